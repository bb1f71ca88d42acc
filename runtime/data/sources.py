"""From the `[data]` table of a recipe to rows: its sources, what is held out of them, and the system prompt."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from ...recipes.data_table import DataSource, DataTable
from ...recipes.errors import DataError
from .records import EVAL_SPLITS, TRAIN_SPLITS, Dataset, is_here, load_records
from .rows import Message, Row, RowParser

STREAM_HEAD_ROWS = 1000
"""Rows of a streamed source that are read before the run, to check them."""

Resolve = Callable[[str], Path]
"""From a path as the recipe writes it to the path that it means."""


@dataclass(frozen=True, kw_only=True)
class SourceRows:
    """The rows of one source.

    name:    as the recipe writes it
    rows:    1 or more
    format:  of the rows: the recipe's, or the one that was detected
    weight:  its part of the rows drawn, relative to the other sources; None: every row once an epoch
    unread:  how many rows have each column that is not read
    """

    name: str
    rows: tuple[Row, ...]
    format: str
    weight: float | None = None
    unread: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoadedRows:
    """The rows of a recipe, source by source.

    train:  to train on; 1 source or more
    eval:   held out; none where `data.eval` is unset
    forgetting: of another task; none where `data.forgetting` is unset
    """

    train: tuple[SourceRows, ...]
    eval: tuple[SourceRows, ...] = ()
    forgetting: tuple[SourceRows, ...] = ()

    @property
    def train_rows(self) -> list[Row]:
        """All rows to train on, each once."""
        return [row for source in self.train for row in source.rows]

    @property
    def eval_rows(self) -> list[Row]:
        """All held-out rows."""
        return [row for source in self.eval for row in source.rows]


def load_rows(table: DataTable, resolve: Resolve, *, seed: int = 0) -> LoadedRows:
    """The rows of `[data]`; a fraction in `data.eval` is held out of each source.

    Of a source that is streamed only the first STREAM_HEAD_ROWS are read: the data check and the plan look at them.
    """
    train = [_load(source, table, resolve, TRAIN_SPLITS) for source in list_sources(table.train, table)]
    held_out = list[SourceRows]()
    if isinstance(table.eval, float):
        train, held_out = split_sources(train, table.eval, seed=seed)
    elif table.eval is not None:
        held_out = load_eval_rows(table, resolve)
    return LoadedRows(train=tuple(train), eval=tuple(held_out), forgetting=tuple(_load_forgetting(table, resolve)))


def load_eval_rows(table: DataTable, resolve: Resolve) -> list[SourceRows]:
    """The rows of the sources in `data.eval`; none where it is unset or a fraction."""
    if table.eval is None or isinstance(table.eval, float):
        return []
    return [_load(source, table, resolve, EVAL_SPLITS) for source in list_sources(table.eval, table)]


def _load_forgetting(table: DataTable, resolve: Resolve) -> Iterator[SourceRows]:
    """The rows of another task: of its own format and columns, and without `data.system`."""
    written = table.forgetting
    listed = [DataSource(path=written)] if isinstance(written, str) else written or ()
    bare = table.model_copy(update={"system": None})
    for source in listed:
        yield _load(source, bare, resolve, EVAL_SPLITS)


def find_absent(table: DataTable, resolve: Resolve) -> str | None:
    """The first source of `data.train` of which nothing is on this machine: no path, and no file of a pattern."""
    listed = list_sources(table.train, table)
    return next((one.path for one in listed if not is_here(one.path, resolve(one.path))), None)


def list_sources(written: str | Sequence[DataSource], table: DataTable) -> list[DataSource]:
    """The sources of `data.train` or `data.eval`, with the table's format and columns where they have none."""
    listed = [DataSource(path=written)] if isinstance(written, str) else written
    return [
        source.model_copy(
            update={
                "format": table.format if source.format == "auto" else source.format,
                "columns": source.columns or table.columns,
            }
        )
        for source in listed
    ]


def load_rows_from(path: Path, row_format: str = "auto", *, name: str | None = None) -> list[Row]:
    """The rows of a local file or folder.

    Raises DataError that lists the first bad rows with file and line, or says that there are no rows.
    """
    return list(_parse(RowParser(row_format=row_format), Dataset(name=name or path.name, path=path)))


def open_source(
    source: DataSource, table: DataTable, resolve: Resolve, splits: Sequence[str] = TRAIN_SPLITS
) -> tuple[RowParser, Dataset]:
    """What reads the rows of a source, and where they are."""
    columns = {} if source.columns is None else source.columns.model_dump(exclude_none=True)
    dataset = Dataset(
        name=source.path, path=resolve(source.path), splits=splits, split=source.split, subset=source.subset
    )
    return RowParser(row_format=source.format, columns=columns), dataset


def _load(source: DataSource, table: DataTable, resolve: Resolve, splits: Sequence[str]) -> SourceRows:
    parser, dataset = open_source(source, table, resolve, splits)
    head = STREAM_HEAD_ROWS if table.streaming and splits is TRAIN_SPLITS else None
    rows = tuple(_parse(parser, dataset, head=head))
    if table.system is not None:
        rows = add_system(rows, table.system)
    return SourceRows(
        name=source.path, rows=rows, format=parser.row_format, weight=source.weight, unread=dict(parser.unread)
    )


def _parse(parser: RowParser, dataset: Dataset, *, head: int | None = None) -> Iterator[Row]:
    """The rows of a dataset, or the first `head` of them; DataError where there are none."""
    records = islice(load_records(dataset, streaming=head is not None), head)
    empty = True
    for row in parser.parse(records):
        empty = False
        yield row
    if empty:
        raise DataError(f"{dataset.name}: no rows")


def split_sources(
    sources: Sequence[SourceRows], fraction: float, *, seed: int
) -> tuple[list[SourceRows], list[SourceRows]]:
    """(the rest, some `fraction` of each source's rows), in order: a seeded choice of one or more, and not of all.

    Rows that say the same stay together, across sources too: a held-out row with a twin in training would measure
    memory.
    """
    digests = [[normalize(row) for row in source.rows] for source in sources]
    chosen = {
        one for source, said in zip(sources, digests, strict=True) for one in _choose(source, said, fraction, seed)
    }
    train, held_out = list[SourceRows](), list[SourceRows]()
    for source, said in zip(sources, digests, strict=True):
        pairs = list(zip(source.rows, said, strict=True))
        rest = tuple(row for row, one in pairs if one not in chosen)
        part = tuple(row for row, one in pairs if one in chosen)
        if not rest:
            raise DataError(
                f"{source.name}: every row says what a held-out row of another source says (data.eval = {fraction})"
            )
        train.append(replace(source, rows=rest))
        held_out.append(replace(source, rows=part))
    return train, held_out


def _choose(
    source: SourceRows, said: Sequence[tuple[str, ...]], fraction: float, seed: int
) -> Iterator[tuple[str, ...]]:
    """What the rows say that are held out of one source."""
    different = list(dict.fromkeys(said))
    if len(different) < 2:
        what = "is the only row" if len(said) == 1 else "all rows are the same"
        raise DataError(f"{source.rows[0].where}: {what}, so none can be held out (data.eval = {fraction})")
    count = min(max(1, round(fraction * len(different))), len(different) - 1)
    return map(different.__getitem__, random.Random(f"held out {seed}").sample(range(len(different)), count))


def normalize(row: Row) -> tuple[str, ...]:
    """What a row says: its texts in NFKC, without case and without white space of different lengths.

    Punctuation stays: `1 + 1` and `1 - 1` are two questions.
    """
    return tuple(" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in row.texts)


def add_system(rows: Sequence[Row], system: str) -> tuple[Row, ...]:
    """Rows with a system prompt where they have none: a first message, or text before a completion's prompt.

    Text rows have no place for it; a dataset of nothing else is refused.
    """
    if all(row.text is not None for row in rows):
        raise DataError(f"{rows[0].where}: format text has no place for a system prompt (data.system)")
    return tuple(with_system(row, system) for row in rows)


def with_system(row: Row, system: str) -> Row:
    """The row with a system prompt, where it has a place for one and none of its own."""
    if row.messages is not None and row.messages[0].role != "system":
        return replace(row, messages=(Message(role="system", content=system), *row.messages))
    if row.prompt is not None:
        return replace(row, prompt=f"{system}\n\n{row.prompt}")
    return row
