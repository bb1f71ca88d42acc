"""What a plan is made for: the GPU, or the CPU where there is none, and what may be used of its memory."""

from __future__ import annotations

import importlib.util
import os
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Literal

import psutil

from ...planner.catalog import TRITON_CAPABILITY, find_gpu, make_catalog_device
from ...planner.rates import FLOAT8_CAPABILITY, make_gpu_rates
from ...planner.strategy import Device, DeviceConstant, Rates
from ...recipes.errors import DeviceError
from ...recipes.schema import BudgetTable
from ...recipes.units import format_bytes
from ..versions import find_versions
from .calibration import Stack, load_calibration
from .host import Cpu, probe_cpu, probe_free_disk_bytes, probe_host_memory
from .nvml import Gpu, NvmlUnavailable, open_nvml


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The NVIDIA GPUs of this machine.

    visible:      in the order of CUDA_VISIBLE_DEVICES
    driver:       version of the NVIDIA driver, None without one
    cuda_version: the newest CUDA that the driver runs, such as `13.0`; None where unknown
    why_none:     a phrase for people that says why there is none; empty where there is one
    is_faulty:    whether the driver is there and does not work
    """

    visible: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda_version: str | None = None
    why_none: str = ""
    is_faulty: bool = False


def probe_device(budget: BudgetTable, *, disk_path: Path) -> Device:
    """The device that the budget names, or else what this machine has: its first visible GPU, or its CPU.

    RAM and disk are this host's too, unless the budget says them, or names a card on a machine without any GPU: such a
    plan is for another machine. What was learnt of the device (calibration.py) counts where it is in this one.

    disk_path: where the run writes; it need not exist yet
    """
    here = probe_gpus()
    if budget.gpu is not None:
        device = make_catalog_device(find_gpu(budget.gpu), budget).model_copy(update={"has_liger": has_liger()})
        if not here.visible:
            return device
    elif budget.gpus > max(len(here.visible), 1):
        why = f" ({here.why_none})" if here.why_none else ""
        raise DeviceError(f"budget.gpus: {budget.gpus} asked for, {len(here.visible)} found on this machine{why}")
    elif here.visible:
        device = _make_gpu_device(budget, here)
    else:
        device = _make_cpu_device(budget, here.why_none)
    found = {
        "beside": _find_constant(device, here),
        "host_memory_bytes": budget.host_memory_bytes or probe_host_memory().available_bytes,
        "disk_bytes": budget.disk_bytes or probe_free_disk_bytes(disk_path),
    }
    return device.model_copy(update=found)


def probe_gpus() -> Gpus:
    """The visible NVIDIA GPUs, or why there is none. Raises GpuLostError for one that does not answer."""
    nvml = open_nvml()
    if isinstance(nvml, NvmlUnavailable):
        why_none = f"no GPU: {nvml.reason}" if nvml.has_driver else "no GPU found"
        return Gpus(why_none=why_none, is_faulty=nvml.has_driver)
    with nvml:
        return Gpus(
            visible=nvml.list_gpus(),
            driver=nvml.driver_version,
            cuda_version=nvml.cuda_version,
            why_none="" if nvml.gpu_count else "no GPU is visible: see CUDA_VISIBLE_DEVICES",
        )


def probe_training_device() -> Literal["cuda", "cpu"]:
    """Where this installation of torch trains on this machine. Imports torch."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_runs_here(device: Device, *, required_bytes: int | None = None) -> None:
    """Raises DeviceError where a plan for this device cannot run on this machine. Imports torch for a GPU's plan.

    required_bytes: what the plan needs; compared with what is free now
    """
    if device.kind == "cpu":
        _check_cpu_has_free(required_bytes or 0)
        return
    here = probe_gpus()
    if not here.visible:
        raise DeviceError(
            f"the plan is for {device.name}, which is not in this machine ({here.why_none}): run it on a machine "
            "that has one, or leave budget.gpu out to train on this machine's CPU"
        )
    if len(here.visible) < device.gpus:
        raise DeviceError(f"the plan is for {device.gpus} GPUs, and this machine shows {len(here.visible)}")
    if probe_training_device() == "cpu":
        raise DeviceError(explain_torch_without_cuda(here))
    for gpu in here.visible[: device.gpus]:
        _check_torch_has_kernels(gpu)
        _check_gpu_can_run(gpu, device, required_bytes or 0)


def explain_torch_without_cuda(here: Gpus) -> str:
    """Why torch does not see the GPU that the driver sees, and what to do. Imports torch."""
    import torch

    cannot = f"and cannot use the {here.visible[0].name}"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a CPU build {cannot}: reinstall torch with CUDA (pytorch.org, Get Started, "
            "has the command), or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda} {cannot}: driver {here.driver} runs CUDA up "
        f"to {here.cuda_version or '?'}; update the driver, or reinstall torch for that CUDA"
    )


def describe_use(gpu: Gpu) -> str:
    """How full a GPU is and who fills it: `12.5 GiB of 79.6 GiB are free on NVIDIA H100 (python, pid 17: 67.1 GiB)`."""
    free, total = format_bytes(gpu.free_bytes or 0), format_bytes(gpu.memory_bytes or 0)
    holders = "; ".join(
        f"{process.name}, pid {process.pid}: {format_bytes(process.memory_bytes) if process.memory_bytes else '?'}"
        for process in gpu.processes[:3]
    )
    return f"{free} of {total} are free on {gpu.name}" + (f" ({holders})" if holders else "")


def _make_gpu_device(budget: BudgetTable, here: Gpus) -> Device:
    """The first `budget.gpus` cards as the fullest of them is: what others hold is not ours."""
    gpus = here.visible[: budget.gpus]
    fullest = min(gpus, key=lambda gpu: gpu.free_bytes or 0)
    if not fullest.memory_bytes or fullest.free_bytes is None:
        raise DeviceError(f"{fullest.name} does not say how much memory it has: name a card in budget.gpu")
    if fullest.free_bytes == 0:
        raise DeviceError(describe_use(fullest))
    return Device(
        name=gpus[0].name,
        kind="cuda",
        memory_bytes=min(gpu.memory_bytes or 0 for gpu in gpus),
        budget_bytes=budget.memory_bytes or fullest.free_bytes,
        bf16=all(gpu.bf16 for gpu in gpus),
        compiles=has_compiler() and all((gpu.compute_capability or (0, 0)) >= TRITON_CAPABILITY for gpu in gpus),
        gpus=budget.gpus,
        budget_source="free memory of the card" if budget.memory is None else "budget.memory",
        driver=here.driver,
        rates=_find_rates(gpus[0].name),
        has_float8=all((gpu.compute_capability or (0, 0)) >= FLOAT8_CAPABILITY for gpu in gpus),
        has_liger=has_liger(),
    )


def has_compiler() -> bool:
    """Whether torch.compile has what it needs for a GPU."""
    return explain_missing_compiler() is None


def explain_missing_compiler() -> str | None:
    """What torch.compile lacks for a GPU: Triton, or what its launchers are built with, a C compiler and Python's
    headers; None where nothing is missing. triton/runtime/build.py."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if not any(map(which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "no C compiler was found: install gcc"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers (Python.h) were not found: install python3-dev or python3-devel"
    return None


def has_liger() -> bool:
    """Whether Liger's kernels are installed, and Triton, which they are written in."""
    return find_spec("triton") is not None and find_spec("liger_kernel") is not None


def _make_cpu_device(budget: BudgetTable, why_none: str) -> Device:
    cpu, memory = probe_cpu(), probe_host_memory()
    if memory.available_bytes == 0:
        raise DeviceError(f"no {memory.limited_by} is free")
    return Device(
        name=name_cpu_device(cpu),
        kind="cpu",
        memory_bytes=memory.total_bytes,
        budget_bytes=budget.memory_bytes or memory.available_bytes,
        bf16=cpu.bf16,
        has_triton=importlib.util.find_spec("triton") is not None,
        has_amx="amx_bf16" in cpu.flags,
        budget_source=f"free {memory.limited_by} ({why_none})" if budget.memory is None else "budget.memory",
    )


def name_cpu_device(cpu: Cpu) -> str:
    """What a plan calls a CPU: `AMD EPYC 9354, 2 cores`."""
    return f"{cpu.name}, {cpu.cores} core{'' if cpu.cores == 1 else 's'}"


def _find_constant(device: Device, here: Gpus) -> DeviceConstant | None:
    """What was learnt of this device; None for a card of the catalog that is not in this machine."""
    if device.kind == "cpu":
        names = [device.name]
    else:
        names = [gpu.name for gpu in here.visible if device.name in (gpu.name, _find_catalog_name(gpu.name))]
    if not names:
        return None
    stack = Stack.of(names[0], None if device.kind == "cpu" else here.driver, find_versions())
    return load_calibration().find_constant(stack)


def _find_rates(name: str) -> Rates | None:
    """The catalog's rates of a card that NVML names; None where it does not have it."""
    try:
        return make_gpu_rates(find_gpu(name))
    except DeviceError:
        return None


def _find_catalog_name(name: str) -> str | None:
    """The catalog's name of a card that NVML names; None where it does not have it."""
    try:
        return find_gpu(name).name
    except DeviceError:
        return None


def _check_cpu_has_free(required_bytes: int) -> None:
    """A CPU plan's bytes are the process's resident peak, so what this process holds already counts as free."""
    memory = probe_host_memory()
    free_bytes = memory.available_bytes + int(psutil.Process().memory_info().rss)
    if required_bytes > free_bytes:
        raise DeviceError(
            f"the plan needs {format_bytes(required_bytes)}, and {format_bytes(free_bytes)} of {memory.limited_by} are "
            "free now: close other programs, or plan again"
        )


def explain_missing_kernels(gpu: Gpu, architectures: Sequence[str]) -> str | None:
    """Why a build of torch has no kernels for a GPU; None where it has. Kernels of sm_80 run on every 8.x, those of
    compute_90 on every later card: https://docs.nvidia.com/cuda/cuda-compiler-driver-nvcc/#gpu-compilation

    architectures: what torch is built for, as torch.cuda.get_arch_list() names them, such as `sm_90`; empty: unknown
    """
    if gpu.compute_capability is None or not architectures:
        return None
    major, minor = gpu.compute_capability
    for name in architectures:
        kind, _, digits = name.partition("_")
        built = re.match(r"(\d+)(\d)", digits)
        if built is None:
            continue
        found = int(built[1]), int(built[2])
        if found <= (major, minor) and (kind == "compute" or found[0] == major):
            return None
    return (
        f"torch has no kernels for {gpu.name}, whose compute capability is {major}.{minor}: it is built for "
        f"{', '.join(architectures)}; install a build of torch that has them, or set CUDA_VISIBLE_DEVICES= to train on "
        "the CPU"
    )


def _check_torch_has_kernels(gpu: Gpu) -> None:
    import torch

    missing = explain_missing_kernels(gpu, torch.cuda.get_arch_list())
    if missing is not None:
        raise DeviceError(missing)


def _check_gpu_can_run(gpu: Gpu, device: Device, required_bytes: int) -> None:
    if gpu.memory_bytes is not None and gpu.memory_bytes < device.budget_bytes:
        raise DeviceError(
            f"the plan may use {format_bytes(device.budget_bytes)} of {device.name}, and {gpu.name} has "
            f"{format_bytes(gpu.memory_bytes)} in all: plan again with this card"
        )
    if device.bf16 and not gpu.bf16:
        raise DeviceError(f"the plan computes in bf16, which {gpu.name} cannot: plan again with this card")
    if gpu.free_bytes is not None and gpu.free_bytes < required_bytes:
        raise DeviceError(
            f"the plan needs {format_bytes(required_bytes)}, and {describe_use(gpu)}: end what holds it, or plan again"
        )
