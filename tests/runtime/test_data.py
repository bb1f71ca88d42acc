"""From a recipe's [data] table to sequences: sources, shares, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import CHATML, build_tokenizer

from fitune.recipes.errors import DataError
from fitune.recipes.schema import DataTable
from fitune.runtime.batches import iterate_batches
from fitune.runtime.data import TokenizedData, tokenize_data
from fitune.runtime.sources import load_rows


def write_texts(path: Path, *texts: str) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def tokenize(folder: Path, **table: Any) -> TokenizedData:
    checked = DataTable.model_validate(table)
    return tokenize_data(checked, load_rows(checked, lambda written: folder / written), build_tokenizer(CHATML), Path)


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
