"""A RunReport on the terminal: what came of a run, and predicted against measured memory, speed and time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..planner.plan import Plan
from ..planner.show.reasons import describe_strategy
from ..planner.speed import Speed as PlannedSpeed
from ..recipes.units import format_bytes, format_seconds
from .data.view import describe_data
from .report import RunReport, Speed, is_whole, list_part_seconds, list_phase_peaks, predict_file_bytes
from .shown import show_text
from .training.forgetting import render_forgetting


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
        console.print(_render_speed(plan.speed, report.speed))
        console.print(_render_parts(plan, plan.speed.total_seconds, report))
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
    table = _make_table("Memory")
    rows = [
        ("live tensors", predicted.peak_allocated_bytes, measured.peak_allocated_bytes),
        ("reserved by the allocator", predicted.peak_reserved_bytes, measured.peak_reserved_bytes),
        (what, predicted.peak_device_bytes, measured.peak_device_bytes),
        ("files", predict_file_bytes(plan, report), measured.disk_bytes),
    ]
    _add_peaks(table, rows)
    table.add_row("with margin, decided on", format_bytes(predicted.required_bytes), "", "")
    table.add_row("budget", format_bytes(predicted.budget_bytes), "", "")
    table.add_section()
    kind = "live tensors" if plan.device.kind == "cuda" else "resident"
    phases = list_phase_peaks(plan, report)
    _add_peaks(table, [(f"{kind} in {one.name}", one.predicted_bytes, one.measured_bytes) for one in phases])
    return table


def _add_peaks(table: Table, peaks: Iterable[tuple[str, int | None, int | None]]) -> None:
    """Rows of name, predicted and measured bytes, with the error; what is not known on both sides is left out."""
    for name, ours, theirs in peaks:
        if ours is not None and theirs is not None:
            error = _show_error(ours, theirs) if theirs else "-"
            table.add_row(name, format_bytes(ours), format_bytes(theirs), error)


def _render_speed(predicted: PlannedSpeed, measured: Speed) -> Table:
    """Speed, predicted beside measured; the MFU that was reached follows from the tokens."""
    table = _make_table("Speed")
    tokens, utilization = predicted.tokens_per_second, predicted.model_flops_utilization
    reached = None if measured.tokens_per_second is None else utilization * measured.tokens_per_second / tokens
    rows: list[tuple[str, float | None, float | None, Callable[[float], str]]] = [
        ("tokens a second", tokens, measured.tokens_per_second, "{:,.0f}".format),
        ("a step", predicted.step_seconds, measured.step_seconds, format_seconds),
        ("model FLOPs utilization", utilization, reached, "{:.1%}".format),
        ("J for 1,000 tokens", predicted.joules_per_1000_tokens, measured.joules_per_1000_tokens, "{:.3g}".format),
    ]
    for name, ours, theirs, show in rows:
        if ours is not None and theirs:
            table.add_row(name, show(ours), show(theirs), _show_error(ours, theirs))
    return table


def _render_parts(plan: Plan, total: float | None, report: RunReport) -> Table:
    """The time of the run's parts, predicted beside measured.

    total: seconds of the whole run by the plan
    """
    table = _make_table("Time")
    for part in list_part_seconds(plan, report):
        ours, theirs = part.predicted_seconds, part.measured_seconds
        if theirs:
            error = _show_error(ours, theirs)
            table.add_row(part.name, format_seconds(ours), format_seconds(theirs), error)
    taken = report.speed.total_seconds
    if total is not None and taken and is_whole(plan, report):
        table.add_row("the whole run", format_seconds(total), format_seconds(taken), _show_error(total, taken))
    if report.speed.first_step_seconds:
        first = format_seconds(report.speed.first_step_seconds)
        table.caption = f"The first step took {first}: it is left out of tokens a second and of the mean step."
        table.caption_justify = "left"
    return table


def _make_table(what: str) -> Table:
    """An empty table of name, predicted, measured and error."""
    table = Table(title=f"{what}, predicted against measured", title_justify="left", box=None, padding=(0, 2))
    for name in ("", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if not name else "right")
    return table


def _show_error(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.1f} %"
