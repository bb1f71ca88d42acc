"""A source that was tokenised before comes out of the cache, and only where nothing has changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_tokenizers import CHATML, MARKED, build_tokenizer

from fitune.runtime.data import prepare, token_cache
from fitune.runtime.data.prepare import tokenize_sources
from fitune.runtime.data.rows import Message, Row
from fitune.runtime.data.sources import SourceRows
from fitune.runtime.data.tokens import RowTokenizer, TokenizedRows, TokenSettings

SETTINGS = TokenSettings(max_length=32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "CACHED_CHARACTERS", 0)
    return tmp_path / "cache" / "tokens"


def make_source(answer: str = "Yes, of course.") -> SourceRows:
    messages = (Message(role="user", content="Feta?"), Message(role="assistant", content=answer))
    rows = [Row(where="a:1", messages=messages), Row(where="a:2", text="graviera " * 40), Row(where="a:3", text="x")]
    return SourceRows(name="a.jsonl", rows=tuple(rows), format="messages")


def tokenize(
    source: SourceRows | None = None, template: str = CHATML, settings: TokenSettings = SETTINGS
) -> TokenizedRows:
    return tokenize_sources([source or make_source()], build_tokenizer(template), settings)


def refuse_to_tokenize(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(RowTokenizer):
        def tokenize(self, row: Row) -> list[object]:  # type: ignore[override]
            raise AssertionError("tokenised again")

    monkeypatch.setattr(prepare, "RowTokenizer", Refusing)


def test_rows_come_out_of_the_cache_as_they_went_in(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenize()
    assert first.counts.truncated == 1
    refuse_to_tokenize(monkeypatch)
    assert tokenize() == first


@pytest.mark.parametrize("change", ["a row", "a weight", "the template", "max_length", "train_on"])
def test_what_decides_over_the_tokens_is_part_of_the_name(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    tokenize()
    refuse_to_tokenize(monkeypatch)
    source = make_source()
    first, *rest = source.rows
    assert first.messages is not None
    untrained = replace(first, messages=(first.messages[0], replace(first.messages[1], trained=False)))
    with pytest.raises(AssertionError, match="tokenised again"):
        match change:
            case "a row":
                tokenize(make_source("No."))
            case "a weight":
                tokenize(replace(source, rows=(untrained, *rest)))
            case "the template":
                tokenize(template=MARKED)
            case "max_length":
                tokenize(settings=TokenSettings(max_length=33))
            case "train_on":
                tokenize(settings=TokenSettings(max_length=32, train_on="all"))


def test_where_a_row_lies_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenize()
    refuse_to_tokenize(monkeypatch)
    source = make_source()
    assert (
        tokenize(replace(source, name="b", rows=tuple(replace(row, where="b:9") for row in source.rows))).rows
        == first.rows
    )


@pytest.mark.parametrize("damage", ["cut", "emptied", "of something else"])
def test_a_damaged_file_is_not_used_and_written_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    first = tokenize()
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-7], "emptied": b"", "of something else": b"x" * 100}[damage])
    assert tokenize() == first
    assert path.read_bytes() == content
    refuse_to_tokenize(monkeypatch)
    assert tokenize() == first


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "file"))
    assert len(tokenize()) == 3


def test_the_files_that_were_not_read_for_longest_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize(make_source("One."))
    (old,) = cache.iterdir()
    tokenize(make_source("Two."))
    monkeypatch.setattr(token_cache, "MOST_BYTES", 2 * old.stat().st_size)
    tokenize(make_source("Three."))
    left = list(cache.iterdir())
    assert old not in left and 1 <= len(left) <= 2
    assert not [path for path in left if path.suffix == ".part"]


def test_a_small_source_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "CACHED_CHARACTERS", 1_000_000)
    tokenize()
    assert not cache.exists()
