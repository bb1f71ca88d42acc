"""accelerate's tracker that writes JSON lines: one object a step or evaluation."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from ...recipes.errors import DiskError


class JsonLinesTracker(GeneralTracker):  # type: ignore[misc]
    """Each `log` is a line `{"step": ..., "unix_time": ..., **values}`, written at once; what is not finite is null.

    Lines that the disk does not take wait, and are tried again with the next one: a full disk does not end a run.

    say: shows a line to the user
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        super().__init__()
        self._path, self._say = path, say
        self._file = path.open("ab", buffering=0)
        self._whole_bytes = self._file.seek(0, os.SEEK_END)
        self._waiting: list[bytes] = []

    @property
    def tracker(self) -> Any:
        """The open file."""
        return self._file

    def start(self) -> None:
        """Nothing to do: the file is open."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing to store: plan.json has it."""

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        """Write one line."""
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = json.dumps({"step": step, "unix_time": time.time(), **finite}, allow_nan=False) + "\n"
        self._waiting.append(line.encode())
        try:
            self._write_waiting()
        except OSError as error:
            if len(self._waiting) == 1:
                self._say(f"{self._path} cannot be written now: {error.strerror}; its lines wait")

    def _write_waiting(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            try:
                written = self._file.write(line) or 0
                if written < len(line):
                    self._file.write(line[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._whole_bytes)
                raise
            self._whole_bytes += len(line)
            del self._waiting[0]

    def flush(self) -> None:
        """Write what waits; DiskError where that cannot be."""
        try:
            self._write_waiting()
        except OSError as error:
            raise DiskError(f"{self._path} cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        """Have all lines on the disk, as far as it takes them."""
        with contextlib.suppress(OSError):
            self._write_waiting()
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Close the file."""
        self._file.close()
