"""A thousand datasets by chance: rows of all shapes, encodings and sizes, in files of every kind, whole and damaged.

Each gives a right result or an error that names file and row; never a traceback.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console
from small_tokenizers import BOS_CHATML, CHATML, MARKED, THINKS_LAST, WITHOUT_END, WITHOUT_SYSTEM, build_tokenizer

from fitune.recipes.data_table import DataTable
from fitune.recipes.errors import DataError
from fitune.runtime.data.batches import iterate_batches
from fitune.runtime.data.preflight import check_data, refuse_problems
from fitune.runtime.data.prepare import TokenizedData, tokenize_data
from fitune.runtime.data.report import DataReport
from fitune.runtime.data.sources import load_rows
from fitune.runtime.data.streaming import StreamedRows
from fitune.runtime.data.view import render_data

TOKENIZERS = {
    "chatml": build_tokenizer(CHATML),
    "marked": build_tokenizer(MARKED),
    "bos": build_tokenizer(BOS_CHATML, adds_bos=True),
    "thinks": build_tokenizer(THINKS_LAST),
    "without an end": build_tokenizer(WITHOUT_END),
    "without a system prompt": build_tokenizer(WITHOUT_SYSTEM + CHATML),
}
TEXT = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(), max_size=6),
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>user\n", "<s>", "\x1b[2J", "[bold]x[/]", " ", "\u2028", "\ud83d", "é" * 80]
    ),
    st.text(st.sampled_from("feta \n"), min_size=30, max_size=200),
)


def as_talk(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions and answers as messages."""
    return [
        {"role": role, "content": said}
        for pair in pairs
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


ROLE = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "", "USER"])
VALUE = TEXT | st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.lists(TEXT, max_size=2)
TURN = st.fixed_dictionaries({"role": ROLE, "content": VALUE}) | st.fixed_dictionaries({"from": ROLE, "value": VALUE})
TURNS = st.lists(TURN | VALUE, max_size=4)
TALK = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)
ROW = st.one_of(
    st.fixed_dictionaries(
        {"instruction": TEXT, "output": TEXT}, optional={"context": VALUE, "input": TEXT, "system": TEXT}
    ),
    st.fixed_dictionaries({"messages": TALK.map(as_talk) | TURNS}, optional={"tools": VALUE, "system": VALUE}),
    st.fixed_dictionaries({"conversations": TALK.map(as_talk) | TURNS}),
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
    st.fixed_dictionaries({"text": TEXT}),
    st.dictionaries(
        st.sampled_from(["text", "messages", "prompt", "answer", "question", "a", ""]) | TEXT, VALUE, max_size=3
    ),
    VALUE,
)
ROWS = st.lists(ROW, max_size=6) | ROW.flatmap(lambda row: st.lists(st.just(row), min_size=1, max_size=20))
SAID = TEXT.map(lambda text: "Feta " + text.encode("utf-8", "ignore").decode())
GOOD_TALK = st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3).map(as_talk)
GOOD_ROW = st.sampled_from(
    [
        st.fixed_dictionaries({"instruction": SAID, "output": SAID, "context": TEXT, "id": st.integers()}),
        st.fixed_dictionaries({"question": SAID, "answer": SAID}),
        st.fixed_dictionaries({"messages": GOOD_TALK}),
        st.fixed_dictionaries({"prompt": SAID, "completion": SAID}),
        st.fixed_dictionaries({"text": SAID}),
    ]
)
GOOD_ROWS = GOOD_ROW.flatmap(lambda row: st.lists(row, min_size=2, max_size=12))
COMPRESSED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write_json_lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def write_csv(rows: list[Any]) -> bytes:
    tables = [row for row in rows if isinstance(row, dict)]
    names = sorted({name for row in tables for name in row})
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows({name: "" if value is None else str(value) for name, value in row.items()} for row in tables)
    return file.getvalue().encode("utf-8", "surrogatepass")


def write_parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    try:
        parquet.write_table(pa.Table.from_pylist([row for row in rows if isinstance(row, dict)]), sink)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return b"PAR1"
    return sink.getvalue()


WRITERS = {
    ".jsonl": write_json_lines,
    ".json": lambda rows: json.dumps(rows).encode(),
    ".csv": write_csv,
    ".tsv": write_csv,
    ".txt": lambda rows: "\n\n".join(map(str, rows)).encode("utf-8", "surrogatepass"),
    ".parquet": write_parquet,
}


@st.composite
def files(draw: st.DrawFn, *, good: bool) -> tuple[str, bytes]:
    """(ending, content) of a file: good rows; else rows of any shape, now and then damaged, or bytes by chance."""
    ending = draw(st.sampled_from([".jsonl", ".json", ".parquet", ".txt"] if good else sorted(WRITERS)))
    compression = "" if ending == ".parquet" else draw(st.sampled_from([*COMPRESSED, "", "", ""]))
    if good:
        return ending + compression, COMPRESSED[compression](WRITERS[ending](draw(GOOD_ROWS)))
    content = WRITERS[ending](draw(ROWS)) if draw(st.integers(0, 9)) else draw(st.binary(max_size=60))
    content = COMPRESSED[compression](content)
    if draw(st.integers(0, 7)) == 0 and content:
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] + draw(st.binary(max_size=3)) + content[at + draw(st.integers(0, 4)) :]
    return ending + compression, content


@st.composite
def datasets(draw: st.DrawFn) -> tuple[list[tuple[str, bytes]], dict[str, Any]]:
    """(files, the keys of [data] but `train`); three in four are good."""
    good = draw(st.integers(0, 3)) > 0
    table = draw(TABLES)
    if good:
        table = {key: value for key, value in table.items() if key not in ("format", "columns")}
        table["max_length"] += 20
    return draw(st.lists(files(good=good), min_size=1, max_size=2)), table


TABLES = st.fixed_dictionaries(
    {"max_length": st.integers(1, 200)},
    optional={
        "format": st.sampled_from(["auto", "instruction", "messages", "sharegpt", "completion", "text"]),
        "overlong": st.sampled_from(["truncate", "split", "drop"]),
        "train_on": st.sampled_from(["assistant", "last", "all"]),
        "packing": st.booleans(),
        "streaming": st.booleans(),
        "eval": st.floats(0.01, 0.99),
        "system": st.just("Be Pavlos."),
        "columns": st.sampled_from(
            [{"text": "a"}, {"prompt": "text", "completion": "answer"}, {"instruction": "question"}]
        ),
        "max_truncated": st.just(1.0),
    },
)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(dataset=datasets(), name=st.sampled_from(sorted(TOKENIZERS)), weight=st.booleans())
def test_whatever_a_dataset_holds_it_gives_a_right_result_or_an_error_that_names_it(
    tmp_path_factory: pytest.TempPathFactory,
    dataset: tuple[list[tuple[str, bytes]], dict[str, Any]],
    name: str,
    weight: bool,
) -> None:
    written, table = dataset
    folder, sources = tmp_path_factory.mktemp("fuzz"), []
    for number, (ending, content) in enumerate(written):
        (folder / f"rows{number}{ending}").write_bytes(content)
        sources.append({"path": f"rows{number}{ending}"} | ({"weight": number + 0.5} if weight else {}))
    try:
        checked = DataTable.model_validate(table | {"train": sources})
    except ValidationError:
        return
    try:
        loaded = load_rows(checked, lambda path: folder / path)
        data = tokenize_data(checked, loaded, TOKENIZERS[name], lambda path: folder / path)
        report = check_data("recipe.toml", checked, loaded, data, seed=0)
    except DataError as error:
        assert str(error).splitlines()[0].startswith(("rows0.", "rows1."))
        assert str(folder) not in str(error)
        return
    assert_right(report, data, checked)
    if data.stream is not None:
        assert_streams(data.stream)


def assert_right(report: DataReport, data: TokenizedData, table: DataTable) -> None:
    """What holds for every data check: counts add up, nothing is too long, something is trained, it can be shown."""
    facts, rows = report.train, data.unpacked.rows
    assert facts.sequences == len(rows) == sum(source.sequences for source in report.sources)
    assert facts.rows == sum(source.rows for source in report.sources)
    assert all(0 < len(row) <= table.max_length and row.trained_tokens > 0 for row in (*rows, *data.train.rows))
    assert all(label in (-100, token) for row in rows for token, label in zip(row.input_ids, row.labels, strict=True))
    assert facts.tokens == data.train.total_tokens and facts.trained_tokens <= facts.tokens
    assert facts.trained_tokens >= data.train.trained_tokens == sum(row.trained_tokens for row in data.train.rows)
    assert report.leak is None or not isinstance(table.eval, float) or report.leak.normalized == 0
    assert not facts.truncated or table.overlong != "drop"
    assert DataReport.model_validate_json(report.model_dump_json()) == report
    output = io.StringIO()
    render_data(report, Console(file=output, width=80))
    assert not set(output.getvalue()) & set("\x00\x07\x1b\x7f\x9b\u202e")
    batches = list(iterate_batches(data.train, global_batch_size=3, micro_batch_size=2, seed=0, epochs=1))
    assert sum(len(one.input_ids) for batch in batches for one in batch.micro_batches) == data.train.epoch_rows
    if report.problems:
        with pytest.raises(DataError):
            refuse_problems(report)


def assert_streams(stream: StreamedRows) -> None:
    """A stream of data that was checked runs on, or says which row stops it."""
    try:
        rows = list(islice(stream.iterate(start=2, seed=0), 12))
    except DataError as error:
        assert str(error).startswith(("rows0.", "rows1."))
    else:
        assert all(0 < len(row) <= stream.max_length and row.trained_tokens for _, row in rows)
