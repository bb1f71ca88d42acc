"""The small commands: recipes, schema, init, explain, validate, help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Commands

from fitune.recipes.schema import make_schema
from fitune.recipes.shipped import list_shipped, read_shipped
from fitune.runtime.cli import cli


def test_help_names_every_command(fitune: Commands) -> None:
    result = fitune("--help")
    assert result.code == 0
    assert all(f"  {name} " in result.out for name in cli.commands)


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_has_help_that_says_what_it_does(fitune: Commands, name: str) -> None:
    result = fitune(name, "-h")
    assert result.code == 0
    assert result.out.startswith(f"Usage: fitune {name}")
    assert (cli.commands[name].help or "").split("\n")[0].endswith((".", ";", ":")) or cli.commands[name].help


def test_the_version_is_the_packages(fitune: Commands) -> None:
    from importlib.metadata import version

    assert fitune("--version").out.strip() == f"fitune, version {version('fitune')}"


def test_recipes_lists_what_ships_with_its_description(fitune: Commands) -> None:
    lines = fitune("recipes").out.splitlines()
    assert lines == [f"{one.name}  {one.description}" for one in list_shipped()]


@pytest.mark.parametrize("name", [one.name for one in list_shipped()])
def test_a_shipped_recipe_is_printed_as_it_is(fitune: Commands, name: str) -> None:
    assert fitune("recipes", "show", name).out == read_shipped(name)


def test_the_schema_is_json(fitune: Commands) -> None:
    assert json.loads(fitune("schema").out) == make_schema()


def test_init_writes_a_recipe_that_can_be_planned(fitune: Commands, workspace: Path) -> None:
    result = fitune("init", "my recipe.toml", "--model", "qwen3-0.6b", "--data", "my [rows].jsonl")
    assert result.code == 0
    assert result.out == "wrote my recipe.toml; next: fitune plan 'my recipe.toml'\n"
    (plan,) = fitune("plan", "--json", "my recipe.toml").plans
    assert plan["resolved_recipe"]["model"]["id"] == "qwen3-0.6b"
    assert plan["resolved_recipe"]["data"]["train"] == "my [rows].jsonl"


def test_init_without_a_name_writes_recipe_toml(
    fitune: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fitune("init").code == 0
    assert fitune("init").code == 1, "an existing file is never overwritten"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_explain_shows_the_lectures_120_gb(fitune: Commands) -> None:
    text = fitune("explain", "10B").out
    assert "120" in text
    assert isinstance(json.loads(fitune("explain", "10B", "--json").out), dict)


@pytest.mark.parametrize("size", ["354.8M", "gpt2-medium", "7b", "8030261248"])
def test_explain_takes_counts_and_models(fitune: Commands, size: str) -> None:
    assert fitune("explain", size).code == 0


def test_validate_says_what_it_found(fitune: Commands, workspace: Path) -> None:
    result = fitune("validate", "recipe.toml", "--set", "data.eval=0.25")
    assert (result.code, result.err) == (0, "")
    assert (
        result.out == "ok recipe.toml: smollm2-135m-instruct (embedded), 6 rows to train on (completion), 2 held out\n"
    )


@pytest.mark.parametrize("shipped", list_shipped(), ids=lambda shipped: shipped.name)
def test_every_shipped_recipe_validates(fitune: Commands, workspace: Path, shipped: object) -> None:
    name = getattr(shipped, "name", "")
    result = fitune("validate", name)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"ok {name}: ")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_plan_keeps_within_the_terminal(
    fitune: Commands, workspace: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = fitune("plan", "--quick", "recipe.toml").out.splitlines()
    assert lines[-1] == "next: fitune run recipe.toml"
    assert max(map(len, lines)) <= width


def test_output_that_is_no_terminal_has_no_colours(fitune: Commands, workspace: Path) -> None:
    assert "\x1b" not in fitune.apart("plan", "--quick", "recipe.toml").out


def test_init_writes_files_as_seen_from_the_recipe(fitune: Commands, workspace: Path) -> None:
    Path("sub").mkdir()
    assert fitune("init", "sub/mine.toml", "--data", "rows.jsonl", "--eval", "owner/name").code == 0
    text = Path("sub/mine.toml").read_text(encoding="utf-8")
    assert 'train = "../rows.jsonl"' in text
    assert 'eval = "owner/name"' in text
    assert "# fitune run sub/mine.toml " in text
    assert fitune("validate", "sub/mine.toml", "--set", "data.eval=0.5").code == 0


def test_each_command_is_described_within_a_line_of_80_columns(
    fitune: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "..." not in fitune("--help").out.partition("Commands:")[2]
