from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitune.recipes.data_table import DataSource, DataTable
from fitune.recipes.errors import DataError
from fitune.runtime.data.rows import Message, Row
from fitune.runtime.data.sources import SourceRows, load_rows, load_rows_from, normalize, split_sources


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def question(text: str) -> dict[str, str]:
    return {"instruction": text, "context": "", "output": f"{text}!"}


def turns(*messages: tuple[str, str]) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def load_one(tmp_path: Path, record: object, row_format: str = "auto") -> Row:
    (row,) = load_rows_from(write_jsonl(tmp_path / "train.jsonl", record), row_format)
    return row


def error_of(path: Path, row_format: str = "auto") -> str:
    with pytest.raises(DataError) as caught:
        load_rows_from(path, row_format)
    return str(caught.value)


def instructions(rows: list[Row]) -> list[str]:
    return [row.messages[0].content for row in rows if row.messages]


def test_an_instruction_with_context_is_a_question_and_its_answer(tmp_path: Path) -> None:
    row = load_one(tmp_path, {"instruction": "Is this feta?", "context": "Label: cow's milk.", "output": "No."})
    assert row.where == "train.jsonl:1"
    assert row.messages == (
        Message(role="user", content="Is this feta?\n\nLabel: cow's milk."),
        Message(role="assistant", content="No."),
    )


@pytest.mark.parametrize("more", [{}, {"context": ""}, {"context": None}, {"input": " "}, {"context": "", "input": ""}])
def test_the_context_of_an_instruction_may_be_missing_or_empty(tmp_path: Path, more: dict[str, str]) -> None:
    row = load_one(tmp_path, {"instruction": "Feta?", "output": "Yes.", **more})
    assert row.messages is not None
    assert row.messages[0].content == "Feta?"


def test_input_is_another_name_of_context(tmp_path: Path) -> None:
    record = {"instruction": "Translate.", "input": "tyri", "output": "cheese"}
    assert load_one(tmp_path, record) == load_one(tmp_path, {**record, "context": "tyri", "input": ""})


def test_messages_are_kept_as_they_are(tmp_path: Path) -> None:
    said = (("system", "Be Pavlos."), ("user", "Feta?"), ("assistant", "Opa!"), ("user", ""), ("assistant", "Yes."))
    row = load_one(tmp_path, turns(*said))
    assert row.messages == tuple(Message(role=role, content=content) for role, content in said)


def test_a_completion_and_a_text_are_kept_as_they_are(tmp_path: Path) -> None:
    row = load_one(tmp_path, {"prompt": "Q: ", "completion": " A\n"})
    assert (row.prompt, row.completion, row.messages, row.text) == ("Q: ", " A\n", None, None)
    assert load_one(tmp_path, {"text": " Once\n"}).text == " Once\n"


@pytest.mark.parametrize(
    ("record", "row_format"),
    [
        ({"instruction": "a", "input": "", "output": "b", "text": "a b"}, "instruction"),
        ({"prompt": "a", "messages": turns(("user", "a"), ("assistant", "b"))["messages"]}, "messages"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "completion"),
        ({"title": "a", "text": "b"}, "text"),
    ],
)
def test_the_format_is_told_by_the_columns(tmp_path: Path, record: object, row_format: str) -> None:
    assert load_one(tmp_path, record) == load_one(tmp_path, record, row_format)


def test_a_format_that_is_given_is_not_guessed(tmp_path: Path) -> None:
    assert load_one(tmp_path, {"instruction": "a", "output": "b", "text": "c"}, "text").text == "c"


def test_a_json_file_is_a_list_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([question("a"), question("b")]), encoding="utf-8")
    rows = load_rows_from(path)
    assert [row.where for row in rows] == ["train.json: row 1", "train.json: row 2"]
    assert instructions(rows) == ["a", "b"]


def test_a_text_file_is_a_row_a_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_bytes(b"\n\nFeta\nis white.\n \nGraviera\r\nis not.")
    rows = load_rows_from(path)
    assert [(row.where, row.text) for row in rows] == [
        ("story.txt:3", "Feta\nis white."),
        ("story.txt:6", "Graviera\nis not."),
    ]


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.txt"])
def test_a_byte_order_mark_is_accepted(tmp_path: Path, name: str) -> None:
    content = {"jsonl": '{"text": "tyrí"}', "json": '[{"text": "tyrí"}]', "txt": "tyrí"}[name.partition(".")[2]]
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert [row.text for row in load_rows_from(tmp_path / name)] == ["tyrí"]


def test_empty_lines_and_windows_line_ends_are_accepted_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\r\n{"text": "a"}\r\n   \r\n{"text": "b"}')
    assert [(row.where, row.text) for row in load_rows_from(path)] == [("train.jsonl:2", "a"), ("train.jsonl:4", "b")]


def test_a_unicode_line_separator_within_a_string_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert [row.text for row in load_rows_from(path)] == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"instruction": "a"}, 'no "output", only instruction'),
        ({"instruction": "a", "output": ""}, '"output" is empty'),
        ({"instruction": " ", "output": "b"}, '"instruction" is empty'),
        ({"instruction": "a", "output": 12}, '"output" must be text, is a number'),
        ({"instruction": "a", "output": None}, '"output" must be text, is null'),
        ({"instruction": "a", "output": "b", "context": ["c"]}, '"context" must be text, is a list'),
        ({"instruction": "a", "output": "b", "context": "c", "input": "d"}, 'has both "context" and "input"'),
        ({"instruction": "a", "output": "\ud800"}, '"output" is not valid Unicode'),
        ({"messages": "hello"}, '"messages" must be a list of {"role", "content"}, is text'),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": ["hello"]}, 'message 1: must be {"role": ..., "content": ...}, is text'),
        ({"messages": [{"speaker": "human", "value": "a"}]}, 'message 1: no "role", only speaker, value'),
        ({"conversations": [{"from": "human", "text": "a"}]}, 'message 1: no "value", only from, text'),
        ({**turns(("user", "a"), ("assistant", "b")), "tools": [{"name": "f"}]}, '"tools" are not supported'),
        (turns(("tool", "a")), 'message 1: role "tool" is not one of system, user, assistant'),
        (turns(("user", "a"), ("assistant", "")), 'message 2: "content" is empty'),
        (turns(("user", "a")), 'the last message is from "user", must be from "assistant"'),
        (turns(("assistant", "a")), 'the first message is from "assistant"'),
        (turns(("user", "a"), ("system", "b"), ("assistant", "c")), 'only the first message may be from "system"'),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [1]}]},
            'message 2: "tool_calls" are not supported',
        ),
        ({"prompt": "a", "completion": " "}, '"completion" is empty'),
        ({"text": True}, '"text" must be text, is true'),
        ({"title": "a", "body": "b"}, "the columns title, body belong to no format"),
        (["a"], "must be an object"),
        ("a", "must be an object"),
    ],
)
def test_a_bad_row_is_told_with_file_and_line(tmp_path: Path, record: object, problem: str) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", record)
    assert error_of(path).startswith(f"train.jsonl:1: {problem}")


def test_only_the_first_five_bad_rows_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    bad = {"instruction": "a", "output": ""}
    path = write_jsonl(tmp_path / "train.jsonl", question("a"), *[bad] * 8, question("b"))
    *lines, last = error_of(path).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"train.jsonl:{number}" for number in range(2, 7)]
    assert last == "and 3 more bad rows"


def test_a_format_that_was_guessed_is_named_in_the_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", question("a"), {"prompt": "a"})
    assert error_of(path) == (
        'train.jsonl:2: no "instruction", only prompt (format instruction, taken from the first row\'s columns)'
    )


def test_lines_that_are_not_json_or_not_utf8_are_told_together_with_other_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(b'{"text": "a"}\n{"text": "b"\n{"text": "\xff"}\n{"text": ""}\n' + deep + b"\n" + b"9" * 5000)
    lines = error_of(path).splitlines()
    assert lines[0].startswith("train.jsonl:2: not valid JSON: Expecting ',' delimiter (column ")
    assert lines[1].startswith("train.jsonl:3: not UTF-8: byte 0xff")
    assert lines[2] == 'train.jsonl:4: "text" is empty'
    assert lines[3].startswith("train.jsonl:5: not JSON that can be read")
    assert lines[4].startswith("train.jsonl:6: not JSON that can be read")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: no rows"),
        ("a.jsonl", b"\n \n", "a.jsonl: no rows"),
        ("a.json", b"", "a.json: no rows"),
        ("a.json", b"[]", "a.json: no rows"),
        ("a.txt", b"\n", "a.txt: no rows"),
        ("a.json", b'{"text": "a"}', "a.json: a .json file holds one list of objects"),
        ("a.json", b"[\n{\xff}]", "a.json:2: not UTF-8: byte 0xff"),
        ("a.json", b"[" * 100_000, "a.json: not JSON that can be read"),
        ("a.txt", b"a\n\xff", "a.txt:2: not UTF-8: byte 0xff"),
        ("a.csv", b"", "a.csv: no rows"),
        ("a.csv", b"text,n\na,1\nb\n", "a.csv:3: has 1 values, the header 2 columns"),
        ("a.csv", b"text;n\na;1\n", "a.csv: its header is one column, 'text;n'"),
        ("a.csv", b"text,text\na,b\n", 'a.csv: its header names "text" more than once'),
        ("a.csv", b'text\n"a\n', "a.csv:2: not valid CSV: "),
        ("a.csv", b"text\na\xff\n", "a.csv:2: not UTF-8: byte 0xff"),
        ("a.parquet", b"PAR1", "a.parquet: not a readable parquet file: "),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read: Not a gzipped file"),
        ("a.jsonl.xz", b"no xz", "a.jsonl.xz: cannot be read: "),
        ("a.jsonl.zst", b"no zstd", "a.jsonl.zst: cannot be read: "),
        ("a.jsonl.bz2", b"no bzip2", "a.jsonl.bz2: cannot be read: "),
        ("a.docx", b"a", "a.docx: files ending in '.docx' are not read; allowed: a file ending in .jsonl, "),
    ],
)
def test_a_file_that_cannot_be_used_is_told_with_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert error_of(tmp_path / name).startswith(message)


def test_a_missing_file_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", question("a"))
    assert "trian.jsonl: no such file or folder (did you mean train.jsonl?)" in error_of(tmp_path / "trian.jsonl")
    assert f"there is no folder {tmp_path / 'nowhere'}" in error_of(tmp_path / "nowhere" / "train.jsonl")


@pytest.mark.parametrize("name", ["a" * 300, "a/" + "b" * 300, "train.jsonl/x.jsonl"])
def test_a_path_that_no_file_can_have_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match=r"cannot be read|no such"):
        load_rows(DataTable(train=name), lambda path: tmp_path / path)


def test_a_folder_that_holds_no_saved_dataset_is_refused(tmp_path: Path) -> None:
    assert "a folder without a file that is read" in error_of(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "role", "content", "instruction", "context", "output", "prompt", "completion", "text"]
            ),
            inner | st.sampled_from(["user", "assistant", "system"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(records=st.lists(JSON, max_size=4), row_format=st.sampled_from(["auto", "instruction", "messages", "text"]))
def test_whatever_a_file_of_json_holds_it_gives_rows_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, records: list[object], row_format: str
) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("fuzz") / "train.jsonl", *records)
    try:
        rows = load_rows_from(path, row_format)
    except DataError:
        return
    assert len(rows) == len(records)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=60), ending=st.sampled_from([".jsonl", ".json", ".txt"]))
def test_whatever_bytes_a_file_holds_it_gives_rows_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / f"train{ending}"
    path.write_bytes(content)
    try:
        assert load_rows_from(path)
    except DataError:
        return


def test_held_out_rows_may_be_a_file_of_their_own(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", question("a"), question("b"))
    write_jsonl(tmp_path / "eval.jsonl", question("c"))
    loaded = load_rows(DataTable(train="train.jsonl", eval="eval.jsonl"), lambda path: tmp_path / path)
    assert (instructions(loaded.train_rows), instructions(loaded.eval_rows)) == (["a", "b"], ["c"])


def test_without_eval_nothing_is_held_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", question("a"))
    assert load_rows(DataTable(train="train.jsonl"), lambda path: tmp_path / path).eval_rows == []


def test_errors_name_a_source_as_the_recipe_writes_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", {"text": ""})
    with pytest.raises(DataError, match=r"^data/train\.jsonl:1: "):
        load_rows(DataTable(train="data/train.jsonl"), lambda path: tmp_path / path)


ROWS = st.integers(2, 60).map(lambda count: [Row(where=f"a:{number}", text=str(number)) for number in range(count)])


@given(rows=ROWS, fraction=st.floats(0, 1, exclude_min=True, exclude_max=True), seed=st.integers(0, 99))
def test_a_split_keeps_every_row_once_and_leaves_neither_part_empty(
    rows: list[Row], fraction: float, seed: int
) -> None:
    sources = [SourceRows(name="a", rows=tuple(rows), format="text")]
    ((rest,), (held_out,)) = split_sources(sources, fraction, seed=seed)
    assert sorted(rest.rows + held_out.rows, key=rows.index) == rows
    assert rest.rows and held_out.rows
    assert abs(len(held_out.rows) - fraction * len(rows)) <= 1
    assert ([rest], [held_out]) == split_sources(sources, fraction, seed=seed)


def test_rows_that_two_sources_share_are_held_out_of_both(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", *[{"text": str(number)} for number in range(10)])
    write_jsonl(tmp_path / "b.jsonl", *[{"text": str(number)} for number in range(5, 30)])
    sources = (DataSource(path="a.jsonl"), DataSource(path="b.jsonl"))
    for seed in range(9):
        loaded = load_rows(DataTable(train=sources, eval=0.2), lambda path: tmp_path / path, seed=seed)
        assert {row.text for row in loaded.train_rows}.isdisjoint(row.text for row in loaded.eval_rows)
    with pytest.raises(DataError, match=r"^b\.jsonl: every row says what a held-out row of another source says"):
        write_jsonl(tmp_path / "b.jsonl", *[{"text": "0"}, {"text": "1"}])
        load_rows(DataTable(train=sources, eval=0.9), lambda path: tmp_path / path)


def test_another_seed_holds_out_other_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", *[question(str(number)) for number in range(100)])
    table = DataTable(train="train.jsonl", eval=0.1)
    chosen = {
        tuple(instructions(load_rows(table, lambda path: tmp_path / path, seed=seed).eval_rows)) for seed in range(5)
    }
    assert len(chosen) == 5


def test_a_single_row_cannot_be_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", question("a"))
    with pytest.raises(DataError, match=r"train\.jsonl:1: is the only row"):
        load_rows(DataTable(train="train.jsonl", eval=0.5), lambda path: tmp_path / path)


def test_rows_that_say_the_same_are_never_on_both_sides_of_a_split(tmp_path: Path) -> None:
    said = ["What is  feta?", "what is feta?", "Graviera?", "Manouri?", "MANOURI?"]
    write_jsonl(tmp_path / "train.jsonl", *[{"text": text} for text in said * 3])
    for seed in range(10):
        loaded = load_rows(DataTable(train="train.jsonl", eval=0.4), lambda path: tmp_path / path, seed=seed)
        assert {*map(normalize, loaded.train_rows)}.isdisjoint(map(normalize, loaded.eval_rows))
        assert len(loaded.train_rows) + len(loaded.eval_rows) == 15


def test_a_dataset_of_one_row_again_and_again_cannot_be_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", question("a"), question("a"))
    with pytest.raises(DataError, match=r"train\.jsonl:1: all rows are the same"):
        load_rows(DataTable(train="train.jsonl", eval=0.5), lambda path: tmp_path / path)


def test_every_source_of_a_mixture_holds_out_its_fraction(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", *[question(f"a{number}") for number in range(20)])
    write_jsonl(tmp_path / "b.jsonl", *[{"text": f"b{number}"} for number in range(10)])
    sources = (DataSource(path="a.jsonl", weight=2.0), DataSource(path="b.jsonl", weight=0.5, format="text"))
    loaded = load_rows(DataTable(train=sources, eval=0.2), lambda path: tmp_path / path)
    assert [(one.name, len(one.rows), one.weight, one.format) for one in loaded.train] == [
        ("a.jsonl", 16, 2.0, "instruction"),
        ("b.jsonl", 8, 0.5, "text"),
    ]
    assert [len(one.rows) for one in loaded.eval] == [4, 2]


def test_a_source_without_a_format_has_the_datasets_format(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", {"instruction": "a", "output": "b", "text": "c"})
    sources = (DataSource(path="a.jsonl"), DataSource(path="a.jsonl", format="instruction"))
    loaded = load_rows(DataTable(train=sources, format="text"), lambda path: tmp_path / path)
    assert [row.text for row in loaded.train_rows] == ["c", None]


def test_a_system_prompt_goes_before_rows_that_have_none(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "a.jsonl", turns(("user", "a"), ("assistant", "b")), turns(("system", "Old."), ("assistant", "b"))
    )
    write_jsonl(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"})
    sources = (DataSource(path="a.jsonl"), DataSource(path="b.jsonl"))
    first, second, third = load_rows(DataTable(train=sources, system="New."), lambda path: tmp_path / path).train_rows
    assert first.messages is not None and second.messages is not None
    assert [message.content for message in first.messages] == ["New.", "a", "b"]
    assert [message.content for message in second.messages] == ["Old.", "b"]
    assert (third.prompt, third.completion) == ("New.\n\na", "b")


def test_a_system_prompt_for_nothing_but_text_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(DataError, match="format text has no place for a system prompt"):
        load_rows(DataTable(train="a.jsonl", system="New."), lambda path: tmp_path / path)


def test_a_saved_dataset_is_read_split_by_split(tmp_path: Path) -> None:
    import datasets

    parts = {name: datasets.Dataset.from_list([question(name)]) for name in ("test", "train", "validation")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    parts["test"].save_to_disk(tmp_path / "plain")
    loaded = load_rows(DataTable(train="saved", eval="saved"), lambda path: tmp_path / path)
    assert (instructions(loaded.train_rows), instructions(loaded.eval_rows)) == (["train"], ["validation"])
    assert loaded.train_rows[0].where == "saved: row 1"
    assert instructions(load_rows_from(tmp_path / "plain")) == ["test"]


def test_a_saved_dataset_without_the_split_is_told_with_those_it_has(tmp_path: Path) -> None:
    import datasets

    part = datasets.Dataset.from_list([question("a")])
    datasets.DatasetDict({"en": part, "el": part}).save_to_disk(tmp_path / "saved")
    assert error_of(tmp_path / "saved").startswith("saved: has the splits en, el, but none of train")


def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_rows(DataTable(train="data/train.jsonl"), lambda path: tmp_path / path)


def test_offline_the_hub_is_told_to_be_out_of_reach(tmp_path: Path) -> None:
    code = (
        "from fitune.runtime.data.sources import load_rows; from fitune.recipes.data_table import DataTable; "
        "from pathlib import Path; load_rows(DataTable(train='owner/name'), Path)"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    answer = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True)
    assert "DataError: owner/name: no such local path, and not to be had from the Hugging Face hub" in answer.stderr
    assert "(without a network, give a local file)" in answer.stderr
