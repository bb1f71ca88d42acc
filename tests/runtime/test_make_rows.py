"""From answers to rows: what is accepted, and why the rest is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.recipes.make_spec import MakeSpec
from fitune.runtime.data.sources import load_rows_from
from fitune.runtime.make.client import Answered
from fitune.runtime.make.dataset import choose_held_out
from fitune.runtime.make.prompts import make_request
from fitune.runtime.make.rows import Harvest, MadeRow, Unusable, make_record, parse_answer
from fitune.runtime.make.sources import Passage

PASSAGE = Passage(source="feta.md", text="Feta is white.", start=0, end=14)


def make_spec(**output: Any) -> MakeSpec:
    return MakeSpec.model_validate(
        {
            "source": {"documents": "*.md"},
            "persona": {"name": "Pavlos", "description": "You are Pavlos."},
            "output": {"file": "out.jsonl", "rows": 100, **output},
            "endpoint": {"base_url": "http://localhost/v1", "model": "m"},
            "generation": {"questions_per_request": 1},
        }
    )


def answer(content: object, **fields: Any) -> Answered:
    text = content if isinstance(content, str) else json.dumps(content)
    given = {"finish_reason": "stop", "refusal": None, "prompt_tokens": 1, "answer_tokens": 1, **fields}
    return Answered(content=text, **given)


def take(harvest: Harvest, *pairs: object, passage: Passage = PASSAGE) -> None:
    request = make_request(make_spec(), [passage], 0)
    harvest.take(request, answer({"pairs": list(pairs)}))


def pair(question: str, text: str) -> dict[str, str]:
    return {"question": question, "answer": text}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (answer("Sure! Here they are."), "not JSON"),
        (answer('```json\n{"pairs": []}\n```'), "not JSON: in a code fence"),
        (answer('{"pairs": [{"question": "a", "answer": "b"}]} I hope it helps'), "not JSON"),
        (answer('{"pairs": [NaN]}'), "not JSON"),
        (answer('{"pairs": [], "pairs": [{"question": "a", "answer": "b"}]}'), "not JSON"),
        (answer("[" * 100_000), "not JSON"),
        (answer(""), "empty"),
        (answer("[]"), 'not an object of the form {"pairs": [...]}'),
        (answer({"pairs": {}}), 'not an object of the form {"pairs": [...]}'),
        (answer({"pairs": [], "more": 1}), 'not an object of the form {"pairs": [...]}'),
        (answer({"pairs": []}), "no pairs in it"),
        (answer({"pairs": [pair("a", "b")]}, finish_reason="length"), "cut off at max_tokens"),
        (answer({"pairs": [pair("a", "b")]}, finish_reason="content_filter"), "the model refused"),
        (answer("", refusal="I cannot do that."), "the model refused"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_rejected_whole(given: Answered, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        parse_answer(given)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("text", 'not an object of the form {"question": ..., "answer": ...}'),
        ({"question": "a"}, 'not an object of the form {"question": ..., "answer": ...}'),
        ({"question": "a", "answer": "b", "more": "c"}, 'not an object of the form {"question": ..., "answer": ...}'),
        ({"question": "a", "answer": 3}, "question or answer is not text"),
        (pair(" ", "b"), "question or answer is empty"),
        (pair("What?", "bell \x07"), "a control character"),
        (pair("What?", "half \ud800 of it, and long enough"), "a character that cannot be decoded"),
        (pair("What?", "not \ufffd decoded, and long enough"), "a character that cannot be decoded"),
        (pair("What?", "short"), "the answer is shorter than output.min_answer_characters"),
        (pair("What?", "long" * 30), "the answer is longer than output.max_answer_characters"),
        (pair("What?", "As an ai language model I cannot"), 'holds "as an AI"'),
    ],
)
def test_a_bad_pair_is_rejected_and_counted_and_its_neighbour_is_kept(bad: object, reason: str) -> None:
    spec = make_spec(min_answer_characters=10, max_answer_characters=100, reject_phrases=["as an AI"])
    harvest = Harvest(spec)
    take(harvest, bad, pair("Which colour has feta?", "White as the walls of my village."))
    assert [row.answer for row in harvest.rows] == ["White as the walls of my village."]
    assert harvest.rejected_rows == {reason: 1}


def test_a_question_or_an_answer_that_came_before_is_rejected() -> None:
    harvest = Harvest(make_spec())
    take(harvest, pair("Which colour has feta?", "White as the walls of my village."))
    take(harvest, pair("which colour has FETA", "It is something else altogether."))
    take(harvest, pair("Of which colour are the walls?", "white as the walls of my village!"))
    assert len(harvest.rows) == 1
    assert harvest.rejected_rows == {
        "the question is like an earlier one": 1,
        "the answer is like an earlier one": 1,
    }


def test_the_same_question_about_another_passage_is_kept_where_the_passage_is_part_of_it() -> None:
    other = Passage(source="brie.md", text="Brie is soft.", start=0, end=13)
    for include_passage, rows in ((False, 1), (True, 2)):
        harvest = Harvest(make_spec(include_passage=include_passage))
        take(harvest, pair("What is said?", "That feta is white."))
        take(harvest, pair("What is said?", "Brie is soft, it is."), passage=other)
        assert len(harvest.rows) == rows


def test_no_more_rows_are_kept_than_asked_for_and_missing_pairs_are_counted() -> None:
    harvest = Harvest(make_spec(rows=1))
    request = make_request(make_spec(), [PASSAGE], 0)
    harvest.take(request, answer({"pairs": [pair("What is feta?", "A cheese."), pair("Is brie soft?", "It is.")]}))
    assert len(harvest.rows) == 1
    assert harvest.rejected_rows == {"more than output.rows": 1}


@given(content=st.one_of(st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)))
def test_no_answer_whatever_it_holds_is_an_error(content: object) -> None:
    harvest = Harvest(make_spec())
    request = make_request(make_spec(), [PASSAGE], 0)
    harvest.take(request, answer(content))
    harvest.take(request, answer({"pairs": content}))
    harvest.take(request, answer({"pairs": [content, {"question": content, "answer": content}]}))


@pytest.mark.parametrize("row_format", ["instruction", "messages"])
@pytest.mark.parametrize("include_passage", [False, True])
def test_rows_are_what_a_run_reads(tmp_path: Path, row_format: str, include_passage: bool) -> None:
    row = MadeRow(question="What is it?", answer='Feta, "my friend"\n\u2028Really.', request="0", passage=PASSAGE)
    record = make_record(row, make_spec(format=row_format, include_passage=include_passage).output)
    (tmp_path / "out.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    (read,) = load_rows_from(tmp_path / "out.jsonl")
    assert read.messages is not None
    question = "What is it?\n\nFeta is white." if include_passage else "What is it?"
    assert [(one.role, one.content) for one in read.messages] == [("user", question), ("assistant", row.answer)]


@given(count=st.integers(0, 60), share=st.floats(0, 0.99))
def test_some_rows_but_never_all_are_held_out_and_more_rows_hold_out_more(count: int, share: float) -> None:
    rows = [MadeRow(question=f"{n}?", answer="a", request="0", passage=PASSAGE) for n in range(count)]
    held_out = choose_held_out(rows, share)
    if share == 0 or count < 2:
        assert held_out == frozenset()
    else:
        assert len(held_out) == min(max(1, round(share * count)), count - 1)
        assert choose_held_out([*rows, rows[0]], share) <= {*range(count + 1)}
