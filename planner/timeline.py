"""Live tensors over one optimizer step: from a log of allocations and frees to points, and from points to a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from math import ceil, floor, log10

from .memory import Components, Memory, Timeline, TimelinePoint

POINTS = 240
"""About so many points does a timeline have; each of its phases has at least one."""
COMPONENTS = tuple(Components.model_fields)
LARGEST_HEADROOM = 1.6
"""A budget up to so many times of what is required is drawn in scale: beyond, the step itself would be flat."""
NICE_STEPS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


@dataclass(kw_only=True)
class EventLog:
    """Allocations and frees in their order.

    start:      live bytes by component before the first event
    events:     (component, bytes), below 0 where freed
    marks:      (index into events, phase that begins there)
    peak_bytes: the highest sum of live bytes so far
    """

    start: Mapping[str, int]
    events: list[tuple[str, int]] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self._live_bytes = sum(self.start.values())
        self.peak_bytes = self._live_bytes

    def enter(self, phase: str) -> None:
        """The next events are this phase's; those before the first phase are the first one's too."""
        self.marks.append((len(self.events) if self.marks else 0, phase))

    def add(self, component: str, size_bytes: int) -> None:
        """Note an allocation, or with a size below 0 a free."""
        self.events.append((component, size_bytes))
        self._live_bytes = live_bytes = self._live_bytes + size_bytes
        if live_bytes > self.peak_bytes:
            self.peak_bytes = live_bytes


@dataclass(frozen=True, kw_only=True)
class Span:
    """Neighbouring points of one phase: its name, the index of its first point, and of the one behind its last."""

    phase: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A chart's vertical axis, bytes.

    unit:  GiB or MiB
    step:  from one tick to the next, in that unit
    steps: how many
    """

    unit: str
    step: float
    steps: int

    @property
    def step_bytes(self) -> float:
        """From one tick to the next, bytes."""
        return self.step * (2**30 if self.unit == "GiB" else 2**20)

    @property
    def top_bytes(self) -> float:
        """The highest tick, bytes."""
        return self.step_bytes * self.steps

    def find_row(self, size_bytes: int) -> int:
        """The row, from 1 at the bottom, that a height lies in."""
        return max(1, ceil(size_bytes / self.step_bytes))


def make_timeline(logs: Sequence[EventLog], *, micro_batches: int) -> Timeline:
    """The highest instant of each of about POINTS equal parts of the logs' events; parts end where phases do."""
    phases = tuple(dict.fromkeys(phase for log in logs for _, phase in log.marks))
    events = sum(len(log.events) for log in logs)
    points = [point for log in logs for point in _sample(log, phases, max(events, 1))]
    return Timeline(phases=phases, micro_batches=micro_batches, points=tuple(points))


def _sample(log: EventLog, phases: Sequence[str], all_events: int) -> list[TimelinePoint]:
    live = dict.fromkeys(COMPONENTS, 0) | dict(log.start)
    ends = [*(index for index, _ in log.marks[1:]), len(log.events)]
    points = []
    for (start, phase), end in zip(log.marks, ends, strict=True):
        parts = max(1, POINTS * (end - start) // all_events)
        bounds = [start + (end - start) * part // parts for part in range(parts + 1)]
        for first, last in pairwise(bounds):
            opens = first == 0 or first == last
            highest = _find_highest(live, log.events[first:last], with_start=opens)
            points.append(TimelinePoint(phases.index(phase), *highest))
    return points


def _find_highest(live: dict[str, int], events: Sequence[tuple[str, int]], *, with_start: bool) -> tuple[int, ...]:
    """The live bytes at the highest instant of some events, which are taken into `live`.

    with_start: whether the moment before the first event counts
    """
    total = sum(live.values())
    highest, found = (total, tuple(live.values())) if with_start else (-1, ())
    for component, size in events:
        live[component] += size
        total += size
        if total > highest:
            highest, found = total, tuple(live.values())
    return found


def list_spans(timeline: Timeline) -> list[Span]:
    """The phases in their order, as ranges of points; a phase comes once for each micro-batch."""
    spans, start = [], 0
    for phase, group in groupby(point.phase for point in timeline.points):
        end = start + len(list(group))
        spans.append(Span(phase=timeline.phases[phase], start=start, end=end))
        start = end
    return spans


def list_passes(timeline: Timeline, spans: Sequence[Span]) -> list[Span]:
    """The micro-batches that are shown and the update, as ranges of spans; empty where there is but one micro-batch."""
    starts = [index for index, span in enumerate(spans) if span.phase == "forward"]
    ends = [index + 1 for index, span in enumerate(spans) if span.phase == "backward"]
    if timeline.micro_batches == 1 or len(starts) != 2 or len(ends) != 2:
        return []
    others = timeline.micro_batches - 1
    words = "second micro-batch" if others == 1 else f"highest of the other {others:,}"
    return [
        Span(phase="first micro-batch", start=0, end=ends[0]),
        Span(phase=words, start=ends[0], end=ends[1]),
        Span(phase="update", start=ends[1], end=len(spans)),
    ]


def resample(points: Sequence[TimelinePoint], columns: int) -> list[TimelinePoint]:
    """`columns` points: the highest of those that a column stands for, or one for several columns."""
    count = len(points)
    bounds = [(count * column // columns, -(-count * (column + 1) // columns)) for column in range(columns)]
    return [max(points[start:end], key=lambda point: point.total) for start, end in bounds]


def is_in_scale(memory: Memory) -> bool:
    """Whether the budget's line is in the chart; else it is far above."""
    return memory.budget_bytes <= LARGEST_HEADROOM * max(memory.required_bytes, 1)


def make_scale(memory: Memory, *, most_steps: int) -> Scale:
    """An axis of round numbers of GiB, or MiB below one, for peak, requirement and, where it is near, budget."""
    highest = max(memory.required_bytes, memory.peak_allocated_bytes, 1)
    if is_in_scale(memory):
        highest = max(highest, memory.budget_bytes)
    unit = "GiB" if highest >= 2**30 else "MiB"
    units = highest / (2**30 if unit == "GiB" else 2**20)
    power = 10.0 ** floor(log10(units / most_steps))
    step = next((nice * power for nice in NICE_STEPS if nice * power * most_steps >= units), 20 * power)
    return Scale(unit=unit, step=step, steps=ceil(units / step))


def share_out(sizes: Sequence[int], minimums: Sequence[int], total: int) -> list[int]:
    """`total` divided in proportion to `sizes`, each share at least its minimum; without minimums where `total` is too
    small for them. What the short ones lack, the long ones give."""
    floors = list(minimums) if sum(minimums) <= total else [1] * len(sizes)
    raised: set[int] = set()
    while True:
        rest = total - sum(floors[index] for index in raised)
        weight = sum(size for index, size in enumerate(sizes) if index not in raised)
        low = {i for i, size in enumerate(sizes) if i not in raised and rest * size < floors[i] * weight}
        if not low:
            break
        raised |= low
    shares, given, seen = [], 0, 0
    for index, size in enumerate(sizes):
        if index in raised:
            shares.append(floors[index])
            continue
        seen += size
        shares.append(rest * seen // weight - given)
        given += shares[-1]
    return shares
