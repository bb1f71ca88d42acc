"""The runtime's own step, timed on this machine's CPU: a few of the model's layers, with random weights."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ...planner.strategy import Strategy, Value
from ..data.batches import count_starts
from ..machine.host import keep_heap_tight, measure_waiting_seconds, trim_heap
from ..training.evaluate import sum_losses
from ..training.in_backward import UpdatesInBackward, narrowed
from ..training.optimizers import make_optimizer
from ..training.step import MicroBatch, autocast, make_scaler, training_step
from .collector import collector_paused
from .cut import plan_shortest_cut
from .evaluation import UNTRACEABLE, number_layers
from .model import RehearsalModel, build_rehearsal_model
from .reals import make_reals
from .sections import marked_sections

TIMED_SECONDS = 1.5
"""For so long steps are repeated; the fastest of each section counts, so that other work on the machine does not."""
MOST = 6
"""Repetitions after the first, which fills caches."""
PROMPT_TOKENS = 32
"""Before the timed token of an answer."""
CPU = torch.device("cpu")


class StepSeconds(Value):
    """How long the parts of a step take, on the whole model.

    forward, backward: of the first micro-batch
    next_forward, next_backward: of any later one, which finds gradients to add to; as the first where there is none
    clip, optimizer:   of the update; 0 where it is a part of backward
    evaluation:        of a micro-batch without gradients
    token:             of a token of an answer, None where the model makes none
    waiting:           share of the time that a thread waited for a processor which other processes had, 0 or more
    """

    forward: float = Field(ge=0)
    backward: float = Field(ge=0)
    next_forward: float = Field(ge=0)
    next_backward: float = Field(ge=0)
    clip: float = Field(ge=0)
    optimizer: float = Field(ge=0)
    evaluation: float = Field(ge=0)
    token: float | None = Field(ge=0)
    waiting: float = Field(ge=0)


class _Stopwatch:
    """Notes when sections begin; see sections.SectionWatch."""

    def __init__(self) -> None:
        self.backward = False
        self._marks: list[tuple[str, float]] = []
        self._batch = ""

    def enter(self, section: str, _: str = "") -> None:
        """A section of the current micro-batch begins."""
        self._marks.append((self._batch + section, time.perf_counter()))

    def enter_phase(self, phase: str) -> None:
        """A phase of the step begins; with a forward a micro-batch does."""
        if phase == "forward":
            self._batch = "next " if self._marks else ""
        elif phase != "backward":
            self._batch = ""
        self.backward = phase == "backward"
        self.enter(phase)

    def list_seconds(self) -> dict[str, float]:
        """Of each section, all its parts together; the last one ends now."""
        seconds: dict[str, float] = defaultdict(float)
        ends = [*(when for _, when in self._marks[1:]), time.perf_counter()]
        for (section, begin), end in zip(self._marks, ends, strict=True):
            seconds[section] += end - begin
        return seconds


def time_step_on_cpu(
    config: Mapping[str, Any], strategy: Strategy, *, rows: int, length: int, documents_per_row: int
) -> StepSeconds:
    """A step with micro-batches of [rows, length] tokens; nothing of it stays in memory.

    documents_per_row: of packed rows
    """
    keep_heap_tight()
    try:
        with collector_paused():
            return _time_step(config, strategy, rows, length, documents_per_row)
    finally:
        gc.collect()
        trim_heap()


def _time_step(
    config: Mapping[str, Any], strategy: Strategy, rows: int, length: int, documents_per_row: int
) -> StepSeconds:
    model = build_rehearsal_model(dict(config), strategy, plan=plan_shortest_cut)
    make_reals(model.model, strategy)
    ids = torch.randint(model.base.get_input_embeddings().weight.shape[0], (rows, length))
    begin, waited = time.perf_counter(), measure_waiting_seconds()
    trained = _time_training(model, strategy, _make_batch(ids, strategy, documents_per_row))
    model.model.eval()
    evaluated = _time_sections(model, partial(_evaluate, model, strategy, ids), "evaluate")
    token = _time_token(model, strategy, ids)
    waiting = (measure_waiting_seconds() - waited) / (time.perf_counter() - begin)
    whole = partial(_extend, model)
    forward, backward = whole(trained, "forward"), whole(trained, "backward")
    share = sum(spec.elements for spec in model.trainable) / sum(map(Tensor.numel, _list_trainable(model)))
    accumulates = strategy.gradient_accumulation_steps > 1
    return StepSeconds(
        forward=forward,
        backward=backward,
        next_forward=whole(trained, "next forward") if accumulates else forward,
        next_backward=whole(trained, "next backward") if accumulates else backward,
        clip=share * trained.get("clip", 0.0),
        optimizer=whole(trained, "optimizer"),
        evaluation=whole(evaluated, "evaluate"),
        token=None if token is None else whole(token, "answer"),
        waiting=max(waiting, 0.0),
    )


def _list_trainable(model: RehearsalModel) -> list[Any]:
    return [one for one in model.model.parameters() if one.requires_grad]


def _make_batch(ids: Tensor, strategy: Strategy, documents_per_row: int) -> MicroBatch:
    """Random tokens, all of them trained; packed ones in documents of one length."""
    if not strategy.packing:
        return MicroBatch(input_ids=ids, labels=ids)
    rows, length = ids.shape
    bounds = torch.linspace(0, length, documents_per_row + 1).long()
    positions = torch.cat([torch.arange(int(one)) for one in bounds.diff()])
    starts = torch.cat([bounds[:-1] + row * length for row in range(rows)])
    padding = torch.full((count_starts(starts.numel()) - starts.numel(),), rows * length)
    return MicroBatch(
        input_ids=ids,
        labels=ids,
        position_ids=positions.expand(rows, length),
        document_starts=torch.cat([starts, padding]).to(torch.int32),
    )


def _time_training(model: RehearsalModel, strategy: Strategy, batch: MicroBatch) -> dict[str, float]:
    """The sections of whole steps: of two micro-batches where gradients accumulate, else of one."""
    trainable = _list_trainable(model)
    optimizer = make_optimizer(
        strategy.optimizer,
        model.model,
        learning_rate=strategy.learning_rate,
        weight_decay=0.0,
        rounding=strategy.rounding,
        compiled=strategy.compile,
    )
    updates = UpdatesInBackward(optimizer, model.model, model.layers) if strategy.optimizer_in_backward else None
    batches = [batch] * min(2, strategy.gradient_accumulation_steps)

    def step(watch: _Stopwatch) -> None:
        training_step(
            model.model,
            model.base,
            batches,
            tokens=len(batches) * batch.input_ids.numel(),
            strategy=strategy,
            optimizer=optimizer,
            scaler=make_scaler(strategy, CPU),
            clip=lambda: torch.nn.utils.clip_grad_norm_(trainable, 1.0),
            updates=updates,
            enter_phase=watch.enter_phase,
        )

    seconds = _time_sections(model, step, "forward")
    return seconds if updates else seconds | _time_updates(model, optimizer)


def _time_updates(model: RehearsalModel, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Of each layer, and of what lies outside of them: an element of a large embedding takes longer than a layer's."""
    groups = [[one for one in layer.parameters() if one.requires_grad] for layer in model.layers]
    in_layers = {one for group in groups for one in group}
    groups.append([one for one in _list_trainable(model) if one not in in_layers])
    names = [*(f"optimizer {layer}" for layer in range(len(model.layers))), "optimizer"]

    def update(watch: _Stopwatch) -> None:
        for name, group in zip(names, groups, strict=True):
            for parameter in group:
                parameter.grad = torch.zeros_like(parameter)
            if group:
                with narrowed(optimizer, group):
                    watch.enter(name)
                    optimizer.step()
                watch.enter("gradients")
            for parameter in group:
                parameter.grad = None

    return _time_sections(model, update, "forward")


def _evaluate(model: RehearsalModel, strategy: Strategy, ids: Tensor, watch: _Stopwatch) -> None:
    watch.enter("evaluate")
    sum_losses(model.model, model.base, [(ids, ids)], strategy, CPU, tokens=ids.numel())


def _time_token(model: RehearsalModel, strategy: Strategy, ids: Tensor) -> dict[str, float] | None:
    """Of one token, after a few; None for an architecture that keeps no keys and values."""
    number_layers(model)
    with contextlib.suppress(*UNTRACEABLE), torch.no_grad(), autocast(strategy, CPU):
        answer = partial(model.model, use_cache=True, logits_to_keep=1)
        cache = answer(input_ids=ids[:1, :PROMPT_TOKENS]).past_key_values

        def step(watch: _Stopwatch) -> None:
            watch.enter("answer")
            answer(input_ids=ids[:1, :1], past_key_values=cache)

        return _time_sections(model, step, "answer")
    return None


def _time_sections(model: RehearsalModel, step: Callable[[_Stopwatch], None], forward: str) -> dict[str, float]:
    """The fastest of each section among some repetitions."""
    fastest: dict[str, float] = {}
    for seconds in _repeat(model, step, forward):
        fastest = {name: min(one, fastest.get(name, one)) for name, one in seconds.items()}
    return fastest


def _repeat(model: RehearsalModel, step: Callable[[_Stopwatch], None], forward: str) -> Iterator[dict[str, float]]:
    """Sections of repetitions until TIMED_SECONDS are over; the first, which fills caches, counts where it alone takes
    as long."""
    begin = time.perf_counter()
    for number in range(1 + MOST):
        watch = _Stopwatch()
        with marked_sections(model, watch, forward):
            step(watch)
        seconds, is_over = watch.list_seconds(), time.perf_counter() - begin > TIMED_SECONDS
        if number or is_over:
            yield seconds
        if is_over:
            break


def _extend(model: RehearsalModel, seconds: Mapping[str, float], phase: str) -> float:
    """A phase of the whole model: what lies outside of the layers once, each layer as often as it stands for one."""
    times = Counter(model.cut.sources)
    return seconds.get(phase, 0.0) + sum(count * seconds.get(f"{phase} {layer}", 0.0) for layer, count in times.items())
