"""Traces the runtime's own step on fake tensors."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ...planner.allocator import SegmentOrder
from ...planner.strategy import Strategy
from ...recipes.errors import TraceError
from ..data.batches import STARTS_MULTIPLE, count_starts
from ..model.attention import attention_kernels
from ..model.parts import find_decoder
from ..training.in_backward import UpdatesInBackward
from ..training.losses import compute_loss
from ..training.offload import OffloadHooks, offload_decoder
from ..training.step import autocast, recomputation, uncast_adapter_inputs
from .attention import known_documents
from .compile import compiled_layers
from .cost import Operation, current_ledger, kept_ledger
from .cuda import CudaCard, cuda_semantics, list_temporaries
from .cut import no_cut, plan_cut
from .evaluation import NO_PASSES, UNTRACEABLE, Answers, Passes, record_passes
from .fakes import make_fakes
from .host_work import counted_host_work
from .kernels import noted_launches
from .layers import NotPeriodic, Segment, extend, split_segments
from .model import RehearsalModel, build_rehearsal_model
from .replay import Replay
from .sections import marked_sections
from .updates import record_updates
from .watch import Recording, StorageWatch

SHORT_DOCUMENT_TOKENS = 64
"""A packed row of a dataset that is not read is planned for documents of this length. A choice: half of the rows of
instruction sets such as Alpaca's are longer than 80 tokens."""


@dataclass(frozen=True, kw_only=True)
class TracedStep:
    """The events of an optimizer step's micro-batches on the whole model.

    model:     what was traced
    recording: sizes and components of all storages
    operations: of the traced layers, with what they cost
    first:     segments of the first micro-batch
    next:      segments of any later one, which finds gradients to add to; empty without accumulation
    replays:   those of it that met no limit of memory, by strategy and order of segments
    evaluation, answer: what the run does without gradients; None for what was not asked for or cannot be traced
    """

    model: RehearsalModel
    recording: Recording
    operations: Sequence[Operation]
    first: list[Segment]
    next: list[Segment]
    replays: dict[tuple[Strategy, SegmentOrder, bool], Replay] = field(default_factory=dict, compare=False)
    evaluation: TracedPass | None = None
    answer: TracedPass | None = None

    def on(self, card: CudaCard) -> TracedStep:
        """The same step on this card."""
        return replace(
            self,
            recording=self.recording.with_workspace(card.workspace_bytes),
            replays={},
            evaluation=None if self.evaluation is None else self.evaluation.on(card),
            answer=None if self.answer is None else self.answer.on(card),
        )


@dataclass(frozen=True, kw_only=True)
class TracedPass:
    """Forwards without gradients on the whole model: their segments, and the storages in them."""

    recording: Recording
    segments: list[Segment]

    def on(self, card: CudaCard) -> TracedPass:
        """The same on this card."""
        return replace(self, recording=self.recording.with_workspace(card.workspace_bytes))


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """The step on the cut model, and what the run does without gradients, as they were recorded.

    micro_batches: of the step
    """

    model: RehearsalModel
    recording: Recording
    operations: Sequence[Operation]
    micro_batches: int
    evaluation: Recording | None = None
    answer: Recording | None = None

    def extend(self) -> TracedStep:
        """The step on the whole model; NotPeriodic where its layers do not repeat."""
        recording, segments = self._extend(self.recording)
        starts = [index for index, segment in enumerate(segments) if segment.name == "data"]
        assert len(starts) == self.micro_batches, "each micro-batch begins with its data"
        first = segments[: starts[1]] if self.micro_batches > 1 else segments
        return TracedStep(
            model=self.model,
            recording=recording,
            operations=self.operations,
            first=first,
            next=segments[starts[1] :] if self.micro_batches > 1 else [],
            evaluation=self._extend_pass(self.evaluation),
            answer=self._extend_pass(self.answer),
        )

    def _extend_pass(self, recorded: Recording | None) -> TracedPass | None:
        if recorded is None:
            return None
        recording, segments = self._extend(recorded)
        return TracedPass(recording=recording, segments=segments)

    def _extend(self, recorded: Recording) -> tuple[Recording, list[Segment]]:
        """A recording for the whole model, and its segments after the model was built."""
        recording = recorded.fork()
        segments = extend(recording, split_segments(recording, self.model.cut), self.model.cut)
        return recording, [one for one in segments if one.name != "build"]


class Traces:
    """The traced steps of one model on rows of one length, for all cards and budgets: cards differ in sizes alone.

    One recording serves all strategies that differ only in how often the recorded layers occur, or in what is replayed
    afterwards: the update, and the number of micro-batches.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        sequence_length: int,
        documents_per_row: int | None = None,
        passes: Passes = NO_PASSES,
    ) -> None:
        """documents_per_row: of packed rows, the most, padding as one of them; None where it is not known
        passes: what the run does without gradients
        """
        self.config, self.sequence_length = dict(config), sequence_length
        self._passes, self._answers = passes, Answers()
        self._documents_per_row = documents_per_row or ceil(sequence_length / SHORT_DOCUMENT_TOKENS)
        self._traced: dict[Strategy, TracedStep] = {}
        self._on_cards: dict[tuple[CudaCard, Strategy], TracedStep] = {}
        self._recorded: dict[Strategy, list[RecordedStep]] = defaultdict(list)

    def find(self, strategy: Strategy, card: CudaCard) -> TracedStep:
        """The strategy's step on a card."""
        step = strategy.model_copy(
            update={
                "optimizer": "adamw",
                "rounding": "nearest",
                "learning_rate": 0.0,
                "expandable_segments": False,
                "clips_gradients": True,
                "gradient_accumulation_steps": min(2, strategy.gradient_accumulation_steps),
            }
        )
        if (card, step) not in self._on_cards:
            if step not in self._traced:
                self._traced[step] = self._trace(step)
            self._on_cards[card, step] = self._traced[step].on(card)
        return self._on_cards[card, step]

    def _trace(self, step: Strategy) -> TracedStep:
        documents = count_starts(step.micro_batch_size * self._documents_per_row) - 1
        with (
            known_documents(documents if step.attention == "varlen" else None),
            attention_kernels(step.attention),
        ):
            return self._extend(step)

    def _extend(self, step: Strategy) -> TracedStep:
        recorded = self._recorded[step.model_copy(update={"checkpointed_layers": 0})]
        for one in recorded:
            model = one.model.find_like(step)
            if model is not None:
                return replace(one, model=model).extend()
        recorded.append(self._record(step))
        try:
            return recorded[-1].extend()
        except NotPeriodic:
            return self._record(step, cut=False).extend()

    def _record(self, step: Strategy, *, cut: bool = True) -> RecordedStep:
        length, passes = self.sequence_length, self._passes
        return record_step(self.config, step, sequence_length=length, cut=cut, passes=passes, answers=self._answers)


def trace_step(
    config: Mapping[str, Any], strategy: Strategy, card: CudaCard, *, sequence_length: int, passes: Passes = NO_PASSES
) -> TracedStep:
    """Trace a step: few layers, and the middle ones' events repeated."""
    return Traces(config, sequence_length=sequence_length, passes=passes).find(strategy, card)


def record_step(
    config: dict[str, Any],
    strategy: Strategy,
    *,
    sequence_length: int,
    cut: bool = True,
    passes: Passes = NO_PASSES,
    answers: Answers | None = None,
) -> RecordedStep:
    """Run a step on fakes, and the passes without gradients.

    cut:     on few layers
    answers: as in record_passes
    """
    answers = {} if answers is None else answers
    with _trace_errors(config["model_type"]):
        model = build_rehearsal_model(config, strategy, plan=plan_cut if cut else no_cut)
    with _trace_errors(type(model.base).__name__), FakeTensorMode(allow_non_fake_inputs=True):
        watch, micro_batches = _record(model, strategy, sequence_length)
        evaluation, answer = record_passes(model, strategy, passes, answers, sequence_length=sequence_length)
    return RecordedStep(
        model=model,
        recording=watch.recording,
        operations=watch.ledger.operations,
        micro_batches=micro_batches,
        evaluation=evaluation,
        answer=answer,
    )


@contextlib.contextmanager
def _trace_errors(name: str) -> Iterator[None]:
    try:
        yield
    except UNTRACEABLE as error:
        raise TraceError(f"config.json: {name} cannot be rehearsed: {type(error).__name__}: {error}") from error


def _record(model: RehearsalModel, strategy: Strategy, sequence_length: int) -> tuple[StorageWatch, int]:
    """One micro-batch, or two where gradients accumulate."""
    watch = StorageWatch(temporaries=list_temporaries)
    micro_batches = min(2, strategy.gradient_accumulation_steps)
    with (
        watch,
        cuda_semantics(),
        kept_ledger(watch.ledger),
        counted_host_work(watch),
        marked_sections(model, watch),
    ):
        watch.enter("build", "weights")
        make_fakes(model.model, strategy)
        compiled = (
            compiled_layers(model.layers, model.traced_kinds, watch) if strategy.compile else contextlib.nullcontext()
        )
        updates = record_updates(model, watch) if strategy.optimizer_in_backward else None
        with compiled, noted_launches(watch.ledger, strategy):
            for _ in range(micro_batches):
                watch.enter("data", "temporary")
                ids = torch.empty(strategy.micro_batch_size, sequence_length, dtype=torch.int64)
                _run_micro_batch(model, strategy, watch, ids, updates)
    watch.settle()
    for parameter in model.model.parameters():
        if parameter.grad is not None:
            watch.label(parameter.grad, "gradients")
    return watch, micro_batches


def _run_micro_batch(
    model: RehearsalModel, strategy: Strategy, watch: StorageWatch, ids: Tensor, updates: UpdatesInBackward | None
) -> None:
    """runtime.step.training_step's part for one micro-batch."""
    positions = torch.empty_like(ids) if strategy.packing else None
    starts = torch.empty(STARTS_MULTIPLE, dtype=torch.int32) if strategy.attention == "varlen" else None
    watch.enter("forward", "activations")
    with autocast(strategy, ids.device), uncast_adapter_inputs(model.model), _offload(model, strategy):
        loss = compute_loss(
            model.model,
            model.base,
            ids,
            ids,
            loss_head=strategy.loss_head,
            tokens=ids.numel(),
            position_ids=positions,
            document_starts=starts,
            compiled=strategy.compile,
        )
    watch.enter("backward", "loss_head")
    watch.backward = True
    with recomputation(model.model, strategy):
        run_backward(loss)
    if updates is not None:
        updates.finish()
    watch.backward = False
    del loss
    watch.enter("end", "temporary")


class _VanishingCopies(OffloadHooks):
    """What is offloaded leaves the device; on fakes host and device are one, so that nothing is kept of it."""

    def store(self, flat: Tensor) -> tuple[Tensor, ...]:
        _note_transfer(flat)
        return ()

    def bring(self, flat: Tensor, blocks: tuple[Tensor, ...]) -> None:
        _note_transfer(flat)


def _note_transfer(flat: Tensor) -> None:
    ledger = current_ledger()
    if ledger is not None:
        ledger.note_transfer(flat.nbytes)


def _offload(model: RehearsalModel, strategy: Strategy) -> contextlib.AbstractContextManager[None]:
    if not strategy.activation_offload:
        return contextlib.nullcontext()
    return offload_decoder(find_decoder(model.base), _VanishingCopies(model.base, torch.device("cpu")))


def run_backward(loss: Tensor) -> None:
    """loss.backward(), through the engine itself: the public functions would suspend torch function modes inside."""
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
