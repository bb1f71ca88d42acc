"""The raw records of a dataset: files, folders and patterns of them, what `datasets` saved, or the Hugging Face hub."""

from __future__ import annotations

import difflib
import glob
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ...recipes.errors import DataError
from .readers import OPENERS, READERS, Record, has_reader, read_file, split_ending

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TRAIN_SPLITS = ("train",)
EVAL_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
METADATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}
"""Files about a dataset, which hold no rows."""
ALLOWED = (
    f"a file ending in {', '.join(READERS)} (compressed: {', '.join(OPENERS)}), a folder or pattern of them such as "
    "data/*.jsonl, a folder saved by datasets.save_to_disk, or a hub id such as owner/name"
)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One dataset as a recipe names it.

    name:    what errors call it: as the recipe writes it
    path:    where it would be on this machine
    splits:  the splits wanted, first choice first, where it has several; one alone is taken, whatever its name
    split:   the one split that is wanted; None leaves it to `splits`
    subset:  configuration of a hub dataset; None is its default
    """

    name: str
    path: Path
    splits: Sequence[str] = TRAIN_SPLITS
    split: str | None = None
    subset: str | None = None

    @property
    def is_on_hub(self) -> bool:
        """Whether the name can be a hub id and nothing of that path is here; a known ending is never looked for there.

        Raises DataError where the path cannot be looked at.
        """
        if HUB_ID.fullmatch(self.name) is None or has_reader(Path(self.name)):
            return False
        return not _exists(self.path, self.name)


def load_records(dataset: Dataset, *, streaming: bool = False) -> Iterator[Record]:
    """The records in order; `streaming` reads a dataset of the hub as it comes instead of fetching it whole."""
    name, path = dataset.name, dataset.path
    if dataset.is_on_hub:
        return _load_from_hub(dataset, streaming=streaming)
    if dataset.subset is not None:
        raise DataError(f"{name}: only a dataset of the hub has a subset ({dataset.subset}); this is a local path")
    if not _exists(path, name):
        return _read_files(_find_matches(path, name), dataset)
    if not path.is_dir():
        if not has_reader(path):
            raise DataError(f"{name}: files ending in {path.suffix!r} are not read; allowed: {ALLOWED}")
        return read_file(path, name)
    if any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return _load_saved_folder(dataset)
    return _read_files(_find_in_folder(dataset), dataset)


def is_here(name: str, path: Path) -> bool:
    """Whether a path is on this machine, or a file that a pattern matches."""
    return _exists(path, name) or bool(_match(path, name))


def _exists(path: Path, name: str) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _find_matches(pattern: Path, name: str) -> list[Path]:
    """The files that a pattern names, by name."""
    if not glob.has_magic(str(pattern)):
        raise DataError(f"{name}: no such file or folder{_nearest_file(pattern)}; allowed: {ALLOWED}")
    found = _match(pattern, name)
    files = [path for path in found if path.is_file() and has_reader(path) and path.name not in METADATA]
    if not files:
        others = f"; it names {found[0].name}, which is not read" if found else ""
        raise DataError(f"{name}: no file matches this pattern{others}; allowed: {ALLOWED}")
    return files


def _match(pattern: Path, name: str) -> list[Path]:
    """What a pattern matches, by name; nothing where it has none of `*`, `?` and `[`."""
    parts = pattern.parts
    fixed = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    if fixed == len(parts):
        return []
    try:
        return sorted(Path(*parts[:fixed]).glob("/".join(parts[fixed:])))
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{name}: not a pattern of files: {error}") from error


def _nearest_file(missing: Path) -> str:
    if not missing.parent.is_dir():
        return f" (there is no folder {missing.parent})"
    near = difflib.get_close_matches(missing.name, [path.name for path in missing.parent.iterdir()], n=1)
    return f" (did you mean {near[0]}?)" if near else f" in {missing.parent}"


def _find_in_folder(dataset: Dataset) -> list[Path]:
    """The files of a folder, by name; where file names tell splits (train-00000.parquet), those of the wanted one."""
    folder, name = dataset.path, dataset.name
    inside = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    files = [one for one in inside if not any(part.startswith((".", "_")) for part in one.parts)]
    files = [one for one in files if has_reader(one) and one.name not in METADATA]
    if not files:
        raise DataError(f"{name}: a folder without a file that is read; allowed: {ALLOWED}")
    by_split: dict[str | None, list[Path]] = {}
    for one in files:
        by_split.setdefault(_tell_split(one), []).append(one)
    present = [split for split in by_split if split is not None]
    if present:
        unnamed = None in by_split and dataset.split is None and not set(dataset.splits) & set(present)
        files = by_split[None if unnamed else _choose_split(present, dataset)]
    endings = sorted({split_ending(one)[0] for one in files})
    if len(endings) > 1:
        raise DataError(f"{name}: holds {' and '.join(endings)} files: name one kind, such as {name}/*{endings[0]}")
    return [folder / one for one in files]


def _tell_split(file: Path) -> str | None:
    """The split that a file's or its folder's name begins with, as `train-00000-of-00002.parquet`."""
    words = [re.split(r"[^a-z]+", part.lower())[0] for part in reversed(file.parts)]
    return next((word for word in words if word in (*TRAIN_SPLITS, *EVAL_SPLITS)), None)


def _choose_split(present: Sequence[str], dataset: Dataset) -> str:
    wanted = dataset.splits if dataset.split is None else (dataset.split,)
    chosen = next((split for split in wanted if split in present), None)
    if chosen is None and len(present) == 1 and dataset.split is None:
        chosen = present[0]
    if chosen is None:
        hint = "" if dataset.split else ' (name one: data.train = [{ path = ..., split = "..." }])'
        raise DataError(f"{dataset.name}: has the splits {', '.join(present)}, but none of {', '.join(wanted)}{hint}")
    return chosen


def _read_files(files: Sequence[Path], dataset: Dataset) -> Iterator[Record]:
    """The records of several files, one after the other; errors name each by its place under the dataset."""
    base = dataset.path if dataset.path.is_dir() else dataset.path.parent
    names = [path.relative_to(base) if path.is_relative_to(base) else Path(path.name) for path in files]
    shown = Path(dataset.name) if dataset.path.is_dir() else Path(dataset.name).parent
    return chain.from_iterable(read_file(path, str(shown / one)) for path, one in zip(files, names, strict=True))


def _load_saved_folder(dataset: Dataset) -> Iterator[Record]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(dataset.path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{dataset.name}: not a readable saved dataset: {error}") from error
    return _records_of(loaded, dataset)


def _load_from_hub(dataset: Dataset, *, streaming: bool) -> Iterator[Record]:
    import datasets

    name = dataset.name
    # Every failed attempt would be a line of its own; what is wrong is said once below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        loaded = datasets.load_dataset(name, dataset.subset, streaming=streaming)
    # Errors of several libraries come out here (HTTP, parquet, its own); each means that the rows cannot be had.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: no such local path, and not to be had from the Hugging Face hub: {reason} "
            "(without a network, give a local file)"
        ) from error
    return _records_of(loaded, dataset)


def _records_of(loaded: Any, dataset: Dataset) -> Iterator[Record]:
    if isinstance(loaded, dict):
        loaded = loaded[_choose_split(list(loaded), dataset)]
    for number, value in enumerate(loaded, start=1):
        yield Record(where=f"{dataset.name}: row {number}", value=value)
