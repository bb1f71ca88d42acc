"""`fitune run`: a recipe or a saved plan becomes a plan that is shown, a run, and a report."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..planner.plan import Plan
from ..planner.render import render_plan
from ..recipes.errors import PlanError
from .devices import check_runs_here
from .planning import Job, check_data_fits_plan, reopen_plan
from .report import render_report

EXIT_CODES = {"finished": 0, "out_of_time": 0, "interrupted": 130}


def run_recipe(path: str, overrides: Sequence[str], console: Console) -> int:
    """Run a recipe, or exactly a saved plan (`*.json`); returns the exit code: 0, 3 nothing fits, 130 interrupted."""
    started = time.time()
    job, plan = _find_plan(path, overrides, console)
    if not plan.fits:
        render_plan(plan, console)
        return 3
    check_runs_here(plan.device, required_bytes=plan.memory.required_bytes)
    render_plan(plan, console)
    console.print()
    from .train import choose_run_path, run_job

    run_path = choose_run_path(job, started)
    report = run_job(job, plan, run_path, console)
    console.print()
    render_report(plan, report, console)
    for words in (["chat", str(run_path)], ["chat", str(run_path), "--base"], ["report", str(run_path)]):
        console.print(Text.assemble("next: ", (shlex.join(["fitune", *words]), "bold")), soft_wrap=True)
    return EXIT_CODES[report.status]


def _find_plan(path: str, overrides: Sequence[str], console: Console) -> tuple[Job, Plan]:
    """The job and its plan, with the dataset tokenised: every problem of the data shows before anything starts."""
    if path.endswith(".json"):
        if overrides:
            raise PlanError(f"{path}: a saved plan is executed as it is: --set needs the recipe")
        job, plan, warnings = reopen_plan(Path(path))
        for warning in warnings:
            console.print(Text.assemble(("note: ", "yellow"), warning))
    else:
        job, plan = Job(path, overrides), None
        # What is wrong with model, method or device is said before anything is fetched.
        quick = job.make_plan(quick=True)
        if quick.fits and quick.device.kind == "cuda":
            check_runs_here(quick.device)
    with console.status("reading the data and the tokenizer"):
        job.data  # noqa: B018 - tokenised here, used by the run
    if plan is None:
        return job, job.make_plan(quick=False)
    check_data_fits_plan(job, plan)
    return job, plan
