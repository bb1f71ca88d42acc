"""What the NVIDIA driver says of its GPUs: a thin typed layer over NVML (package nvidia-ml-py, module pynvml).

A GPU's index is its position among the visible ones, as CUDA_VISIBLE_DEVICES says, in PCI bus order: CUDA counts the
same way where CUDA_DEVICE_ORDER=PCI_BUS_ID is set before it starts. A reading that a card or driver does not offer is
None; a GPU that fell off the bus raises `GpuLostError`. Reference: https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import psutil
import pynvml

from ...recipes.errors import DeviceError

T = TypeVar("T")
Handle = Any

REASONS = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver (libnvidia-ml.so.1 was not found)",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is installed but not loaded",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA kernel module and the driver's library differ in version",
    pynvml.NVML_ERROR_NO_PERMISSION: "no permission to talk to the NVIDIA driver",
}
FATAL = {
    pynvml.NVML_ERROR_UNINITIALIZED,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_RESET_REQUIRED,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    pynvml.NVML_ERROR_GPU_NOT_FOUND,
}
THROTTLE_REASONS = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "power_cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware_slowdown",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync_boost",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hardware_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power_brake_slowdown",
    pynvml.nvmlClocksThrottleReasonBoardLimit: "board_limit",
    pynvml.nvmlClocksThrottleReasonReliability: "reliability",
}


class GpuLostError(DeviceError):
    """A GPU that stopped answering: it fell off the bus, needs a reset, or its driver was unloaded."""


@dataclass(frozen=True, kw_only=True)
class NvmlUnavailable:
    """Why there is no NVML.

    reason:     a phrase for people, such as `the NVIDIA driver is installed but not loaded`
    has_driver: whether the driver's library is there, so that something is wrong rather than absent
    """

    reason: str
    has_driver: bool


@dataclass(frozen=True, kw_only=True)
class GpuProcess:
    """A process that holds memory of a GPU.

    pid:          as the driver counts: in a container the host's
    name:         such as `python`; `?` where it may not be known
    memory_bytes: what it holds, None where the driver does not tell
    """

    pid: int
    name: str
    memory_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One visible GPU, or the first instance of one that is split by MIG.

    index:              position among the visible ones, from 0
    name:               such as `NVIDIA H100 80GB HBM3`
    uuid:               such as `GPU-8f3c...`
    memory_bytes:       total memory, None where the driver does not tell (memory shared with the host)
    used_bytes:         held by all processes and the driver, None likewise
    free_bytes:         free, None likewise
    compute_capability: such as (9, 0), None where unknown
    processes:          who holds its memory, most first
    """

    index: int
    name: str
    uuid: str
    memory_bytes: int | None
    used_bytes: int | None
    free_bytes: int | None
    compute_capability: tuple[int, int] | None
    processes: tuple[GpuProcess, ...]

    @property
    def bf16(self) -> bool:
        """Whether it computes in bf16 in hardware: Ampere (8.0) and newer."""
        return self.compute_capability is not None and self.compute_capability >= (8, 0)


@dataclass(frozen=True, kw_only=True)
class GpuSample:
    """One reading of a GPU; each field is None where the card or driver does not offer it.

    memory_used_bytes:    held by all processes and the driver
    process_memory_bytes: held by the process asked for; None also where the driver does not list it
    other_memory_bytes:   held by the other listed processes
    utilization_percent:  share of the last sampling period in which a kernel ran, 0 to 100
    power_watts:          draw of the board
    energy_joules:        the board's counter since the driver was loaded
    temperature_celsius:  of the GPU's core
    throttle_reasons:     what holds the clocks down, such as `power_cap`; empty for nothing
    """

    memory_used_bytes: int | None
    process_memory_bytes: int | None
    other_memory_bytes: int | None
    utilization_percent: float | None
    power_watts: float | None
    energy_joules: float | None
    temperature_celsius: float | None
    throttle_reasons: tuple[str, ...] | None


class Nvml:
    """NVML, initialised; made by `open_nvml`, closed by `close` or as a context manager."""

    def __init__(self) -> None:
        self.driver_version: str = _read(pynvml.nvmlSystemGetDriverVersion) or "?"
        self.cuda_version = _read_cuda_version()
        self._handles = _find_visible_handles(os.environ.get("CUDA_VISIBLE_DEVICES"))

    @property
    def gpu_count(self) -> int:
        """Number of visible GPUs."""
        return len(self._handles)

    def list_gpus(self) -> tuple[Gpu, ...]:
        """Every visible GPU with its memory and who holds it. Raises GpuLostError."""
        return tuple(_read_gpu(index, handle) for index, handle in enumerate(self._handles))

    def sample(self, index: int, pid: int) -> GpuSample:
        """Reads visible GPU `index`, and what process `pid` holds of it. Raises GpuLostError."""
        handle = self._handles[index]
        memory = _read(pynvml.nvmlDeviceGetMemoryInfo, handle)
        held = _read_process_memory(handle)
        utilization = _read(pynvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = _read(pynvml.nvmlDeviceGetPowerUsage, handle)
        millijoules = _read(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        return GpuSample(
            memory_used_bytes=None if memory is None else int(memory.used),
            process_memory_bytes=None if held is None else held.get(pid),
            other_memory_bytes=None if held is None else sum(n or 0 for other, n in held.items() if other != pid),
            utilization_percent=None if utilization is None else float(utilization.gpu),
            power_watts=None if milliwatts is None else milliwatts / 1000,
            energy_joules=None if millijoules is None else millijoules / 1000,
            temperature_celsius=_read_temperature(handle),
            throttle_reasons=_read_throttle_reasons(handle),
        )

    def close(self) -> None:
        """Lets go of NVML; a driver that is already gone is no error."""
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()

    def __enter__(self) -> Nvml:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_nvml() -> Nvml | NvmlUnavailable:
    """NVML, or why there is none; never raises."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        reason = REASONS.get(error.value, f"NVML does not start: {error}")
        return NvmlUnavailable(reason=reason, has_driver=error.value != pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    try:
        return Nvml()
    except (GpuLostError, pynvml.NVMLError) as error:
        pynvml.nvmlShutdown()
        return NvmlUnavailable(reason=str(error), has_driver=True)


def _read(call: Callable[..., T], *arguments: Any) -> T | None:
    """The call's answer; None where it is not supported or not permitted, GpuLostError where the GPU is gone."""
    try:
        return call(*arguments)
    except pynvml.NVMLError as error:
        if error.value in FATAL:
            raise GpuLostError(f"the GPU no longer answers: {error}") from error
        return None


def _read_cuda_version() -> str | None:
    """The newest CUDA that the driver runs, such as `13.0`."""
    version = _read(pynvml.nvmlSystemGetCudaDriverVersion_v2)
    return None if version is None else f"{version // 1000}.{version % 1000 // 10}"


def _find_visible_handles(visible: str | None) -> list[Handle]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; CUDA stops at the first entry it does not know."""
    count = _read(pynvml.nvmlDeviceGetCount) or 0
    found = (_read(pynvml.nvmlDeviceGetHandleByIndex, index) for index in range(count))
    handles = [handle for handle in found if handle is not None]
    if visible is not None:
        chosen: list[Handle] = []
        for entry in visible.split(","):
            handle = _find_handle(entry.strip(), handles)
            if handle is None:
                break
            chosen.append(handle)
        handles = chosen
    return [_find_first_instance(handle) for handle in handles]


def _find_handle(entry: str, handles: list[Handle]) -> Handle | None:
    """The GPU that one entry of CUDA_VISIBLE_DEVICES names: an index, a UUID or its unique beginning, or a MIG UUID."""
    if entry.isdecimal():
        return handles[int(entry)] if int(entry) < len(handles) else None
    if entry.startswith("MIG-"):
        return _read(pynvml.nvmlDeviceGetHandleByUUID, entry)
    if not entry.startswith("GPU-"):
        return None
    matches = [handle for handle in handles if str(_read(pynvml.nvmlDeviceGetUUID, handle)).startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _find_first_instance(handle: Handle) -> Handle:
    """The GPU itself, or its first MIG instance: all that CUDA lets a process use of a GPU that is split."""
    mode = _read(pynvml.nvmlDeviceGetMigMode, handle)
    if not mode or mode[0] == pynvml.NVML_DEVICE_MIG_DISABLE:
        return handle
    for index in range(_read(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        instance = _read(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
        if instance is not None:
            return instance
    return handle


def _read_gpu(index: int, handle: Handle) -> Gpu:
    memory = _read(pynvml.nvmlDeviceGetMemoryInfo, handle)
    held = _read_process_memory(handle) or {}
    return Gpu(
        index=index,
        name=_read(pynvml.nvmlDeviceGetName, handle) or "NVIDIA GPU",
        uuid=_read(pynvml.nvmlDeviceGetUUID, handle) or "?",
        memory_bytes=None if memory is None else int(memory.total),
        used_bytes=None if memory is None else int(memory.used),
        free_bytes=None if memory is None else int(memory.free),
        compute_capability=_read(pynvml.nvmlDeviceGetCudaComputeCapability, handle),
        processes=tuple(
            GpuProcess(pid=pid, name=_find_process_name(pid), memory_bytes=n)
            for pid, n in sorted(held.items(), key=lambda item: -(item[1] or 0))
        ),
    )


def _read_process_memory(handle: Handle) -> dict[int, int | None] | None:
    """Bytes held by each process, by pid; one that computes and draws is listed twice with the same figure."""
    lists = [
        _read(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle),
        _read(pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3, handle),
    ]
    if lists == [None, None]:
        return None
    return {process.pid: process.usedGpuMemory for listed in lists for process in listed or []}


def _find_process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "?"


def _read_temperature(handle: Handle) -> float | None:
    value = _read(pynvml.nvmlDeviceGetTemperatureV, handle, pynvml.NVML_TEMPERATURE_GPU)
    if value is None:
        value = _read(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
    return None if value is None else float(value)


def _read_throttle_reasons(handle: Handle) -> tuple[str, ...] | None:
    """What holds the clocks down; drivers before 535 know the call by its older name."""
    mask = _read(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if mask is None:
        mask = _read(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return None if mask is None else tuple(name for bit, name in THROTTLE_REASONS.items() if mask & bit)
