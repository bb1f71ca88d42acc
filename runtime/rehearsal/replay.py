"""Replays a rehearsed run through the allocator's model: what is live and what is reserved, phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from ...planner.allocator import Block, CachingAllocator
from ...planner.memory import Components
from ...planner.timeline import EventLog
from .model import TensorSpec
from .watch import FIRST_STORAGE, Recording

MANAGED_CHUNK_BYTES = 128 * 2**20
"""NVML shows managed memory in steps of this size (19 of the 95 measured rows have some)."""


@dataclass(kw_only=True)
class PhasePeak:
    """The highest moment of a phase, bytes: what was allocated, and that by component."""

    allocated_bytes: int = 0
    components: dict[str, int] = field(default_factory=dict)


class Replay:
    """Feeds an allocator and remembers each phase's peak.

    watches:       whether peaks and logs are kept of what is played; without them the allocator's own are left
    managed_bytes: beside the allocator, in managed memory
    step_logs:     of the step with the highest peak: its first micro-batch, the highest of the others, the update
    """

    def __init__(self, allocator: CachingAllocator, *, watches: bool = True) -> None:
        self.allocator, self._watches = allocator, watches
        self.peaks: dict[str, PhasePeak] = {}
        self.managed_bytes = 0
        self.step_logs: list[EventLog] = []
        self._managed_free = 0
        self._live: dict[Hashable, tuple[Block, str]] = {}
        self._played: dict[int, Block] = {}
        self._totals = dict.fromkeys(Components.model_fields, 0)
        self._peak = PhasePeak()
        self._log = self.start_log()
        self.enter("load")

    def enter(self, phase: str) -> None:
        """From here on peaks are this phase's."""
        self._peak = self.peaks.setdefault(phase, PhasePeak())
        self._log.enter(phase)
        self._note()

    def start_log(self) -> EventLog:
        """From here on events are written to a new log."""
        self._log = EventLog(start=dict(self._totals))
        return self._log

    def keep_step(self, logs: list[EventLog]) -> None:
        """Keep a step's logs if none before had a peak as high."""
        if not self.step_logs or _peak_of(logs) > _peak_of(self.step_logs):
            self.step_logs = logs

    def allocate(self, key: Hashable, size_bytes: int, component: str) -> None:
        block = self.allocator.allocate(size_bytes)
        self._live[key] = block, component
        self._totals[component] += block.size_bytes
        self._log.add(component, block.size_bytes)
        if self.allocator.allocated_bytes > self._peak.allocated_bytes:
            self._note()

    def free(self, key: Hashable) -> None:
        block, component = self._live.pop(key)
        self._totals[component] -= block.size_bytes
        self._log.add(component, -block.size_bytes)
        self.allocator.free(block)

    def temporary(self, size_bytes: int) -> None:
        """Allocate and free at once."""
        self.allocate("temporary", size_bytes, "temporary")
        self.free("temporary")

    def manage(self, size_bytes: int) -> None:
        """Allocate managed memory, which the driver takes in chunks that no allocation straddles."""
        if size_bytes > self._managed_free:
            taken = -(-size_bytes // MANAGED_CHUNK_BYTES) * MANAGED_CHUNK_BYTES
            self.managed_bytes += taken
            self._managed_free = taken
        self._managed_free -= size_bytes

    def play(
        self,
        events: Iterable[int],
        recording: Recording,
        update: Callable[[Sequence[TensorSpec]], None] = lambda _: None,
    ) -> None:
        """Play a recording's events. Workspaces stay for good; what is left of the rest is freed by end_play().

        update: replays an update in backward
        """
        if not self._watches:
            self._play_unwatched(events, recording, update)
            return
        sizes, components, played, totals = recording.sizes, recording.components, self._played, self._totals
        allocator, peak, add, updates = self.allocator, self._peak, self._log.add, recording.updates
        for event in events:
            if updates and event in updates:
                update(updates[event])
            elif event >= FIRST_STORAGE:
                block = played[event] = allocator.allocate(sizes[event])
                component, size = components[event], block.size_bytes
                totals[component] += size
                add(component, size)
                if allocator.allocated_bytes > peak.allocated_bytes:
                    self._note()
            elif event >= 0:
                if event not in self._live:
                    self.allocate(event, sizes[event], components[event])
            elif ~event in played:
                block, component = played.pop(~event), components[~event]
                totals[component] -= block.size_bytes
                add(component, -block.size_bytes)
                allocator.free(block)

    def _play_unwatched(
        self, events: Iterable[int], recording: Recording, update: Callable[[Sequence[TensorSpec]], None]
    ) -> None:
        """play(), for the allocator's sake alone."""
        sizes, played, updates = recording.sizes, self._played, recording.updates
        allocate, free = self.allocator.allocate, self.allocator.free
        for event in events:
            if updates and event in updates:
                update(updates[event])
            elif event >= FIRST_STORAGE:
                played[event] = allocate(sizes[event])
            elif event >= 0:
                if event not in self._live:
                    self.allocate(event, sizes[event], recording.components[event])
            elif ~event in played:
                free(played.pop(~event))

    def end_play(self, recording: Recording) -> None:
        """Free what is left of a recording, as setting gradients to None does."""
        self.play([~number for number in self._played], recording)

    def _note(self) -> None:
        peak, allocator = self._peak, self.allocator
        if allocator.allocated_bytes > peak.allocated_bytes:
            peak.allocated_bytes = allocator.allocated_bytes
            peak.components = dict(self._totals)

    def highest(self) -> str:
        """The phase with the highest peak of allocated memory; the first of several."""
        return max(self.peaks, key=lambda phase: self.peaks[phase].allocated_bytes)


def keep_highest(logs: list[EventLog], log: EventLog) -> list[EventLog]:
    """The first log, and the highest of the others."""
    return [*logs[:1], max([*logs[1:], log], key=lambda one: one.peak_bytes)]


def _peak_of(logs: list[EventLog]) -> int:
    return max(log.peak_bytes for log in logs)
