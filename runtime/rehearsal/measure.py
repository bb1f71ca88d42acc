"""Rehearses a run: the runtime's own step on fake tensors, replayed through a model of the CUDA caching allocator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ...planner.allocator import SEGMENT_ORDERS, CachingAllocator, SegmentOrder
from ...planner.catalog import find_gpu
from ...planner.clock import find_order_rates
from ...planner.estimate import CUDA_HOST_BYTES, estimate_memory
from ...planner.families import FAMILIES
from ...planner.memory import PHASES, Components, Memory, Phase
from ...planner.shape import ModelShape, make_shape
from ...planner.speed import StepTime
from ...planner.step_cost import estimate_model_flops
from ...planner.strategy import Device, Strategy
from ...planner.timeline import EventLog, make_timeline
from ...recipes.errors import DeviceError, ModelError
from .collector import collector_paused
from .cuda import CudaCard
from .evaluation import NO_PASSES, Passes
from .loading import replay_adapters, replay_float8, replay_loading, replay_measured_loading
from .model import TensorSpec
from .replay import Replay, keep_highest
from .states import replay_clip, replay_optimizer
from .time import time_step
from .trace import TracedStep, Traces, trace_step

MiB = 2**20
STEPS = 3
"""Steps replayed: the first makes the optimizer's states, the second runs with them, the third shows fragmentation."""
MICRO_BATCHES = 2
"""Micro-batches replayed of a step with more: the first makes gradients, all others are alike."""
CONTEXT_BYTES = 751 * MiB
"""Device memory beside the allocator's on the measured stack: context, loaded kernels, cuBLAS's own (95 rows)."""
FLASH_KERNEL_BYTES = 16 * MiB
"""The module of FlashAttention's kernels, loaded at its first use (measured: rows with eager attention lack it)."""
DRIVER_BYTES = 480 * MiB
"""Of an H100's memory as NVML names it, what the driver keeps from every process: 81,559 MiB are 81,079 to CUDA."""
DEVICE_MARGIN = 0.0275
"""Added to what is required, for what the rehearsal does not know (for the 95 measured rows 2.05 % suffices)."""
SPREADS = 2
"""How often the range of the replays in several orders is added to the highest."""


@collector_paused()
def rehearse(
    config: Mapping[str, Any],
    strategy: Strategy,
    device: Device,
    *,
    sequence_length: int,
    merge: bool,
    passes: Passes = NO_PASSES,
    as_measured: bool = False,
) -> Memory:
    """The memory of a run of `strategy` on rows of `sequence_length` tokens.

    passes:      what it does without gradients
    as_measured: whether weights are loaded as by the process that the measured rows come from

    On a CPU, whose memory no caching allocator holds, these are the closed forms. A ModelError where transformers
    cannot build the model.
    """
    quick = _estimate_quickly(config, strategy, device, sequence_length, merge=merge)
    if device.kind == "cpu":
        if quick is None:
            raise ModelError(f"config.json: model_type: {config.get('model_type')}: there is no closed form for a CPU")
        return quick
    traced = trace_step(config, strategy, find_card(device), sequence_length=sequence_length, passes=passes)
    return _measure(traced, strategy, device, quick, as_measured=as_measured, merge=merge)


def _measure(
    traced: TracedStep,
    strategy: Strategy,
    device: Device,
    quick: Memory | None,
    *,
    merge: bool,
    as_measured: bool = False,
) -> Memory:
    """The run as the measured driver gives out addresses; of one that fits, what other orders of them require too."""
    run = partial(_replay_within, traced, strategy, count_limit(strategy, device), as_measured=as_measured)
    replay = run()
    memory = _summarise(replay, traced, strategy, device, quick, merge=merge)
    if strategy.expandable_segments or memory.required_bytes > memory.budget_bytes:
        return memory
    others = [run(order=order, watches=False) for order in SEGMENT_ORDERS[1:]]
    unsure_bytes = count_unsure([one.allocator.peak_reserved_bytes for one in (replay, *others)])
    return memory.model_copy(update={"required_bytes": _require(memory.peak_device_bytes + unsure_bytes)})


def _replay_within(
    traced: TracedStep,
    strategy: Strategy,
    limit_bytes: int,
    *,
    order: SegmentOrder = SEGMENT_ORDERS[0],
    as_measured: bool = False,
    watches: bool = True,
) -> Replay:
    """replay_run, once for all cards whose memory it never meets the end of."""
    key = strategy, order, as_measured
    known = traced.replays.get(key)
    if known is not None and known.allocator.peak_reserved_bytes <= limit_bytes:
        return known
    replay = replay_run(
        traced, strategy, limit_bytes=limit_bytes, order=order, as_measured=as_measured, watches=watches
    )
    if not replay.allocator.retries:
        traced.replays[key] = replay
    return replay


def count_limit(strategy: Strategy, device: Device) -> int:
    """What of the card the allocator can have."""
    return device.memory_bytes - DRIVER_BYTES - context_bytes(strategy, device)


def _require(device_bytes: int) -> int:
    return int(device_bytes * (1 + DEVICE_MARGIN))


def count_unsure(reserved_bytes: Sequence[int], *, spreads: int = SPREADS) -> int:
    """How far what is reserved may exceed the first of several replays that differ only in what nothing decides.

    The highest of them, and their range `spreads` times on top: the true one need not lie between a few samples. 0 for
    a run that is not sensitive, as most are.
    """
    highest = max(reserved_bytes)
    return highest - reserved_bytes[0] + spreads * (highest - min(reserved_bytes))


def _estimate_quickly(
    config: Mapping[str, Any], strategy: Strategy, device: Device, sequence_length: int, *, merge: bool
) -> Memory | None:
    """The closed forms, which the phases outside of the step come from; None for a family that they do not know."""
    text = config.get("text_config")
    families = {config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None}
    if not families & FAMILIES.keys():
        return None
    return estimate_memory(make_shape(config), strategy, device, sequence_length=sequence_length, merge=merge)


class Rehearsal:
    """Memory and step time of strategies on one device.

    traces: of the model on rows of one length; shared by the devices that it is planned for
    shape:  of the model, for the operations that it needs
    document_tokens: as in DataFacts
    """

    def __init__(
        self,
        traces: Traces,
        shape: ModelShape,
        device: Device,
        *,
        merge: bool,
        document_tokens: float | None = None,
    ) -> None:
        self._traces, self._shape, self._device, self._merge = traces, shape, device, merge
        self._document_tokens = document_tokens
        self._known: dict[Strategy, tuple[Memory, StepTime]] = {}

    def measure(self, strategy: Strategy) -> Memory:
        """The memory of a run of `strategy`."""
        return self._rehearse(strategy)[0]

    def time(self, strategy: Strategy) -> StepTime:
        """The time of one of its steps."""
        return self._rehearse(strategy)[1]

    @collector_paused()
    def _rehearse(self, strategy: Strategy) -> tuple[Memory, StepTime]:
        if strategy not in self._known:
            device, length = self._device, self._traces.sequence_length
            quick = _estimate_quickly(self._traces.config, strategy, device, length, merge=self._merge)
            traced = self._traces.find(strategy, find_card(device))
            time = time_step(
                traced,
                strategy,
                find_order_rates(device),
                flops_per_token=estimate_model_flops(self._shape, strategy, self._document_tokens or length),
                length=length,
                document_tokens=self._document_tokens,
            )
            self._known[strategy] = _measure(traced, strategy, device, quick, merge=self._merge), time
        return self._known[strategy]


def find_card(device: Device) -> CudaCard:
    """What the catalog knows of the card; one that it does not know, or a later one, is taken for the measured one."""
    try:
        major = int(find_gpu(device.name).compute_capability.split(".")[0])
    except DeviceError:
        return CudaCard()
    return CudaCard(major=min(major, CudaCard.major))


def context_bytes(strategy: Strategy, device: Device) -> int:
    """Device memory beside the allocator's and managed memory: as calibrated, else the measured stack's."""
    if device.beside is not None:
        return device.beside.bytes
    return CONTEXT_BYTES + (0 if strategy.attention == "eager" else FLASH_KERNEL_BYTES)


def replay_run(
    traced: TracedStep,
    strategy: Strategy,
    *,
    limit_bytes: int | None,
    order: SegmentOrder = SEGMENT_ORDERS[0],
    as_measured: bool = False,
    watches: bool = True,
) -> Replay:
    """A run through the allocator: loading, what it evaluates and answers before and after STEPS steps, saving.

    watches: as in Replay
    """
    allocator = CachingAllocator(limit_bytes=limit_bytes, expandable=strategy.expandable_segments, order=order)
    replay = Replay(allocator, watches=watches)
    load = replay_measured_loading if as_measured else replay_loading
    load(replay, traced.model, strategy)
    replay_adapters(replay, traced.model)
    if strategy.float8:
        replay_float8(replay, traced.model)
    _replay_passes(replay, traced)
    _replay_steps(replay, traced, strategy)
    _replay_passes(replay, traced)
    replay.start_log()
    replay.enter("save")
    return replay


def _replay_passes(replay: Replay, traced: TracedStep) -> None:
    """What the run does without gradients."""
    for one in (traced.evaluation, traced.answer):
        if one is not None:
            replay.start_log()
            replay.enter("evaluate")
            for segment in one.segments:
                replay.play(segment.events, one.recording)
            replay.end_play(one.recording)


def _replay_steps(replay: Replay, traced: TracedStep, strategy: Strategy) -> None:
    """STEPS optimizer steps; fewer, where they repeat."""
    allocator, trainable = replay.allocator, traced.model.trainable
    for step in range(STEPS):
        segments_before = allocator.segments
        logs: list[EventLog] = []
        for micro_batch in range(min(MICRO_BATCHES, strategy.gradient_accumulation_steps)):
            log = replay.start_log()
            update = _make_update(replay, strategy, first=step == 0)
            for segment in traced.next if micro_batch else traced.first:
                if segment.name in ("forward", "backward"):
                    replay.enter(segment.name)
                replay.play(segment.events, traced.recording, update)
            logs = keep_highest(logs, log)
        if not strategy.optimizer_in_backward:
            logs.append(replay.start_log())
            replay.enter("clip")
            replay_clip(replay, trainable)
            replay.enter("optimizer")
            replay_optimizer(replay, trainable, strategy, first=step == 0)
        replay.end_play(traced.recording)
        replay.keep_step(logs)
        if step and allocator.segments == segments_before:
            break  # the step began and ended with the same blocks, so every other one is like it


def _make_update(replay: Replay, strategy: Strategy, *, first: bool) -> Callable[[Sequence[TensorSpec]], None]:
    """Replays the updates of one backward, one after the other."""
    done = 0

    def update(tensors: Sequence[TensorSpec]) -> None:
        nonlocal done
        replay_optimizer(replay, tensors, strategy, first=first, done=done)
        done += len(tensors)

    return update


def _summarise(
    replay: Replay, traced: TracedStep, strategy: Strategy, device: Device, quick: Memory | None, *, merge: bool
) -> Memory:
    """The device from the replay; RAM and disk from the closed forms. A merge happens in RAM."""
    peak_phase = replay.highest()
    peak = replay.peaks[peak_phase]
    reserved = replay.allocator.peak_reserved_bytes
    device_bytes = reserved + context_bytes(strategy, device) + replay.managed_bytes
    merges = merge and strategy.method != "full"
    allocated = {name: one.allocated_bytes for name, one in replay.peaks.items()}
    if merges:
        allocated["merge"] = 0
    trained = sum(spec.elements * spec.width for spec in traced.model.trainable)
    merged = 2 * sum(spec.elements for spec in traced.model.weights.values()) if merges else 0
    return Memory(
        peak_allocated_bytes=peak.allocated_bytes,
        peak_reserved_bytes=reserved,
        managed_bytes=replay.managed_bytes,
        peak_device_bytes=device_bytes,
        required_bytes=_require(device_bytes),
        budget_bytes=device.budget_bytes,
        host_bytes=quick.host_bytes if quick else CUDA_HOST_BYTES + max(trained, merged),
        disk_bytes=quick.disk_bytes if quick else trained + merged,
        peak_phase=peak_phase,
        components=Components(**peak.components),
        phases=tuple(Phase(name=name, peak_allocated_bytes=allocated[name]) for name in PHASES if name in allocated),
        estimator="rehearsal",
        timeline=make_timeline(replay.step_logs, micro_batches=strategy.gradient_accumulation_steps),
    )
