"""The files of a dataset, record by record: .jsonl, .json, .csv, .tsv, .parquet and .txt, plain or compressed.

JSON lines, CSV and text are read here and not by `datasets`, which takes "007" in a CSV file for a number and "NA" for
nothing, and cannot say in which line of a file a row is.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from ...recipes.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"
PARQUET_BATCH_ROWS = 256
"""Rows of a parquet file that are turned into Python values at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record as it was read, before its meaning is known.

    where:    file and line, such as `train.jsonl:17`
    value:    the JSON value; None where it could not be read
    problem:  why it could not be read, None for a readable one
    """

    where: str
    value: object = None
    problem: str | None = None


def read_file(path: Path, name: str) -> Iterator[Record]:
    """The records of one file in order; `name` is what errors call it. The ending must be one of `has_reader`."""
    ending, _ = split_ending(path)
    with _telling(name):
        yield from READERS[ending](path, name)


def split_ending(path: Path) -> tuple[str, str]:
    """The ending that tells the format and the one that tells the compression, such as (".jsonl", ".gz")."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in OPENERS:
        return (suffixes[-2] if len(suffixes) > 1 else ""), suffixes[-1]
    return (suffixes[-1] if suffixes else ""), ""


def has_reader(path: Path) -> bool:
    """Whether files with such an ending are read; parquet is compressed inside and not once more."""
    ending, compression = split_ending(path)
    return ending in READERS and not (ending == ".parquet" and compression)


def _open_zst(path: Path) -> io.BufferedReader:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


OPENERS: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}


def _open(path: Path) -> IO[bytes]:
    _, compression = split_ending(path)
    return cast(IO[bytes], OPENERS[compression](path)) if compression else path.open("rb")


@contextmanager
def _telling(name: str) -> Iterator[None]:
    """What goes wrong while a file is read becomes a DataError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, KeyError, NotImplementedError) as error:
        # pyarrow's errors are subclasses of OSError, ValueError, KeyError and NotImplementedError.
        reason = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{name}: cannot be read: {reason}") from error


def _read_lines(path: Path) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """Numbered lines from 1; a line that is not UTF-8 comes as the error that tells so."""
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(UTF8_BOM) if number == 1 else raw
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield number, error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} (save the file as UTF-8)"


def _read_utf8_lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a file of which no line can be left out."""
    for number, line in _read_lines(path):
        if isinstance(line, UnicodeDecodeError):
            raise DataError(f"{name}:{number}: {_not_utf8(line)}")
        yield number, line


def _parse_json(text: str) -> tuple[object, str | None]:
    """The JSON value, or None and what is wrong with it."""
    try:
        return json.loads(text), None
    except json.JSONDecodeError as error:
        return None, f"not valid JSON: {error.msg} (column {error.colno})"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON that can be read: {error}"


def _read_jsonl(path: Path, name: str) -> Iterator[Record]:
    for number, line in _read_lines(path):
        where = f"{name}:{number}"
        if isinstance(line, UnicodeDecodeError):
            yield Record(where=where, problem=_not_utf8(line))
        elif line.strip():
            value, problem = _parse_json(line.rstrip("\r\n"))
            yield Record(where=where, value=value, problem=problem)


def _read_json(path: Path, name: str) -> Iterator[Record]:
    """A list of objects, or one object a line as many files called .json have them."""
    with _open(path) as file:
        content = file.read().removeprefix(UTF8_BOM)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: {_not_utf8(error)}") from error
    if not text.strip():
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(path, name)
            return
        raise DataError(f"{name}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON that can be read: {error}") from error
    if not isinstance(values, list):
        raise DataError(f"{name}: a .json file holds one list of objects, one a row; this one holds something else")
    for number, value in enumerate(values, start=1):
        yield Record(where=f"{name}: row {number}", value=value)


def _read_csv(path: Path, name: str, *, delimiter: str = ",") -> Iterator[Record]:
    """RFC 4180: a header and then a record a row, every value text; `where` is the line that a row starts in."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = (line for _, line in _read_utf8_lines(path, name))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next((row for row in reader if row), [])
        _check_header(header, name, delimiter)
        start = reader.line_num + 1
        for row in reader:
            where, start = f"{name}:{start}", reader.line_num + 1
            if len(row) == len(header):
                yield Record(where=where, value=dict(zip(header, row, strict=True)))
            elif row:
                yield Record(where=where, problem=f"has {len(row)} values, the header {len(header)} columns")
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num}: not valid CSV: {error}") from error


def _check_header(header: list[str], name: str, delimiter: str) -> None:
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise DataError(f'{name}: its header names "{repeated[0]}" more than once')
    others = [one for one in (";", "\t", ",") if one != delimiter and len(header) == 1 and one in header[0]]
    if others:
        raise DataError(
            f"{name}: its header is one column, {header[0]!r}: a .csv file has commas between its columns, a .tsv "
            "file tabs"
        )


def _read_parquet(path: Path, name: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=PARQUET_BATCH_ROWS)
            rows = chain.from_iterable(_list_rows(batch, name) for batch in batches)
            for number, value in enumerate(rows, start=1):
                yield Record(where=f"{name}: row {number}", value=value)
    except pa.ArrowException as error:
        raise DataError(f"{name}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def _list_rows(batch: Any, name: str) -> list[dict[str, object]]:
    names = batch.schema.names
    if len(set(names)) != len(names):
        raise DataError(f"{name}: has two columns of one name: {', '.join(names)}")
    return cast(list[dict[str, object]], batch.to_pylist())


def _read_txt(path: Path, name: str) -> Iterator[Record]:
    """One record a paragraph: lines without an empty one between them. `where` is its first line."""
    first, paragraph = 0, list[str]()
    for number, line in chain(_read_utf8_lines(path, name), [(0, "")]):
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line.rstrip("\r\n"))
        elif paragraph:
            yield Record(where=f"{name}:{first}", value={"text": "\n".join(paragraph)})
            paragraph = []


READERS: Mapping[str, Callable[[Path, str], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": lambda path, name: _read_csv(path, name, delimiter="\t"),
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
