from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from small_models import save_small_model
from small_runs import run_recipe_file, write_recipe

from fitune.planner.plan import Plan
from fitune.recipes.errors import RunError
from fitune.recipes.units import format_bytes
from fitune.runtime.machine.samples import PhasePeak, Tally
from fitune.runtime.report import RunReport, load_report, make_report_json
from fitune.runtime.report_page import render_report_page
from fitune.runtime.report_view import list_memory, list_speed, list_times, render_report
from fitune.runtime.training.loop import Progress
from fitune.runtime.training.outcome import make_speed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that has finished."""
    folder = tmp_path_factory.mktemp("finished")
    return run_recipe_file(write_recipe(folder, save_small_model(folder / "model")))[0]


def render(plan: Plan, report: RunReport) -> str:
    console = Console(file=io.StringIO(), width=160)
    render_report(plan, report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_report_shows_the_loss_the_question_and_both_memories(finished: Path) -> None:
    plan, report = load_report(finished)
    text = render(plan, report)
    assert report.loss.before is not None and report.loss.after is not None and report.sample is not None
    change = 100 * (report.loss.after / report.loss.before - 1)
    assert f"{report.loss.before:.3f} -> {report.loss.after:.3f} ({change:+.1f} %)" in text
    assert report.sample.question in text and "before" in text and "after" in text
    measured = report.measured.peak_device_bytes
    assert measured is not None
    (line,) = (one for one in text.splitlines() if "resident memory of the process" in one)
    error = 100 * (plan.memory.peak_device_bytes / measured - 1)
    assert line.rstrip().endswith(f"{error:+.1f} %")
    assert format_bytes(plan.memory.peak_device_bytes) in line and format_bytes(measured) in line
    assert format_bytes(plan.memory.budget_bytes) in text


def test_a_report_as_json_has_the_predicted_memory_beside_the_measured(finished: Path) -> None:
    plan, report = load_report(finished)
    document = json.loads(make_report_json(plan, report))
    assert document["predicted"] == plan.memory.model_dump(mode="json")
    assert document["measured"]["peak_device_bytes"] == report.measured.peak_device_bytes
    assert document["status"] == "finished" and document["format_version"] == 1


def test_a_report_sets_the_measured_speed_beside_the_planned_one(finished: Path) -> None:
    plan, report = load_report(finished)
    planned, measured = plan.speed, report.speed
    assert planned is not None and measured.tokens_per_second is not None and measured.step_seconds is not None
    steady_seconds = measured.train_seconds - measured.first_step_seconds
    assert measured.step_seconds == pytest.approx(steady_seconds / (measured.steps - 1)), "the first step is left out"
    assert json.loads(make_report_json(plan, report))["predicted_speed"] == planned.model_dump(mode="json")
    lines = {line.split("  ")[1]: line for line in render(plan, report).splitlines() if line.startswith("  ")}
    tokens, utilization = lines["tokens a second"], lines["model FLOPs utilization"]
    assert f"{planned.tokens_per_second:,.0f}" in tokens and f"{measured.tokens_per_second:,.0f}" in tokens
    reached = planned.model_flops_utilization * measured.tokens_per_second / planned.tokens_per_second
    assert f"{reached:.1%}" in utilization
    assert "J for 1,000 tokens" not in lines, "a CPU has no counter"


def test_energy_a_token_is_that_of_the_training_steps() -> None:
    phases = (
        PhasePeak(name="load", seconds=5, peak_rss_bytes=0, peak_device_bytes=0, energy_joules=999.0),
        PhasePeak(name="forward", seconds=1, peak_rss_bytes=0, peak_device_bytes=0, energy_joules=300.0),
        PhasePeak(name="backward", seconds=3, peak_rss_bytes=0, peak_device_bytes=0, energy_joules=900.0),
    )
    summary = Tally().make_summary(seconds=9, rss_peak_is_exact=True, events=())
    speed = make_speed(
        Progress(step=4, tokens=20_000, train_seconds=8.0), total_seconds=20.0, summary=replace(summary, phases=phases)
    )
    assert speed.joules_per_1000_tokens == pytest.approx(1000 * 300 * 8 / 20_000), "300 W, 8 s in all sessions"
    assert (speed.step_seconds, speed.tokens_per_second) == (2.0, 2500.0)


def test_the_first_step_of_each_session_does_not_count_in_the_speed_unless_there_are_no_others() -> None:
    progress = Progress()
    progress.count(1, 100, 9.0, is_first=True)
    assert progress.steady == (1, 100, 9.0)
    progress.count(2, 300, 2.0, is_first=False)
    progress.count(3, 100, 7.0, is_first=True)
    progress.count(4, 100, 1.0, is_first=False)
    assert progress.steady == (2, 400, 3.0)
    speed = make_speed(
        progress, total_seconds=30.0, summary=Tally().make_summary(seconds=9, rss_peak_is_exact=True, events=())
    )
    assert (speed.first_step_seconds, speed.train_seconds) == (16.0, 19.0)
    assert (speed.step_seconds, speed.tokens_per_second) == (1.5, pytest.approx(400 / 3))


def test_a_report_sets_the_time_of_each_part_beside_the_planned_one(finished: Path) -> None:
    plan, report = load_report(finished)
    assert plan.speed is not None
    parts = {one["name"]: one for one in json.loads(make_report_json(plan, report))["parts"]}
    assert {"load", "evaluate", "train", "save"} <= set(parts)
    assert plan.speed.total_seconds == pytest.approx(sum(one["predicted_seconds"] for one in parts.values()))
    measured = sum(one["measured_seconds"] for one in parts.values())
    assert 0.7 * report.speed.total_seconds < measured <= report.speed.total_seconds
    lines = {line.split("  ")[1]: line for line in render(plan, report).splitlines() if line.startswith("  ")}
    assert set(parts) | {"the whole run"} <= set(lines)


def test_a_run_that_was_not_done_in_one_go_is_not_compared_with_the_time_of_a_whole_one(finished: Path) -> None:
    plan, report = load_report(finished)
    stopped = report.model_copy(update={"status": "interrupted"})
    resumed = report.model_copy(update={"resumed_from": (1,)})
    early = report.model_copy(update={"speed": report.speed.model_copy(update={"steps": report.speed.steps - 1})})
    for part in (stopped, resumed, early):
        assert [one["name"] for one in json.loads(make_report_json(plan, part))["parts"]] == ["load"]
        assert "the whole run" not in render(plan, part)


def test_text_in_brackets_is_shown_as_it_is(finished: Path) -> None:
    """An answer or a path is not the terminal's markup."""
    plan, report = load_report(finished)
    assert report.sample is not None
    sample = report.sample.model_copy(update={"question": "[bold]why[/nonsense]?"})
    text = render(plan, report.model_copy(update={"sample": sample, "recipe": "[a]/[/b].toml"}))
    assert "[bold]why[/nonsense]?" in text and "[a]/[/b].toml" in text


def test_events_of_the_monitor_are_shown(finished: Path) -> None:
    plan, report = load_report(finished)
    event = {"kind": "memory_over_plan", "message": "memory [x] has left the plan"}
    assert "note: memory [x] has left the plan" in render(plan, report.model_copy(update={"events": (event,)}))


def test_a_run_without_held_out_rows_and_steps_can_be_shown(finished: Path) -> None:
    plan, report = load_report(finished)
    loss = report.loss.model_copy(update={"before": None, "after": None, "first": None, "last": None})
    speed = report.speed.model_copy(update={"steps": 0, "tokens_per_second": None})
    text = render(
        plan, report.model_copy(update={"loss": loss, "speed": speed, "sample": None, "status": "interrupted"})
    )
    assert "interrupted" in text and "held-out" not in text


def test_a_directory_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"gone: there is no such run directory"):
        load_report(tmp_path / "gone")


def test_a_run_that_has_not_finished_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no report\.json in it: the run has not finished"):
        load_report(tmp_path)


@pytest.mark.parametrize("name", ["plan.json", "report.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format_version": 2}', b"\xff\xfe"])
def test_a_damaged_document_is_one_message(finished: Path, tmp_path: Path, name: str, content: bytes) -> None:
    for one in ("plan.json", "report.json"):
        (tmp_path / one).write_bytes((finished / one).read_bytes())
    (tmp_path / name).write_bytes(content)
    what = rf"{name}: not a {name.removesuffix('.json')} of this version of fitune: "
    with pytest.raises(RunError, match=what) as refused:
        load_report(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_run_without_its_plan_is_one_message(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes((finished / "report.json").read_bytes())
    with pytest.raises(RunError, match=r"plan\.json: cannot be read: No such file"):
        load_report(tmp_path)


def test_a_run_is_shown_as_a_page_with_its_losses_its_memory_and_every_figure(finished: Path) -> None:
    plan, report = load_report(finished)
    page = render_report_page(plan, report, finished)
    assert page.count("<svg") == 2
    assert f"predicted {format_bytes(plan.memory.peak_device_bytes)}</text>" in page
    rows = [*list_memory(plan, report), *list_speed(plan, report), *list_times(plan, report)]
    assert len(rows) > 12
    assert all(f'<td class="n">{cell}</td>' in page for row in rows for cell in row[1:] if cell)


def test_a_page_of_a_run_takes_no_text_for_html_and_leaves_out_what_is_damaged(finished: Path, tmp_path: Path) -> None:
    plan, report = load_report(finished)
    assert report.sample is not None
    sample = report.sample.model_copy(update={"after": "<script>alert(1)</script>"})
    hostile = report.model_copy(update={"sample": sample, "recipe": "<b>x</b>.toml"})
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": 2.0}\n{"step": "a", "loss": 1}\n\xff\n[1]\n{"step": 2, "lo'
    )
    page = render_report_page(plan, hostile, tmp_path)
    assert "<script>alert" not in page and "<b>x</b>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<svg" not in page, "one point is no line"


def test_memory_of_a_resumed_run_is_drawn_on_from_where_it_was(finished: Path, tmp_path: Path) -> None:
    """Each session's samples count from its own start."""
    plan, report = load_report(finished)
    samples = [{"seconds": at, "rss_bytes": 2**30} for at in (0.0, 50.0, 100.0, 0.0, 60.0)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples), encoding="utf-8")
    page = render_report_page(plan, report, tmp_path)
    assert "2:40 min</text>" in page
