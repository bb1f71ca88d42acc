"""From the operations of a rehearsed step to its time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ...planner.speed import PhaseTime, StepTime, Work, estimate_phase_time, join_phases, make_step_time
from ...planner.step_cost import SELECTIVE_CALLS, estimate_update_work, host_waits
from ...planner.strategy import Dtype, Rates, Strategy
from .cut import Cut
from .trace import TracedStep

PHASES = ("forward", "backward")
DTYPES: dict[int, Dtype] = {2: "bf16", 4: "fp32"}


def time_step(
    traced: TracedStep,
    strategy: Strategy,
    rates: Rates,
    *,
    flops_per_token: float,
    length: int,
    document_tokens: float | None = None,
) -> StepTime:
    """The time of one optimizer step.

    flops_per_token: that the model needs
    document_tokens: of the document that a token is in, on average, where attention goes document by document; None:
                     each row is one
    """
    works: dict[str, list[Work]] = {name: [] for name in PHASES}
    tokens = document_tokens if strategy.attention == "varlen" else None
    for phase, work in list_works(traced):
        works[phase].append(work.divide(tokens) if work.kind == "attention" and tokens is not None else work)
    if strategy.save_attention and not strategy.compile:
        for name in PHASES:
            works[name].append(_make_selection(traced))
    micro_batch_tokens = strategy.micro_batch_size * length
    micro_batch = {name: estimate_phase_time(name, of_phase, rates) for name, of_phase in works.items()}
    update = time_update(traced, strategy, rates)
    if strategy.optimizer_in_backward:  # whose own operations were traced, the norm's among them
        joined = join_phases(
            "backward", (micro_batch["backward"], update["optimizer"]), rates, waits=host_waits(strategy)
        )
        micro_batch, update = micro_batch | {"backward": joined}, {}
    return make_step_time(
        micro_batch,
        update,
        strategy.gradient_accumulation_steps,
        tokens=micro_batch_tokens,
        flops=flops_per_token * micro_batch_tokens,
        estimator="rehearsal",
    )


def _make_selection(traced: TracedStep) -> Work:
    """What eager checkpoints that keep attention's output take of the host, once through the checkpointed layers."""
    checkpointed = sum(bool(getattr(layer, "gradient_checkpointing", False)) for layer in traced.model.layers)
    times, sections = _count_layers(traced.model.cut), [name for _, name in traced.recording.marks]
    calls = 0.0
    for operation in traced.operations:
        phase, _, layer = sections[operation.mark].partition(" ")
        is_seen = operation.work.host in ("operation", "view")
        if is_seen and phase == "forward" and layer and int(layer) < checkpointed:
            calls += SELECTIVE_CALLS * times[int(layer)]
    return Work(kind="none", calls=calls)


def time_update(traced: TracedStep, strategy: Strategy, rates: Rates) -> dict[str, PhaseTime]:
    """Clipping and the optimizer's update of the whole model."""
    trainable = traced.model.trainable
    dtype = DTYPES[max((spec.width for spec in trainable), default=4)]
    tensors = tuple(Counter(spec.elements for spec in trainable).items())
    update = estimate_update_work(tensors, strategy, dtype, groups=len(traced.recording.updates))
    return {name: estimate_phase_time(name, works, rates) for name, works in update.items()}


def list_works(traced: TracedStep) -> Iterator[tuple[str, Work]]:
    """(phase, work) of every operation of the last micro-batch traced, those of a repeated layer as often as it is."""
    recording, times = traced.recording, _count_layers(traced.model.cut)
    sections = [name for _, name in recording.marks]
    start = max(index for index, name in enumerate(sections) if name == "data")
    for operation in traced.operations:
        phase, _, layer = sections[operation.mark].partition(" ")
        if operation.mark < start or phase not in PHASES:
            continue
        work = operation.work
        yield phase, work if not layer or times[int(layer)] == 1 else work.repeat(times[int(layer)])


def _count_layers(cut: Cut) -> list[int]:
    """For each traced layer how many layers of the whole model are like it."""
    return [1 + cut.copies.get(block, 0) for block, size in enumerate(cut.blocks) for _ in range(size)]
