"""Extends the trace of a cut model to the whole one: the events of a middle block of layers are repeated, exactly."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .cut import Cut
from .watch import WORKSPACES, Recording

Key = tuple[bool, int]
"""A storage of a block: whether it was made in backward, and its place among those made there."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of events: block None outside of the layers, else which block; and whether it is in backward."""

    name: str
    block: int | None
    backward: bool
    events: Sequence[int]


def split_segments(recording: Recording, cut: Cut) -> list[Segment]:
    """Cut a recording at its marks; marks `forward i` and `backward i` begin layer i, others leave the layers."""
    block_of = [block for block, size in enumerate(cut.blocks) for _ in range(size)]
    segments: list[Segment] = []
    bounds = [*recording.marks, (len(recording.events), "")]
    for (start, name), (end, _) in pairwise(bounds):
        pass_name, _, layer = name.partition(" ")
        block = block_of[int(layer)] if layer else None
        events = recording.events[start:end]
        last = segments[-1] if segments else None
        if last is not None and last.name == pass_name and last.block == block:
            segments[-1] = Segment(name=pass_name, block=block, backward=last.backward, events=[*last.events, *events])
        else:
            segments.append(Segment(name=pass_name, block=block, backward=pass_name == "backward", events=events))
    return segments


class NotPeriodic(Exception):
    """The middle layers do not repeat; the whole model has to be traced."""


def extend(recording: Recording, segments: list[Segment], cut: Cut) -> list[Segment]:
    """The segments of the whole model; new storages are added to the recording's sizes and components."""
    for template in sorted(cut.copies, reverse=True):
        extension = _Extension(recording, segments, template, cut.copies[template])
        extension.check()
        segments = list(extension.run())
    return segments


class _Extension:
    """Repeats one block, the template; its neighbours on both sides are like itself."""

    def __init__(self, recording: Recording, segments: list[Segment], template: int, copies: int) -> None:
        self.recording, self.segments, self.template = recording, segments, template
        self.owner: dict[int, tuple[int, Key]] = {}
        self.made: dict[int, dict[Key, int]] = defaultdict(dict)
        counts: Counter[tuple[int, bool]] = Counter()
        for segment in segments:
            if segment.block is None:
                continue
            for event in segment.events:
                if event >= 0 and event not in WORKSPACES:
                    within = segment.block, segment.backward
                    key = segment.backward, counts[within]
                    counts[within] += 1
                    self.made[segment.block][key] = event
                    self.owner[event] = segment.block, key
        self.copied = [self._copy() for _ in range(copies)]

    def _copy(self) -> dict[Key, int]:
        """Numbers for the storages of one more block like the template."""
        return {key: self.recording.copy(number) for key, number in self.made[self.template].items()}

    def check(self) -> None:
        """The three middle blocks must make the same storages and treat them, and their neighbours', alike."""
        middle = (self.template - 1, self.template, self.template + 1)
        one, template, other = (self._describe(block) for block in middle)
        sizes = [[(key, self.recording.sizes[number]) for key, number in self.made[block].items()] for block in middle]
        if sizes[0] != sizes[1] or sizes[1] != sizes[2] or template not in (one, other):
            raise NotPeriodic

    def _describe(self, block: int) -> list[object]:
        """A block's events with each storage named by its block's distance and its key."""
        described: list[object] = []
        for segment in self.segments:
            if segment.block != block:
                continue
            for event in segment.events:
                number = event if event >= 0 else ~event
                owner = self.owner.get(number)
                described.append((event >= 0, (owner[0] - block, owner[1]) if owner else number))
        return described

    def run(self) -> list[Segment]:
        """All segments, with the copies behind the template in forward and before it in backward."""
        result: list[Segment] = []
        for segment in self.segments:
            if segment.block is None:
                result.append(self._replace(segment, [e for event in segment.events for e in self._spread(event)]))
            elif segment.block == self.template and segment.backward:
                result += [self._instance(segment, copy) for copy in reversed(range(len(self.copied)))]
                result.append(self._instance(segment, -1))
            elif segment.block == self.template:
                result += [self._instance(segment, copy) for copy in range(-1, len(self.copied))]
            elif segment.block == self.template + 1:
                result.append(self._replace(segment, [self._after_copies(event) for event in segment.events]))
            else:
                if any(
                    self._block(event) == self.template and segment.block > self.template + 1
                    for event in segment.events
                ):
                    raise NotPeriodic
                result.append(segment)
        return result

    @staticmethod
    def _replace(segment: Segment, events: list[int]) -> Segment:
        return Segment(name=segment.name, block=segment.block, backward=segment.backward, events=events)

    def _block(self, event: int) -> int | None:
        owner = self.owner.get(event if event >= 0 else ~event)
        return None if owner is None else owner[0]

    def _spread(self, event: int) -> list[int]:
        """Outside of the layers: what happens to the template's storages happens to the copies', too."""
        number = event if event >= 0 else ~event
        owner = self.owner.get(number)
        if owner is None or owner[0] != self.template:
            return [event]
        return [event, *(_signed(copy[owner[1]], event) for copy in self.copied)]

    def _after_copies(self, event: int) -> int:
        """In the block behind the template: its predecessor is the last copy."""
        owner = self.owner.get(event if event >= 0 else ~event)
        if owner is None or owner[0] != self.template:
            return event
        return _signed(self.copied[-1][owner[1]], event)

    def _instance(self, segment: Segment, copy: int) -> Segment:
        """The template's segment as copy number `copy`; -1 is the template itself, whose successor is copy 0."""
        own = self.made[self.template] if copy < 0 else self.copied[copy]
        before = {-1: self.made[self.template - 1], 0: self.made[self.template]}.get(copy) or self.copied[copy - 1]
        after = self.made[self.template + 1] if copy + 1 == len(self.copied) else self.copied[copy + 1]
        neighbours = {self.template - 1: before, self.template: own, self.template + 1: after}
        events = []
        for event in segment.events:
            owner = self.owner.get(event if event >= 0 else ~event)
            if owner is None:
                events.append(event)
            elif owner[0] not in neighbours:
                raise NotPeriodic
            else:
                events.append(_signed(neighbours[owner[0]][owner[1]], event))
        return self._replace(segment, events)


def _signed(number: int, like: int) -> int:
    return number if like >= 0 else ~number
