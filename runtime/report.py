"""RunReport: predicted against measured, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..planner.plan import Plan
from ..planner.show.reasons import describe_strategy
from ..planner.strategy import Value
from ..recipes.errors import RunError
from ..recipes.units import format_bytes
from .data.report import DataReport
from .data.view import describe_data
from .report_time import list_part_seconds, render_parts, render_speed
from .rundir import PLAN_NAME, REPORT_NAME
from .shown import show_text
from .training.forgetting import Forgetting, render_forgetting

Status = Literal["finished", "interrupted", "terminated", "out_of_time"]


class MeasuredPhase(Value):
    """A phase as it was measured.

    name:              load, forward, backward, clip, optimizer, evaluate, save or merge
    seconds:           time spent in it
    peak_allocated_bytes: highest sum of live tensors on the GPU, None on a CPU
    peak_device_bytes: highest of the device, sampled; on a CPU the process's resident peak
    """

    name: str
    seconds: float
    peak_allocated_bytes: int | None = None
    peak_device_bytes: int | None = None


class PhasePeaks(Value):
    """A phase's peak, predicted beside measured: live tensors on a GPU, the process's resident memory on a CPU.

    name:            load, forward, backward, clip, optimizer, evaluate, save or merge
    predicted_bytes: by the plan
    measured_bytes:  by the run, None where nothing was
    """

    name: str
    predicted_bytes: int
    measured_bytes: int | None


class MeasuredMemory(Value):
    """What a run really took, bytes.

    peak_allocated_bytes, peak_reserved_bytes: PyTorch's allocator, None on a CPU
    peak_device_bytes: NVML; on a CPU the process's resident peak
    peak_host_bytes:   the process's resident peak
    disk_bytes:        files of the run
    """

    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_device_bytes: int | None
    peak_host_bytes: int
    disk_bytes: int
    phases: tuple[MeasuredPhase, ...]


class Loss(Value):
    """Mean cross-entropy a token.

    before, after:  on the held-out rows, None without any
    first, last:    of the first and the last training step
    """

    before: float | None
    after: float | None
    first: float | None
    last: float | None


class Sample(Value):
    """One held-out question, answered before and after."""

    question: str
    before: str
    after: str


class Speed(Value):
    """How fast it went.

    steps:             optimizer steps done
    tokens:            tokens computed, padding excepted
    train_seconds:     in training steps
    first_step_seconds: of them in the first step of each session, which compiles, loads kernels and fills caches
    total_seconds:     from loading the model to the last file
    tokens_per_second: of the other steps, padding excepted; of all where there are no others, None without any
    step_seconds:      mean time of one of them, None without one
    energy_joules:     of the GPU, None without one
    joules_per_1000_tokens: of the GPU in training steps, None without one
    """

    steps: int
    tokens: int
    train_seconds: float
    first_step_seconds: float = 0.0
    total_seconds: float
    tokens_per_second: float | None
    step_seconds: float | None = None
    energy_joules: float | None = None
    joules_per_1000_tokens: float | None = None


class RunReport(Value):
    """What happened: the document that a run writes last.

    status:    finished; interrupted by Ctrl-C, terminated by SIGTERM; out_of_time by budget.max_hours
    measured:  memory as measured, in the last session; the prediction is in plan.json beside it
    events:    of the monitor: what left the plan
    output:    folders with what was trained, by name
    skipped_steps: steps without an update, since loss or gradients were not finite
    resumed_from:  the steps after which the run was taken up again, one for each time
    lost_steps:    steps that were done again since they came after the last checkpoint
    best_step:     after it the held-out loss was the best, None where it was measured at the end only
    checkpoints:   that lay beside the result when it was written
    forgetting: rows of another task, before and after; None without any, or where a signal ended the run
    data:      the data check that the run began with; None in a report of an earlier version
    """

    format_version: Literal[1] = 1
    recipe: str
    recipe_sha256: str
    status: Status
    started_unix_time: float
    loss: Loss
    sample: Sample | None
    measured: MeasuredMemory
    speed: Speed
    events: tuple[dict[str, Any], ...] = ()
    output: dict[str, str]
    versions: dict[str, str]
    skipped_steps: int = Field(default=0, ge=0)
    resumed_from: tuple[int, ...] = ()
    lost_steps: int = Field(default=0, ge=0)
    best_step: int | None = None
    checkpoints: int = Field(default=0, ge=0)
    forgetting: Forgetting | None = None
    data: DataReport | None = None


def load_report(run: Path) -> tuple[Plan, RunReport]:
    """The plan and the report of a run directory; RunError where there is none or it cannot be read."""
    if not run.is_dir():
        raise RunError(f"{run}: there is no such run directory")
    if not (run / REPORT_NAME).is_file():
        raise RunError(f"{run}: no {REPORT_NAME} in it: the run has not finished, or this is not a run directory")
    try:
        plan = Plan.model_validate_json((run / PLAN_NAME).read_bytes())
        report = RunReport.model_validate_json((run / REPORT_NAME).read_bytes())
    except (OSError, ValidationError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise RunError(f"{run}: its plan or report cannot be read: {first}") from error
    return plan, report


def make_report_json(plan: Plan, report: RunReport) -> str:
    """One JSON object: the report, with what was predicted: memory, in all and by phase, and speed."""
    document = report.model_dump(mode="json")
    if report.forgetting is not None:
        figures = ("perplexity_before", "perplexity_after", "rise", "warning")
        document["forgetting"] |= {name: getattr(report.forgetting, name) for name in figures}
    document["predicted"] = plan.memory.model_dump(mode="json")
    document["predicted_speed"] = None if plan.speed is None else plan.speed.model_dump(mode="json")
    document["parts"] = []
    if plan.speed is not None:
        document["parts"] = [one.model_dump(mode="json") for one in list_part_seconds(plan.speed, report)]
    document["phases"] = [one.model_dump(mode="json") for one in list_phase_peaks(plan, report)]
    return json.dumps(document, allow_nan=False)


def list_phase_peaks(plan: Plan, report: RunReport) -> list[PhasePeaks]:
    """Each phase of the run that the plan knows, predicted and measured."""
    is_cpu = plan.device.kind == "cpu"
    process_bytes = plan.memory.peak_device_bytes - plan.memory.peak_allocated_bytes if is_cpu else 0
    predicted = {
        phase.name: phase.host_bytes if is_cpu and phase.host_bytes else phase.peak_allocated_bytes + process_bytes
        for phase in plan.memory.phases
    }
    return [
        PhasePeaks(
            name=phase.name,
            predicted_bytes=predicted[phase.name],
            measured_bytes=phase.peak_device_bytes if is_cpu else phase.peak_allocated_bytes,
        )
        for phase in report.measured.phases
        if phase.name in predicted
    ]


def render_report(plan: Plan, report: RunReport, console: Console) -> None:
    """Print a run's result: loss, the sample question, predicted against measured memory, speed."""
    console.print(
        Panel(
            _render_result(plan, report),
            title=f"Run of [bold]{escape(show_text(report.recipe))}[/bold]: {report.status}",
            title_align="left",
        )
    )
    console.print(_render_memory(plan, report))
    if plan.speed is not None and report.speed.tokens_per_second:
        console.print(render_speed(plan.speed, report.speed))
        console.print(render_parts(plan.speed, report))
    for event in report.events:
        console.print(Text.assemble(("note: ", "yellow"), show_text(str(event["message"]))))
    if report.forgetting is not None and report.forgetting.warning is not None:
        console.print(Text.assemble(("warning: ", "bold yellow"), report.forgetting.warning))


def _render_result(plan: Plan, report: RunReport) -> Group:
    lines: list[Text] = [Text(describe_strategy(plan.strategy), style="bright_black")]
    loss, speed = report.loss, report.speed
    if loss.before is not None and loss.after is not None:
        change = 100 * (loss.after / loss.before - 1)
        style = "bold green" if loss.after < loss.before else "bold red"
        text = f"{loss.before:.3f} -> {loss.after:.3f} ({change:+.1f} %)"
        lines.append(Text.assemble("held-out loss  ", (text, style)))
    if report.forgetting is not None:
        lines.append(render_forgetting(report.forgetting))
    if loss.first is not None and loss.last is not None:
        lines.append(Text(f"training loss  {loss.first:.3f} -> {loss.last:.3f} in {speed.steps} steps"))
    if speed.tokens_per_second is not None:
        energy = "" if speed.energy_joules is None else f", {speed.energy_joules / 3600:.1f} Wh"
        lines.append(
            Text(f"speed          {speed.tokens_per_second:,.0f} tokens/s, {speed.total_seconds:,.0f} s in all{energy}")
        )
    if report.resumed_from:
        steps = ", ".join(str(step) for step in report.resumed_from)
        times = "once" if len(report.resumed_from) == 1 else f"{len(report.resumed_from)} times"
        again = f"; {report.lost_steps} steps were done again" if report.lost_steps else ""
        lines.append(Text(f"resumed        {times}, after step {steps}{again}"))
    if report.skipped_steps:
        lines.append(Text(f"skipped        {report.skipped_steps} steps whose loss or gradients were not finite"))
    if report.data is not None:
        lines.append(Text(f"data           {describe_data(report.data)}"))
    if report.sample is not None:
        lines += [
            Text(),
            Text.assemble(("held-out question  ", "bold"), show_text(report.sample.question)),
            Text.assemble(("before  ", "bold"), show_text(report.sample.before)),
            Text.assemble(("after   ", "bold green"), show_text(report.sample.after)),
        ]
    return Group(*lines)


def _render_memory(plan: Plan, report: RunReport) -> Table:
    predicted, measured = plan.memory, report.measured
    what = "device memory (NVML)" if plan.device.kind == "cuda" else "resident memory of the process"
    table = Table(title="Memory, predicted against measured", title_justify="left", box=None, padding=(0, 2))
    for name in ("", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if not name else "right")
    rows = [
        ("live tensors", predicted.peak_allocated_bytes, measured.peak_allocated_bytes),
        ("reserved by the allocator", predicted.peak_reserved_bytes, measured.peak_reserved_bytes),
        (what, predicted.peak_device_bytes, measured.peak_device_bytes),
        ("files", _predict_files(plan, report), measured.disk_bytes),
    ]
    _add_peaks(table, rows)
    table.add_row("with margin, decided on", format_bytes(predicted.required_bytes), "", "")
    table.add_row("budget", format_bytes(predicted.budget_bytes), "", "")
    table.add_section()
    kind = "live tensors" if plan.device.kind == "cuda" else "resident"
    phases = list_phase_peaks(plan, report)
    _add_peaks(table, [(f"{kind} in {one.name}", one.predicted_bytes, one.measured_bytes) for one in phases])
    return table


def _predict_files(plan: Plan, report: RunReport) -> int | None:
    """The files beside the result, with as many checkpoints as there were; None for a run that wrote no result."""
    memory = plan.memory
    saved = sum(phase.disk_bytes or 0 for phase in memory.phases if phase.name == "save" or "merged" in report.output)
    return (
        saved + memory.log_bytes - (memory.checkpoints - report.checkpoints) * memory.checkpoint_bytes
        if saved
        else None
    )


def _add_peaks(table: Table, peaks: Iterable[tuple[str, int | None, int | None]]) -> None:
    """Rows of name, predicted and measured bytes, with the error; what is not known on both sides is left out."""
    for name, ours, theirs in peaks:
        if ours is not None and theirs is not None:
            error = f"{100 * (ours / theirs - 1):+.1f} %" if theirs else "-"
            table.add_row(name, format_bytes(ours), format_bytes(theirs), error)
