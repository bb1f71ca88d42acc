"""From a recipe's [data] table to sequences: sources, shares, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import CHATML, build_tokenizer

from fitune.recipes.data_table import DataTable
from fitune.recipes.errors import DataError
from fitune.runtime.data.batches import iterate_batches
from fitune.runtime.data.prepare import TokenizedData, tokenize_data
from fitune.runtime.data.sources import load_rows


def write_texts(path: Path, *texts: str) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def tokenize(folder: Path, **table: Any) -> TokenizedData:
    checked = DataTable.model_validate(table)

    def resolve(written: str) -> Path:
        return folder / written

    return tokenize_data(checked, load_rows(checked, resolve), build_tokenizer(CHATML), resolve)


def test_a_mixture_is_drawn_by_weight_in_every_epoch(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", *[f"a{number}" for number in range(12)])
    write_texts(tmp_path / "b.jsonl", *[f"b{number}" for number in range(30)])
    sources = [{"path": "a.jsonl", "weight": 0.75}, {"path": "b.jsonl", "weight": 0.25}]
    data = tokenize(tmp_path, train=sources, max_length=64)
    assert data.train.epoch_rows == 16
    batches = iterate_batches(data.train, global_batch_size=4, micro_batch_size=4, seed=0, epochs=2)
    seen = [data.tokenizer.decode(ids)[:1] for batch in batches for one in batch.micro_batches for ids in one.input_ids]
    assert [seen[:16].count("b"), seen[16:].count("b")] == [4, 4]


def test_packing_keeps_the_sources_of_a_mixture_apart(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", *["a" * 5] * 12)
    write_texts(tmp_path / "b.jsonl", *["b" * 5] * 30)
    sources = [{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "weight": 1}]
    data = tokenize(tmp_path, train=sources, max_length=64, packing=True)
    assert sum(part.rows for part in data.train.parts) == len(data.train) < len(data.unpacked) == 42
    kinds = [
        {character for character in data.tokenizer.decode(row.input_ids) if character in "ab"}
        for row in data.train.rows
    ]
    assert all(len(kind) == 1 for kind in kinds)


def test_a_source_of_which_nothing_is_left_is_named(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", "feta")
    write_texts(tmp_path / "b.jsonl", "feta " * 60)
    with pytest.raises(DataError, match=r"^b\.jsonl: all 1 rows were dropped"):
        tokenize(tmp_path, train=[{"path": "a.jsonl"}, {"path": "b.jsonl"}], max_length=32, overlong="drop")


def test_a_template_of_ones_own_replaces_the_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "Feta?", "output": "Yes."}))
    (tmp_path / "own.jinja").write_text(CHATML.replace("assistant", "Pavlos"))
    data = tokenize(tmp_path, train="a.jsonl", max_length=64, chat_template="own.jinja", train_on="all")
    assert data.tokenizer.chat_template == CHATML.replace("assistant", "Pavlos")
    assert not data.default_template


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "data.chat_template: own.jinja cannot be read: No such file or directory"),
        (b" ", "data.chat_template: own.jinja is empty"),
        (b"\xff", "data.chat_template: own.jinja cannot be read: "),
        (b"\n{% if %}", "data.chat_template: own.jinja:2: not a Jinja template: "),
    ],
)
def test_a_template_that_is_none_is_told(tmp_path: Path, content: bytes | None, problem: str) -> None:
    write_texts(tmp_path / "a.jsonl", "feta")
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(DataError) as caught:
        tokenize(tmp_path, train="a.jsonl", max_length=64, chat_template="own.jinja")
    assert str(caught.value).startswith(problem)
