"""A folder to work in, with a recipe and its rows, and the `fitune` command."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import RECIPE, Commands, write_rows


@pytest.fixture
def fitune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.setenv("COLUMNS", "100")
    return Commands(capsys, monkeypatch)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the test: recipe.toml and rows.jsonl, and an empty cache."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    write_rows(folder / "rows.jsonl")
    return folder
