"""The raw records of a dataset: a .jsonl, .json or .txt file, a folder saved by `datasets`, or the Hugging Face hub."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipes.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ALLOWED = "a .jsonl, .json or .txt file, a folder saved by datasets.save_to_disk, or a hub id such as owner/name"


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


def load_records(source: Path | str, *, name: str, splits: Sequence[str]) -> Iterator[Record]:
    """The records of a local file or folder (a Path) or of a dataset on the hub (its id, a str), in order.

    `name` is what errors call the source; `splits` are the splits wanted, first choice first, where it has several.
    """
    if isinstance(source, str):
        return _load_from_hub(source, splits)
    try:
        exists, is_folder = source.exists(), source.is_dir()
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error
    if not exists:
        raise DataError(f"{name}: no such file or folder{_nearest_file(source)}; allowed: {ALLOWED}")
    if is_folder:
        return _load_saved_folder(source, name, splits)
    reader = READERS.get(source.suffix.lower())
    if reader is None:
        raise DataError(f"{name}: files ending in {source.suffix!r} are not read; allowed: {ALLOWED}")
    return reader(source, name)


def find_source(written: str, path: Path) -> Path | str:
    """The path that a recipe's words stand for, or the words themselves where they can be a hub id and no path exists.

    A path with a known ending is never looked for on the hub.
    """
    may_be_hub_id = HUB_ID.fullmatch(written) is not None and Path(written).suffix.lower() not in READERS
    try:
        return written if may_be_hub_id and not path.exists() else path
    except OSError as error:
        raise DataError(f"{written}: cannot be read: {error.strerror}") from error


def _nearest_file(missing: Path) -> str:
    if not missing.parent.is_dir():
        return f" (there is no folder {missing.parent})"
    near = difflib.get_close_matches(missing.name, [path.name for path in missing.parent.iterdir()], n=1)
    return f" (did you mean {near[0]}?)" if near else f" in {missing.parent}"


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes().removeprefix(UTF8_BOM)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error


def _read_lines(path: Path, name: str) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """Numbered lines from 1; a line that is not UTF-8 comes as the error that tells so."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.removeprefix(UTF8_BOM) if number == 1 else raw
                try:
                    yield number, line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    yield number, error
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} (save the file as UTF-8)"


def _parse_json(text: str) -> tuple[object, str | None]:
    """The JSON value, or None and what is wrong with it."""
    try:
        return json.loads(text), None
    except json.JSONDecodeError as error:
        return None, f"not valid JSON: {error.msg} (column {error.colno})"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON that can be read: {error}"


def _read_jsonl(path: Path, name: str) -> Iterator[Record]:
    for number, line in _read_lines(path, name):
        where = f"{name}:{number}"
        if isinstance(line, UnicodeDecodeError):
            yield Record(where=where, problem=_not_utf8(line))
        elif line.strip():
            value, problem = _parse_json(line)
            yield Record(where=where, value=value, problem=problem)


def _read_json(path: Path, name: str) -> Iterator[Record]:
    content = _read_bytes(path, name)
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
        hint = " (one object a line? then call it .jsonl)" if error.msg == "Extra data" else ""
        raise DataError(f"{name}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}){hint}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON that can be read: {error}") from error
    if not isinstance(values, list):
        raise DataError(f"{name}: a .json file holds one list of objects, one a row; this one holds something else")
    for number, value in enumerate(values, start=1):
        yield Record(where=f"{name}: row {number}", value=value)


def _read_txt(path: Path, name: str) -> Iterator[Record]:
    """One record a paragraph: lines without an empty one between them. `where` is its first line."""
    first, paragraph = 0, list[str]()
    for number, line in _read_lines(path, name):
        if isinstance(line, UnicodeDecodeError):
            raise DataError(f"{name}:{number}: {_not_utf8(line)}")
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield Record(where=f"{name}:{first}", value={"text": "\n".join(paragraph)})
            paragraph = []
    if paragraph:
        yield Record(where=f"{name}:{first}", value={"text": "\n".join(paragraph)})


READERS: Mapping[str, Callable[[Path, str], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_txt,
}


def _import_datasets(name: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(f'{name}: reading it needs the package datasets: pip install "fitune[hub]"') from error


def _load_saved_folder(folder: Path, name: str, splits: Sequence[str]) -> Iterator[Record]:
    if not any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        raise DataError(f"{name}: a folder without a dataset saved by datasets.save_to_disk; allowed: {ALLOWED}")
    datasets = _import_datasets(name)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name}: not a readable saved dataset: {error}") from error
    return _records_of(loaded, name, splits)


def _load_from_hub(name: str, splits: Sequence[str]) -> Iterator[Record]:
    datasets = _import_datasets(name)
    try:
        loaded = datasets.load_dataset(name)
    # Errors of several libraries come out here (HTTP, parquet, its own); each means that the rows cannot be had.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: no such local path, and not to be had from the Hugging Face hub: {reason} "
            "(without a network, give a local file)"
        ) from error
    return _records_of(loaded, name, splits)


def _records_of(loaded: Any, name: str, splits: Sequence[str]) -> Iterator[Record]:
    if isinstance(loaded, dict):
        wanted = [split for split in splits if split in loaded] or list(loaded)
        if wanted[0] not in splits and len(wanted) != 1:
            raise DataError(f"{name}: has the splits {', '.join(loaded)}, but none of {', '.join(splits)}")
        loaded = loaded[wanted[0]]
    return (Record(where=f"{name}: row {number}", value=value) for number, value in enumerate(loaded, start=1))
