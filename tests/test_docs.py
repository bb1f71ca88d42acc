"""What the documents say comes from the software."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_recipe_reference_is_the_schema() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    made = generate["make_recipe_reference"]()
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == made, "run `python docs/generate.py recipe`"


def test_the_reference_of_a_datasets_spec_is_its_schema() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    page = (ROOT / "docs" / "data_make.md").read_text(encoding="utf-8")
    assert page == generate["make_spec_reference"](page), "run `python docs/generate.py recipe`"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_to_files_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [part.split(")")[0] for part in text.split("](")[1:]]
    local = [target for target in targets if "://" not in target]
    assert all(((ROOT / page).parent / target).exists() for target in local), local
