"""Checkpoints: folders `checkpoints/step-000040` that are whole and proven so, or not there.

Each is written under another name, synced and renamed, its manifest last: the size and SHA-256 of every file. Nothing
in it is a pickle, and nothing is read that the manifest does not vouch for.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from ...planner.strategy import Value
from ...recipes.errors import CheckpointError
from ..rundir import REMOVED_PREFIX, RunDirectory, check_free_disk, write_whole

State = TypeVar("State")

FOLDER_NAME = "checkpoints"
MANIFEST_NAME = "manifest.json"
NAME = re.compile(r"step-([0-9]{6,})")
DAMAGED_PREFIX = "damaged-"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
"""Files that are read with pickle, or may be."""


class StoredFile(Value):
    """A file of a checkpoint.

    bytes:  its size
    sha256: its digest in hexadecimal
    """

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(Value):
    """What a checkpoint consists of.

    step:  optimizer steps done
    files: by their paths below the folder; all but the manifest itself
    """

    format_version: Literal[1] = 1
    step: int = Field(ge=0)
    files: dict[str, StoredFile]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found whole.

    folder: where it is
    step:   optimizer steps done
    """

    folder: Path
    step: int


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory, self._folder = directory, directory.path / FOLDER_NAME

    def write(self, step: int, fill: Callable[[Path], Mapping[str, str]], *, needed_bytes: int) -> Checkpoint:
        """A new checkpoint from what `fill` writes into a folder; DiskError where there is no room for it.

        fill: returns the SHA-256 that it knows already, by the files' names
        """
        check_free_disk(self._folder, needed_bytes)
        name = f"step-{step:06d}"
        with self._directory.write_folder(f"{FOLDER_NAME}/{name}") as folder:
            known = fill(folder)
            manifest = Manifest(
                step=step, files={path: _describe(folder / path, known.get(path)) for path in walk(folder)}
            )
            write_whole(folder / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")
        return Checkpoint(folder=self._folder / name, step=step)

    def list_steps(self) -> list[int]:
        """The steps that there are checkpoints of, in order; whether they are whole is not looked at."""
        if not self._folder.is_dir():
            return []
        found = (NAME.fullmatch(one.name) for one in self._folder.iterdir())
        return sorted(int(one[1]) for one in found if one)

    def find(self, step: int) -> Checkpoint:
        """The checkpoint of a step; CheckpointError where it is damaged."""
        folder = self._folder / f"step-{step:06d}"
        verify(folder, step)
        return Checkpoint(folder=folder, step=step)

    def find_last_good(
        self, load: Callable[[Checkpoint], State], say: Callable[[str], None]
    ) -> tuple[Checkpoint, State] | None:
        """The last checkpoint that is whole and can be read, with what `load` reads of it; None without one.

        Those after it are set aside, and `say` tells why.
        """
        for step in reversed(self.list_steps()):
            try:
                checkpoint = self.find(step)
                return checkpoint, load(checkpoint)
            except CheckpointError as error:
                say(f"{error}; the checkpoint before it is tried")
                damaged = self._folder / f"step-{step:06d}"
                aside = self._folder / f"{DAMAGED_PREFIX}{damaged.name}"
                if aside.is_dir():
                    shutil.rmtree(aside)
                damaged.rename(aside)
        return None

    def rotate(self, keep: int, best: int | None) -> None:
        """Remove all but the last `keep` checkpoints and the one of step `best`."""
        for step in self.list_steps()[:-keep]:
            if step != best:
                self._remove(step)

    def remove_all(self) -> None:
        """Remove every checkpoint."""
        for step in self.list_steps():
            self._remove(step)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _remove(self, step: int) -> None:
        """The name goes first: a process that is killed meanwhile leaves no checkpoint that lacks files."""
        folder = self._folder / f"step-{step:06d}"
        aside = folder.with_name(f"{REMOVED_PREFIX}{folder.name}")
        with contextlib.suppress(OSError):
            folder.rename(aside)
            shutil.rmtree(aside)


def walk(folder: Path) -> list[str]:
    """The files below a folder, by their paths from it."""
    found = (one for one in folder.rglob("*") if one.is_symlink() or not one.is_dir())
    return sorted(str(PurePosixPath(one.relative_to(folder))) for one in found)


def verify(folder: Path, step: int) -> None:
    """CheckpointError where a checkpoint's files are not just those of its manifest."""
    where = f"{FOLDER_NAME}/{folder.name}"
    manifest = _read_manifest(folder, where)
    if manifest.step != step:
        raise CheckpointError(f"{where}: its manifest is of step {manifest.step}")
    found = set(walk(folder)) - {MANIFEST_NAME}
    if found != set(manifest.files):
        differing = min(found ^ set(manifest.files))
        raise CheckpointError(f"{where}: {differing} is {'not in its manifest' if differing in found else 'missing'}")
    for path, stored in manifest.files.items():
        file = folder / path
        if file.suffix.lower() in PICKLE_SUFFIXES:
            raise CheckpointError(f"{where}: {path} may be a pickle, which is never read")
        if file.is_symlink() or not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{where}: {path} is a link")
        size = file.stat().st_size
        if size != stored.bytes:
            raise CheckpointError(f"{where}: {path} has {size:,} bytes, and {stored.bytes:,} were written")
        if compute_sha256(file) != stored.sha256:
            raise CheckpointError(f"{where}: {path} is not as it was written: its SHA-256 is another")


def _read_manifest(folder: Path, where: str) -> Manifest:
    try:
        return Manifest.model_validate_json((folder / MANIFEST_NAME).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{where}: {MANIFEST_NAME} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise CheckpointError(f"{where}: {MANIFEST_NAME} is damaged: {error.errors()[0]['msg']}") from error


def _describe(file: Path, sha256: str | None) -> StoredFile:
    return StoredFile(bytes=file.stat().st_size, sha256=sha256 or compute_sha256(file))


def compute_sha256(file: Path) -> str:
    """SHA-256 of a file in hexadecimal; CheckpointError where it cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
