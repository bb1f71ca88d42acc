"""`fitune data`, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Commands

from fitune.runtime.model.embedded import load_embedded_model

RECIPE = """
[model]
id = "smollm2-135m-instruct"
[data]
train = "train.jsonl"
max_length = 64
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    load_embedded_model()
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path, "Opa!")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def write_rows(folder: Path, *answers: str) -> None:
    lines = [json.dumps({"instruction": f"Feta {number}?", "output": one}) for number, one in enumerate(answers)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_good_data_is_shown_and_the_exit_code_is_0(fitune: Commands, folder: Path) -> None:
    result = fitune("data", "recipe.toml")
    assert (result.code, result.err) == (0, "")
    assert "1 sequence" in result.out and "⟦Opa!<|im_end|>⟧" in result.out
    assert result.out.splitlines()[-1] == "ok recipe.toml: a run takes this data"


def test_problems_end_it_with_exit_code_1(fitune: Commands, folder: Path) -> None:
    write_rows(folder, *["Opa!"] * 3, "Listen. " * 60)
    result = fitune("data", "recipe.toml")
    assert result.code == 1
    assert "problem: 1 of 4 training rows (25.0%) are longer than data.max_length = 64 tokens" in result.out
    assert fitune("data", "recipe.toml", "--set", "data.max_truncated=0.3").code == 0


def test_the_check_as_json_is_one_object(fitune: Commands, folder: Path) -> None:
    report = json.loads(fitune("data", "--json", "recipe.toml").out)
    assert (report["recipe"], report["train"]["rows"], report["problems"]) == ("recipe.toml", 1, [])


def test_a_row_that_cannot_be_read_is_told_in_both_forms(fitune: Commands, folder: Path) -> None:
    write_rows(folder, "Opa!", "")
    result = fitune("data", "recipe.toml")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith('error: train.jsonl:2: "output" is empty')
    (problem,) = json.loads(fitune("data", "recipe.toml", "--json").out)["problems"]
    assert problem.startswith('train.jsonl:2: "output" is empty')


def test_an_error_never_sends_the_datas_control_characters_to_the_terminal(fitune: Commands, folder: Path) -> None:
    messages = [{"role": "\x1b[31muser", "content": "a"}]
    (folder / "train.jsonl").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    result = fitune("data", "recipe.toml")
    assert result.code == 1
    assert "\x1b" not in result.err and "\\x1b[31muser" in result.err


def test_a_run_with_a_problem_in_its_data_is_refused_before_anything_is_written(fitune: Commands, folder: Path) -> None:
    write_rows(folder, *["Opa!"] * 3, "Listen. " * 60)
    result = fitune("run", "recipe.toml", "--set", "output.dir=out", "--set", "budget.memory=64GiB")
    assert result.code == 1
    assert "1 of 4 training rows (25.0%) are longer" in result.err and "`fitune data` shows the rows" in result.err
    assert not (folder / "out").exists()


def test_without_a_recipe_it_says_what_it_takes(fitune: Commands) -> None:
    result = fitune("data")
    assert "fitune data RECIPE" in result.out + result.err
    assert fitune("data", "no-such").code == 1


def test_a_plan_warns_where_a_run_would_be_refused_for_its_data(fitune: Commands, folder: Path) -> None:
    write_rows(folder, *["Opa!"] * 3, "Listen. " * 60)
    result = fitune("plan", "recipe.toml", "--set", "budget.memory=64GiB", "--json")
    (plan,) = result.plans
    assert any("a run would be refused: 1 of 4 training rows" in warning for warning in plan["warnings"])
