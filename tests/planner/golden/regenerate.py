"""Writes the golden plans anew, after a change to the planner that is meant: python tests/planner/golden/regenerate.py

Look at the difference before it is committed: each changed figure is a plan that changes for users.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from plans import CPU, make_gpu, plan_for

from fitune.recipes.load import load_recipe
from fitune.recipes.shipped import list_shipped

GOLDEN = Path(__file__).parent


def make_golden(name: str) -> dict[str, Any]:
    """The plan of a shipped recipe as JSON: on its own card, or on a fixed CPU; of each rejected candidate its reason.

    What differs between machines is left out of the inputs: no versions, no free RAM or disk, 1,000 rows of the
    longest length.
    """
    recipe_file = load_recipe(name)
    budget = recipe_file.recipe.budget
    device = CPU if budget.gpu is None else make_gpu(budget.gpu)
    if budget.memory_bytes is not None:
        device = device.model_copy(update={"budget_bytes": budget.memory_bytes})
    plan: dict[str, Any] = plan_for(recipe_file.resolved, device).model_dump(mode="json")
    plan["rejected"] = [f"{one['component']}: {one['reason']}" for one in plan["rejected"]]
    return plan


def main() -> None:
    for path in GOLDEN.glob("*.json"):
        path.unlink()
    for shipped in list_shipped():
        text = json.dumps(make_golden(shipped.name), indent=1) + "\n"
        (GOLDEN / f"{shipped.name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
