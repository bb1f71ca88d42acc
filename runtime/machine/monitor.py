"""Watches a run from a background thread: memory, utilisation, power and temperature, as JSON lines and as maxima.

Nothing that goes wrong here reaches the training: a lost GPU, a full disk or an error of the monitor becomes an event.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import psutil

from ...planner.logs import DENSE_SECONDS, SAMPLE_SECONDS, SPARSE_SECONDS
from ...recipes.units import format_bytes
from .nvml import GpuLostError, GpuSample, Nvml
from .samples import DeviceShare, EventKind, MonitorEvent, MonitorSummary, Sample, Tally


class ResidentMemory:
    """Resident memory of this process, and its peak as the kernel keeps it (VmHWM), so that no short one is missed.

    Starting a new peak writes 5 to /proc/self/clear_refs (Linux 4.0 and later, proc(5)); tools that read the process's
    peak from outside then see it since the last phase. Where that is not permitted, the peak is what was sampled.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.is_exact = self._restart_peak()

    def read(self) -> tuple[int, int]:
        """Bytes now, and the peak since the last `take_peak`."""
        if self.is_exact:
            try:
                lines = Path("/proc/self/status").read_text().splitlines()
                fields = {key: value for key, _, value in (line.partition(":") for line in lines)}
                return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
            except (OSError, LookupError):
                self.is_exact = False
        rss_bytes = int(self._process.memory_info().rss)
        return rss_bytes, rss_bytes

    def take_peak(self) -> int:
        """The peak since the last call, in bytes; the next one starts now."""
        _, peak_bytes = self.read()
        if self.is_exact:
            self.is_exact = self._restart_peak()
        return peak_bytes

    def _restart_peak(self) -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True


class Monitor:
    """Samples this process, its host and one GPU until it is stopped; a context manager.

    path:             JSON lines: samples, and events with the key `event`; added to where it exists
    nvml:             None without a GPU; closed by its owner
    gpu_index:        position among the visible GPUs
    interval_seconds: pause between two samples
    limit_bytes:      the planned peak: of device memory with a GPU, else of this process's resident memory
    on_event:         called with each event as it happens, mostly in the sampling thread; it must not stop the monitor
    first_phase:      what runs until `enter_phase` is called

    Start it before CUDA's context is made: what the GPU holds at the start counts as held by others.
    """

    def __init__(
        self,
        path: Path,
        *,
        nvml: Nvml | None = None,
        gpu_index: int = 0,
        interval_seconds: float = SAMPLE_SECONDS,
        limit_bytes: int | None = None,
        on_event: Callable[[MonitorEvent], None] | None = None,
        first_phase: str = "load",
    ) -> None:
        assert nvml is None or gpu_index < nvml.gpu_count, "the GPU is one of the visible ones"
        self._path, self._nvml, self._gpu_index = path, nvml, gpu_index
        self._interval_seconds, self._limit_bytes, self._on_event = interval_seconds, limit_bytes, on_event
        self._has_gpu = nvml is not None
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fitune-monitor", daemon=True)
        self._start_time = time.monotonic()
        self._process = psutil.Process()
        self._resident = ResidentMemory()
        self._tally = Tally()
        self._events: list[MonitorEvent] = []
        self._share: DeviceShare | None = None
        self._latest: Sample | None = None
        self._file: TextIO | None = None
        self._written_seconds = float("-inf")
        self._phase, self._phase_seconds = first_phase, 0.0
        self._stop_seconds: float | None = None

    def start(self) -> None:
        """Takes the first sample, then goes on in the background."""
        self._start_time = time.monotonic()
        self._resident.take_peak()
        self._process.cpu_percent(None)
        try:
            self._file = self._path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            self.report("samples_not_written", f"{self._path} cannot be written: {error}")
        self._take_sample_safely()
        self._thread.start()

    def stop(self) -> None:
        """Takes a last sample and ends; a second call does nothing, and neither does one before `start`."""
        if self._stop_seconds is not None or self._thread.ident is None:
            return
        self._stopping.set()
        self._thread.join()
        self._take_sample_safely()
        with self._lock:
            self._end_phase()
            self._stop_seconds = self._elapsed()
            self._close_file()

    def enter_phase(self, name: str) -> None:
        """From now on the loop is in this phase; peaks of the one before are taken down."""
        with self._lock:
            if name != self._phase:
                self._end_phase()
                self._phase = name

    @property
    def latest(self) -> Sample | None:
        """The last sample, for the live line."""
        return self._latest

    @property
    def events(self) -> tuple[MonitorEvent, ...]:
        """What has happened so far."""
        with self._lock:
            return tuple(self._events)

    def summary(self) -> MonitorSummary:
        """Everything so far; after `stop`, of the whole run."""
        with self._lock:
            return self._tally.make_summary(
                seconds=self._elapsed() if self._stop_seconds is None else self._stop_seconds,
                rss_peak_is_exact=self._resident.is_exact,
                events=tuple(self._events),
            )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_seconds):
            self._take_sample_safely()

    def _take_sample_safely(self) -> None:
        try:
            self._take_sample()
        except Exception as error:
            self._stopping.set()
            self.report("monitor_failed", f"no more samples are taken: {error!r}")

    def _take_sample(self) -> None:
        with self._lock:
            phase = self._phase
            rss_bytes, peak_rss_bytes = self._resident.read()
            self._tally.add_resident(phase, peak_rss_bytes)
        gpu = self._sample_gpu()  # without the lock: it may take milliseconds, and the loop must not wait for it
        if gpu is not None and self._share is None:
            self._share = DeviceShare(gpu)
        sample = Sample(
            seconds=self._elapsed(),
            unix_time=time.time(),
            phase=phase,
            rss_bytes=rss_bytes,
            rss_peak_bytes=self._tally.peak_rss_bytes,
            cpu_percent=self._process.cpu_percent(None),
            ram_available_bytes=int(psutil.virtual_memory().available),
            device_bytes=None if gpu is None or self._share is None else self._share.estimate_bytes(gpu),
            gpu=gpu,
        )
        with self._lock:
            self._tally.add(sample, phase_is_sure=phase == self._phase)
            self._latest = sample
            self._write_sample(sample)
        self._check_limit()

    def _sample_gpu(self) -> GpuSample | None:
        if self._nvml is None:
            return None
        try:
            return self._nvml.sample(self._gpu_index, os.getpid())
        except GpuLostError as error:
            self._nvml = None
            self.report("gpu_lost", f"{error}; the host is still monitored")
            return None

    def _check_limit(self) -> None:
        measured_bytes = self._tally.peak_device_bytes if self._has_gpu else self._tally.peak_rss_bytes
        if self._limit_bytes is None or measured_bytes is None or measured_bytes <= self._limit_bytes:
            return
        planned_bytes, self._limit_bytes = self._limit_bytes, None
        what = "device memory" if self._has_gpu else "resident memory"
        with self._lock:
            phase = self._tally.find_peak_phase(of_device=self._has_gpu) or self._phase
        self.report(
            "memory_over_plan",
            f"{what} reached {format_bytes(measured_bytes)} in phase {phase}; the plan says "
            f"{format_bytes(planned_bytes)}, {format_bytes(measured_bytes - planned_bytes)} less",
            measured_bytes=measured_bytes,
            planned_bytes=planned_bytes,
        )

    def _end_phase(self) -> None:
        now = self._elapsed()
        self._tally.add_resident(self._phase, self._resident.take_peak(), now - self._phase_seconds)
        self._phase_seconds = now

    def _elapsed(self) -> float:
        return time.monotonic() - self._start_time

    def report(self, kind: EventKind, message: str, **figures: int) -> None:
        """Take down an event, and tell of it."""
        event = MonitorEvent(kind=kind, seconds=self._elapsed(), message=message, **figures)
        with self._lock:
            self._events.append(event)
            self._write({"event": asdict(event)})
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception as error:
                self._on_event = None
                self.report("monitor_failed", f"on_event failed and is not called again: {error!r}")

    def _write_sample(self, sample: Sample) -> None:
        pause_seconds = 0.0 if sample.seconds < DENSE_SECONDS else SPARSE_SECONDS
        if sample.seconds - self._written_seconds >= pause_seconds:
            self._written_seconds = sample.seconds
            row = asdict(sample)
            gpu = row.pop("gpu") or {}
            self._write(row | {f"gpu_{name}": value for name, value in gpu.items()})

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(row) + "\n")
        except OSError as error:
            self._close_file()
            self.report("samples_not_written", f"{self._path}: samples are no longer written: {error}")

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
