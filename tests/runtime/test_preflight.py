"""The data check: its figures are those of the rows, and its problems are real ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_tokenizers import CHATML, build_tokenizer

from fitune.recipes.data_table import DataTable
from fitune.recipes.errors import DataError
from fitune.runtime.data.preflight import check_data, refuse_problems
from fitune.runtime.data.prepare import tokenize_data
from fitune.runtime.data.report import DataReport
from fitune.runtime.data.sources import load_rows
from fitune.runtime.data.view import describe_data, render_data
from fitune.runtime.shown import show_text


def write_lines(path: Path, *records: object) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def question(text: str, answer: str = "Yes.") -> dict[str, str]:
    return {"instruction": text, "output": answer}


def check(folder: Path, template: str | None = CHATML, **table: Any) -> DataReport:
    checked = DataTable.model_validate({"train": "train.jsonl", "max_length": 64, **table})
    loaded = load_rows(checked, lambda written: folder / written)
    data = tokenize_data(checked, loaded, build_tokenizer(template), Path)
    return check_data("recipe.toml", checked, loaded, data, seed=0)


def show(report: DataReport, *, colour: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=100, force_terminal=colour, color_system="truecolor" if colour else None
    )
    render_data(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_good_data_has_no_problem_and_its_figures_are_those_of_the_rows(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", *[question(f"Is it {number}?") for number in range(20)])
    write_lines(tmp_path / "eval.jsonl", question("Feta?"))
    report = check(tmp_path, eval="eval.jsonl")
    train = report.train
    assert (report.problems, report.notes) == ((), ())
    assert (train.rows, train.sequences, train.duplicates, train.truncated) == (20, 20, 0, 0)
    assert sum(one.sequences for one in train.lengths) == 20
    (source,) = report.sources
    assert (source.tokens, source.trained_tokens, source.epoch_rows) == (train.tokens, train.trained_tokens, 20)
    assert 0 < train.trained_share < 1
    assert report.leak is not None and report.leak.normalized == 0
    refuse_problems(report)


def test_more_cut_rows_than_the_recipe_allows_are_a_problem_with_what_to_set(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "train.jsonl", *[{"text": text} for text in ["feta"] * 8 + ["feta " * 60, "a graviera " * 60]]
    )
    (problem,) = check(tmp_path, max_length=32).problems
    assert problem.startswith("2 of 10 training rows (20.0%) are longer than data.max_length = 32 tokens")
    with pytest.raises(DataError, match=r"allowed is data\.max_truncated = 0\.05.*\n`fitune data` shows"):
        refuse_problems(check(tmp_path, max_length=32))
    report = check(tmp_path, max_length=32, max_truncated=0.2)
    assert (report.problems, report.train.truncated) == ((), 2)
    assert any(note == "training rows cut at data.max_length = 32 tokens: 2 (20.0%)" for note in report.notes)
    for overlong in ("split", "drop"):
        assert check(tmp_path, max_length=32, overlong=overlong).problems == ()


def test_a_held_out_row_that_is_trained_on_is_a_problem(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", question("Feta?"), question("Manouri?"), question("Kasseri?"))
    write_lines(
        tmp_path / "eval.jsonl",
        question("Feta?"),
        question("MANOURI?  "),
        question("Kasseri?", "No."),
        question("New?"),
    )
    report = check(tmp_path, eval="eval.jsonl")
    assert report.leak is not None
    assert (report.leak.exact, report.leak.normalized, report.leak.same_question) == (1, 2, 1)
    assert report.leak.first == "eval.jsonl:1 is train.jsonl:1"
    (problem,) = report.problems
    assert problem.startswith(
        "2 of 4 held-out rows (50.0%) are among the training rows (eval.jsonl:1 is train.jsonl:1)"
    )
    assert any(
        note.startswith("held-out rows that ask what a training row asks, with another answer: 1")
        for note in report.notes
    )
    assert check(tmp_path, eval="eval.jsonl", max_leaked=0.5).problems == ()


def test_rows_that_are_held_out_by_a_fraction_never_leak(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", *[question(text) for text in ["Feta?", "feta?", "Manouri?", "Kasseri?"] * 4])
    report = check(tmp_path, eval=0.3)
    assert report.leak is not None and report.leak.normalized == 0
    assert report.train.duplicates > 0


def test_repeated_rows_and_columns_that_are_not_read_are_noted(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", {**question("Feta?"), "id": 1}, question("Manouri?"), question("feta? "))
    report = check(tmp_path)
    assert report.train.duplicates == 1
    assert report.notes == (
        "training rows that say the same as one before: 1 (33.3%; the first: train.jsonl:3 is train.jsonl:1)",
        "train.jsonl: columns not read, with their rows: id (1)",
    )


def test_what_is_left_out_split_or_spelt_is_noted(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", question("Feta?"), question("x " * 80), question("What is <|im_end|>?"))
    notes = check(tmp_path, max_truncated=1.0).notes
    assert any(note.startswith("training rows with nothing to train within") and note.endswith(": 1") for note in notes)
    assert any(note.endswith("control token of the model, encoded as text: 1") for note in notes)
    assert any("left out" in note for note in check(tmp_path, overlong="drop").notes)
    assert any("ChatML is used" in note for note in check(tmp_path, template=None, max_truncated=1.0).notes)


def test_a_conversation_that_nothing_ends_is_a_problem(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", question("Feta?"))
    table = DataTable(train="train.jsonl")
    loaded = load_rows(table, lambda written: tmp_path / written)
    tokenizer = build_tokenizer(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", eos=None
    )
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    report = check_data("recipe.toml", table, loaded, tokenize_data(table, loaded, tokenizer, Path), seed=0)
    assert report.problems[0].startswith("conversations that do not end with a token that ends a turn: 1")


def test_samples_are_rows_with_their_trained_tokens_marked(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", question("Feta?", "Opa!"))
    report = check(tmp_path)
    (sample,) = report.samples
    assert sample.where == "train.jsonl:1"
    assert [(one.text, one.trained) for one in sample.pieces] == [
        ("<|im_start|>user\nFeta?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Opa!<|im_end|>", True),
        ("\n", False),
    ]
    assert "⟦Opa!<|im_end|>⟧" in show(report)
    assert "\x1b[32mOpa!<|im_end|>\x1b[0m" in show(report, colour=True)


def test_what_the_data_says_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    evil = "\x1b[31mred\x1b]0;title\x07 [bold]x[/bold] \u202eesrever\x00 \x9b2J"
    write_lines(tmp_path / "train.jsonl", {**question(evil, evil), evil: 1})
    shown = show(check(tmp_path, max_length=256))
    assert not set(shown) & {"\x1b", "\x07", "\u202e", "\x00", "\x9b"}
    assert "\\x1b[31mred" in shown and "[bold]x[/bold]" in shown
    assert show_text("a\tb\n\u2028é🧀") == "a\tb\n\u2028é🧀"


def test_the_check_is_a_document_that_can_be_read_back(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", question("Feta?"))
    report = check(tmp_path)
    assert DataReport.model_validate_json(report.model_dump_json()) == report
    assert describe_data(report).startswith("1 rows, ")


def test_a_mixture_is_shown_source_by_source(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", *[question(str(number)) for number in range(9)])
    write_lines(tmp_path / "other.jsonl", *[{"text": str(number)} for number in range(50)])
    sources = [{"path": "train.jsonl", "weight": 0.9}, {"path": "other.jsonl", "weight": 0.1}]
    report = check(tmp_path, train=sources)
    assert [(one.name, one.format, one.rows, one.epoch_rows) for one in report.sources] == [
        ("train.jsonl", "instruction", 9, 9),
        ("other.jsonl", "text", 50, 1),
    ]
    assert "9 (90%)" in show(report)
    assert "train.jsonl 90% + other.jsonl 10%" in describe_data(report)
