"""Which rows an epoch of a mixture draws: a function of the sources' sizes and weights, the seed and the epoch alone.

Without weights every row of every source is drawn once an epoch. With weights an epoch ends when the source that is
used up first has been drawn once, and each source has its share of it; the next epoch goes on with those rows of the
others that were not drawn yet. A source whose rows were all drawn begins again in another order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rows of one source.

    name:    of the source, as the recipe writes it
    rows:    how many, 1 or more
    weight:  relative to the other parts', above 0; None: each row once an epoch
    """

    name: str
    rows: int
    weight: float | None = None


def count_draws(parts: Sequence[Part]) -> list[int]:
    """Rows that an epoch draws of each part, 1 or more and at most all of them.

    epoch = floor(min over parts of rows / share), share = weight / sum of weights; the shares of it are rounded so that
    they add up (largest remainders).
    """
    weights = [part.weight for part in parts if part.weight is not None]
    if len(weights) < len(parts):
        return [part.rows for part in parts]
    shares = [weight / sum(weights) for weight in weights]
    epoch = max(1, int(min(part.rows / share for part, share in zip(parts, shares, strict=True)) + 1e-9))
    draws = [int(epoch * share) for share in shares]
    by_remainder = sorted(range(len(parts)), key=lambda index: (draws[index] - epoch * shares[index], index))
    for index in by_remainder[: epoch - sum(draws)]:
        draws[index] += 1
    return [min(max(1, drawn), part.rows) for drawn, part in zip(draws, parts, strict=True)]


def draw_epoch(parts: Sequence[Part], *, epoch: int, seed: int) -> list[int]:
    """Numbers of the rows of an epoch, part after part and sorted; rows are numbered through over all parts."""
    drawn, start = list[int](), 0
    for number, (part, count) in enumerate(zip(parts, count_draws(parts), strict=True)):
        drawn += sorted(start + row for row in _draw(part, number, range(epoch * count, (epoch + 1) * count), seed))
        start += part.rows
    return drawn


def _draw(part: Part, number: int, positions: range, seed: int) -> list[int]:
    """The rows at some positions of the part's endless sequence: one permutation of its rows after the other."""
    if len(positions) == part.rows:
        return list(range(part.rows))
    rows = list[int]()
    for again in range(positions.start // part.rows, (positions.stop - 1) // part.rows + 1):
        order = list(range(part.rows))
        random.Random(f"source {number} pass {again} seed {seed}").shuffle(order)
        first = again * part.rows
        rows += order[max(positions.start - first, 0) : positions.stop - first]
    return rows
