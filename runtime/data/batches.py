"""The order of rows, and batches of them: one global batch is one optimizer step.

The order of an epoch is a permutation seeded by the recipe's seed and the epoch alone, so a run can be repeated and
resumed. Within a global batch the rows are sorted by length, longest first, before they are split into micro-batches:
less padding, and the allocator meets the largest micro-batch first. The loss is normalised over the whole global batch,
so the split changes nothing but time. The last global batch of an epoch is kept even where it is smaller.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, islice
from typing import TYPE_CHECKING

from ...planner.widths import padded_width
from .encoding import UNTRAINED
from .streaming import StreamedRows
from .tokens import TokenizedRow, TokenizedRows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..training.step import MicroBatch

STARTS_MULTIPLE = 64
"""The documents of a micro-batch are counted up to a multiple of this; those beyond them are empty."""


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """The rows of one optimizer step.

    step:            number of the step, from 1
    epoch:           number of the pass over the rows, from 0
    micro_batches:   the rows, longest first
    trained_tokens:  tokens with a label, the first of each row excepted, which nothing predicts; 1 or more
    tokens:          tokens without padding
    padded_tokens:   tokens with padding: what is computed
    """

    step: int
    epoch: int
    micro_batches: tuple[MicroBatch, ...]
    trained_tokens: int
    tokens: int
    padded_tokens: int


def count_steps(rows: int, *, global_batch_size: int, epochs: int | None, max_steps: int | None) -> int:
    """max_steps, or epochs * ceil(rows / global_batch_size)."""
    assert (epochs is None) != (max_steps is None), "one of epochs and max_steps is set"
    if max_steps is not None:
        return max_steps
    assert epochs is not None
    return epochs * -(-rows // global_batch_size)


def epoch_order(rows: int, *, epoch: int, seed: int) -> list[int]:
    """A permutation of range(rows) that depends on rows, epoch and seed alone."""
    order = list(range(rows))
    random.Random(f"epoch {epoch} seed {seed}").shuffle(order)
    return order


def iterate_batches(
    tokenized: TokenizedRows | StreamedRows,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    seed: int,
    epochs: int | None = None,
    max_steps: int | None = None,
    done_steps: int = 0,
) -> Iterator[GlobalBatch]:
    """The global batches of a run, made as they are asked for; with max_steps epochs go on as needed.

    done_steps: how many of them were trained on before: the first one is the next, the same as without an interruption
    """
    if isinstance(tokenized, StreamedRows):
        chosen = _stream_rows(tokenized, global_batch_size, seed=seed, done_steps=done_steps)
        steps = count_steps(0, global_batch_size=global_batch_size, epochs=epochs, max_steps=max_steps)
    else:
        chosen = _draw_rows(tokenized, global_batch_size, seed=seed, done_steps=done_steps)
        rows = tokenized.epoch_rows
        steps = count_steps(rows, global_batch_size=global_batch_size, epochs=epochs, max_steps=max_steps)
    for step, (epoch, rows_of_step) in zip(range(done_steps, steps), chosen, strict=False):
        yield _make_global_batch(tokenized, rows_of_step, micro_batch_size, step=step + 1, epoch=epoch)


def _draw_rows(
    tokenized: TokenizedRows, global_batch_size: int, *, seed: int, done_steps: int
) -> Iterator[tuple[int, list[TokenizedRow]]]:
    """(epoch, rows) of each step after the first `done_steps`, without end."""
    per_epoch = -(-tokenized.epoch_rows // global_batch_size)
    order: list[int] = []
    for step in count(done_steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or step == done_steps:
            drawn = tokenized.draw_epoch(epoch=epoch, seed=seed)
            order = [drawn[index] for index in epoch_order(len(drawn), epoch=epoch, seed=seed)]
        chosen = order[position * global_batch_size : (position + 1) * global_batch_size]
        yield epoch, [tokenized.rows[index] for index in chosen]


def _stream_rows(
    stream: StreamedRows, global_batch_size: int, *, seed: int, done_steps: int
) -> Iterator[tuple[int, list[TokenizedRow]]]:
    """(pass over the source of the first row, rows) of each step after the first `done_steps`, without end."""
    positions = stream.iterate(start=done_steps * global_batch_size, seed=seed)
    while chosen := list(islice(positions, global_batch_size)):
        yield chosen[0][0], [row for _, row in chosen]


class BatchesAhead:
    """Global batches on a device, of which the next one can be made while a step runs.

    What goes wrong with a batch that is made early is raised when it is asked for.
    """

    def __init__(self, batches: Iterator[GlobalBatch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._next: GlobalBatch | None = None
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[GlobalBatch]:
        return self

    def __next__(self) -> GlobalBatch:
        self.prepare()
        if self._error is not None:
            raise self._error
        assert self._next is not None, "prepare() makes a batch or an error"
        batch, self._next = self._next, None
        return batch

    def prepare(self) -> None:
        """Make the next batch and begin to copy it to the device; nothing where that is done."""
        if self._next is not None or self._error is not None:
            return
        try:
            batch = next(self._batches)
            moved = tuple(one.to(self._device) for one in batch.micro_batches)
            self._next = replace(batch, micro_batches=moved)
        except Exception as error:  # StopIteration among them
            self._error = error


def iterate_eval_batches(tokenized: TokenizedRows, *, micro_batch_size: int) -> Iterator[MicroBatch]:
    """Micro-batches of all rows, longest first; their losses are normalised by `tokenized.trained_tokens`."""
    for rows in _split_by_length(tokenized.rows, micro_batch_size):
        yield make_micro_batch(rows, pad_token_id=tokenized.pad_token_id, max_length=tokenized.max_length)


def make_micro_batch(rows: Sequence[TokenizedRow], *, pad_token_id: int, max_length: int) -> MicroBatch:
    """Rows as tensors on the CPU, [micro_batch, sequence], padded at the right.

    sequence: the longest row rounded up to WIDTH_MULTIPLE, at most max_length. Padding is known by length, never by its
    id: a pad token may be the end-of-turn token as well, which is trained.
    """
    import torch

    from ..training.step import MicroBatch

    width = padded_width(max(len(row) for row in rows), max_length=max_length)
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(rows), width), UNTRAINED, dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row.input_ids, dtype=torch.int64)
        labels[index, : len(row)] = torch.tensor(row.labels, dtype=torch.int64)
    if not any(row.documents for row in rows):
        return MicroBatch(input_ids=input_ids, labels=labels)
    lengths = [[*(row.documents or (len(row),)), width - len(row)] for row in rows]
    return MicroBatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths]),
        document_starts=_list_starts([length for row in lengths for length in row]),
    )


def _list_starts(lengths: Sequence[int]) -> Tensor:
    """Where documents of these lengths begin one after the other, int32, with the end repeated to a multiple of
    STARTS_MULTIPLE, so that few sizes occur: compiled layers are made anew for each."""
    import torch

    starts = [0, *accumulate(length for length in lengths if length)]
    spare = count_starts(len(starts) - 1) - len(starts)
    return torch.tensor(starts + [starts[-1]] * spare, dtype=torch.int32)


def count_starts(documents: int) -> int:
    """Entries of a micro-batch's document_starts: ceil((documents + 1) / STARTS_MULTIPLE) * STARTS_MULTIPLE."""
    return -(-(documents + 1) // STARTS_MULTIPLE) * STARTS_MULTIPLE


def _split_by_length(rows: Sequence[TokenizedRow], micro_batch_size: int) -> Iterator[Sequence[TokenizedRow]]:
    by_length = sorted(rows, key=len, reverse=True)
    return (by_length[start : start + micro_batch_size] for start in range(0, len(by_length), micro_batch_size))


def _make_global_batch(
    tokenized: TokenizedRows | StreamedRows,
    rows: Sequence[TokenizedRow],
    micro_batch_size: int,
    *,
    step: int,
    epoch: int,
) -> GlobalBatch:
    micro_batches = tuple(
        make_micro_batch(part, pad_token_id=tokenized.pad_token_id, max_length=tokenized.max_length)
        for part in _split_by_length(rows, micro_batch_size)
    )
    return GlobalBatch(
        step=step,
        epoch=epoch,
        micro_batches=micro_batches,
        trained_tokens=sum(row.trained_tokens for row in rows),
        tokens=sum(len(row) for row in rows),
        padded_tokens=sum(batch.input_ids.numel() for batch in micro_batches),
    )
