"""What finished runs teach about a device: real ones of this CPU, and a GPU's as documents."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median_high
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small_models import save_small_model
from small_runs import plan_recipe, run_recipe_file, write_recipe

from fitune.planner.catalog import find_gpu, find_model, make_catalog_device
from fitune.planner.estimate import CUDA_CONTEXT_BYTES
from fitune.planner.plan import Plan, PlanInputs, make_plan
from fitune.planner.shape import make_shape
from fitune.planner.show.plan import render_plan
from fitune.planner.strategy import DataFacts
from fitune.recipes.errors import FituneError, PlanError, RunError
from fitune.recipes.load import recipe_from_resolved
from fitune.runtime.machine.calibrating import calibrate_runs, probe_stacks, run_measuring_set
from fitune.runtime.machine.calibration import (
    Calibration,
    RunConstant,
    Stack,
    calibration_path,
    load_calibration,
    make_run_constant,
    save_run_constants,
)
from fitune.runtime.report import (
    Loss,
    MeasuredMemory,
    MeasuredPhase,
    RunReport,
    Speed,
    list_phase_peaks,
    load_report,
    make_report_json,
)

MiB, GiB = 2**20, 2**30
BALLAST_BYTES = 256 * MiB
CONTEXT_BYTES = 790 * MiB
CUDA = Stack(device="NVIDIA Fake 80GB", driver="580.159.04", torch="2.13.0", bitsandbytes="0.50.2")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Two finished runs of different models and methods, in a process that holds more than the libraries."""
    ballast = b"\1" * BALLAST_BYTES
    finished = []
    for name, method, width in (("first", "full", 64), ("second", "lora", 128)):
        folder = tmp_path_factory.mktemp(name)
        recipe = write_recipe(folder, save_small_model(folder / "model", hidden_size=width), method={"kind": method})
        finished.append(run_recipe_file(recipe)[0])
    yield finished
    del ballast


def change_report(run: Path, target: Path, **changes: Any) -> Path:
    """A copy of a run directory's documents with keys of the report changed."""
    target.mkdir()
    document = json.loads((run / "report.json").read_text()) | changes
    (target / "report.json").write_text(json.dumps(document))
    (target / "plan.json").write_bytes((run / "plan.json").read_bytes())
    return target


def refuse(run: Path) -> str:
    """Why a run is not learnt from; nothing is written."""
    (error,) = calibrate_runs([run])
    assert isinstance(error, FituneError)
    assert not calibration_path().exists()
    return str(error)


def make_gpu_plan(**train: Any) -> Plan:
    tables = {"model": {"id": "llama-3.2-1b"}, "data": {"train": "rows.jsonl"}, "train": train}
    recipe_file = recipe_from_resolved(tables, Path("recipe.toml"))
    card, model = find_gpu("H100 80GB"), find_model("llama-3.2-1b")
    assert model is not None
    device = make_catalog_device(card, recipe_file.recipe.budget)
    return make_plan(
        PlanInputs(
            recipe_file=recipe_file,
            recipe_path="recipe.toml",
            shape=make_shape(model.config),
            config_sha256="0" * 64,
            device=device.model_copy(update={"name": CUDA.device, "driver": CUDA.driver}),
            data=DataFacts(rows=100, longest_row_tokens=1024, source="tokenised"),
            versions={"torch": "2.13.0", "bitsandbytes": "0.50.2"},
        )
    )


def make_gpu_report(plan: Plan, *, context_bytes: int = CONTEXT_BYTES, **changes: Any) -> RunReport:
    """The report of a run that took a tenth more than planned, beside a context of `context_bytes`."""
    reserved = int(1.1 * (plan.memory.peak_reserved_bytes or 0))
    phase = MeasuredPhase(name="backward", seconds=1.0, peak_allocated_bytes=reserved - 5, peak_device_bytes=None)
    measured = MeasuredMemory(
        peak_allocated_bytes=reserved - 5,
        peak_reserved_bytes=reserved,
        peak_device_bytes=reserved + plan.memory.managed_bytes + context_bytes,
        peak_host_bytes=4 * GiB,
        disk_bytes=1,
        phases=(phase,),
    )
    report = RunReport(
        recipe=plan.recipe,
        recipe_sha256=plan.recipe_sha256,
        status="finished",
        started_unix_time=1.79e9,
        loss=Loss(before=None, after=None, first=2.0, last=1.0),
        sample=None,
        measured=measured,
        speed=Speed(steps=4, tokens=100, train_seconds=1.0, total_seconds=2.0, tokens_per_second=100.0),
        output={},
        versions=plan.versions,
    )
    return report.model_copy(update=changes)


def make_constants(sizes: list[int]) -> list[RunConstant]:
    return [
        RunConstant(run=f"run-{number}", started_unix_time=1.79e9 + number, beside_bytes=size)
        for number, size in enumerate(sizes)
    ]


def test_a_calibrated_cpu_plan_is_closer_to_the_measured_peak(runs: list[Path], tmp_path: Path) -> None:
    """Learnt from a run of one model, tried on the run of another."""
    first, second = runs
    plan, report = load_report(second)
    assert plan.device.beside is None
    assert calibrate_runs([first]) == []
    _, calibrated = plan_recipe(second.parent / "recipe.toml")
    assert calibrated.device.beside is not None
    measured = report.measured.peak_device_bytes
    assert measured is not None
    before = abs(plan.memory.peak_device_bytes - measured)
    after = abs(calibrated.memory.peak_device_bytes - measured)
    assert after < before / 2
    assert after < 0.08 * measured


def test_a_constant_is_the_same_whatever_the_model(runs: list[Path]) -> None:
    first, second = (make_run_constant(run, *load_report(run)).beside_bytes for run in runs)
    assert first == pytest.approx(second, rel=0.08)


def test_every_later_plan_shows_where_its_constant_comes_from(runs: list[Path]) -> None:
    assert calibrate_runs(runs) == []
    _, plan = plan_recipe(runs[0].parent / "recipe.toml")
    assert plan.device.beside is not None
    assert plan.device.beside.source.startswith("2 runs on this machine, the last on 20")
    assert json.loads(plan.model_dump_json())["device"]["beside"]["bytes"] == plan.device.beside.bytes
    console = Console(file=io.StringIO(), width=160)
    render_plan(plan, console)
    assert isinstance(console.file, io.StringIO)
    (line,) = (one for one in console.file.getvalue().splitlines() if "with Python's libraries" in one)
    assert plan.device.beside.source in line


def test_a_run_that_is_given_twice_counts_once(runs: list[Path]) -> None:
    assert calibrate_runs([runs[0], runs[0]]) == []
    assert calibrate_runs([runs[0]]) == []
    (known,) = load_calibration().devices
    assert [run.run for run in known.runs] == ["run"]


def test_a_run_of_another_machine_is_refused(runs: list[Path], tmp_path: Path) -> None:
    copy = change_report(runs[0], tmp_path / "copy")
    plan = json.loads((copy / "plan.json").read_text())
    plan["device"]["name"] = "Other CPU, 64 cores"
    (copy / "plan.json").write_text(json.dumps(plan))
    message = refuse(copy)
    assert "ran on Other CPU, 64 cores, torch" in message
    assert str(probe_stacks()[-1]) in message


def test_a_run_with_other_versions_is_refused(runs: list[Path], tmp_path: Path) -> None:
    versions = {"torch": "2.11.0", "bitsandbytes": "0.50.2"}
    assert "torch 2.11.0" in refuse(change_report(runs[0], tmp_path / "copy", versions=versions))


@pytest.mark.parametrize("status", ["interrupted", "out_of_time"])
def test_a_run_that_did_not_reach_its_end_is_refused(runs: list[Path], tmp_path: Path, status: str) -> None:
    assert f"the run is {status}" in refuse(change_report(runs[0], tmp_path / "copy", status=status))


def test_a_directory_without_a_report_is_refused(tmp_path: Path) -> None:
    assert "the run has not finished" in refuse(tmp_path)


@pytest.mark.parametrize("kind", ["monitor_failed", "gpu_lost"])
def test_a_run_whose_monitor_failed_is_refused(runs: list[Path], tmp_path: Path, kind: str) -> None:
    event = {"kind": kind, "seconds": 1.0, "message": "no more samples are taken"}
    assert "no more samples are taken" in refuse(change_report(runs[0], tmp_path / "copy", events=[event]))


def test_a_run_that_left_its_plan_is_just_what_is_learnt_from(runs: list[Path], tmp_path: Path) -> None:
    event = {"kind": "memory_over_plan", "seconds": 1.0, "message": "memory has left the plan"}
    assert calibrate_runs([change_report(runs[0], tmp_path / "copy", events=[event])]) == []


def test_the_others_are_learnt_from_where_one_is_refused(runs: list[Path], tmp_path: Path) -> None:
    (refused,) = calibrate_runs([tmp_path / "gone", *runs])
    assert "gone" in str(refused)
    assert len(load_calibration().devices[0].runs) == 2


def test_a_cpu_run_with_large_tensors_is_refused(runs: list[Path]) -> None:
    plan, report = load_report(runs[0])
    phases = tuple(one.model_copy(update={"peak_allocated_bytes": 9 * GiB}) for one in plan.memory.phases)
    large = plan.model_copy(update={"memory": plan.memory.model_copy(update={"phases": phases})})
    with pytest.raises(RunError, match=r"9\.0 GiB of tensors hide what the process itself takes"):
        make_run_constant(runs[0], large, report)


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_a_gpus_constant_is_what_lies_beside_the_allocator_and_managed_memory(optimizer: str) -> None:
    plan = make_gpu_plan(optimizer=optimizer)
    assert (plan.memory.managed_bytes > 0) == optimizer.startswith("paged")
    assert make_run_constant(Path("run"), plan, make_gpu_report(plan)).beside_bytes == CONTEXT_BYTES


def test_how_far_a_plan_was_off_is_not_learnt() -> None:
    """The tenth that the report's tensors are above the plan stays out of the constant."""
    plan = make_gpu_plan()
    constant = make_run_constant(Path("run"), plan, make_gpu_report(plan))
    known = Calibration().add(CUDA, [constant]).find_constant(CUDA)
    again = make_plan_with(plan, known)
    assert again.memory.peak_reserved_bytes == plan.memory.peak_reserved_bytes
    assert known is not None and known.bytes == CONTEXT_BYTES
    difference = again.memory.peak_device_bytes - plan.memory.peak_device_bytes
    assert difference == CONTEXT_BYTES - CUDA_CONTEXT_BYTES


def make_plan_with(plan: Plan, constant: Any) -> Plan:
    """The same plan for a device of which `constant` is known."""
    recipe_file = recipe_from_resolved(plan.resolved_recipe, Path("recipe.toml"))
    model = find_model(plan.model.id)
    assert model is not None
    return make_plan(
        PlanInputs(
            recipe_file=recipe_file,
            recipe_path=plan.recipe,
            shape=make_shape(model.config),
            config_sha256=plan.model.config_sha256,
            device=plan.device.model_copy(update={"beside": constant}),
            data=DataFacts(rows=plan.data.rows, longest_row_tokens=plan.data.sequence_length, source="tokenised"),
            versions=plan.versions,
        )
    )


def test_a_gpu_that_was_not_measured_teaches_nothing() -> None:
    plan = make_gpu_plan()
    measured = make_gpu_report(plan).measured.model_copy(update={"peak_device_bytes": None})
    with pytest.raises(RunError, match="the GPU's memory was not measured"):
        make_run_constant(Path("run"), plan, make_gpu_report(plan, measured=measured))


def test_a_device_peak_below_its_tensors_is_refused() -> None:
    plan = make_gpu_plan()
    with pytest.raises(RunError, match="are not above the"):
        make_run_constant(Path("run"), plan, make_gpu_report(plan, context_bytes=-1))


def test_a_run_planned_for_a_card_of_the_catalog_is_refused(runs: list[Path], tmp_path: Path) -> None:
    plan = make_gpu_plan()
    device = plan.device.model_copy(update={"driver": None})
    copy = change_report(runs[0], tmp_path / "copy")
    (copy / "plan.json").write_text(plan.model_copy(update={"device": device}).model_dump_json())
    assert "run it without budget.gpu" in refuse(copy)


@given(st.lists(st.integers(1, 2 * GiB), min_size=1, max_size=9))
def test_the_constant_is_the_median_run_and_its_range_is_shown(sizes: list[int]) -> None:
    known = Calibration().add(CUDA, make_constants(sizes)).find_constant(CUDA)
    assert known is not None
    assert known.bytes == median_high(sizes)
    assert known.source.startswith("1 run on" if len(sizes) == 1 else f"{len(sizes)} runs on")


@given(st.permutations(range(6)), st.integers(0, 6))
def test_the_order_in_which_runs_are_added_does_not_matter(order: list[int], cut: int) -> None:
    constants = make_constants([100 * MiB + number for number in range(6)])
    mixed = [constants[number] for number in order]
    assert Calibration().add(CUDA, mixed[:cut] or mixed).add(CUDA, mixed) == Calibration().add(CUDA, constants)


@pytest.mark.parametrize(
    "change", [{"device": "NVIDIA A100"}, {"driver": "590.1"}, {"torch": "2.14.0"}, {"bitsandbytes": None}]
)
def test_a_constant_holds_for_its_device_driver_and_versions_only(change: dict[str, Any]) -> None:
    calibration = Calibration().add(CUDA, make_constants([700 * MiB]))
    other = CUDA.model_copy(update=change)
    assert calibration.find_constant(CUDA) is not None
    assert calibration.find_constant(other) is None
    both = calibration.add(other, make_constants([900 * MiB]))
    assert [one.stack for one in both.devices] == [CUDA, other]


def test_the_calibration_is_read_as_it_was_saved() -> None:
    assert load_calibration() == Calibration()
    saved = save_run_constants(CUDA, make_constants([700 * MiB, 710 * MiB]))
    assert load_calibration() == saved
    assert [path.name for path in calibration_path().parent.iterdir() if path.suffix != ".lock"] == ["calibration.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 2}', '{"devices": [{}]}'])
def test_a_calibration_that_cannot_be_read_is_one_message(content: str) -> None:
    calibration_path().parent.mkdir()
    calibration_path().write_text(content)
    with pytest.raises(PlanError, match="remove it and calibrate again") as refused:
        load_calibration()
    assert str(refused.value).startswith(f"{calibration_path()}: ")
    assert "\n" not in str(refused.value)


def test_a_cache_that_cannot_be_written_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RunError, match=r"calibration\.json: cannot be written"):
        save_run_constants(CUDA, make_constants([700 * MiB]))


PROBE = """
    from fitune.recipes.schema import BudgetTable
    from fitune.runtime.machine.calibration import RunConstant, Stack, save_run_constants
    from fitune.runtime.machine.devices import probe_device
    from fitune.runtime.versions import find_versions
    constant = RunConstant(run="run", started_unix_time=1.79e9, beside_bytes=700 * 2**20)
    save_run_constants(Stack.of("{name}", "{driver}", find_versions()), [constant])
    show(probe_device(BudgetTable(**{budget}), disk_path=Path("runs")).model_dump()["beside"])
"""


def test_a_plan_for_the_card_in_this_machine_uses_what_was_learnt_of_it(run_on_fake_gpus: Any) -> None:
    beside = run_on_fake_gpus(PROBE.format(name=CUDA.device, driver=CUDA.driver, budget={}))
    assert beside == {"bytes": 700 * MiB, "source": "1 run on this machine, 2026-09-21"}


@pytest.mark.parametrize(
    ("name", "driver", "budget"),
    [
        ("NVIDIA Fake 80GB", "570.1", {}),
        ("NVIDIA GeForce RTX 4090", "580.159.04", {"gpu": "RTX 4090"}),
        ("RTX 4090", "580.159.04", {"gpu": "RTX 4090"}),
    ],
    ids=["another driver", "a card that is not here", "a catalog name"],
)
def test_what_was_learnt_of_something_else_is_not_used(
    run_on_fake_gpus: Any, name: str, driver: str, budget: dict[str, str]
) -> None:
    assert run_on_fake_gpus(PROBE.format(name=name, driver=driver, budget=budget)) is None


def test_without_a_gpu_measuring_is_refused_and_says_what_to_do(run_on_fake_gpus: Any) -> None:
    source = """
        from fitune.recipes.errors import DeviceError
        from fitune.runtime.machine.calibrating import calibrate_gpu
        try:
            calibrate_gpu()
        except DeviceError as error:
            show(str(error))
    """
    message = run_on_fake_gpus(source, init_error=12)
    assert "it measures a GPU, and there is none (no GPU found)" in message
    message = run_on_fake_gpus(source)
    assert "cannot use the NVIDIA Fake 80GB" in message


@pytest.mark.slow
def test_the_measuring_sets_run_is_one_to_learn_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded_model: Path
) -> None:
    """On this CPU, which stands for a GPU as far as a run goes."""
    monkeypatch.setenv("FITUNE_CACHE", str(embedded_model.parent))
    (run,), failed = run_measuring_set(tmp_path / "set", methods=["lora"])
    assert not failed
    assert 300 * MiB < make_run_constant(run, *load_report(run)).beside_bytes < 1500 * MiB


def test_a_measuring_run_that_fails_says_why(tmp_path: Path) -> None:
    finished, (failed,) = run_measuring_set(tmp_path, methods=["qlra"])
    assert not finished
    assert re.search(r"the run of qlra failed: .*is not one of auto, full, lora, qlora", str(failed))


def test_a_report_has_each_phase_predicted_and_measured(runs: list[Path]) -> None:
    plan, report = load_report(runs[0])
    peaks = {one["name"]: one for one in json.loads(make_report_json(plan, report))["phases"]}
    assert {"load", "forward", "backward", "optimizer", "evaluate", "save"} <= peaks.keys()
    measured = {one.name: one.peak_device_bytes for one in report.measured.phases}
    assert all(peaks[name]["measured_bytes"] == measured[name] for name in peaks)
    planned = {phase.name: phase.host_bytes for phase in plan.memory.phases}
    assert all(peaks[name]["predicted_bytes"] == planned[name] for name in peaks)


def test_on_a_gpu_a_phases_live_tensors_stand_side_by_side() -> None:
    plan = make_gpu_plan()
    (peaks,) = list_phase_peaks(plan, make_gpu_report(plan))
    planned = {phase.name: phase.peak_allocated_bytes for phase in plan.memory.phases}
    assert (peaks.name, peaks.predicted_bytes) == ("backward", planned["backward"])
    assert peaks.measured_bytes == make_gpu_report(plan).measured.peak_allocated_bytes
