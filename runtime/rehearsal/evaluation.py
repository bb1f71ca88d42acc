"""What a run does without gradients, on fake tensors: the runtime's own evaluation, and the answer to a question."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from ...planner.strategy import Strategy
from ..training.evaluate import sum_losses
from ..training.step import autocast
from .cost import kept_ledger
from .cuda import cuda_semantics, list_temporaries
from .fakes import list_slots
from .kernels import noted_launches
from .model import RehearsalModel
from .sections import marked_sections
from .watch import Recording, StorageWatch

UNTRACEABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model raises on fake tensors when it reads their values, or when its config's sizes do not fit together."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What a run does without gradients before its first step and after its last one.

    evaluates: whether it has rows to evaluate
    answers:   whether it answers a held-out question
    """

    evaluates: bool = False
    answers: bool = False


NO_PASSES = Passes()


Answers = dict[Hashable, Recording | None]
"""Recordings of answers, by what they depend on."""


def record_passes(
    model: RehearsalModel, strategy: Strategy, passes: Passes, answers: Answers, *, sequence_length: int
) -> tuple[Recording | None, Recording | None]:
    """The evaluation of rows and the answer, each of `sequence_length` tokens; None for what the run does not do.

    An architecture that cannot be traced with a cache of keys and values has no answer here.

    answers: those that are known; one serves all micro-batches and loss heads
    """
    evaluation = answer = None
    model.model.eval()
    if passes.evaluates:
        evaluation = _record(model, strategy, lambda: _evaluate(model, strategy, sequence_length))
    if passes.answers:
        alike = strategy.model_copy(update={"micro_batch_size": 1, "loss_head": "full", "checkpointed_layers": 0})
        key = alike, model.sketch, sequence_length
        if key not in answers:
            answers[key] = None
            with contextlib.suppress(*UNTRACEABLE):
                answers[key] = _record(model, strategy, lambda: _answer(model, strategy, sequence_length))
        answer = answers[key]
    model.model.train()
    return evaluation, answer


def _record(model: RehearsalModel, strategy: Strategy, run: Callable[[], None]) -> Recording:
    watch = StorageWatch(temporaries=list_temporaries)
    launches = noted_launches(watch.ledger, strategy)
    with watch, cuda_semantics(), kept_ledger(watch.ledger), launches, marked_sections(model, watch, "evaluate"):
        watch.enter("build", "weights")
        for table, key in list_slots(model.model):
            watch.see(table[key])
        watch.enter("evaluate", "temporary")
        run()
        watch.enter("end", "temporary")
    return watch.recording


def _evaluate(model: RehearsalModel, strategy: Strategy, length: int) -> None:
    """runtime.training.evaluate.evaluate's part on the device, of one batch: at its end autocast has cached all that it
    does, so that any other needs as much."""
    shape = strategy.micro_batch_size, length
    batch = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    sum_losses(model.model, model.base, [batch], strategy, torch.device("cpu"), tokens=length)


def _answer(model: RehearsalModel, strategy: Strategy, length: int) -> None:
    """runtime.training.evaluate.answer's first two tokens, the second with all keys and values cached: those of any
    more are a token longer each."""
    number_layers(model)
    with torch.no_grad(), autocast(strategy, torch.device("cpu")):
        ids = torch.zeros(1, length, dtype=torch.int64)
        out = model.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        following = out.logits[:, -1].float().argmax(-1, keepdim=True)
        cache = out.past_key_values
        del out
        model.model(input_ids=following, past_key_values=cache, use_cache=True, logits_to_keep=1)


def number_layers(model: RehearsalModel) -> None:
    """Give the layers of a cut model the numbers by which they find their places in the cache of keys and values."""
    for index, layer in enumerate(model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]
