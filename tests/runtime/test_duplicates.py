"""Equal and similar texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.runtime.make.duplicates import SimilarTexts, jaccard, make_shingles, normalise_text

PAVLOS = Path(__file__).parents[2] / "recipes" / "data" / "pavlos"
# A small alphabet and whole phrases, so that many texts are similar and some are equal.
PHRASES = st.lists(
    st.sampled_from(["what is feta", "how old", "brie ", "x", "abcdefg", "the milk of sheep"]), max_size=8
)
TEXTS = st.one_of(PHRASES.map(" ".join), st.text(max_size=30))


def similarity(one: str, other: str) -> float:
    return jaccard(make_shingles(normalise_text(one)), make_shingles(normalise_text(other)))


@given(texts=st.lists(TEXTS, max_size=12), threshold=st.sampled_from([0.3, 0.5, 0.8, 0.95, 1.0]))
def test_the_index_finds_exactly_what_comparing_with_every_text_finds(texts: list[str], threshold: float) -> None:
    index = SimilarTexts(threshold)
    for number, text in enumerate(texts):
        expected = next((n for n in range(number) if similarity(texts[n], text) >= threshold), None)
        assert index.find(text) == expected
        index.add(text)


@given(TEXTS)
def test_a_text_is_similar_to_itself_and_to_itself_without_punctuation_and_case(text: str) -> None:
    assert similarity(text, text) == 1
    assert similarity(text, f"  {text}?! ") == 1
    assert normalise_text(normalise_text(text)) == normalise_text(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is feta?", "what is  FETA"),
        ("Ｗhat is feta", "What is feta"),
        ("How long does feta keep in the fridge?", "How long does feta keep in the fridge"),
        ("How should I best store a whole feta in brine at home?", "How should I store a whole feta in brine at home?"),
    ],
)
def test_the_same_question_in_other_clothes_is_a_duplicate(one: str, other: str) -> None:
    assert similarity(one, other) >= 0.7


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is feta?", "What is brie?"),
        ("What is 1 + 1?", "What is 1 < 1?"),
        ("How should I store feta at home?", "How should I store gouda at home?"),
    ],
)
def test_the_same_question_about_something_else_is_none(one: str, other: str) -> None:
    assert similarity(one, other) < 0.7


def test_the_shipped_rows_that_were_checked_by_hand_have_no_duplicates() -> None:
    rows = [
        json.loads(line) for name in ("train", "eval") for line in (PAVLOS / f"{name}.jsonl").open(encoding="utf-8")
    ]
    for column in ("instruction", "output"):
        index = SimilarTexts(0.7)
        for row in rows:
            assert index.find(row[column] + row["context"]) is None, row[column]
            index.add(row[column] + row["context"])
