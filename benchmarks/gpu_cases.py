"""The cases of benchmarks.gpu: what each one runs, and what it reads from the run's own files."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from .rows import write_long_rows, write_mixed_rows

WARM_STEPS = 3
STEPS = 10
CURVE_STEPS = 200
START_SECONDS = 20
"""Of a run before its plan's time begins: Python, libraries, the plan's rehearsals, CUDA. A guess."""
MODELS = {"8b": "llama-3.1-8b", "1b": "llama-3.2-1b", "embedded": "smollm2-135m-instruct"}
"""Names of fitune's model catalog; the embedded one has its real weights, the others random ones."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run.

    model:    key of MODELS
    length:   data.max_length
    batch:    train.global_batch_size
    settings: further `--set`s
    rows:     `long`: each of max_length tokens; `mixed`: lengths drawn like Alpaca's; `pavlos`: the rows that ship
    steps:    optimizer steps
    target:   tokens per second to reach on an H100, None where there is none
    seconds:  estimated on an H100, START_SECONDS and the plan's own time of the run: a case is left out where less
              time is left
    """

    name: str
    model: str
    length: int
    batch: int
    settings: Sequence[str]
    rows: Literal["long", "mixed", "pavlos"] = "long"
    steps: int = STEPS
    target: float | None = None
    seconds: int = 45


LORA, QLORA, FULL = 'method.kind="lora"', 'method.kind="qlora"', 'method.kind="full"'
COMPILED, SMALL = "train.compile=true", 'budget.memory="24GiB"'
"""Speeds are those of long runs: left to the planner, as few steps as here would not earn the time to compile."""
EAGER, LIGER, FLOAT8 = ("train.compile=false", 'train.kernels="torch"'), 'train.kernels="liger"', "train.float8=true"
PEFT = "method.fused_adapters=false"
PLAIN = ('train.loss_head="full"', *EAGER, PEFT, "train.micro_batch_size=2")
WHOLE = ("train.gradient_checkpointing=false", "train.micro_batch_size=2")
CURVE = {"model": "embedded", "length": 256, "batch": 8, "rows": "pavlos", "steps": CURVE_STEPS}
AT_ONCE = "train.micro_batch_size=8"
_8B, _1B = {"model": "8b", "length": 4096, "batch": 2}, {"model": "1b", "length": 2048}
_24GIB = _8B | {"length": 2048, "batch": 8}
LONG = ("train.micro_batch_size=4", 'train.loss_head="fused"')
"""What the plan of a long run of full-auto chooses."""
BF16_FULL = (FULL, 'model.dtype="bf16"', COMPILED, *LONG)
CASES = (
    Case(name="full-auto", **_1B, batch=4, settings=BF16_FULL, target=55_000, seconds=60),
    Case(name="padded", **_1B, batch=16, settings=(LORA, "train.micro_batch_size=16"), rows="mixed", seconds=30),
    Case(name="packed", **_1B, batch=2, settings=(LORA, "data.packing=true"), rows="mixed", seconds=30),
    Case(name="lora-auto", **_8B, settings=(LORA, COMPILED), target=16_000, seconds=70),
    Case(name="qlora-auto", **_8B, settings=(QLORA, COMPILED), target=13_000, seconds=70),
    Case(name="curve-eager", **CURVE, settings=(LORA, *EAGER, PEFT, AT_ONCE), seconds=75),
    Case(name="curve-compiled", **CURVE, settings=(LORA, COMPILED, AT_ONCE), seconds=75),
)
"""What has a target, in the order in which they are run: within 8 minutes on an H100, with their models."""
MORE_CASES = (
    Case(name="qlora-auto-24GiB", **_24GIB, settings=(QLORA, COMPILED, SMALL), seconds=75),
    Case(name="lora-auto-24GiB", **_24GIB, settings=(LORA, COMPILED, SMALL), seconds=80),
    Case(name="lora-eager-ckpt", **_8B, settings=(LORA, *PLAIN, "train.gradient_checkpointing=true"), seconds=45),
    Case(
        name="lora-compiled-fused",
        **_8B,
        settings=(LORA, 'train.loss_head="fused"', COMPILED, *WHOLE),
        target=16_000,
        seconds=70,
    ),
    Case(name="qlora-compiled", **_8B, settings=(QLORA, 'train.loss_head="fused"', COMPILED, *WHOLE), seconds=70),
    Case(
        name="lora-peft-adapters",
        **_8B,
        settings=(LORA, 'train.loss_head="fused"', COMPILED, PEFT, *WHOLE),
        seconds=70,
    ),
    Case(name="lora-liger", **_8B, settings=(LORA, 'train.loss_head="fused"', LIGER, *WHOLE), seconds=45),
    Case(name="lora-float8", **_8B, settings=(LORA, 'train.loss_head="fused"', COMPILED, FLOAT8, *WHOLE), seconds=70),
    Case(name="curve-liger", **CURVE, settings=(LORA, LIGER, AT_ONCE), seconds=75),
    Case(name="curve-float8", **CURVE, settings=(LORA, COMPILED, FLOAT8, AT_ONCE), seconds=75),
)
"""What `--all` adds, 11 minutes more."""
KNOBS = {
    "train.micro_batch_size": ("1", "2", "4", "8"),
    "train.gradient_checkpointing": ("true", "false"),
    "train.compile": ("true", "false"),
}
"""Of the exhaustive check: every combination, on the model and within the memory of SEARCHED."""
SEARCHED = Case(name="search-auto", **_1B, batch=8, settings=(LORA, SMALL), seconds=45)
PAVLOS = Path(__file__).parents[1] / "recipes/data/pavlos/train.jsonl"
EXIT_NOTHING_FITS = 3
ROWS_IN_A_PACK = 20
"""Rows that a packed row of 2,048 tokens holds, with some to spare."""


def list_search_cases() -> tuple[Case, ...]:
    """The plan's own choice, then every combination of KNOBS."""
    combinations = [tuple(map("=".join, zip(KNOBS, one, strict=True))) for one in itertools.product(*KNOBS.values())]
    return (
        SEARCHED,
        *(
            replace(SEARCHED, name=f"search-{number}", settings=(*SEARCHED.settings, *settings), seconds=40)
            for number, settings in enumerate(combinations, start=1)
        ),
    )


def run_case(case: Case, model: str, scratch: Path, *, smoke: bool, timeout_seconds: float) -> dict[str, Any]:
    """`fitune run` of one case: its plan and what it measured, or the error's last line."""
    folder, recipe = scratch / case.name, write_recipe(case, model, scratch, smoke=smoke)
    words = [word for one in list_settings(case, smoke=smoke) for word in ("--set", one)]
    command = [sys.executable, "-m", "fitune.runtime.cli", "run", str(recipe), *words]
    start = time.perf_counter()
    row: dict[str, Any] = {"case": case.name, "target": case.target, "settings": list(case.settings)}
    code, said = run_apart(command, timeout_seconds)
    row["wall_seconds"] = time.perf_counter() - start
    if code == EXIT_NOTHING_FITS:
        return row | {"skipped": "does not fit"}
    if code != 0:
        return row | {"error": said}
    try:
        return row | read_run(folder)
    except (OSError, ValueError, LookupError, TypeError) as unread:
        return row | {"error": f"the run's files cannot be read: {unread!r}"}


def run_apart(command: Sequence[str], timeout_seconds: float) -> tuple[int, str]:
    """Run a command in a process of its own: its exit code, and the last of its errors, or else its last line."""
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=make_environment(),
        start_new_session=True,  # Inductor's workers end with it
    )
    try:
        printed, _ = child.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return -signal.SIGKILL, f"stopped after {timeout_seconds:.0f} s"
    said = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("error:")]
    return child.returncode, (errors or said or [f"exit code {child.returncode}"])[-1]


def make_environment() -> dict[str, str]:
    """No colours, and lines as long as they are."""
    return os.environ | {"NO_COLOR": "1", "COLUMNS": "500"}


def write_recipe(case: Case, model: str, scratch: Path, *, smoke: bool) -> Path:
    """The recipe of a case and its rows."""
    length, steps = (64 if smoke else case.length), (WARM_STEPS + 2 if smoke else case.steps)
    train = scratch / f"{case.name}.jsonl"
    if case.rows == "mixed":
        write_mixed_rows(train, steps * case.batch * ROWS_IN_A_PACK, max_tokens=length)
    elif case.rows == "long":
        write_long_rows(train, steps * case.batch, tokens=length)
    else:
        train = PAVLOS
    recipe = scratch / f"{case.name}.toml"
    recipe.write_text(
        f'[model]\nid = "{model}"\n[data]\ntrain = "{train}"\nmax_length = {length}\nmax_truncated = 1.0\n'
        f"[train]\nmax_steps = {steps}\nglobal_batch_size = {case.batch}\n"
        f'[output]\ndir = "{scratch / case.name}"\nsave_every = "never"\n'
    )
    return recipe


def list_settings(case: Case, *, smoke: bool) -> list[str]:
    """A case's settings; on a CPU without those that are a GPU's."""
    if not smoke:
        return list(case.settings)
    of_gpu = ("train.compile", "train.kernels", "train.float8", "budget.memory", "model.dtype")
    return [one for one in case.settings if not one.startswith(of_gpu)]


def read_run(folder: Path) -> dict[str, Any]:
    """The figures of a finished run's directory. Tokens per second are the median over the steps after WARM_STEPS."""
    plan, report = (json.loads((folder / name).read_text()) for name in ("plan.json", "report.json"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    memory, measured = plan["memory"], report["measured"]
    keys = (
        "method",
        "checkpointed_layers",
        "loss_head",
        "optimizer",
        "compile",
        "kernels",
        "fused_adapters",
        "float8",
        "micro_batch_size",
        "attention",
    )
    return {
        "strategy": {key: plan["strategy"][key] for key in keys},
        "tokens_per_second": median(line["tokens_per_second"] for line in steps[WARM_STEPS:]),
        "predicted_tokens_per_second": (plan.get("speed") or {}).get("tokens_per_second"),
        **{
            f"{who}{key}": source[key]
            for key in ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes")
            for who, source in (("predicted_", memory), ("measured_", measured))
        },
        "required_bytes": memory["required_bytes"],
        "losses": [line["loss"] for line in steps],
        "events": [event["message"] for event in report["events"]],
        "versions": report["versions"],
    }
