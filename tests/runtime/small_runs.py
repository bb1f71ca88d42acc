"""Recipes on small models, and runs of them: everything real, in a second or two."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from fitune.planner.plan import Plan
from fitune.runtime.planning import Job
from fitune.runtime.report import RunReport
from fitune.runtime.training.loop import TrainingLoop
from fitune.runtime.training.train import run_job

CHEESES = ("feta", "graviera", "manouri", "kasseri", "mizithra", "halloumi")
TABLES: dict[str, dict[str, Any]] = {
    "model": {"dtype": "fp32"},
    "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 64, "max_truncated": 0.2},
    "method": {"kind": "full", "rank": 4},
    "budget": {"memory": "8GiB"},
    "train": {
        "max_steps": 6,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 5e-3,
        "optimizer": "adamw",
        "gradient_checkpointing": False,
        "loss_head": "full",
        "kernels": "torch",
        "compile": False,
    },
    "output": {"dir": "run"},
}


def write_rows(path: Path, rows: int, *, asks: str = "What is") -> Path:
    """Instruction rows of different lengths, which a small model learns within some steps."""
    lines = [
        {
            "instruction": f"{asks} {CHEESES[number % len(CHEESES)]}?" + " Tell me." * (number % 4),
            "output": f"A good cheese, my friend, {CHEESES[number % len(CHEESES)]} it is.",
        }
        for number in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_recipe(folder: Path, model_id: Path | str, /, *, rows: int = 24, **tables: dict[str, Any]) -> Path:
    """A recipe in `folder` with its data; the keywords are tables that are laid over TABLES, None removes a key."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "eval.jsonl", 5, asks="And what is")
    lines = []
    for name, defaults in TABLES.items():
        table = defaults | ({"id": str(model_id)} if name == "model" else {}) | tables.get(name, {})
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None]
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def plan_recipe(path: Path, **strategy: Any) -> tuple[Job, Plan]:
    """The job of a recipe and its plan, which must fit; computed in fp32 on every CPU unless the keywords say more."""
    job = Job(str(path))
    plan = job.make_plan(quick=False)
    assert plan.fits
    return job, plan.model_copy(
        update={"strategy": plan.strategy.model_copy(update={"compute_dtype": "fp32"} | strategy)}
    )


def run_recipe_file(path: Path, **strategy: Any) -> tuple[Path, RunReport]:
    """Run a recipe; the run's directory and its report. The keywords change the plan's strategy."""
    job, plan = plan_recipe(path, **strategy)
    run = path.parent / "run"
    return run, run_job(job, plan, run, Console(file=io.StringIO()))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, in which NaN and infinities are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path}: {constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def read_losses(run: Path) -> list[float]:
    """The training losses of a run, step by step."""
    return [one["loss"] for one in read_lines(run / "metrics.jsonl") if "loss" in one]


class Killed(BaseException):
    """Stands for the end of the process: nothing after it is executed but clean-up."""


def execute_until(recipe: Path, step: int) -> None:
    """Run a recipe and end it, as if killed, when it would do `step`."""
    real = TrainingLoop.step

    def break_off(self: TrainingLoop, batch: Any, line: Any) -> None:
        if batch.step == step:
            raise Killed
        real(self, batch, line)

    job, plan = plan_recipe(recipe)
    TrainingLoop.step = break_off  # type: ignore[method-assign]
    try:
        run_job(job, plan, recipe.parent / "run", Console(file=io.StringIO()))
    except Killed:
        return
    finally:
        TrainingLoop.step = real  # type: ignore[method-assign]
    raise AssertionError("the run ended before that step")
