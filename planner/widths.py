"""To how many tokens micro-batches are padded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from .strategy import DataFacts, Strategy

WIDTH_MULTIPLE = 8
"""Micro-batches are padded to a multiple of this many tokens: fewer distinct shapes, and aligned matrices."""


def padded_width(longest_row_tokens: int, *, max_length: int) -> int:
    """min(ceil(longest / WIDTH_MULTIPLE) * WIDTH_MULTIPLE, max_length)."""
    return min(-(-longest_row_tokens // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, max_length)


def estimate_distinct_widths(data: DataFacts, strategy: Strategy, *, steps: int | None) -> float:
    """How many widths of micro-batches a run is expected to meet: sum(1 - (1 - share)^micro-batches) over the widths of
    its rows. Of rows whose lengths are not known, half of all widths up to the longest are taken to be as likely as
    each other, and of packed ones the longest alone.

    steps: of the run; None where they are not known, then all widths are met
    """
    drawn = None if steps is None else steps * strategy.gradient_accumulation_steps
    if data.row_tokens is None:
        count = 1 if strategy.packing else ceil(data.longest_row_tokens / WIDTH_MULTIPLE / 2)
        shares = {1 / count: count}
    else:
        widths = Counter(padded_width(tokens, max_length=data.longest_row_tokens) for tokens in data.row_tokens)
        shares = Counter(count / widths.total() for count in widths.values())
    return sum(count * (1.0 if drawn is None else 1 - (1 - share) ** drawn) for share, count in shares.items())


@dataclass(frozen=True, kw_only=True)
class EvaluatedWidths:
    """How many distinct widths evaluations meet.

    alone:   that no training step meets
    trained: that training rows have, too
    """

    alone: float
    trained: float


NONE_EVALUATED = EvaluatedWidths(alone=0, trained=0)


def count_evaluated_widths(data: DataFacts, strategy: Strategy) -> EvaluatedWidths:
    """Of micro-batches of held-out rows, longest first, of a question and of each token of its answer. None where the
    lengths of the training rows are not known, whose widths are many."""
    if data.row_tokens is None:
        return NONE_EVALUATED
    trained = {padded_width(tokens, max_length=data.longest_row_tokens) for tokens in data.row_tokens}
    evaluated = set(_iterate_evaluated_widths(data, strategy))
    alone = len(evaluated - trained) + (2 if data.has_question else 0)
    return EvaluatedWidths(alone=alone, trained=len(evaluated & trained))


def _iterate_evaluated_widths(data: DataFacts, strategy: Strategy) -> Iterator[int]:
    for row_tokens in (data.eval_row_tokens, data.forgetting_row_tokens):
        for tokens in (row_tokens or ())[:: -strategy.micro_batch_size]:
            yield padded_width(tokens, max_length=data.longest_row_tokens)
