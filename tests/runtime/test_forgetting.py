"""The forgetting check: rows of another task before and after the training."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small_models import save_small_model
from small_runs import plan_recipe, read_lines, run_recipe_file, write_recipe

from fitune.planner.plan import Plan
from fitune.recipes.errors import DataError, RecipeError, RunError
from fitune.recipes.load import load_recipe
from fitune.runtime.planning import Job
from fitune.runtime.report import RunReport, load_report, make_report_json
from fitune.runtime.report_view import render_report
from fitune.runtime.resume.run_record import list_changes, make_record
from fitune.runtime.training.forgetting import Forgetting

OTHER = [{"text": f"The train to Volos leaves at {number} and it is late."} for number in range(4)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("llama"))


def write(folder: Path, model: Path, rows: list[dict[str, Any]] = OTHER, /, **data: Any) -> Path:
    """A recipe with rows of another task beside its own."""
    path = write_recipe(folder, model, data={"forgetting": "other.jsonl", **data})
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def render(plan: Plan, report: RunReport) -> str:
    console = Console(file=io.StringIO(), width=160)
    render_report(plan, report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def make(before: float, after: float, allowed: float = 0.1) -> Forgetting:
    return Forgetting(rows=1, trained_tokens=1, loss_before=before, loss_after=after, allowed=allowed)


def test_a_run_measures_another_task_before_and_after_and_reports_the_change(llama: Path, tmp_path: Path) -> None:
    run, report = run_recipe_file(write(tmp_path, llama))
    found = report.forgetting
    assert found is not None
    measured = [
        (one["step"], one["forgetting_loss"]) for one in read_lines(run / "metrics.jsonl") if "forgetting_loss" in one
    ]
    assert measured == [(0, found.loss_before), (6, found.loss_after)]
    assert found.rows == 4
    assert found.loss_before != found.loss_after
    document = json.loads(make_report_json(*load_report(run)))["forgetting"]
    assert document["rise"] == pytest.approx(math.exp(found.loss_after - found.loss_before) - 1)
    assert document["perplexity_before"] == pytest.approx(math.exp(found.loss_before))
    assert f"another task   {found.loss_before:.3f} -> {found.loss_after:.3f}, perplexity" in render(*load_report(run))


def test_the_same_rows_as_held_out_and_as_another_task_have_the_same_loss(llama: Path, tmp_path: Path) -> None:
    _, report = run_recipe_file(write(tmp_path, llama, eval="other.jsonl"))
    assert report.forgetting is not None
    assert (report.forgetting.loss_before, report.forgetting.loss_after) == (report.loss.before, report.loss.after)


def test_the_check_changes_nothing_of_the_training(llama: Path, tmp_path: Path) -> None:
    _, with_check = run_recipe_file(write(tmp_path / "with", llama))
    _, without = run_recipe_file(write_recipe(tmp_path / "without", llama))
    assert with_check.loss == without.loss
    assert without.forgetting is None


def test_a_rise_above_what_the_recipe_allows_is_a_warning_that_names_the_remedy(llama: Path, tmp_path: Path) -> None:
    run, _ = run_recipe_file(write(tmp_path, llama, max_forgotten=1000.0))
    plan, report = load_report(run)
    assert report.forgetting is not None and report.forgetting.allowed == 1000.0
    assert "warning" not in render(plan, report)
    shown = render(plan, report.model_copy(update={"forgetting": make(2.0, 2.5)}))
    assert "another task   2.000 -> 2.500, perplexity 7.39 -> 12.18 (+64.9 %)" in shown
    assert "warning: the perplexity of another task rose by 64.9%, more than data.max_forgotten = 0.1" in shown
    assert "Mix rows of that task into data.train" in " ".join(shown.split())


def test_a_tuned_model_that_forgot_is_told_from_one_that_did_not() -> None:
    assert make(2.0, 2.0 + math.log(1.099)).warning is None
    assert "rose by 10.1%, more than data.max_forgotten = 0.1" in str(make(2.0, 2.0 + math.log(1.101)).warning)
    assert make(2.0, 1.0).warning is None


@given(before=st.floats(0, 1e6), after=st.floats(0, 1e6), allowed=st.floats(1e-9, 1e6))
def test_no_loss_is_too_large_to_be_reported(before: float, after: float, allowed: float) -> None:
    found = make(before, after, allowed)
    assert math.isfinite(found.rise) and math.isfinite(found.perplexity_after)
    assert (found.warning is not None) == (found.rise > allowed)


def test_the_other_task_has_a_format_of_its_own_and_no_system_prompt(llama: Path, tmp_path: Path) -> None:
    job = Job(str(write(tmp_path, llama, format="instruction", system="You are Pavlos.")))
    (source,) = job.rows.forgetting
    assert source.format == "text"
    assert source.rows[0].text == OTHER[0]["text"]


def test_the_plan_allows_for_the_longest_row_of_the_other_task(llama: Path, tmp_path: Path) -> None:
    lengths = {}
    for name, words in (("short", 1), ("long", 300)):
        job = Job(str(write(tmp_path / name, llama, [{"text": "late " * words}], max_length=256)))
        facts = job.find_data_facts(quick=False)
        lengths[name] = facts.longest_row_tokens
        assert facts.forgetting_row_tokens is not None and facts.forgetting_row_tokens[-1] <= lengths[name]
    assert lengths["short"] < lengths["long"] == facts.forgetting_row_tokens[-1] == 256


def test_the_data_check_shows_the_other_task_and_notes_rows_that_are_trained_on(llama: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, llama)
    trained = (tmp_path / "train.jsonl").read_text().splitlines()[0]
    with (tmp_path / "other.jsonl").open("w") as file:
        file.write(trained + "\n" + json.dumps({"instruction": "Is it late?", "output": "Yes."}) + "\n")
    report = Job(str(recipe)).data_report
    assert report.forgetting is not None and report.forgetting.rows == 2
    assert [source.name for source in report.forgetting_sources] == ["other.jsonl"]
    assert any(note.startswith("1 of 2 rows of data.forgetting are trained on") for note in report.notes)


def test_a_run_that_goes_on_has_the_same_other_task(llama: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, llama)
    before = make_record(Job(str(recipe)))
    assert list_changes(before, make_record(Job(str(recipe))), replan=False) == []
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "Another one."}) + "\n")
    (change,) = list_changes(before, make_record(Job(str(recipe))), replan=False)
    assert change.startswith("rows of another task: there were 4 with")


def test_a_list_of_sources_is_measured_as_one(llama: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, llama, forgetting=None)
    text = recipe.read_text().replace(
        "[method]", '[[data.forgetting]]\npath = "other.jsonl"\n[[data.forgetting]]\npath = "eval.jsonl"\n[method]'
    )
    recipe.write_text(text)
    job, _ = plan_recipe(recipe)
    assert job.data.forgetting is not None
    assert len(job.data.forgetting) == 9


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("forgetting = 0.1", "data.forgetting: 0.1 is not text or a non-empty list of tables"),
        ('forgetting = [{path = "a", weight = 1.0}]', "data.forgetting: held-out sources have no weight"),
        ("max_forgotten = 0", "data.max_forgotten: 0 is not a number above 0"),
    ],
)
def test_a_mistake_in_the_recipe_is_named(tmp_path: Path, written: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'[model]\nid = "m"\n[data]\ntrain = "a.jsonl"\n{written}\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_named_before_anything_starts(llama: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, llama)
    (tmp_path / "other.jsonl").unlink()
    with pytest.raises(DataError, match=r"other.jsonl: no such file"):
        _ = Job(str(recipe)).rows


def test_a_loss_of_the_other_task_that_is_not_finite_ends_the_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(tmp_path, llama)
    monkeypatch.setattr(
        "fitune.runtime.training.judge.evaluate", lambda built, rows, *more: math.nan if len(rows) == 4 else 1.0
    )
    with pytest.raises(RunError, match=r"the loss of data.forgetting is nan after 0 steps"):
        run_recipe_file(recipe)
