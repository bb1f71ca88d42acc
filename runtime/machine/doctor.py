"""`fitune doctor`: what this machine has for fine-tuning, what is wrong with it, and what to do about that."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...planner.strategy import Value
from ...recipes.errors import DeviceError
from ...recipes.units import GiB, format_bytes
from ..model.embedded import cache_folder
from .devices import Gpus, describe_use, explain_missing_compiler, probe_gpus
from .host import find_existing, has_nvidia_card, probe_cpu, probe_free_disk_bytes, probe_host_memory
from .smoke import SmokeTest, run_smoke_test

Status = Literal["ok", "warn", "fail"]

LITTLE_RAM_BYTES = 4 * GiB
LITTLE_DISK_BYTES, NO_DISK_BYTES = 10 * GiB, 1 * GiB
FREE_SHARE_OF_GPU = 0.75
"""A GPU of which less is free gets a warning that names who holds it."""
MARKS: dict[Status, tuple[str, str]] = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}
ASCII = {"✓": "+", "!": "!", "✗": "x", "→": "->"}
"""The marks on a terminal that has ASCII alone."""


class Check(Value):
    """One thing that was looked at.

    name:   such as `torch`
    status: ok; warn for what works with limits; fail for what does not work
    detail: what was found
    advice: what to do about it, None where there is nothing to do
    """

    name: str
    status: Status
    detail: str
    advice: str | None = None


class DoctorReport(Value):
    """Everything that was looked at, in the order shown.

    format_version: of this document
    checks:         one a finding
    versions:       of the installed packages that fitune needs, by name
    """

    format_version: Literal[1] = 1
    checks: tuple[Check, ...]
    versions: dict[str, str]

    @property
    def healthy(self) -> bool:
        """Whether nothing failed; warnings do not count."""
        return all(check.status != "fail" for check in self.checks)


def run_doctor(*, runs_path: Path = Path("runs"), timeout_seconds: float = 120.0) -> DoctorReport:
    """Looks at everything; takes some seconds, because torch and bitsandbytes are tried in a child process.

    runs_path: where runs are written, unless a recipe says otherwise
    """
    versions = _find_versions()
    try:
        here = probe_gpus()
    except DeviceError as error:
        here = Gpus(why_none=str(error), is_faulty=True)
    smoke = run_smoke_test(timeout_seconds=timeout_seconds)
    checks = [
        _check_python(),
        *_check_packages(versions),
        *_check_gpus(here),
        _check_torch(smoke, here),
        _check_bitsandbytes(smoke),
        *_check_compiler(smoke),
        _check_cpu(),
        _check_bf16(here, smoke),
        _check_memory(),
        _check_swap(),
        *_check_disks(runs_path),
    ]
    return DoctorReport(checks=tuple(checks), versions=versions)


def render_doctor(report: DoctorReport, console: Console) -> None:
    """Prints the report as a table, and a last line that sums it up."""
    shown = ASCII if console.options.ascii_only else {mark: mark for mark in ASCII}
    arrow = shown["→"]
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(width=1)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for check in report.checks:
        mark, style = MARKS[check.status]
        text = Text(check.detail)
        if check.advice is not None:
            text.append(f"\n{arrow} {check.advice}", style="cyan")
        table.add_row(Text(shown[mark], style=style), check.name, text)
    console.print(table)
    failed, warned = (sum(check.status == status for check in report.checks) for status in ("fail", "warn"))
    if report.healthy:
        console.print(Text(f"Ready to train ({warned} remark{'' if warned == 1 else 's'}).", style="green"))
    else:
        console.print(Text(f"{failed} to put right before training ({shown['✗']}).", style="bold red"))


def _list_requirements() -> Iterator[Requirement]:
    """What fitune's own metadata asks for, extras included; nothing where fitune is not installed."""
    try:
        written = importlib.metadata.requires("fitune") or []
    except importlib.metadata.PackageNotFoundError:
        return
    yield from map(Requirement, written)


def _find_versions() -> dict[str, str]:
    versions = {}
    for requirement in _list_requirements():
        try:
            versions[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _check_python() -> Check:
    version = platform.python_version()
    try:
        allowed = importlib.metadata.metadata("fitune")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        advice = "install it: pip install . in its folder"
        return Check(name="Python", status="fail", detail=f"{version}; fitune is not installed", advice=advice)
    if SpecifierSet(allowed).contains(version, prereleases=True):
        return Check(name="Python", status="ok", detail=f"{version} on {platform.system()} {platform.machine()}")
    advice = f"make an environment with Python {allowed}"
    return Check(name="Python", status="fail", detail=f"{version}, and fitune needs {allowed}", advice=advice)


def _check_packages(versions: dict[str, str]) -> Iterator[Check]:
    """One line for all that is well, and one for each package that is missing or too old."""
    well = []
    for requirement in _list_requirements():
        name, version = requirement.name, versions.get(requirement.name)
        is_needed, is_demo = _applies(requirement, extra=""), _applies(requirement, extra="demo")
        if not (is_needed or is_demo):
            continue
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            well.append(f"{name} {version}")
            continue
        found = "not installed" if version is None else f"{version} is too old"
        yield Check(
            name=name,
            status="fail" if is_needed else "warn",
            detail=f"{found}; fitune needs {requirement.specifier}" + ("" if is_needed else " for its embedded model"),
            advice=f"pip install '{name}{requirement.specifier}'",
        )
    yield Check(name="packages", status="ok", detail=", ".join(well) or "none of fitune's")


def _applies(requirement: Requirement, *, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _check_gpus(here: Gpus) -> Iterator[Check]:
    if here.is_faulty:
        advice = "restart the machine, which loads the driver that is installed; if that does not help, reinstall it"
        yield Check(name="GPU", status="fail", detail=here.why_none, advice=advice)
    elif not here.visible and here.driver is None and has_nvidia_card():
        detail = "an NVIDIA GPU is in the machine, and no driver is"
        advice = "install the NVIDIA driver; in a container, start it with the GPUs (docker run --gpus all)"
        yield Check(name="GPU", status="warn", detail=detail, advice=advice)
    elif not here.visible:
        advice = "small models train on the CPU; plan for a card elsewhere with budget.gpu"
        yield Check(name="GPU", status="warn", detail=here.why_none, advice=advice)
    else:
        yield Check(name="driver", status="ok", detail=f"{here.driver}, runs CUDA up to {here.cuda_version or '?'}")
    for gpu in here.visible:
        is_free = gpu.memory_bytes is None or (gpu.free_bytes or 0) >= FREE_SHARE_OF_GPU * gpu.memory_bytes
        yield Check(
            name=f"GPU {gpu.index}",
            status="ok" if is_free else "warn",
            detail=f"{gpu.name} does not tell its memory" if gpu.memory_bytes is None else describe_use(gpu),
            advice=None
            if is_free
            else "end what holds its memory, or train within what is free: plans count on no more",
        )


def _check_torch(smoke: SmokeTest, here: Gpus) -> Check:
    if smoke.torch_error is not None:
        advice = "reinstall torch (pytorch.org, Get Started, has the command for this machine)"
        return Check(name="torch", status="fail", detail=smoke.torch_error, advice=advice)
    build = f"built for CUDA {smoke.torch_cuda}" if smoke.torch_cuda else "a CPU build"
    detail = f"{smoke.torch_version}, {build}, trains on {'the GPU' if smoke.device == 'cuda' else 'the CPU'}"
    if smoke.device == "cuda" or not here.visible:
        return Check(name="torch", status="ok", detail=detail)
    if smoke.torch_cuda is None:
        advice = "reinstall torch with CUDA to use the GPU (pytorch.org, Get Started, has the command)"
    else:
        advice = f"the driver runs CUDA up to {here.cuda_version or '?'}: update it, or reinstall torch for that CUDA"
    return Check(name="torch", status="fail", detail=detail, advice=advice)


def _check_bitsandbytes(smoke: SmokeTest) -> Check:
    if smoke.bitsandbytes_error is None:
        where = "the GPU" if smoke.device == "cuda" else "the CPU"
        return Check(name="bitsandbytes", status="ok", detail=f"a 4-bit layer trains on {where}")
    advice = 'plan with method.kind = "lora" or "full" and optimizer = "adamw", which do without it; or reinstall it'
    return Check(name="bitsandbytes", status="fail", detail=smoke.bitsandbytes_error, advice=advice)


def _check_compiler(smoke: SmokeTest) -> Iterator[Check]:
    """What compiled layers need, on a GPU: a CPU's are not compiled."""
    if smoke.device != "cuda":
        return
    missing = explain_missing_compiler()
    if missing is None:
        yield Check(name="compiler", status="ok", detail="layers can be compiled: Triton, a C compiler, Python.h")
    else:
        what, _, advice = missing.partition(": ")
        detail = f"{what}; plans do without compiled layers, which are faster"
        yield Check(name="compiler", status="warn", detail=detail, advice=advice)


def _check_cpu() -> Check:
    cpu = probe_cpu()
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
    flags = ", ".join(flag for flag in known if flag in cpu.flags) or "none known"
    return Check(name="CPU", status="ok", detail=f"{cpu.name}, {cpu.cores} cores, vector instructions: {flags}")


def _check_bf16(here: Gpus, smoke: SmokeTest) -> Check:
    if smoke.device == "cuda" and here.visible:
        gpu = here.visible[0]
        if gpu.bf16:
            return Check(name="bf16", status="ok", detail=f"{gpu.name} computes in bf16")
        advice = "plans use fp16 with a gradient scaler here; Ampere and newer cards have bf16"
        return Check(name="bf16", status="warn", detail=f"{gpu.name} has no bf16", advice=advice)
    if probe_cpu().bf16:
        return Check(name="bf16", status="ok", detail="the CPU computes in bf16")
    advice = "plans for this CPU use fp32: in bf16 it would be some twenty times slower"
    return Check(name="bf16", status="warn", detail="the CPU has no bf16 instructions", advice=advice)


def _check_memory() -> Check:
    memory = probe_host_memory()
    detail = f"{format_bytes(memory.available_bytes)} of {format_bytes(memory.total_bytes)} free ({memory.limited_by})"
    if memory.available_bytes >= LITTLE_RAM_BYTES:
        return Check(name="RAM", status="ok", detail=detail)
    advice = "close other programs, or raise the limit of the container or shell: loading a model goes through RAM"
    return Check(name="RAM", status="warn", detail=detail, advice=advice)


def _check_swap() -> Check:
    swap = psutil.swap_memory()
    if swap.total == 0:
        return Check(name="swap", status="ok", detail="none: a run out of RAM is ended by the kernel")
    detail = f"{format_bytes(swap.free)} of {format_bytes(swap.total)} free"
    if swap.percent < 50:
        return Check(name="swap", status="ok", detail=detail)
    return Check(name="swap", status="warn", detail=detail, advice="close other programs: training that swaps crawls")


def _check_disks(runs_path: Path) -> Iterator[Check]:
    folders = {"runs": (runs_path, "set output.dir"), "fitune's cache": (cache_folder(), "set FITUNE_CACHE")}
    hub = (
        os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface") / "hub"
    )
    folders["hub's cache"] = (Path(hub), "set HF_HOME")
    for name, (folder, remedy) in folders.items():
        advice = f"free some, or {remedy} to a folder elsewhere"
        if not find_existing(folder).is_dir():
            yield Check(name=name, status="fail", detail=f"{find_existing(folder)} is no folder", advice=advice)
            continue
        if not os.access(find_existing(folder), os.W_OK):
            yield Check(name=name, status="fail", detail=f"{folder} cannot be written", advice=advice)
            continue
        free_bytes = probe_free_disk_bytes(folder)
        status: Status = "ok" if free_bytes >= LITTLE_DISK_BYTES else "warn" if free_bytes >= NO_DISK_BYTES else "fail"
        detail = f"{format_bytes(free_bytes)} of disk free at {folder}"
        yield Check(name=name, status=status, detail=detail, advice=None if status == "ok" else advice)
