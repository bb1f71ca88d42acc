"""accelerate's tracker that writes JSON lines: one object a step or evaluation."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker


class JsonLinesTracker(GeneralTracker):  # type: ignore[misc]
    """Each `log` is a line `{"step": ..., "unix_time": ..., **values}`, written at once; what is not finite is null."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("a", buffering=1, encoding="utf-8")

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
        self._file.write(json.dumps({"step": step, "unix_time": time.time(), **finite}, allow_nan=False) + "\n")

    def finish(self) -> None:
        """Close the file."""
        self._file.close()
