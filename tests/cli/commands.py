"""The command line in this process: what it prints and its exit code; and files for it to read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fitune.runtime.cli import main

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
RECIPE = """
[model]
id = "smollm2-135m-instruct"
[data]
train = "rows.jsonl"
max_length = 64
[budget]
memory = "3GiB"
[train]
global_batch_size = 4
"""


@dataclass(frozen=True)
class Result:
    """What a command did: its exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def plans(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


class Commands:
    """Runs `fitune` with arguments, here or in a process of its own."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *words: str) -> Result:
        self._monkeypatch.setattr(sys, "argv", ["fitune", *words])
        self._capsys.readouterr()
        try:
            main()
            code: Any = 0
        except SystemExit as exit_error:
            code = exit_error.code
        out, err = self._capsys.readouterr()
        return Result(code or 0, out, err)

    def apart(self, *words: str, **options: Any) -> Result:
        """In a process of its own."""
        command = [sys.executable, "-m", "fitune.runtime.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
        return Result(done.returncode, done.stdout, done.stderr)


def write_rows(path: Path, rows: Iterable[dict[str, Any]] | None = None) -> Path:
    """A dataset of JSON lines; eight short questions and answers where nothing is given."""
    rows = rows if rows is not None else [{"prompt": f"Question {n}?", "completion": "Feta."} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def list_files(folder: Path) -> Sequence[tuple[str, bytes]]:
    """Every file below a folder with its content: to see that nothing was written."""
    return sorted((str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file())
