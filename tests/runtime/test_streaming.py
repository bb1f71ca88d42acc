"""Rows that are read while the model trains: every position can be found again, and no row is lost unsaid."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import CHATML, THINKS_LAST, build_tokenizer

from fitune.recipes.data_table import DataTable
from fitune.recipes.errors import DataError
from fitune.runtime.data import streaming
from fitune.runtime.data.batches import GlobalBatch, iterate_batches
from fitune.runtime.data.streaming import StreamedRows
from fitune.runtime.data.tokens import TokenSettings

TOKENIZER = build_tokenizer(CHATML)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK_ROWS", 8)


def write_texts(path: Path, *texts: str) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def make_stream(folder: Path, template: str = CHATML, **table: Any) -> StreamedRows:
    checked = DataTable.model_validate({"train": "a.jsonl", "streaming": True, "max_length": 32, **table})
    return StreamedRows(
        table=checked,
        resolve=lambda written: folder / written,
        tokenizer=build_tokenizer(template),
        settings=TokenSettings(max_length=32, overlong=checked.overlong, train_on=checked.train_on),
    )


def read(stream: StreamedRows, count: int, start: int = 0, seed: int = 0) -> list[str]:
    rows = islice(stream.iterate(start=start, seed=seed), count)
    return [str(TOKENIZER.decode(row.input_ids, skip_special_tokens=True)) for _, row in rows]


def ids_of(batches: list[GlobalBatch]) -> list[Any]:
    return [(one.step, one.epoch, [each.input_ids.tolist() for each in one.micro_batches]) for one in batches]


def test_every_row_comes_once_a_pass_in_another_order_each_pass(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(20)]
    write_texts(tmp_path / "a.jsonl", *texts)
    seen = read(make_stream(tmp_path), 40)
    assert sorted(seen[:20]) == sorted(seen[20:]) == sorted(texts)
    assert texts != seen[:20] != seen[20:]
    assert sorted(seen[:8]) == sorted(texts[:8]), "rows are shuffled within a block"
    assert read(make_stream(tmp_path), 20, seed=1) != seen[:20]


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 90), count=st.integers(1, 30), sizes=st.lists(st.integers(1, 25), min_size=1, max_size=3))
def test_a_stream_can_be_taken_up_at_every_position(
    tmp_path_factory: pytest.TempPathFactory, start: int, count: int, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    sources = []
    for number, size in enumerate(sizes):
        write_texts(folder / f"{number}.jsonl", *[f"{number} {row}" for row in range(size)])
        sources.append({"path": f"{number}.jsonl", "weight": number + 0.5})
    stream = make_stream(folder, train=sources)
    assert read(stream, count, start=start) == read(stream, start + count)[start:]


def test_batches_are_the_same_whether_resumed_or_not(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", *["row " * (number % 7 + 1) for number in range(21)])
    options: dict[str, Any] = {"global_batch_size": 4, "micro_batch_size": 2, "seed": 3, "max_steps": 13}
    whole = list(iterate_batches(make_stream(tmp_path), **options))
    assert [one.step for one in whole] == list(range(1, 14))
    for done in (1, 5, 12):
        assert ids_of(list(iterate_batches(make_stream(tmp_path), done_steps=done, **options))) == ids_of(whole[done:])


def test_sources_are_drawn_by_their_weights_at_every_moment(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", "a")
    write_texts(tmp_path / "b.jsonl", "b")
    stream = make_stream(tmp_path, train=[{"path": "a.jsonl", "weight": 3}, {"path": "b.jsonl", "weight": 1}])
    seen = read(stream, 400)
    assert all(Counter(seen[start : start + 4]) == {"a": 3, "b": 1} for start in range(0, 400, 4))


def test_a_row_without_a_trained_token_gives_its_place_to_another_of_its_block(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", *["feta"] * 3, "long " * 50, "kasseri")
    seen = read(make_stream(tmp_path, overlong="drop"), 5)
    assert set(seen) == {"feta", "kasseri"} and len(seen) == 5


def test_what_is_cut_and_left_out_is_counted_as_it_is_read(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", *["feta"] * 7, "long " * 50)
    cutting, dropping = make_stream(tmp_path), make_stream(tmp_path, overlong="drop")
    read(cutting, 16)
    read(dropping, 16)
    assert (cutting.counts.rows, cutting.counts.truncated, cutting.counts.too_long) == (16, 2, 0)
    assert (dropping.counts.rows, dropping.counts.truncated, dropping.counts.too_long) == (16, 0, 2)


def test_the_format_is_the_first_rows_also_where_the_stream_is_taken_up(tmp_path: Path) -> None:
    lines = [{"text": "a", "prompt": "b"}] * 8 + [{"text": "c", "prompt": "d", "completion": "e"}] * 8
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert set(read(make_stream(tmp_path), 8, start=8)) == {"c"}


@pytest.mark.parametrize(
    ("lines", "table", "problem"),
    [
        (['{"text": "a"}', '{"text": ""}'], {}, 'a.jsonl:2: "text" is empty'),
        ([], {}, "a.jsonl: no rows"),
        (['{"text": "' + "long " * 50 + '"}'], {"overlong": "drop"}, "a.jsonl:1: none of 1 rows from here on has a to"),
        (["[]"], {}, "a.jsonl:1: must be an object"),
    ],
)
def test_what_cannot_be_used_is_told_with_its_line(
    tmp_path: Path, lines: list[str], table: dict[str, Any], problem: str
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read(make_stream(tmp_path, **table), 3)
    assert str(caught.value).startswith(problem)


def test_a_conversation_of_several_sequences_is_refused_with_what_to_set(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    with pytest.raises(DataError, match=r'a\.jsonl:1: data\.streaming takes one sequence .* data\.train_on = "last"'):
        read(make_stream(tmp_path, template=THINKS_LAST), 1)
    assert len(read(make_stream(tmp_path, template=THINKS_LAST, train_on="last"), 1)) == 1
