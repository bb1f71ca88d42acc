"""Measures a run by phase: the monitor in the background, and PyTorch's own figures on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.text import Text

from ...planner.plan import Plan
from ..machine.monitor import Monitor
from ..machine.nvml import Nvml, NvmlUnavailable, open_nvml
from ..machine.samples import MonitorEvent, MonitorSummary
from ..report import MeasuredMemory, MeasuredPhase


class Meter:
    """Peaks of device, host and allocator, by phase; a context manager around the whole run."""

    def __init__(self, path: Path, plan: Plan, device: torch.device, console: Console) -> None:
        opened = open_nvml() if device.type == "cuda" else None
        self._nvml = opened if isinstance(opened, Nvml) else None
        self._reason = opened.reason if isinstance(opened, NvmlUnavailable) else None
        self._is_cuda, self._console = device.type == "cuda", console
        self._allocated: dict[str, int] = {}
        self._reserved_bytes = 0
        self.phase = "load"
        self._monitor = Monitor(
            path,
            nvml=self._nvml,
            # pages of a weights' file are resident while it is read, and no part of what is required
            limit_bytes=max(plan.memory.required_bytes, plan.memory.peak_device_bytes),
            on_event=self._show_event,
            first_phase=self.phase,
        )

    def _show_event(self, event: MonitorEvent) -> None:
        self._console.print(Text.assemble(("note: ", "yellow"), event.message), soft_wrap=True)

    def __enter__(self) -> Self:
        self._monitor.start()
        if self._reason is not None:
            self._monitor.report("gpu_not_watched", f"the GPU is not watched: {self._reason}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        if self._nvml is not None:
            self._nvml.close()
            self._nvml = None

    def enter(self, phase: str) -> None:
        """From now on the run is in `phase`."""
        self._take_peaks()
        self.phase = phase
        self._monitor.enter_phase(phase)

    def stop(self) -> None:
        """End measuring; `summary` and `measure` are then final."""
        self._take_peaks()
        self._monitor.stop()

    def _take_peaks(self) -> None:
        if self._is_cuda:
            self._reserved_bytes = max(torch.cuda.max_memory_reserved(), self._reserved_bytes)
            peak = torch.cuda.max_memory_allocated()
            self._allocated[self.phase] = max(peak, self._allocated.get(self.phase, 0))
            torch.cuda.reset_peak_memory_stats()

    @property
    def memory_now_bytes(self) -> int:
        """Device memory of this run at the last sample; on a CPU the process's resident memory."""
        latest = self._monitor.latest
        if latest is None:
            return 0
        return latest.rss_bytes if latest.device_bytes is None else latest.device_bytes

    @property
    def summary(self) -> MonitorSummary:
        """What the monitor saw."""
        return self._monitor.summary()

    @property
    def allocated_bytes(self) -> dict[str, int]:
        """The allocator's peak by phase; empty on a CPU."""
        return dict(self._allocated)

    def measure(self, *, disk_bytes: int) -> MeasuredMemory:
        """Everything measured, for the report."""
        summary = self.summary
        phases = tuple(
            MeasuredPhase(
                name=one.name,
                seconds=one.seconds,
                peak_allocated_bytes=self._allocated.get(one.name),
                peak_device_bytes=one.peak_device_bytes if self._is_cuda else one.peak_rss_bytes,
            )
            for one in summary.phases
        )
        return MeasuredMemory(
            peak_allocated_bytes=max(self._allocated.values(), default=None) if self._is_cuda else None,
            peak_reserved_bytes=self._reserved_bytes if self._is_cuda else None,
            peak_device_bytes=summary.peak_device_bytes if self._is_cuda else summary.peak_rss_bytes,
            peak_host_bytes=summary.peak_rss_bytes,
            disk_bytes=disk_bytes,
            phases=phases,
        )
