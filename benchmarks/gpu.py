"""fitune's speed and memory on this machine's NVIDIA GPU, case by case, against the plan and the targets.

    python -m benchmarks.gpu --check         # first: does everything work here? 2 to 3 minutes
    python -m benchmarks.gpu                 # every case with a target within 8 minutes on an H100; 20 GB of free disk
    python -m benchmarks.gpu --all           # the exploratory ones too: 20 minutes
    python -m benchmarks.gpu --search        # a few knobs at 24 GiB, all combinations, against the plan's choice
    python -m benchmarks.gpu --cases lora-auto,qlora-auto
    python -m benchmarks.gpu --smoke         # the same script with tiny models on the CPU, to see that it works

Every case is `fitune run` as a user types it, in a process of its own, on a model of the real shape with random weights
(speed and memory do not depend on their values) and rows of a known number of tokens; predicted and measured memory and
speed are the run's own plan.json and report.json. Prints one table and one JSON line. Exit code 1 where a case fails; a
case for which no time is left is left out and said. None of this has run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .gpu_cases import CASES, MODELS, MORE_CASES, Case, list_search_cases, run_apart, run_case
from .gpu_check import check
from .gpu_table import show

MINUTES, ALL_MINUTES = 8.0, 20.0
WRITING_SECONDS = {"8b": 45, "1b": 20}
"""Guessed, of making a model's weights on the card and writing them; they count in what is left for its case."""
MODEL_SECONDS = 120
"""Writing 16 GB may take so long."""
CASE_SECONDS = 240
"""A case that takes longer hangs."""
FREE_DISK_BYTES = {"8b": 20 * 10**9, "1b": 6 * 10**9}
"""Of a model and what its runs write."""


def run_cases(cases: Sequence[Case], scratch: Path, *, smoke: bool, minutes: float) -> Iterator[dict[str, Any]]:
    """The rows of all cases; those for which no time is left say so."""
    deadline, models = time.monotonic() + 60 * minutes, {"embedded": MODELS["embedded"]}
    failed: dict[str, str] = {}
    for case in cases:
        left_seconds = deadline - time.monotonic()
        writing = 0 if case.model in models or case.model in failed else WRITING_SECONDS[case.model]
        if not smoke and left_seconds < writing + case.seconds:
            yield {"case": case.name, "skipped": f"not run: {left_seconds:.0f} s were left of {minutes:g} minutes"}
            continue
        if case.model not in models and case.model not in failed:
            folder = scratch / f"model-{case.model}"
            problem = write_model(case.model, folder, smoke=smoke)
            if problem is None:
                models[case.model] = str(folder)
            else:
                failed[case.model] = problem
        if case.model in failed:
            yield {"case": case.name, "error": f"its model was not written: {failed[case.model]}"}
            continue
        limit = CASE_SECONDS if smoke else min(CASE_SECONDS, max(deadline - time.monotonic(), case.seconds))
        yield run_case(case, models[case.model], scratch, smoke=smoke, timeout_seconds=limit)
        shutil.rmtree(scratch / case.name, ignore_errors=True)


def write_model(key: str, folder: Path, *, smoke: bool) -> str | None:
    """Random weights of a model's shape; why they could not be written, None where they could."""
    needed, free = FREE_DISK_BYTES[key], shutil.disk_usage(folder.parent).free
    if not smoke and free < needed:
        return (
            f"{folder.parent} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed: name another with --scratch"
        )
    command = [sys.executable, "-m", "benchmarks.gpu_models", MODELS[key], str(folder), *["--smoke"] * smoke]
    code, said = run_apart(command, MODEL_SECONDS)
    return None if code == 0 else said


def choose_cases(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[Case]:
    """The cases that are named; else those with a target, and all of them with --all or on a CPU; those of the
    exhaustive check with --search."""
    if given.search:
        cases = list_search_cases()
        return list(cases[:3] if given.smoke else cases)
    known = {case.name: case for case in (*CASES, *MORE_CASES)}
    if given.cases is None:
        return list(known.values()) if given.all or given.smoke else list(CASES)
    names = given.cases.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"no case {unknown[0]}: there are {', '.join(known)}")
    return [known[name] for name in names]


def main() -> int:
    """All cases, or those that are named; 1 where one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="a short self-test: each line ok, or FAILED with the reason"
    )
    parser.add_argument("--search", action="store_true", help="all combinations of a few knobs, and the plan's choice")
    parser.add_argument("--cases", help="names, joined by commas")
    parser.add_argument("--all", action="store_true", help="cases without a target, too")
    parser.add_argument(
        "--minutes", type=float, help=f"for all cases (default {MINUTES:g}, {ALL_MINUTES:g} with --all)"
    )
    parser.add_argument("--scratch", type=Path, help="folder for models and runs; default: the system's temporary one")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU: does the script work?")
    given = parser.parse_args()
    if not given.smoke and not _has_gpu():
        print("error: no NVIDIA GPU is usable here; --smoke shows on the CPU that the script works", file=sys.stderr)
        return 1
    if given.check:
        return check(smoke=given.smoke)
    chosen = choose_cases(parser, given)
    if given.scratch is not None and not given.scratch.is_dir():
        parser.error(f"--scratch: {given.scratch} is not a folder")
    minutes = given.minutes or (ALL_MINUTES if given.all else MINUTES)
    console = Console(width=180, highlight=False)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="fitune-gpu-") as scratch:
        for row in run_cases(chosen, Path(scratch), smoke=given.smoke, minutes=minutes):
            rows.append(row)
            said = row.get("error") or row.get("skipped") or f"{row['tokens_per_second']:,.0f} tokens/s"
            print(f"{row['case']}: {said}", file=sys.stderr, flush=True)
    show(rows, console)
    print(json.dumps({"smoke": given.smoke, "rows": rows}))
    return 1 if any("error" in row for row in rows) else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
