"""What finished runs teach about a device: the memory beside the tensors, kept in fitune's cache.

Only this constant is learnt, never a factor: how far a prediction of one model is off says nothing about another.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median_high
from typing import Literal, Self

from filelock import FileLock
from pydantic import Field, ValidationError

from ...planner.plan import Plan
from ...planner.process import estimate_own_bytes
from ...planner.strategy import DeviceConstant, Value
from ...recipes.errors import PlanError, RunError
from ...recipes.units import GiB, format_bytes
from ..model.embedded import cache_folder
from ..report import RunReport
from ..rundir import write_whole

MOST_CPU_TENSOR_BYTES = 4 * GiB
"""Nothing tells a CPU's tensors from the process: in a larger run a percent of error would hide the constant."""
BLINDING_EVENTS = {"monitor_failed", "gpu_lost"}
"""Events of the monitor after which a peak may have been missed."""


class Stack(Value):
    """What a constant holds for.

    device:       as NVML names the card, or a CPU with its cores
    driver:       NVIDIA driver version, None for a CPU
    torch, bitsandbytes: versions, None where it is not installed
    """

    device: str
    driver: str | None
    torch: str | None
    bitsandbytes: str | None

    @classmethod
    def of(cls, device: str, driver: str | None, versions: Mapping[str, str]) -> Self:
        """A device with what of `versions` matters."""
        return cls(device=device, driver=driver, torch=versions.get("torch"), bitsandbytes=versions.get("bitsandbytes"))

    def __str__(self) -> str:
        driver = "" if self.driver is None else f", driver {self.driver}"
        return f"{self.device}{driver}, torch {self.torch}, bitsandbytes {self.bitsandbytes}"


class RunConstant(Value):
    """One run's constant.

    run:               name of the run's directory
    started_unix_time: when it started, seconds since 1970; no two runs share it
    beside_bytes:      memory beside the tensors
    """

    run: str
    started_unix_time: float
    beside_bytes: int = Field(gt=0)


class DeviceCalibration(Value):
    """All that was learnt of a device, in the order of the runs."""

    stack: Stack
    runs: tuple[RunConstant, ...] = Field(min_length=1)

    def make_constant(self) -> DeviceConstant:
        """The median of the runs, of an even number the upper one, and where it comes from."""
        sizes = [run.beside_bytes for run in self.runs]
        day = time.strftime("%Y-%m-%d", time.gmtime(self.runs[-1].started_unix_time))
        if len(sizes) == 1:
            source = f"1 run on this machine, {day}"
        else:
            least, most = format_bytes(min(sizes)), format_bytes(max(sizes))
            source = f"{len(sizes)} runs on this machine, the last on {day}, {least} to {most}"
        return DeviceConstant(bytes=median_high(sizes), source=source)


class Calibration(Value):
    """The document in the cache: what was learnt of every device."""

    format_version: Literal[1] = 1
    devices: tuple[DeviceCalibration, ...] = ()

    def find_constant(self, stack: Stack) -> DeviceConstant | None:
        """What was learnt of exactly this device, driver and these versions; None where nothing was."""
        return next((known.make_constant() for known in self.devices if known.stack == stack), None)

    def add(self, stack: Stack, runs: Iterable[RunConstant]) -> Calibration:
        """With more runs of a device; a run that is known already counts once."""
        known = {one.stack: one.runs for one in self.devices}
        by_start = {run.started_unix_time: run for run in (*known.get(stack, ()), *runs)}
        known[stack] = tuple(by_start[started] for started in sorted(by_start))
        return Calibration(devices=tuple(DeviceCalibration(stack=one, runs=known[one]) for one in known))


def calibration_path() -> Path:
    """`calibration.json` in fitune's cache folder."""
    return cache_folder() / "calibration.json"


def load_calibration() -> Calibration:
    """The calibration in the cache, an empty one before the first; PlanError where it cannot be read."""
    path = calibration_path()
    try:
        return Calibration.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return Calibration()
    except (OSError, ValidationError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise PlanError(
            f"{path}: not a calibration of this version of fitune: {first}: remove it and calibrate again"
        ) from error


def save_run_constants(stack: Stack, runs: Iterable[RunConstant]) -> Calibration:
    """Add runs to the calibration in the cache, which is whole at every moment; the calibration after it."""
    path = calibration_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            calibration = load_calibration().add(stack, runs)
            write_whole(path, calibration.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
    return calibration


def make_run_constant(run: Path, plan: Plan, report: RunReport) -> RunConstant:
    """The memory beside the tensors in one run; RunError where its report does not tell it.

    run: the run's directory

    On a GPU everything is measured but the managed memory of paged optimizers, which follows from the parameters:
    peak of the device (NVML) - peak reserved by the allocator - managed.
    On a CPU all but the constant is the plan's, in the phase in which it follows from the parameters and the rows'
    widths: resident peak in `save` - its live tensors - what libraries add when they are used.
    """
    if report.status != "finished":
        raise RunError(f"{run}: the run is {report.status}: only a finished one has all of its peaks")
    missed = [event["message"] for event in report.events if event.get("kind") in BLINDING_EVENTS]
    if missed:
        raise RunError(f"{run}: its monitor missed something: {missed[0]}")
    measure = _measure_gpu if plan.device.kind == "cuda" else _measure_cpu
    device_bytes, tensor_bytes = measure(run, plan, report)
    if device_bytes <= tensor_bytes:
        found, tensors = format_bytes(device_bytes), format_bytes(tensor_bytes)
        raise RunError(f"{run}: the measured {found} are not above the {tensors} of its tensors")
    name = run.resolve().name.encode(errors="replace").decode()
    return RunConstant(run=name, started_unix_time=report.started_unix_time, beside_bytes=device_bytes - tensor_bytes)


def _measure_gpu(run: Path, plan: Plan, report: RunReport) -> tuple[int, int]:
    """What the device held at its peak, and what of it the allocator and managed memory were."""
    measured = report.measured
    if measured.peak_reserved_bytes is None or measured.peak_device_bytes is None:
        raise RunError(f"{run}: the GPU's memory was not measured")
    return measured.peak_device_bytes, measured.peak_reserved_bytes + plan.memory.managed_bytes


def _measure_cpu(run: Path, plan: Plan, report: RunReport) -> tuple[int, int]:
    """What the process held while it saved, and what of it was not the constant."""
    measured = [one.peak_device_bytes for one in report.measured.phases if one.name == "save"]
    planned = [one for one in plan.memory.phases if one.name == "save"]
    if not measured or measured[0] is None or not planned or planned[0].host_bytes is None:
        raise RunError(f"{run}: the phase save was not measured")
    if planned[0].peak_allocated_bytes > MOST_CPU_TENSOR_BYTES:
        raise RunError(
            f"{run}: {format_bytes(planned[0].peak_allocated_bytes)} of tensors hide what the process itself takes: "
            f"calibrate with a run of at most {format_bytes(MOST_CPU_TENSOR_BYTES)}"
        )
    return measured[0], planned[0].host_bytes - estimate_own_bytes(plan.device)
