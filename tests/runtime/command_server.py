"""`fitune` in processes of its own without waiting for imports: one process imports everything, and each command is a
fork of it, with its own signals, limits and exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SERVER = """
import json, os, resource, signal, sys
import bitsandbytes, peft
from transformers.models.llama import modeling_llama
from fitune.runtime import chat
from fitune.runtime.resume import replanning
from fitune.runtime.training import train
from fitune.runtime.cli import main

def serve(request):
    open(request["output"], "w").close()
    pid = os.fork()
    if pid:
        return pid
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(request["folder"])
    signal.alarm(300)
    if request["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    sys.argv = ["fitune", *request["words"]]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    request = json.loads(line)
    if "words" in request:
        answer = serve(request)
    else:
        answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    print("ANSWER", answer, flush=True)
"""


@dataclass(frozen=True)
class Command:
    """A command that was started; `code` is negative where a signal ended it, as in subprocess."""

    server: CommandServer
    pid: int
    output: Path

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return self.server.ask(wait=self.pid)

    @property
    def said(self) -> str:
        """What it wrote so far, with line breaks as they come."""
        return self.output.read_text(encoding="utf-8", errors="replace")


class CommandServer:
    """A context manager: the process that the commands are forks of."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "300"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._count = 0

    def ask(self, **request: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return int(line.removeprefix("ANSWER "))
        raise AssertionError("the server of commands has ended")

    def start(self, folder: Path, *words: str, largest_file: int | None = None) -> Command:
        self._count += 1
        output = folder / f"output-{self._count}.txt"
        pid = self.ask(words=words, folder=str(folder), output=str(output), largest_file=largest_file)
        return Command(self, pid, output)

    def run(self, folder: Path, *words: str, largest_file: int | None = None) -> tuple[int, str]:
        """(exit code, what it wrote)."""
        command = self.start(folder, *words, largest_file=largest_file)
        return command.wait(), command.said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def count_steps_done(run: Path) -> int:
    """Lines of training steps that the run's metrics have."""
    path = run / "metrics.jsonl"
    return path.read_text(errors="replace").count('"loss"') if path.is_file() else 0


def wait_for_steps(run: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while count_steps_done(run) < steps:
        assert time.monotonic() < deadline, "the run has not come so far"
        time.sleep(0.002)
