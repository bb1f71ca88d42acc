"""The run directory: who holds it, and files that are either whole or not there.

run.json        what the run is made of, and each time that it was started; it goes on only where that is the same
plan.json       what is executed, the resolved recipe in it
recipe.toml     the recipe's text as it was
metrics.jsonl   one line a step and an evaluation
samples.jsonl   the monitor's samples and events
checkpoints/    what a run is resumed from
report.json     predicted against measured, written last
adapter/ or model/, merged/   what was trained
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from ..recipes.errors import DiskError, RunError
from ..recipes.units import format_bytes
from .machine.host import probe_free_disk_bytes

LOCK_NAME = ".lock"
REPORT_NAME = "report.json"
PLAN_NAME = "plan.json"
METRICS_NAME, SAMPLES_NAME = "metrics.jsonl", "samples.jsonl"
SCRATCH_PREFIX = ".writing-"
"""Names of files and folders that are being written; what a run that was killed leaves of them, the next removes."""
REMOVED_PREFIX = ".removing-"
"""Names of folders that are being removed, likewise."""


def find_disk_error(error: BaseException) -> str | None:
    """Why a file cannot be written, such as `No space left on device`; None for another error, as for want of memory.

    Libraries in Rust (safetensors, tokenizers) put the system's error into the text of one of their own.
    """
    if isinstance(error, OSError):
        return None if error.errno == errno.ENOMEM else error.strerror or str(error)
    found = re.search(r"([^:]*\S) \(os error \d+\)", str(error))
    return None if found is None or "(os error 12)" in str(error) else found[1].strip()


@contextmanager
def name_disk_errors(path: Path) -> Iterator[None]:
    """DiskError with `path` in it where something cannot be written."""
    try:
        yield
    except Exception as error:
        reason = find_disk_error(error)
        if reason is None or isinstance(error, RunError):
            raise
        raise DiskError(f"{path} cannot be written: {reason}") from error


def check_free_disk(path: Path, needed_bytes: int) -> None:
    """DiskError where less than `needed_bytes` is free."""
    free = probe_free_disk_bytes(path)
    if free < needed_bytes:
        raise DiskError(f"{path} needs {format_bytes(needed_bytes)}, and {format_bytes(free)} of disk is free")


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, not only in the kernel's memory."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have everything below a folder on the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            with (Path(root) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def write_whole(path: Path, text: str) -> None:
    """A text file that is either as it was before or whole, also where the process or the machine dies."""
    scratch = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=SCRATCH_PREFIX, delete=False, encoding="utf-8"
        ) as file:
            scratch = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o644)
        scratch.replace(path)
        sync_folder(path.parent)
    except BaseException:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
        raise


def check_vacant(path: Path) -> None:
    """RunError where a directory holds anything that a new run would mix its files with."""
    left = sorted(one.name for one in path.iterdir() if one.name != LOCK_NAME) if path.is_dir() else []
    if left:
        what = "a finished run" if REPORT_NAME in left else "files of something else or of an unfinished run"
        raise RunError(f"output.dir: {path} holds {what} ({', '.join(left[:3])}): name another or remove it")


def check_not_held(path: Path) -> None:
    """RunError where another run holds the directory, before anything is planned for it."""
    if not (path / LOCK_NAME).is_file():
        return
    try:
        with FileLock(path / LOCK_NAME, timeout=0):
            pass
    except Timeout as error:
        raise _make_held(path) from error


def _make_held(path: Path) -> RunError:
    try:
        holder = f" (process {int((path / LOCK_NAME).read_text())})"
    except (OSError, ValueError):
        holder = ""
    return RunError(f"output.dir: {path} is held by a run that is still going{holder}")


class RunDirectory:
    """A directory that one run owns; a context manager that holds its lock.

    resume: whether an unfinished run is in it that goes on
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path, self.resume = path, resume
        self._lock = FileLock(path / LOCK_NAME, timeout=0)
        self._made = False

    def __enter__(self) -> Self:
        """Make the directory and take it; RunError where another run holds it or has left its files there."""
        try:
            self._made = not self.path.exists()
            if not self._made and not self.path.is_dir():
                raise RunError(f"output.dir: {self.path} is a file, not a folder")
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_links()
            self._lock.acquire()
        except Timeout as error:
            raise _make_held(self.path) from error
        except OSError as error:
            raise DiskError(f"output.dir: {self.path} cannot be written: {error.strerror or error}") from error
        try:
            if not self.resume:
                check_vacant(self.path)
            with name_disk_errors(self.path):
                (self.path / LOCK_NAME).write_text(str(os.getpid()))
            self._sweep()
        except BaseException:
            self._let_go()
            raise
        return self

    def _check_links(self) -> None:
        """A link would lead what a run writes out of its directory."""
        for one in self.path.iterdir():
            if one.is_symlink():
                raise RunError(f"output.dir: {one} is a link: a run writes into its own directory only; remove it")

    def _sweep(self) -> None:
        """Remove what a run that was killed was writing or removing."""
        patterns = (f"{SCRATCH_PREFIX}*", f"checkpoints/{SCRATCH_PREFIX}*", f"checkpoints/{REMOVED_PREFIX}*")
        for one in [path for pattern in patterns for path in self.path.glob(pattern)]:
            if one.is_dir() and not one.is_symlink():
                shutil.rmtree(one, ignore_errors=True)
            else:
                one.unlink(missing_ok=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._let_go()
        if self._made and not any(self.path.iterdir()):
            self.path.rmdir()

    def _let_go(self) -> None:
        """Unlink first: who takes the lock in between finds it gone and takes a new one."""
        (self.path / LOCK_NAME).unlink(missing_ok=True)
        self._lock.release()

    def clear(self) -> None:
        """Remove everything that this run wrote; a directory that it made goes too when the run lets go of it."""
        for one in self.path.iterdir():
            if one.is_dir():
                shutil.rmtree(one, ignore_errors=True)
            elif one.name != LOCK_NAME:
                one.unlink()

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        """One JSON document, whole or not at all."""
        self.write_text(name, json.dumps(document, indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """One text file, whole or not at all."""
        with name_disk_errors(self.path / name):
            write_whole(self.path / name, text)

    @contextmanager
    def write_folder(self, name: str) -> Iterator[Path]:
        """A folder that appears under its name only once everything in it is on the disk."""
        target = self.path / name
        with name_disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.parent.resolve().is_relative_to(self.path.resolve()):
                raise RunError(f"{target.parent} is a link that leaves the run's directory: remove it")
            scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=SCRATCH_PREFIX))
        try:
            with name_disk_errors(target):
                yield scratch
                scratch.chmod(0o755)
                sync_tree(scratch)
                if target.exists():
                    shutil.rmtree(target)
                scratch.rename(target)
                sync_folder(target.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
