"""The doctor, on this machine for real, and on machines that lack something."""

from __future__ import annotations

import importlib.metadata
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fitune.runtime.machine.devices import explain_missing_compiler
from fitune.runtime.machine.doctor import Check, DoctorReport, render_doctor, run_doctor

RUN = """
    from fitune.runtime.machine.doctor import run_doctor
    report = run_doctor(runs_path=Path("{runs}"), timeout_seconds={timeout_seconds})
    show({{"healthy": report.healthy, "checks": {{check.name: check.model_dump() for check in report.checks}}}})
"""
NO_DRIVER = {"init_error": 12}


def examine(
    run_on_fake_gpus: Any, tmp_path: Path, *, packages: dict[str, str] | None = None, runs: str = "runs", **state: Any
) -> Any:
    """The doctor's checks by name; a torch that ends at once stands in for the real one, which takes seconds."""
    for name, source in ({"torch": "raise ImportError('not here')"} | (packages or {})).items():
        (tmp_path / "path" / name).mkdir(parents=True)
        (tmp_path / "path" / name / "__init__.py").write_text(source)
    environment = state.pop("environment", {}) | {"PYTHONPATH": str(tmp_path / "path")}
    return run_on_fake_gpus(RUN.format(runs=runs, timeout_seconds=60), environment=environment, **state)


def test_this_machine_is_examined_for_real(tmp_path: Path) -> None:
    report = run_doctor(runs_path=tmp_path / "runs")
    checks = {check.name: check for check in report.checks}
    assert {"Python", "packages", "torch", "bitsandbytes", "CPU", "bf16", "RAM", "swap", "runs"} <= set(checks)
    assert checks["torch"].status == checks["bitsandbytes"].status == "ok"
    assert report.versions["torch"] == importlib.metadata.version("torch")
    assert report.versions["torch"] in checks["torch"].detail
    assert not (tmp_path / "runs").exists()
    assert DoctorReport.model_validate_json(report.model_dump_json()) == report


def test_everything_that_is_not_ok_comes_with_advice(run_on_fake_gpus: Any, tmp_path: Path) -> None:
    shown = examine(run_on_fake_gpus, tmp_path, **NO_DRIVER)
    assert all(check["advice"] for check in shown["checks"].values() if check["status"] != "ok")


def test_a_torch_that_cannot_be_imported_makes_the_machine_unhealthy(run_on_fake_gpus: Any, tmp_path: Path) -> None:
    shown = examine(run_on_fake_gpus, tmp_path, **NO_DRIVER)
    assert shown["checks"]["torch"]["status"] == "fail"
    assert shown["checks"]["torch"]["detail"] == "ImportError: not here"
    assert "reinstall torch" in shown["checks"]["torch"]["advice"]
    assert shown["healthy"] is False


def test_a_machine_without_a_gpu_is_told_what_it_can_do(run_on_fake_gpus: Any, tmp_path: Path) -> None:
    gpu = examine(run_on_fake_gpus, tmp_path, **NO_DRIVER)["checks"]["GPU"]
    assert gpu["status"] == "warn"


def test_a_driver_that_differs_from_its_library_is_a_failure_with_its_cure(
    run_on_fake_gpus: Any, tmp_path: Path
) -> None:
    gpu = examine(run_on_fake_gpus, tmp_path, init_error=18)["checks"]["GPU"]
    assert gpu["status"] == "fail"
    assert "differ in version" in gpu["detail"]
    assert "restart" in gpu["advice"]


def test_a_lost_gpu_is_a_failure(run_on_fake_gpus: Any, tmp_path: Path) -> None:
    assert examine(run_on_fake_gpus, tmp_path, error=15)["checks"]["GPU"]["status"] == "fail"


def test_who_holds_a_cards_memory_is_named(run_on_fake_gpus: Any, tmp_path: Path) -> None:
    shown = examine(run_on_fake_gpus, tmp_path, gpus=2, used_mib_0=50000, other_mib_0=49000, other_pid=999_999_999)
    checks = shown["checks"]
    assert checks["driver"]["detail"] == "580.159.04, runs CUDA up to 13.0"
    assert checks["GPU 0"]["status"] == "warn"
    assert "?, pid 999999999: 47.9 GiB" in checks["GPU 0"]["detail"]
    assert checks["GPU 1"]["status"] == "ok"


TORCH = """
from types import SimpleNamespace
__version__, version = "{version}", SimpleNamespace(cuda={cuda})
cuda = SimpleNamespace(is_available=lambda: {available})
ones = lambda n, device: SimpleNamespace(sum=lambda: SimpleNamespace(item=lambda: n))
"""


@pytest.mark.parametrize(
    ("version", "cuda", "advice"),
    [("2.13.0+cpu", None, "reinstall torch with CUDA"), ("2.13.0", "14.0", "the driver runs CUDA up to 13.0")],
)
def test_a_torch_that_leaves_the_gpu_unused_is_a_failure(
    run_on_fake_gpus: Any, tmp_path: Path, version: str, cuda: str | None, advice: str
) -> None:
    source = TORCH.format(version=version, cuda=repr(cuda), available=False)
    check = examine(run_on_fake_gpus, tmp_path, packages={"torch": source})["checks"]["torch"]
    assert check["status"] == "fail"
    assert advice in check["advice"]


@pytest.mark.parametrize(("capability", "status"), [(7, "warn"), (8, "ok")])
def test_bf16_is_that_of_the_device_that_trains(
    run_on_fake_gpus: Any, tmp_path: Path, capability: int, status: str
) -> None:
    packages = {
        "torch": TORCH.format(version="2.13.0", cuda="'13.0'", available=True),
        "bitsandbytes": "raise RuntimeError('no kernel for this card')",
    }
    checks = examine(run_on_fake_gpus, tmp_path, packages=packages, capability=capability)["checks"]
    assert checks["torch"]["status"] == "ok"
    assert checks["bf16"]["status"] == status
    assert checks["bitsandbytes"]["detail"] == "RuntimeError: no kernel for this card"
    assert "adamw" in checks["bitsandbytes"]["advice"]
    assert (checks["compiler"]["status"] == "ok") == (explain_missing_compiler() is None)


def test_packages_that_are_missing_or_too_old_are_named_with_the_command(run_on_fake_gpus: Any, tmp_path: Path) -> None:
    for name, version in {"peft": "0.1.0", "gguf": "0.2"}.items():
        folder = tmp_path / "path" / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    checks = examine(run_on_fake_gpus, tmp_path, **NO_DRIVER)["checks"]
    assert (checks["peft"]["status"], checks["gguf"]["status"]) == ("fail", "warn")
    assert checks["peft"]["detail"].startswith("0.1.0 is too old; fitune needs >=")
    assert checks["peft"]["advice"].startswith("pip install 'peft>=")
    assert "embedded model" in checks["gguf"]["detail"]
    assert "peft" not in checks["packages"]["detail"]


def test_a_folder_that_cannot_be_written_is_a_failure(run_on_fake_gpus: Any, tmp_path: Path) -> None:
    checks = examine(
        run_on_fake_gpus, tmp_path, runs="/proc/runs", environment={"FITUNE_CACHE": "/proc/cache"}, **NO_DRIVER
    )["checks"]
    assert (checks["runs"]["status"], checks["fitune's cache"]["status"]) == ("fail", "fail")
    assert "output.dir" in checks["runs"]["advice"]
    assert "FITUNE_CACHE" in checks["fitune's cache"]["advice"]


@pytest.mark.parametrize(
    ("statuses", "healthy", "last"),
    [
        (["ok"], True, "Ready to train (0 remarks)."),
        (["ok", "warn"], True, "Ready to train (1 remark)."),
        (["fail", "warn", "fail"], False, "2 to put right before training (✗)."),
    ],
)
def test_a_report_is_shown_with_its_advice_and_summed_up(statuses: list[Any], healthy: bool, last: str) -> None:
    checks = tuple(
        Check(name=f"thing {n}", status=status, detail="found [bold]", advice=None if status == "ok" else f"do {n}")
        for n, status in enumerate(statuses)
    )
    report = DoctorReport(checks=checks, versions={})
    screen = io.StringIO()
    render_doctor(report, Console(file=screen, width=100))
    lines = screen.getvalue().splitlines()
    assert report.healthy is healthy
    assert lines[-1].strip() == last
    assert screen.getvalue().count("found [bold]") == len(statuses)
    assert [line.strip() for line in lines if "→" in line] == [f"→ {c.advice}" for c in checks if c.advice]


def test_a_terminal_that_has_ascii_alone_tells_what_is_well_from_what_is_not() -> None:
    statuses: list[Any] = ["ok", "warn", "fail"]
    checks = tuple(Check(name=f"thing {status}", status=status, detail="", advice="do") for status in statuses)
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    render_doctor(DoctorReport(checks=checks, versions={}), Console(file=screen, width=100))
    screen.seek(0)
    lines = [line.strip() for line in screen.read().splitlines()]
    assert [line[:2] for line in lines if "thing" in line] == ["+ ", "! ", "x "]
    assert "-> do" in lines
