"""`fitune calibrate`: what it takes, what it says, and its exit codes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import Commands

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from small_models import save_small_model
from small_runs import run_recipe_file, write_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that has finished."""
    folder = tmp_path_factory.mktemp("finished")
    return run_recipe_file(write_recipe(folder, save_small_model(folder / "model"), train={"max_steps": 2}))[0]


def test_a_finished_run_is_learnt_from_and_later_plans_show_it(
    fitune: Commands, workspace: Path, finished: Path
) -> None:
    result = fitune("calibrate", str(finished))
    assert (result.code, result.err) == (0, "")
    assert "beside the tensors: 1 run on this machine, 20" in result.out
    assert "used by plans here" in result.out
    assert fitune("calibrate", "--show").out == result.out
    (plan,) = fitune("plan", "--quick", "--json", "recipe.toml").plans
    assert plan["device"]["beside"]["source"].startswith("1 run on this machine")
    assert "1 run on" in fitune("plan", "--quick", "recipe.toml").out


def test_a_run_that_cannot_be_learnt_from_is_one_message_each_and_exit_1(
    fitune: Commands, workspace: Path, finished: Path
) -> None:
    result = fitune("calibrate", "gone", str(finished), "none")
    assert result.code == 1
    assert [line.split(":")[:2] for line in result.err.splitlines()] == [["error", " gone"], ["error", " none"]]
    assert "1 run on this machine" in result.out


def test_without_anything_to_do_it_is_a_usage_error(fitune: Commands, workspace: Path) -> None:
    result = fitune("calibrate")
    assert result.code == 2
    assert "give directories of finished runs, --measure or --show" in result.err


def test_nothing_learnt_yet_is_said(fitune: Commands, workspace: Path) -> None:
    result = fitune("calibrate", "--show")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("nothing learnt yet: ")


def test_measuring_without_a_gpu_is_exit_1(fitune: Commands, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = fitune("calibrate", "--measure")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: calibrate --measure: it measures a GPU, and there is none (")


def test_a_new_calibration_makes_no_saved_plan_stale(fitune: Commands, workspace: Path, finished: Path) -> None:
    from fitune.runtime.planning import reopen_plan

    assert fitune("plan", "--quick", "recipe.toml", "-o", "plan.json").code == 0
    assert fitune("calibrate", str(finished)).code == 0
    _, plan, warnings = reopen_plan(workspace / "plan.json")
    assert plan.device.beside is None
    assert warnings == ()
