"""The journal of `fitune data make`: every answer that was paid for, one line each, on the disk before anything else.

The rows are derived from it, so an interrupted run goes on without paying twice, and other thresholds cost nothing. Its
first line says what was asked; a spec that asks something else is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

from filelock import FileLock, Timeout
from pydantic import Field, TypeAdapter, ValidationError

from ...planner.strategy import Value
from ...recipes.errors import DataError
from ...recipes.make_spec import MakeSpec


class Asked(Value):
    """The first line: what decides the requests, by key of the spec."""

    kind: Literal["asked"] = "asked"
    format_version: Literal[1] = 1
    asked: dict[str, Any]


class AnswerLine(Value):
    """An answer to the request of this number and key; tokens are None where the endpoint did not tell them."""

    kind: Literal["answer"] = "answer"
    index: int = Field(ge=0)
    request: str
    content: str | None
    finish_reason: str | None
    refusal: str | None
    prompt_tokens: int | None
    answer_tokens: int | None


class LostLine(Value):
    """A request whose answer never came, although it may be charged for."""

    kind: Literal["lost"] = "lost"
    index: int = Field(ge=0)
    request: str
    why: str


class WroteLine(Value):
    """A file that is about to be written: its name and the SHA-256 of its content, to see later changes by hand."""

    kind: Literal["wrote"] = "wrote"
    name: str
    sha256: str


Line = Asked | AnswerLine | LostLine | WroteLine
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


def list_asked(spec: MakeSpec, passages_sha256: str) -> dict[str, Any]:
    """What decides the requests: limits, prices, the number of rows and what happens to answers do not."""
    document = spec.model_dump(mode="json")
    kept = {f"{table}.{key}": document[table][key] for table in ("persona", "generation") for key in document[table]}
    source = "documents" if spec.source.documents is not None else "topics"
    return {**kept, "endpoint.model": spec.endpoint.model, f"source.{source} (what they say)": passages_sha256}


class Journal:
    """The journal beside the output file; a context manager that holds its lock.

    lines:    what it held when it was opened, and what was added
    dropped:  whether a line that was only half written had to be dropped
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        self.dropped = False
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)

    def __enter__(self) -> Self:
        """Take the journal and read it; DataError where another process holds it or it cannot be read."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise DataError(f"{self.path} is held by another `fitune data make` that is still going") from error
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        try:
            self.lines = self._read()
            self._file = self.path.open("ab")
        except OSError as error:
            self._let_go()
            raise DataError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        except DataError:
            self._let_go()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if not any(isinstance(line, AnswerLine | LostLine) for line in self.lines):
            self.path.unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        """Unlink first: who takes the lock in between finds it gone and takes a new one."""
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def append(self, line: Line) -> None:
        """Add a line; when this returns, it is on the disk."""
        try:
            self._file.write(line.model_dump_json().encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        self.lines.append(line)

    def begin(self, asked: Mapping[str, Any]) -> None:
        """Say what is asked; DataError with the difference where the journal holds answers to something else."""
        if not any(isinstance(line, AnswerLine | LostLine) for line in self.lines):
            self._file.truncate(0)
            self.lines = []
            self.append(Asked(asked=dict(asked)))
            return
        first = self.lines[0]
        if not isinstance(first, Asked):
            raise DataError(f"{self.path}:1: is not the first line of a journal of `fitune data make`")
        now = json.loads(json.dumps(asked))
        changed = [key for key in {**first.asked, **now} if first.asked.get(key) != now.get(key)]
        if changed:
            differences = "".join(f"\n  {key}: was {_show(first.asked, key)}, is {_show(now, key)}" for key in changed)
            raise DataError(
                f"{self.path} holds answers to other questions; name another output.file, or undo:{differences}"
            )

    def check_unchanged(self, path: Path) -> None:
        """DataError where a file of an earlier run is not as `fitune data make` wrote it."""
        if not path.exists():
            return
        written = {line.sha256 for line in self.lines if isinstance(line, WroteLine) and line.name == path.name}
        if not written:
            raise DataError(f"{path} exists already, and was not made from this spec: name another output.file")
        if hashlib.sha256(path.read_bytes()).hexdigest() not in written:
            raise DataError(f"{path} was changed since it was made, and would be overwritten: move it elsewhere")

    def _read(self) -> list[Line]:
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self.dropped = True
            os.truncate(self.path, len(whole))
        lines = []
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                lines.append(_LINE.validate_json(line))
            except ValidationError as error:
                found = error.errors()[0]["msg"]
                raise DataError(f"{self.path}:{number}: is not a line of the journal: {found}") from error
        return lines


def _show(asked: Mapping[str, Any], key: str) -> str:
    text = json.dumps(asked.get(key), ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
