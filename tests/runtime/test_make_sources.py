"""Documents cut into passages, and topics."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.recipes.errors import DataError
from fitune.recipes.make_spec import MakeSpec, SpecFile
from fitune.runtime.make.sources import Passage, cut_text, load_passages


def make_spec_file(folder: Path, **source: object) -> SpecFile:
    spec = MakeSpec.model_validate(
        {
            "source": source,
            "persona": {"name": "Pavlos", "description": "You are Pavlos."},
            "output": {"file": "out.jsonl", "rows": 8},
            "endpoint": {"base_url": "http://localhost/v1", "model": "m"},
        }
    )
    return SpecFile(path=folder / "spec.toml", spec=spec)


def load(folder: Path, **source: object) -> list[Passage]:
    return load_passages(make_spec_file(folder, **source))


@given(text=st.text(alphabet="ab .\n\t。", max_size=400), most=st.integers(2, 60))
def test_passages_hold_every_word_in_order_and_none_is_too_long(text: str, most: int) -> None:
    cuts = list(cut_text(text, most))
    assert all(0 < end - start <= most for start, end in cuts)
    assert all(before <= after for (_, before), (after, _) in itertools.pairwise(cuts))
    assert "".join("".join(text[start:end].split()) for start, end in cuts) == "".join(text.split())


def test_a_text_is_cut_between_paragraphs_then_sentences_then_words() -> None:
    def cut(text: str, most: int) -> list[str]:
        return [text[start:end] for start, end in cut_text(text, most)]

    assert cut("One two.\n\nThree four.\n\nFive.", 22) == ["One two.\n\nThree four.", "Five."]
    assert cut("One two three. Four five six. Seven.", 31) == ["One two three. Four five six.", "Seven."]
    assert cut("one two three four", 10) == ["one two", "three four"]
    assert cut("abcdefghij", 4) == ["abcd", "efgh", "ij"]


def test_documents_come_from_paths_and_globs_once_each_with_their_place(tmp_path: Path) -> None:
    folder = tmp_path / "a [folder]"
    (folder / "docs" / "deep").mkdir(parents=True)
    (folder / "docs" / "feta.md").write_text("Feta is white.")
    (folder / "docs" / "deep" / "brie.md").write_text("\n\nBrie is soft.\n")
    found = load(folder, documents=["docs/feta.md", "docs/**/*.md"])
    assert [(one.source, one.text, one.start, one.end) for one in found] == [
        ("docs/feta.md", "Feta is white.", 0, 14),
        ("docs/deep/brie.md", "Brie is soft.", 2, 15),
    ]
    assert load(folder, documents=str(folder / "docs" / "feta.md")) == found[:1]


def test_topics_come_from_the_spec_or_from_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "topics.txt").write_text("# cheeses\nfeta\n\nbrie \nfeta\n")
    for topics in ("topics.txt", ["feta", "brie"]):
        assert [one.text for one in load(tmp_path, topics=topics)] == ["feta", "brie"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"documents": "none/*.md"}, "source.documents: no file matches none/*.md"),
        ({"documents": "docs"}, 'no file matches docs: a folder is written as a glob such as "docs/**/*.md"'),
        ({"documents": "docs/blank.md"}, "all documents are empty"),
        ({"documents": "docs/pdf.pdf"}, "docs/pdf.pdf:2: not UTF-8 text: byte 0xff (a PDF, Word or HTML file has to"),
        ({"documents": "docs/null.md"}, "docs/null.md: is not text: it holds null characters"),
        ({"topics": "none.txt"}, "none.txt: no such file; topics of the spec itself are a list of texts"),
        ({"topics": "docs/blank.md"}, "no topic in it: write one a line"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, source: dict[str, object], message: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "blank.md").write_text(" \n")
    (tmp_path / "docs" / "pdf.pdf").write_bytes(b"%PDF\n\xff\xfe")
    (tmp_path / "docs" / "null.md").write_bytes(b"a\0b")
    with pytest.raises(DataError) as caught:
        load(tmp_path, **source)
    assert message in str(caught.value)
