"""What the monitor takes down: samples, events, and the maxima, means and sums that they add up to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from .nvml import GpuSample

Number = TypeVar("Number", int, float)
EventKind = Literal["memory_over_plan", "gpu_lost", "gpu_not_watched", "samples_not_written", "monitor_failed"]


@dataclass(frozen=True, kw_only=True)
class MonitorEvent:
    """Something that happened once.

    kind:           what happened
    seconds:        when, since the monitor started
    message:        for people, with figures
    measured_bytes: for memory_over_plan, what was measured
    planned_bytes:  for memory_over_plan, the limit
    """

    kind: EventKind
    seconds: float
    message: str
    measured_bytes: int | None = None
    planned_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One reading of host and GPU.

    seconds:             since the monitor started
    unix_time:           seconds since 1970
    phase:               what the loop was doing
    rss_bytes:           resident memory of this process
    rss_peak_bytes:      its highest since the monitor started
    cpu_percent:         of this process since the last sample; 100 is one core
    ram_available_bytes: of the host
    device_bytes:        this run's share of the GPU's memory, None without one
    gpu:                 the GPU's reading, None without one
    """

    seconds: float
    unix_time: float
    phase: str
    rss_bytes: int
    rss_peak_bytes: int
    cpu_percent: float
    ram_available_bytes: int
    device_bytes: int | None = None
    gpu: GpuSample | None = None


@dataclass(frozen=True, kw_only=True)
class PhasePeak:
    """What one phase took, over all the times that it was entered.

    name:              as given to `enter_phase`
    seconds:           time spent in it
    peak_rss_bytes:    highest resident memory of this process
    peak_device_bytes: highest sampled share of the GPU's memory, None where no sample fell into it
    energy_joules:     of the GPU, None without one
    """

    name: str
    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int | None
    energy_joules: float | None = None


@dataclass(frozen=True, kw_only=True)
class MonitorSummary:
    """What the monitor saw, ready for JSON through `dataclasses.asdict`.

    seconds:                   from start to stop
    samples:                   readings taken
    rss_peak_is_exact:         whether the kernel kept the peaks of resident memory; else they were sampled
    peak_rss_bytes:            highest resident memory of this process
    peak_device_bytes:         highest share of this run in the GPU's memory
    peak_memory_used_bytes:    highest use of the GPU's memory by all
    least_ram_available_bytes: what the host had left when it had least
    mean_cpu_percent:          of this process; 100 is one core
    mean_utilization_percent:  of the GPU
    energy_joules:             of the GPU: its counter, or power integrated over time
    peak_temperature_celsius:  of the GPU
    throttled_seconds:         how long each reason held the GPU's clocks down
    phases:                    in the order in which they were first entered
    events:                    in order
    """

    seconds: float
    samples: int
    rss_peak_is_exact: bool
    peak_rss_bytes: int
    peak_device_bytes: int | None
    peak_memory_used_bytes: int | None
    least_ram_available_bytes: int | None
    mean_cpu_percent: float | None
    mean_utilization_percent: float | None
    energy_joules: float | None
    peak_temperature_celsius: float | None
    throttled_seconds: dict[str, float]
    phases: tuple[PhasePeak, ...]
    events: tuple[MonitorEvent, ...]


class DeviceShare:
    """A run's share of a GPU: what is used, less what was used before the run and what others have taken since.

    Unlike the driver's figure for the process it holds the managed memory of paged optimizers too. What others take is
    known only where the driver lists this process by its own pid, which it does not in a container.
    """

    def __init__(self, first: GpuSample) -> None:
        self._foreign_bytes = (first.memory_used_bytes or 0) - (first.process_memory_bytes or 0)
        self._others_before_bytes = first.other_memory_bytes or 0

    def estimate_bytes(self, sample: GpuSample) -> int | None:
        """The run's share at this sample; None where the driver tells neither the GPU's use nor the process's."""
        own_bytes = sample.process_memory_bytes
        if sample.memory_used_bytes is None:
            return own_bytes
        taken_since_bytes = 0
        if own_bytes is not None and sample.other_memory_bytes is not None:
            taken_since_bytes = sample.other_memory_bytes - self._others_before_bytes
        return max(sample.memory_used_bytes - self._foreign_bytes - taken_since_bytes, own_bytes or 0)


@dataclass(kw_only=True)
class _Phase:
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    peak_device_bytes: int | None = None
    energy_joules: float | None = None


@dataclass(kw_only=True)
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


class Tally:
    """Adds samples up. Not thread-safe: the monitor holds its lock."""

    def __init__(self) -> None:
        self.samples = 0
        self.peak_rss_bytes = 0
        self.peak_device_bytes: int | None = None
        self._peak_memory_used_bytes: int | None = None
        self._least_ram_available_bytes: int | None = None
        self._peak_temperature_celsius: float | None = None
        self._cpu_percent, self._utilization_percent = _Mean(), _Mean()
        self._throttled_seconds: dict[str, float] = {}
        self._phases: dict[str, _Phase] = {}
        self._integrated_joules: float | None = None
        self._first_counter_joules: float | None = None
        self._before: tuple[float, GpuSample] | None = None

    def add_resident(self, phase: str, peak_rss_bytes: int, seconds: float = 0.0) -> None:
        """A peak of resident memory in a phase, and time spent in it."""
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss_bytes)
        entry = self._phases.setdefault(phase, _Phase())
        entry.seconds += seconds
        entry.peak_rss_bytes = max(entry.peak_rss_bytes, peak_rss_bytes)

    def add(self, sample: Sample, *, phase_is_sure: bool = True) -> None:
        """One sample; its device memory belongs to its phase only where the phase did not change while it was read."""
        self.samples += 1
        if self.samples > 1:
            self._cpu_percent.add(sample.cpu_percent)
        self._least_ram_available_bytes = _least(self._least_ram_available_bytes, sample.ram_available_bytes)
        if sample.gpu is not None:
            self._add_gpu(sample.seconds, sample.phase, sample.gpu)
        if sample.device_bytes is not None:
            self.peak_device_bytes = _most(self.peak_device_bytes, sample.device_bytes)
            if phase_is_sure:
                entry = self._phases.setdefault(sample.phase, _Phase())
                entry.peak_device_bytes = _most(entry.peak_device_bytes, sample.device_bytes)

    def find_peak_phase(self, *, of_device: bool) -> str | None:
        """The phase with the highest device memory, or else resident memory; None where no phase has a figure."""
        if of_device:
            peaks = {name: phase.peak_device_bytes or 0 for name, phase in self._phases.items()}
        else:
            peaks = {name: phase.peak_rss_bytes for name, phase in self._phases.items()}
        return max(peaks, key=lambda name: peaks[name], default=None)

    def make_summary(
        self, *, seconds: float, rss_peak_is_exact: bool, events: tuple[MonitorEvent, ...]
    ) -> MonitorSummary:
        """Everything added so far."""
        return MonitorSummary(
            seconds=seconds,
            samples=self.samples,
            rss_peak_is_exact=rss_peak_is_exact,
            peak_rss_bytes=self.peak_rss_bytes,
            peak_device_bytes=self.peak_device_bytes,
            peak_memory_used_bytes=self._peak_memory_used_bytes,
            least_ram_available_bytes=self._least_ram_available_bytes,
            mean_cpu_percent=self._cpu_percent.value,
            mean_utilization_percent=self._utilization_percent.value,
            energy_joules=self._make_energy_joules(),
            peak_temperature_celsius=self._peak_temperature_celsius,
            throttled_seconds=dict(self._throttled_seconds),
            phases=tuple(PhasePeak(name=name, **vars(phase)) for name, phase in self._phases.items()),
            events=events,
        )

    def _add_gpu(self, seconds: float, phase: str, gpu: GpuSample) -> None:
        if gpu.memory_used_bytes is not None:
            self._peak_memory_used_bytes = _most(self._peak_memory_used_bytes, gpu.memory_used_bytes)
        if gpu.utilization_percent is not None:
            self._utilization_percent.add(gpu.utilization_percent)
        if gpu.temperature_celsius is not None:
            self._peak_temperature_celsius = _most(self._peak_temperature_celsius, gpu.temperature_celsius)
        if self._first_counter_joules is None:
            self._first_counter_joules = gpu.energy_joules
        if self._before is not None:
            elapsed, before = seconds - self._before[0], self._before[1]
            for reason in gpu.throttle_reasons or ():
                self._throttled_seconds[reason] = self._throttled_seconds.get(reason, 0.0) + elapsed
            self._add_energy(phase, before, gpu, elapsed)
        self._before = (seconds, gpu)

    def _add_energy(self, phase: str, before: GpuSample, gpu: GpuSample, elapsed: float) -> None:
        """What the board took since the last sample, counted to the phase that it was in at this one."""
        joules = None
        if gpu.power_watts is not None and before.power_watts is not None:
            joules = (before.power_watts + gpu.power_watts) / 2 * elapsed
            self._integrated_joules = (self._integrated_joules or 0.0) + joules
        if gpu.energy_joules is not None and before.energy_joules is not None:
            joules = gpu.energy_joules - before.energy_joules
        if joules is not None:
            entry = self._phases.setdefault(phase, _Phase())
            entry.energy_joules = (entry.energy_joules or 0.0) + joules

    def _make_energy_joules(self) -> float | None:
        """The counter's difference where the board has one, else the integral of power over time (trapezoids)."""
        last_joules = self._before[1].energy_joules if self._before else None
        if self._first_counter_joules is not None and last_joules is not None:
            return last_joules - self._first_counter_joules
        return self._integrated_joules


def _most(before: Number | None, now: Number) -> Number:
    return now if before is None else max(before, now)


def _least(before: int | None, now: int) -> int:
    return now if before is None else min(before, now)
