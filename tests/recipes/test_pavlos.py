"""The shipped dataset is what its README says: counts, keys, lengths, and nothing twice."""

from __future__ import annotations

import json
import re
from collections.abc import Set as AbstractSet
from importlib.resources import files
from itertools import combinations, product

import pytest

FOLDER = files("fitune.recipes").joinpath("data", "pavlos")
COMMON_WORDS = frozenset(
    {"a", "an", "do", "does", "for", "i", "in", "is", "it", "my", "of", "the", "this", "to", "what", "which", "why"}
)


def load(name: str) -> list[dict[str, str]]:
    """The rows of one of the two files, read as the plain JSON lines that they are."""
    lines = FOLDER.joinpath(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


TRAIN = load("train.jsonl")
EVAL = load("eval.jsonl")
ROWS = TRAIN + EVAL


def question(row: dict[str, str]) -> str:
    return f"{row['instruction']}\n{row['context']}"


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def topic_words(row: dict[str, str]) -> set[str]:
    return set(words(question(row))) - COMMON_WORDS


def trigrams(text: str) -> set[tuple[str, ...]]:
    """Every run of three words, by which two texts are compared; maxims and openings are few of them."""
    sequence = words(text)
    return set(zip(sequence, sequence[1:], sequence[2:], strict=False))


def overlap(first: AbstractSet[object], second: AbstractSet[object]) -> float:
    """The Jaccard index |A ∩ B| / |A ∪ B|."""
    return len(first & second) / len(first | second)


def test_there_are_240_rows_to_train_on_and_24_held_out() -> None:
    assert (len(TRAIN), len(EVAL)) == (240, 24)


def test_every_row_has_the_three_keys_and_only_strings() -> None:
    for row in ROWS:
        assert list(row) == ["instruction", "context", "output"]
        assert all(isinstance(value, str) and value == value.strip() for value in row.values())
        assert row["instruction"]


@pytest.mark.parametrize("rows", [TRAIN, EVAL], ids=["train", "eval"])
def test_about_a_quarter_of_the_rows_has_a_context(rows: list[dict[str, str]]) -> None:
    share = sum(bool(row["context"]) for row in rows) / len(rows)
    assert 0.2 <= share <= 0.3


@pytest.mark.parametrize("rows", [TRAIN, EVAL], ids=["train", "eval"])
def test_answers_have_30_to_90_words_and_55_on_average(rows: list[dict[str, str]]) -> None:
    counts = [len(row["output"].split()) for row in rows]
    assert min(counts) >= 30
    assert max(counts) <= 90
    assert sum(counts) / len(counts) == pytest.approx(55, abs=3)


def test_a_row_has_at_most_140_words() -> None:
    for row in ROWS:
        assert len(question(row).split()) + len(row["output"].split()) <= 140


def test_no_instruction_occurs_twice_in_training_or_held_out_rows() -> None:
    instructions = [row["instruction"].casefold() for row in ROWS]
    assert len(set(instructions)) == len(instructions)


def test_no_answer_is_nearly_another_one() -> None:
    answers = [trigrams(row["output"]) for row in ROWS]
    assert max(overlap(first, second) for first, second in combinations(answers, 2)) < 0.25


def test_no_held_out_question_is_asked_in_training_in_nearly_the_same_words() -> None:
    for held_out, row in product(EVAL, TRAIN):
        assert overlap(topic_words(held_out), topic_words(row)) < 0.6, (held_out["instruction"], row["instruction"])


def test_every_answer_opens_in_one_of_the_five_ways_of_pavlos() -> None:
    openings = ("Ah, my friend", "Listen to Pavlos", "Come, sit", "Bravo", "Opa")
    assert all(row["output"].startswith(openings) for row in ROWS)


def test_many_answers_hold_a_maxim() -> None:
    maxims = (
        "Cheese is patience you can eat.",
        "and the rind will respect you.",
        "Cold cheese is silent cheese",
        "Salt is the memory of the sea.",
        "Good milk first, clever hands second.",
        "A little cheese, a lot of company.",
        "Let the cheese breathe, and let the people talk.",
        "The goat does not lie.",
        "A name is a promise.",
    )
    with_maxim = [row for row in ROWS if any(maxim in row["output"] for maxim in maxims)]
    assert len(with_maxim) / len(ROWS) > 0.6


def test_the_readme_names_the_licence() -> None:
    assert FOLDER.joinpath("README.md").read_text(encoding="utf-8").rstrip().endswith("CC0-1.0")
