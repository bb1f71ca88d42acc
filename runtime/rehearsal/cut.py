"""Which layers of a model are traced, and how often each of them stands for others."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from ...planner.strategy import Strategy

BLOCKS_TRACED = 5
"""First, three in the middle and last: the middle one's neighbours are middle ones, so it stands for all left out."""
TEMPLATE = 2
"""The middle one of these."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which layers are traced, and how often the repeated ones occur.

    picked:  the layers that are traced, in order
    sources: for each layer of the whole model the traced one, counted among the picked ones, that stands for it
    blocks:  how many picked layers each block has
    copies:  how many more blocks the whole model has that are like these; their neighbours on both sides are, too
    """

    picked: tuple[int, ...]
    sources: tuple[int, ...]
    blocks: tuple[int, ...]
    copies: Mapping[int, int]

    def sketch(self, kinds: Sequence[Hashable], checkpointed: int) -> Hashable:
        """What its trace depends on: what the picked layers are, and which of them are checkpointed and repeated."""
        return tuple((kinds[one], one < checkpointed) for one in self.picked), self.blocks, tuple(self.copies)


def no_cut(kinds: Sequence[Hashable], _: Strategy) -> Cut:
    """All layers."""
    layers = tuple(range(len(kinds)))
    return Cut(picked=layers, sources=layers, blocks=(len(layers),), copies={})


def plan_shortest_cut(kinds: Sequence[Hashable], strategy: Strategy) -> Cut:
    """The first layer, whose input may need no gradient, and the first one of each other kind, checkpointed or not."""
    seen: dict[Hashable, int] = {}
    picked: list[int] = []
    sources: list[int] = []
    for layer, kind in enumerate(kinds):
        key = layer == 0, kind, layer < strategy.checkpointed_layers
        if key not in seen:
            seen[key] = len(picked)
            picked.append(layer)
        sources.append(seen[key])
    return Cut(picked=tuple(picked), sources=tuple(sources), blocks=(len(picked),), copies={})


def plan_cut(kinds: Sequence[Hashable], strategy: Strategy) -> Cut:
    """The fewest layers that show every transition, of the checkpointed ones and of the others."""
    checkpointed = min(strategy.checkpointed_layers, len(kinds))
    picked: list[int] = []
    sources: list[int] = []
    blocks: list[int] = []
    copies: dict[int, int] = {}
    for start, run in ((0, kinds[:checkpointed]), (checkpointed, kinds[checkpointed:])):
        if not run:
            continue
        sizes, left_out = _find_blocks(run)
        if left_out:
            copies[len(blocks) + TEMPLATE] = left_out
        period, before, layers = sizes[-1], sum(sizes), len(run)
        if left_out:
            period, before = sizes[TEMPLATE], sum(sizes[: TEMPLATE + 1])
        sources += [len(picked) + _source(layer, period, before, left_out) for layer in range(layers)]
        after = sum(sizes) - before
        picked += [start + layer for layer in (*range(before), *range(layers - after, layers))]
        blocks += sizes
    return Cut(picked=tuple(picked), sources=tuple(sources), blocks=tuple(blocks), copies=copies)


def _source(layer: int, period: int, before: int, copies: int) -> int:
    """Which of the picked layers stands for a run's layer; the last `period` of the first `before` ones are copied."""
    if layer < before:
        return layer
    if layer < before + copies * period:
        return before - period + (layer - before) % period
    return layer - copies * period


def _find_blocks(kinds: Sequence[Hashable]) -> tuple[tuple[int, ...], int]:
    """Layers of each block: a first one, three alike, and a last one with what remains; and how often the middle one
    is left out. One block of all, where they do not repeat as often."""
    layers = len(kinds)
    for period in range(1, layers // BLOCKS_TRACED + 1):
        for lead in range(min(period, 4) + 1):
            if any(kinds[i] != kinds[i + period] for i in range(lead, layers - period)):
                continue
            repeats, rest = divmod(layers - lead, period)
            if repeats > BLOCKS_TRACED:
                return (lead + period, period, period, period, period + rest), repeats - BLOCKS_TRACED
    return (layers,), 0
