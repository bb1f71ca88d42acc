"""The same row in every form that datasets come in: formats, columns, files, folders and patterns of them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from fitune.recipes.data_table import Columns, DataSource, DataTable
from fitune.recipes.errors import DataError
from fitune.runtime.data.rows import Message, Row
from fitune.runtime.data.sources import LoadedRows, load_rows

QUESTION, ANSWER = "What is feta?", "A cheese,\nmy friend: “opa”!"
ROWS = [{"instruction": QUESTION, "output": ANSWER, "id": 7}, {"instruction": "007", "output": "NA", "id": 8}]


def load(folder: Path, **table: Any) -> LoadedRows:
    return load_rows(DataTable.model_validate(table), lambda written: folder / written)


def write_lines(path: Path, *records: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def load_record(folder: Path, record: object, **table: Any) -> Row:
    write_lines(folder / "one.jsonl", record)
    return load(folder, train="one.jsonl", **table).train[0].rows[0]


def said(row: Row) -> list[tuple[str, str]]:
    return [(one.role, one.content) for one in row.messages or ()]


EXCHANGE = [("user", QUESTION), ("assistant", ANSWER)]


@pytest.mark.parametrize(
    ("record", "row_format"),
    [
        ({"instruction": QUESTION, "output": ANSWER}, "instruction"),
        ({"question": QUESTION, "answer": ANSWER}, "instruction"),
        ({"query": QUESTION, "response": ANSWER, "input": ""}, "instruction"),
        ({"instruction": QUESTION, "question": "", "output": ANSWER}, "instruction"),
        ({"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}, "messages"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
                    {"role": "assistant", "content": ANSWER, "name": None, "tool_calls": None},
                ],
                "tools": [],
            },
            "messages",
        ),
        ({"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]}, "sharegpt"),
        ({"conversation": [{"role": "user", "content": QUESTION}, {"from": "model", "value": ANSWER}]}, "sharegpt"),
        ({"messages": [{"from": "human", "value": QUESTION}, {"from": "chatgpt", "value": ANSWER}]}, "messages"),
    ],
)
def test_a_conversation_is_the_same_in_every_format(tmp_path: Path, record: dict[str, Any], row_format: str) -> None:
    write_lines(tmp_path / "a.jsonl", record)
    (source,) = load(tmp_path, train="a.jsonl").train
    assert (said(source.rows[0]), source.format) == (EXCHANGE, row_format)


def test_a_system_column_and_a_developer_message_are_the_system_prompt(tmp_path: Path) -> None:
    expected = [("system", "Be Pavlos."), *EXCHANGE]
    assert said(load_record(tmp_path, {**ROWS[0], "system": "Be Pavlos."})) == expected
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    assert said(load_record(tmp_path, {"conversations": turns, "system_prompt": "Be Pavlos."})) == expected
    messages = [{"role": "developer", "content": "Be Pavlos."}, *({"role": a, "content": b} for a, b in EXCHANGE)]
    assert said(load_record(tmp_path, {"messages": messages})) == expected


def test_openais_weight_says_which_answers_are_trained(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 1},
    ]
    row = load_record(tmp_path, {"messages": messages})
    assert row.messages is not None
    assert [one.trained for one in row.messages if one.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "assistant", "content": "b", "weight": 2}, '"weight" must be 0 or 1, is 2'),
        ({"role": "assistant", "content": "b", "function_call": {"name": "f"}}, '"function_call" are not supported'),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, 'a part of "content" is not of type "text"'),
        ({"role": "function", "content": "b"}, 'role "function" is not one of system, user, assistant'),
        ({"role": "assistant", "content": None}, '"content" must be text, is null'),
    ],
)
def test_what_would_change_the_meaning_of_a_message_is_refused(
    tmp_path: Path, message: dict[str, Any], problem: str
) -> None:
    with pytest.raises(DataError, match=r"^one\.jsonl:1: message 2: ") as caught:
        load_record(tmp_path, {"messages": [{"role": "user", "content": "a"}, message]})
    assert problem in str(caught.value)


def test_what_is_not_read_is_counted(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a", "id": 1}, {"role": "assistant", "content": "b"}]
    write_lines(tmp_path / "a.jsonl", {"messages": messages, "lang": "en"}, {"messages": messages})
    (source,) = load(tmp_path, train="a.jsonl").train
    assert source.unread == {"lang": 1, "messages: id": 2}


def test_columns_are_mapped_by_the_recipe(tmp_path: Path) -> None:
    record = {"frage": QUESTION, "antwort": ANSWER, "text": "not this"}
    columns = {"instruction": "frage", "output": "antwort"}
    assert said(load_record(tmp_path, record, columns=columns)) == EXCHANGE
    row = load_record(tmp_path, record, columns={"prompt": "frage", "completion": "antwort"})
    assert (row.prompt, row.completion) == (QUESTION, ANSWER)
    assert load_record(tmp_path, record, columns={"text": "antwort"}).text == ANSWER
    swapped = {"prompt": "b", "completion": "a"}
    row = load_record(tmp_path, swapped, columns={"prompt": "completion", "completion": "prompt"})
    assert (row.prompt, row.completion) == ("a", "b")


def test_a_mapped_column_that_a_row_lacks_is_told_by_both_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'one\.jsonl:1: no "frage" \(data\.columns\.instruction\), only question'):
        load_record(tmp_path, {"question": "a"}, columns={"instruction": "frage"})
    with pytest.raises(DataError, match=r'one\.jsonl:1: "frage" must be text, is a number'):
        load_record(tmp_path, {"frage": 1, "answer": "b"}, columns={"instruction": "frage"})


def test_a_format_whose_column_is_missing_is_told_with_the_columns_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'one\.jsonl:1: no "messages", only question, answer'):
        load_record(tmp_path, {"question": "a", "answer": "b"}, format="messages")


def test_a_source_has_columns_of_its_own(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {"q": QUESTION, "answer": ANSWER})
    write_lines(tmp_path / "b.jsonl", {"body": "feta"})
    sources = [
        DataSource(path="a.jsonl", columns=Columns(instruction="q")),
        DataSource(path="b.jsonl"),
    ]
    loaded = load(tmp_path, train=sources, columns={"text": "body"})
    assert (said(loaded.train[0].rows[0]), loaded.train[1].rows[0].text) == (EXCHANGE, "feta")


def write_csv(path: Path) -> None:
    answer = ANSWER.replace("\n", "\r\n" if path.suffix == ".tsv" else "\n")
    separator = "\t" if path.suffix == ".tsv" else ","
    lines = [["instruction", "output", "id"], [QUESTION, f'"{answer}"', "7"], ["007", "NA", "8"]]
    path.write_bytes("\n".join(separator.join(line) for line in lines).encode())


def write_file(path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    match path.name.partition(".")[2]:
        case "jsonl" | "ndjson":
            path.write_text(text)
        case "json":
            path.write_text(json.dumps(ROWS, indent=2))
        case "csv" | "tsv":
            write_csv(path)
        case "parquet":
            parquet.write_table(pa.Table.from_pylist(ROWS), path)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(text.encode()))
        case "jsonl.bz2":
            path.write_bytes(bz2.compress(text.encode()))
        case "jsonl.xz":
            path.write_bytes(lzma.compress(text.encode()))
        case "jsonl.zst":
            path.write_bytes(pa.compress(text.encode(), codec="zstd", asbytes=True))


ENDINGS = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_rows_are_the_same_in_every_kind_of_file(tmp_path: Path, ending: str) -> None:
    write_file(tmp_path / f"rows.{ending}")
    (source,) = load(tmp_path, train=f"rows.{ending}").train
    assert [[text.replace("\r", "") for _, text in said(row)] for row in source.rows] == [
        [QUESTION, ANSWER],
        ["007", "NA"],
    ], "numbers and NA in a CSV file are text"
    assert source.unread == {"id": 2}


def test_a_zst_file_of_several_frames_is_read_whole(tmp_path: Path) -> None:
    frames = [pa.compress(b'{"text": "%d"}\n' % number, codec="zstd", asbytes=True) for number in range(3)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert [row.text for row in load(tmp_path, train="a.jsonl.zst").train_rows] == ["0", "1", "2"]


def test_a_row_of_csv_is_named_by_the_line_that_it_starts_in(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"a\nb"\n\nc\n')
    assert [(row.where, row.text) for row in load(tmp_path, train="a.csv").train_rows] == [
        ("a.csv:2", "a\nb"),
        ("a.csv:5", "c"),
    ]


def test_one_object_a_line_in_a_json_file_is_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [row.where for row in load(tmp_path, train="a.json").train_rows] == ["a.json:1", "a.json:2"]


def test_a_folder_is_its_files_by_name_and_a_pattern_those_that_match(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".hidden.jsonl", "_x.jsonl"):
        write_lines(tmp_path / "data" / name, {"text": name})
    (tmp_path / "data" / "README.md").write_text("notes")
    assert [row.where for row in load(tmp_path, train="data").train_rows] == [
        "data/a.jsonl:1",
        "data/b.jsonl:1",
        "data/sub/c.jsonl:1",
    ]
    assert [row.text for row in load(tmp_path, train="data/[a-b].jsonl").train_rows] == ["a.jsonl", "b.jsonl"]
    found = [row.text for row in load(tmp_path, train="data/**/*.jsonl").train_rows]
    assert found == [".hidden.jsonl", "_x.jsonl", "a.jsonl", "b.jsonl", "sub/c.jsonl"]


def test_a_folder_whose_files_name_splits_gives_the_wanted_one(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test.jsonl", "validation/x.jsonl"):
        write_lines(tmp_path / "data" / name, {"text": name})
    loaded = load(tmp_path, train="data", eval="data")
    assert [row.text for row in loaded.train_rows] == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert [row.text for row in loaded.eval_rows] == ["validation/x.jsonl"]
    chosen = load(tmp_path, train=[{"path": "data", "split": "test"}])
    assert [row.text for row in chosen.train_rows] == ["test.jsonl"]
    with pytest.raises(DataError, match=r"data: has the splits .*, but none of nowhere"):
        load(tmp_path, train=[{"path": "data", "split": "nowhere"}])


def test_a_folder_of_unnamed_files_beside_a_test_file_trains_on_the_others(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "test.jsonl"):
        write_lines(tmp_path / "data" / name, {"text": name})
    assert [row.text for row in load(tmp_path, train="data").train_rows] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ("mixed", "mixed: holds .csv and .jsonl files: name one kind, such as mixed/*.csv"),
        ("empty", "empty: a folder without a file that is read"),
        ("mixed/*.parquet", "mixed/*.parquet: no file matches this pattern"),
        ("mixed/*.md", "mixed/*.md: no file matches this pattern; it names notes.md, which is not read"),
        ("mixed/a**b", "mixed/a**b: not a pattern of files"),
        ([{"path": "mixed/a.csv", "subset": "en"}], "mixed/a.csv: only a dataset of the hub has a subset"),
    ],
)
def test_a_folder_or_pattern_that_says_nothing_clear_is_refused(tmp_path: Path, train: Any, problem: str) -> None:
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "mixed" / "b.jsonl", {"text": "b"})
    (tmp_path / "mixed" / "a.csv").write_text("text\na\n")
    (tmp_path / "mixed" / "notes.md").write_text("notes")
    with pytest.raises(DataError) as caught:
        load(tmp_path, train=train)
    assert str(caught.value).startswith(problem)


def test_a_bad_row_of_a_folder_is_told_with_its_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "a.jsonl", {"text": "a"}, {"text": ""})
    with pytest.raises(DataError, match=r'^data/a\.jsonl:2: "text" is empty'):
        load(tmp_path, train="data")


def test_a_message_keeps_what_it_says_to_the_letter(tmp_path: Path) -> None:
    row = load_record(tmp_path, {"messages": [{"role": "user", "content": " a\r\n"}, {"role": "gpt", "content": "b "}]})
    assert row.messages == (Message(role="user", content=" a\r\n"), Message(role="assistant", content="b "))
