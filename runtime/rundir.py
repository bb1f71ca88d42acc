"""The run directory: who holds it, and files that are either whole or not there.

plan.json       what was executed, the resolved recipe in it
recipe.toml     the recipe's text as it was
metrics.jsonl   one line a step and an evaluation
samples.jsonl   the monitor's samples and events
report.json     predicted against measured, written last
adapter/ or model/, merged/, checkpoints/   what was trained
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from ..recipes.errors import RunError

REPORT_NAME = "report.json"
PLAN_NAME = "plan.json"


def write_whole(path: Path, text: str) -> None:
    """A text file that is either as it was before or whole, also where the process or the machine dies."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


class RunDirectory:
    """A directory that one run owns; a context manager that holds its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock", timeout=0)
        self._made = False

    def __enter__(self) -> Self:
        """Make the directory and take it; RunError where another run holds it or has left its files there."""
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise RunError(f"output.dir: {self.path} is held by a run that is still going{self._holder()}") from error
        except OSError as error:
            raise RunError(f"output.dir: {self.path} cannot be written: {error.strerror or error}") from error
        left = sorted(one.name for one in self.path.iterdir() if one.name != ".lock")
        if left:
            self._let_go()
            what = "a finished run" if REPORT_NAME in left else "files of something else or of an unfinished run"
            raise RunError(f"output.dir: {self.path} holds {what} ({', '.join(left[:3])}): name another or remove it")
        (self.path / ".lock").write_text(str(os.getpid()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._let_go()
        if self._made and not any(self.path.iterdir()):
            self.path.rmdir()

    def _let_go(self) -> None:
        """Unlink first: who takes the lock in between finds it gone and takes a new one."""
        (self.path / ".lock").unlink(missing_ok=True)
        self._lock.release()

    def clear(self) -> None:
        """Remove everything that this run wrote; a directory that it made goes too when the run lets go of it."""
        for one in self.path.iterdir():
            if one.is_dir():
                shutil.rmtree(one, ignore_errors=True)
            elif one.name != ".lock":
                one.unlink()

    def _holder(self) -> str:
        try:
            return f" (process {int((self.path / '.lock').read_text())})"
        except (OSError, ValueError):
            return ""

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        """One JSON document, whole or not at all."""
        self.write_text(name, json.dumps(document, indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """One text file, whole or not at all."""
        write_whole(self.path / name, text)

    @contextmanager
    def write_folder(self, name: str) -> Iterator[Path]:
        """A folder that appears under its name only once everything is in it."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            yield scratch
            scratch.chmod(0o755)
            if target.exists():
                shutil.rmtree(target)
            scratch.rename(target)
        except OSError as error:
            raise RunError(f"{target} cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
