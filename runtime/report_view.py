"""A RunReport on the terminal: what came of a run, and predicted against measured memory, speed and time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..planner.plan import Plan
from ..planner.show.reasons import describe_strategy
from ..recipes.units import format_bytes, format_seconds
from .data.view import describe_data
from .report import RunReport, is_whole, list_part_seconds, list_phase_peaks, predict_file_bytes
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
    console.print(_make_table("Memory", list_memory(plan, report)))
    if speed := list_speed(plan, report):
        console.print(_make_table("Speed", speed))
        console.print(_make_table("Time", list_times(plan, report)))
    if speed and report.speed.first_step_seconds:
        first = format_seconds(report.speed.first_step_seconds)
        which = "first step of each start" if report.resumed_from else "first step"
        console.print(f"The {which} took {first}, left out of tokens a second and of the mean step.", soft_wrap=True)
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


Row = tuple[str, str, str, str]
"""Of a table: name, predicted, measured, error."""


def list_memory(plan: Plan, report: RunReport) -> list[Row]:
    """The run's memory and files; then each phase's peak."""
    predicted, measured = plan.memory, report.measured
    what = "device memory (NVML)" if plan.device.kind == "cuda" else "resident memory of the process"
    kind = "live tensors" if plan.device.kind == "cuda" else "resident"
    phases = list_phase_peaks(plan, report)
    return [
        *_list_peaks(
            [
                ("live tensors", predicted.peak_allocated_bytes, measured.peak_allocated_bytes),
                ("reserved by the allocator", predicted.peak_reserved_bytes, measured.peak_reserved_bytes),
                (what, predicted.peak_device_bytes, measured.peak_device_bytes),
                ("files", predict_file_bytes(plan, report), measured.disk_bytes),
            ]
        ),
        ("with margin, decided on", format_bytes(predicted.required_bytes), "", ""),
        ("budget", format_bytes(predicted.budget_bytes), "", ""),
        *_list_peaks((f"{kind} in {one.name}", one.predicted_bytes, one.measured_bytes) for one in phases),
    ]


def _list_peaks(peaks: Iterable[tuple[str, int | None, int | None]]) -> Iterator[Row]:
    """Rows of name, predicted and measured bytes, with the error; what is not known on both sides is left out."""
    for name, ours, theirs in peaks:
        if ours is not None and theirs is not None:
            yield name, format_bytes(ours), format_bytes(theirs), _show_error(ours, theirs) if theirs else "-"


def list_speed(plan: Plan, report: RunReport) -> list[Row]:
    """Speed, none where none was predicted or measured; the MFU that was reached follows from the tokens."""
    predicted, measured = plan.speed, report.speed
    if predicted is None or not measured.tokens_per_second:
        return []
    tokens, utilization = predicted.tokens_per_second, predicted.model_flops_utilization
    reached = utilization * measured.tokens_per_second / tokens
    rows: list[tuple[str, float | None, float | None, Callable[[float], str]]] = [
        ("tokens a second", tokens, measured.tokens_per_second, "{:,.0f}".format),
        ("a step", predicted.step_seconds, measured.step_seconds, format_seconds),
        ("model FLOPs utilization", utilization, reached, "{:.1%}".format),
        ("J for 1,000 tokens", predicted.joules_per_1000_tokens, measured.joules_per_1000_tokens, "{:.3g}".format),
    ]
    return [
        (name, show(ours), show(theirs), _show_error(ours, theirs))
        for name, ours, theirs, show in rows
        if ours is not None and theirs
    ]


def list_times(plan: Plan, report: RunReport) -> list[Row]:
    """The time of the run's parts; the whole run's where it was done in one go."""
    parts = [(one.name, one.predicted_seconds, one.measured_seconds) for one in list_part_seconds(plan, report)]
    if plan.speed is not None and plan.speed.total_seconds is not None and is_whole(plan, report):
        parts.append(("the whole run", plan.speed.total_seconds, report.speed.total_seconds))
    return [
        (name, format_seconds(ours), format_seconds(theirs), _show_error(ours, theirs))
        for name, ours, theirs in parts
        if theirs
    ]


def _make_table(what: str, rows: Iterable[Row]) -> Table:
    table = Table(title=f"{what}, predicted against measured", title_justify="left", box=None, padding=(0, 2))
    for name in ("", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _show_error(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.1f} %"
