"""The plans of the shipped recipes on fixed devices, figure by figure: golden/regenerate.py writes them anew."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fitune.recipes.shipped import list_shipped

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

from regenerate import make_golden  # noqa: E402 - beside the files that it writes


@pytest.mark.parametrize("name", [shipped.name for shipped in list_shipped()])
def test_a_shipped_recipes_plan_is_the_golden_one(name: str) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert make_golden(name) == golden, "meant? python tests/planner/golden/regenerate.py"


def test_every_golden_plan_is_of_a_shipped_recipe() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == {shipped.name for shipped in list_shipped()}
