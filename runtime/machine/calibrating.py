"""`fitune calibrate`: finished runs become the constants of this machine's devices; on a GPU it can make such runs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ...recipes.errors import DeviceError, FituneError, RunError
from ...recipes.units import format_bytes
from ..report import load_report
from ..versions import find_versions
from .calibration import Calibration, RunConstant, Stack, calibration_path, make_run_constant, save_run_constants
from .devices import explain_torch_without_cuda, name_cpu_device, probe_gpus, probe_training_device
from .host import probe_cpu

MEASURED_METHODS = ("full", "lora", "qlora")
"""Of the runs that `--measure` makes: between them they load every kernel that a step uses."""
MEASURED_SETTINGS = {
    "budget.memory": "6GiB",
    "data.eval": "0.01",
    "data.max_length": "128",
    "data.max_truncated": "1",
    "train.max_steps": "4",
    "train.optimizer": "adamw",
}
"""What they change in the recipe quickstart: short runs, without managed memory."""
MEASURED_SECONDS = 600
"""A run that takes longer hangs: the model is small, and compiling its layers takes a minute or two."""


def calibrate_runs(runs: Sequence[Path]) -> list[FituneError]:
    """Add finished runs of this machine to the calibration in the cache; returns why the others were not added."""
    here = probe_stacks()
    found: dict[Stack, list[RunConstant]] = {}
    refused: list[FituneError] = []
    for run in runs:
        try:
            stack, constant = _read_run_constant(run, here)
        except FituneError as error:
            refused.append(error)
        else:
            found.setdefault(stack, []).append(constant)
    for stack, constants in found.items():
        save_run_constants(stack, constants)
    return refused


def calibrate_gpu() -> list[FituneError]:
    """Run the embedded model with every method on the first visible GPU, and add the runs to the calibration.

    Returns why some of them failed or told nothing; the others count. DeviceError without a GPU that torch can use.
    """
    here = probe_gpus()
    if not here.visible:
        raise DeviceError(
            f"calibrate --measure: it measures a GPU, and there is none ({here.why_none}): give the directories of "
            "finished runs to calibrate this machine's CPU"
        )
    if probe_training_device() == "cpu":
        raise DeviceError(explain_torch_without_cuda(here))
    with tempfile.TemporaryDirectory() as folder:
        runs, failed = run_measuring_set(Path(folder))
        return [*failed, *calibrate_runs(runs)]


def run_measuring_set(folder: Path, methods: Iterable[str] = MEASURED_METHODS) -> tuple[list[Path], list[FituneError]]:
    """One short run of each method: the directories below `folder` of those that finished, and why others failed.

    Each is a process of its own: what CUDA's context holds once is not given back before the process ends.
    """
    finished: list[Path] = []
    failed: list[FituneError] = []
    for method in methods:
        run = folder / method
        settings = {**MEASURED_SETTINGS, "method.kind": method, "output.dir": str(run)}
        overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        why = _find_failure([sys.executable, "-m", "fitune.runtime.cli", "run", "quickstart", *overrides])
        if why is None:
            finished.append(run)
        else:
            failed.append(RunError(f"calibrate --measure: the run of {method} failed: {why}"))
    return finished, failed


def _find_failure(command: Sequence[str]) -> str | None:
    """Why a command failed, None where it did not: its last error, or else its last line."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            check=False,
            timeout=MEASURED_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {MEASURED_SECONDS} s"
    if done.returncode == 0:
        return None
    said = [line.strip() for line in (done.stderr.strip() or done.stdout).splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("error: ")]
    return (errors or said or [f"exit code {done.returncode}"])[-1].removeprefix("error: ")


def probe_stacks() -> tuple[Stack, ...]:
    """Every device of this machine that a run can use, with the installed versions."""
    here, versions = probe_gpus(), find_versions()
    names = [(gpu.name, here.driver) for gpu in here.visible]
    names.append((name_cpu_device(probe_cpu()), None))
    return tuple(dict.fromkeys(Stack.of(name, driver, versions) for name, driver in names))


def render_calibration(calibration: Calibration, console: Console, *, here: Sequence[Stack]) -> None:
    """Print what was learnt, device by device, and which of it plans on this machine use."""
    if not calibration.devices:
        console.print(Text(f"nothing learnt yet: {calibration_path()} holds no device"), soft_wrap=True)
    for known in calibration.devices:
        constant = known.make_constant()
        console.print(Text(str(known.stack), style="bold"), soft_wrap=True)
        console.print(Text(f"  {format_bytes(constant.bytes)} beside the tensors: {constant.source}"), soft_wrap=True)
        used = "used by plans here" if known.stack in here else "not used: here are another device, driver or versions"
        console.print(Text(f"  {used}"), soft_wrap=True)


def _read_run_constant(run: Path, here: Sequence[Stack]) -> tuple[Stack, RunConstant]:
    """What a run directory teaches, and of which of this machine's devices."""
    plan, report = load_report(run)
    device = plan.device
    if device.kind == "cuda" and device.driver is None:
        raise RunError(
            f"{run}: planned for the catalog's {device.name}, so the report does not say which card it ran on: run it "
            "without budget.gpu"
        )
    stack = Stack.of(device.name, device.driver, report.versions)
    if stack not in here:
        raise RunError(
            f"{run}: ran on {stack}; this machine has {' and '.join(map(str, here))}: a constant holds for the device "
            "and the versions that it was measured with"
        )
    return stack, make_run_constant(run, plan, report)
