"""`fitune plan --html`: the plan as a page, and the timeline in the plan's JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import TINY_LLAMA, Commands

ON_A_CARD = ("--set", 'budget.gpu="RTX 4090"', "--set", "model.id=config.json", "--set", "method.kind=lora")


@pytest.fixture
def tiny(workspace: Path) -> Path:
    (workspace / "config.json").write_text(json.dumps(TINY_LLAMA))
    return workspace


def test_the_page_of_a_quick_plan_is_written_and_the_table_printed(fitune: Commands, workspace: Path) -> None:
    result = fitune("plan", "--quick", "recipe.toml", "--html", "plan.html")
    assert result.code == 0
    assert "Plan for recipe.toml" in result.out
    page = Path("plan.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "<h1>Plan for recipe.toml</h1>" in page
    assert "<svg" not in page


def test_a_rehearsed_plan_has_its_timeline_on_the_page_in_the_terminal_and_in_json(
    fitune: Commands, tiny: Path
) -> None:
    shown = fitune("plan", "recipe.toml", *ON_A_CARD, "--html", "plan.html")
    assert shown.code == 0
    assert "Live tensors over one optimizer step" in shown.out
    assert "<svg" in Path("plan.html").read_text(encoding="utf-8")
    (plan,) = fitune("plan", "--json", "recipe.toml", *ON_A_CARD).plans
    points = plan["memory"]["timeline"]["points"]
    assert max(sum(point[1:]) for point in points) == plan["memory"]["peak_allocated_bytes"]


def test_a_page_is_for_one_recipe(fitune: Commands, workspace: Path) -> None:
    assert fitune("plan", "--quick", "recipe.toml", "recipe.toml", "--html", "plan.html").code == 2
    assert fitune("plan", "recipe.toml", "--what-fits", "--html", "plan.html").code == 2
    assert not Path("plan.html").exists()


def test_a_page_that_cannot_be_written_is_an_error(fitune: Commands, workspace: Path) -> None:
    result = fitune("plan", "--quick", "recipe.toml", "--html", "missing/plan.html")
    assert result.code == 1
    assert "missing/plan.html: cannot be written" in result.err


def test_what_does_not_fit_has_a_page_too(fitune: Commands, workspace: Path) -> None:
    result = fitune("plan", "--quick", "recipe.toml", "--set", "budget.memory=1MiB", "--html", "plan.html")
    assert result.code == 3
    assert "nothing fits" in Path("plan.html").read_text(encoding="utf-8")
