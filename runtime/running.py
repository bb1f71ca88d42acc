"""`fitune run`: a recipe or a saved plan becomes a plan, a run, and a report; an unfinished run goes on."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..planner.plan import Plan
from ..planner.show.plan import render_plan
from ..recipes.errors import PlanError, RunError
from .data.preflight import refuse_problems
from .machine.devices import check_runs_here
from .planning import Job, check_data_fits_plan, load_plan, reopen_plan
from .report import Status
from .report_view import render_report
from .rundir import PLAN_NAME, check_not_held, check_vacant

EXIT_CODES: dict[Status, int] = {"finished": 0, "out_of_time": 0, "interrupted": 130, "terminated": 143}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line says of a run that is there already.

    resume: an unfinished run must be there, and goes on
    replan: likewise, with another plan
    """

    resume: bool = False
    replan: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether an unfinished run is wanted."""
        return self.resume or self.replan


def run_recipe(path: str, overrides: Sequence[str], console: Console, options: RunOptions | None = None) -> int:
    """Run a recipe, or exactly a saved plan (`*.json`); its exit code: 0, 3 nothing fits, 130 or 143 stopped."""
    started, options = time.time(), options or RunOptions()
    job, plan = _open_job(path, overrides, console)
    run_path, is_unfinished = find_run_path(job, started, options)
    check_not_held(run_path)
    if not is_unfinished and job.recipe_file.recipe.output.dir is None and list_unfinished(job.recipe_file.name):
        console.print(Text.assemble(("note: ", "yellow"), "an unfinished run is in runs/: --resume goes on with it"))
    with console.status("reading the data and the tokenizer"):
        refuse_problems(job.data_report)
    if is_unfinished:
        plan = _find_plan_to_go_on(job, plan, run_path, options, console)
    elif plan is None:
        plan = job.make_plan(quick=False)
    else:
        check_data_fits_plan(job, plan)
    if not plan.fits:
        render_plan(plan, console)
        return 3
    check_runs_here(plan.device, required_bytes=plan.memory.required_bytes)
    render_plan(plan, console)
    console.print()
    from .training.train import run_job

    report = run_job(job, plan, run_path, console, resume=is_unfinished, replanned=options.replan)
    console.print()
    render_report(plan, report, console)
    words = [["chat", str(run_path)], ["chat", str(run_path), "--base"], ["report", str(run_path)]]
    if EXIT_CODES[report.status]:
        settings = [word for one in overrides for word in ("--set", one)]
        words = [["run", path, *settings, "--resume"], *words]
    for one in words:
        console.print(Text.assemble("next: ", (shlex.join(["fitune", *one]), "bold")), soft_wrap=True)
    return EXIT_CODES[report.status]


def _open_job(path: str, overrides: Sequence[str], console: Console) -> tuple[Job, Plan | None]:
    """The job, and the plan where a saved one was given: what is wrong with model, method or device is said before
    anything is fetched."""
    if path.endswith(".json"):
        if overrides:
            raise PlanError(f"{path}: a saved plan is executed as it is: --set needs the recipe")
        job, plan, warnings = reopen_plan(Path(path))
        for warning in warnings:
            console.print(Text.assemble(("note: ", "yellow"), warning))
        return job, plan
    job = Job(path, overrides)
    quick = job.make_plan(quick=True)
    if quick.fits and quick.device.kind == "cuda":
        check_runs_here(quick.device)
    return job, None


def find_run_path(job: Job, now: float, options: RunOptions) -> tuple[Path, bool]:
    """(directory of the run, whether an unfinished run is in it).

    `output.dir`, else `runs/<recipe>-<time>` in the current folder: the last of these that is unfinished where one is
    to go on.
    """
    from .resume.run_record import is_unfinished

    written, name = job.recipe_file.recipe.output.dir, job.recipe_file.name
    if written is not None:
        path = job.recipe_file.resolve(written)
        if options.goes_on and not is_unfinished(path):
            raise RunError(f"output.dir: {path} holds no unfinished run: leave --resume and --replan out")
        if not is_unfinished(path):
            check_vacant(path)
        return path, is_unfinished(path)
    if not options.goes_on:
        return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}", False
    unfinished = list_unfinished(name)
    if not unfinished:
        raise RunError(f"runs/{name}-*: none of these is an unfinished run: leave --resume and --replan out")
    return unfinished[-1], True


def list_unfinished(name: str) -> list[Path]:
    """The unfinished runs of a recipe in the folder runs, by the time of their start."""
    from .resume.run_record import is_unfinished

    started = len("-20260301-140509")
    return [one for one in sorted(Path("runs").glob("*-*-*")) if one.name[:-started] == name and is_unfinished(one)]


def _find_plan_to_go_on(job: Job, given: Plan | None, run_path: Path, options: RunOptions, console: Console) -> Plan:
    """The plan that the run had, or with --replan another one; RunError where the run is not the same."""
    from .resume.replanning import make_new_plan
    from .resume.run_record import load_record, make_record
    from .resume.session import check_same

    record, old = load_record(run_path), load_plan(run_path / PLAN_NAME)
    if record is None:
        raise RunError(f"{run_path}: its run has just been removed")
    check_same(record, make_record(job), run_path, replan=options.replan)
    console.print(Text.assemble(("going on ", "bold"), f"with the unfinished run in {run_path}"), soft_wrap=True)
    if options.replan:
        return make_new_plan(job, old, record.failure)
    if record.failure is not None:
        text = f"it was out of memory in phase {record.failure.phase}: --replan looks for a plan that needs less"
        console.print(Text.assemble(("note: ", "yellow"), text), soft_wrap=True)
    if given is not None and given.strategy != old.strategy:
        raise RunError(f"output.dir: {run_path} holds an unfinished run with another plan: --replan changes it")
    device = job.probe_device()
    if (device.name, device.kind, device.memory_bytes) != (old.device.name, old.device.kind, old.device.memory_bytes):
        raise RunError(
            f"{run_path}: its plan is for {old.device.name}, and this is {device.name}: --replan makes another plan"
        )
    check_data_fits_plan(job, old)
    return old
