"""The shipped general questions: rows that a run reads, and none in both files."""

from __future__ import annotations

import json
from importlib.resources import files

FOLDER = files("fitune.recipes").joinpath("data", "general")


def load(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in FOLDER.joinpath(name).read_text(encoding="utf-8").splitlines()]


def test_the_general_questions_are_as_many_as_their_readme_says_and_none_is_asked_twice() -> None:
    train, held_out = load("train.jsonl"), load("eval.jsonl")
    assert (len(train), len(held_out)) == (24, 10)
    assert all(set(row) == {"instruction", "output"} and all(row.values()) for row in train + held_out)
    assert len({row["instruction"].casefold() for row in train + held_out}) == 34
    readme = FOLDER.joinpath("README.md").read_text(encoding="utf-8")
    assert "| `train.jsonl` | 24 |" in readme and "| `eval.jsonl` | 10 |" in readme and "CC0-1.0" in readme
