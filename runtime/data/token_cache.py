"""Tokenised rows on disk, so that a large dataset is tokenised once: safetensors files in fitune's cache folder.

A file's name is the digest of everything that decides over its content: the rows as they were parsed, the tokenizer,
its chat template, the recipe's settings, and the versions of the libraries. A file is whole or not there; one that
cannot be read counts as not there. Deleting them loses nothing but time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model.embedded import cache_folder
from .encoding import UNTRAINED
from .rows import Row
from .tokens import Counts, TokenizedRow, TokenSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHED_CHARACTERS = 1_000_000
"""Of a source that is worth a file: about a second's tokenising (measured: 0.9 million characters/s on one core)."""
MOST_BYTES = 20 * 2**30
"""Of all files: those that were not read for longest make room."""
FORMAT = 1

log = logging.getLogger(__name__)


def find_key(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: TokenSettings) -> str | None:
    """The name that the tokens of these rows have in the cache; None where they are too few to be worth it.

    A tokenizer without a Rust backend cannot be told from another, so its rows are not kept.
    """
    characters = sum(len(text) for row in rows for text in row.texts)
    if characters < CACHED_CHARACTERS or not tokenizer.is_fast:
        return None
    digest = hashlib.sha256()
    named: dict[str, Any] = {
        "format": FORMAT,
        "settings": asdict(settings),
        "template": tokenizer.chat_template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "versions": {name: importlib.metadata.version(name) for name in ("fitune", "transformers", "tokenizers")},
    }
    digest.update(json.dumps(named, sort_keys=True, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for row in rows:
        trained = [one.trained for one in row.messages or ()]
        digest.update(json.dumps([row.messages is None, row.text is None, trained, row.texts]).encode())
    return digest.hexdigest()


def load_tokens(key: str) -> tuple[list[TokenizedRow], Counts] | None:
    """The sequences of a source and what became of its rows; None where they are not in the cache."""
    from safetensors import SafetensorError, safe_open

    path = _find_path(key)
    try:
        with safe_open(path, framework="numpy") as file:
            counts = json.loads(file.metadata()["counts"])
            ids, trained, sizes, lengths = (
                file.get_tensor(name) for name in ("input_ids", "trained", "sizes", "lengths")
            )
        if int(sizes.sum()) != len(ids) or len(ids) != len(trained):
            raise ValueError("its sizes do not add up")
        path.touch()
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        log.info("%s: not used: %s", path, error)
        return None
    labels = ids.copy()
    labels[trained == 0] = UNTRAINED
    rows, start = list[TokenizedRow](), 0
    for size in sizes.tolist():
        rows.append(TokenizedRow(input_ids=_take(ids, start, size), labels=_take(labels, start, size)))
        start += size
    return rows, Counts(**counts, lengths=_take(lengths, 0, len(lengths)))


def save_tokens(key: str, rows: Sequence[TokenizedRow], counts: Counts) -> None:
    """Keep the sequences of a source; a cache that cannot be written is no reason to stop."""
    import numpy as np
    from safetensors.numpy import save_file

    ids = np.concatenate([np.frombuffer(row.input_ids, dtype=np.int32) for row in rows])
    labels = np.concatenate([np.frombuffer(row.labels, dtype=np.int32) for row in rows])
    tensors = {
        "input_ids": ids,
        "trained": (labels != UNTRAINED).astype(np.uint8),
        "sizes": np.array([len(row) for row in rows], dtype=np.int32),
        "lengths": np.array(counts.lengths, dtype=np.int32),
    }
    numbers = {name: value for name, value in vars(counts).items() if name != "lengths"}
    path = _find_path(key)
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_room(path.parent, sum(one.nbytes for one in tensors.values()))
        handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        save_file(tensors, scratch, metadata={"counts": json.dumps(numbers)})
        Path(scratch).replace(path)
    except OSError as error:
        log.info("%s: cannot be written: %s", path, error)
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)


def _find_path(key: str) -> Path:
    return cache_folder() / "tokens" / f"{key}.safetensors"


def _take(values: Any, start: int, size: int) -> array[int]:
    taken = array("i")
    taken.frombytes(values[start : start + size].tobytes())
    return taken


def _make_room(folder: Path, needed_bytes: int) -> None:
    """Remove the files that were not read for longest until all of them have at most MOST_BYTES."""
    with suppress(OSError):
        files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        total = needed_bytes + sum(path.stat().st_size for path in files)
        for path in files:
            if total <= MOST_BYTES:
                return
            total -= path.stat().st_size
            path.unlink(missing_ok=True)
