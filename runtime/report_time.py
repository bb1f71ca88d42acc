"""Predicted against measured time of a run: its speed, and its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.table import Table

from ..planner.memory import STEP_PHASES
from ..planner.speed import Speed as PlannedSpeed
from ..planner.strategy import Value
from ..recipes.units import format_seconds

if TYPE_CHECKING:
    from .report import RunReport, Speed


class PartSeconds(Value):
    """The time of a part of the run, predicted beside measured.

    name:              load, evaluate, train, save or merge
    predicted_seconds: by the plan
    measured_seconds:  by the run's last session, None where nothing was
    """

    name: str
    predicted_seconds: float
    measured_seconds: float | None


def list_part_seconds(predicted: PlannedSpeed, report: RunReport) -> list[PartSeconds]:
    """Each part of the run that the plan knows, predicted and measured; compiling is a part of the first step."""
    planned: dict[str, float] = {}
    for part in predicted.parts:
        name = "train" if part.name == "compile" else part.name
        planned[name] = planned.get(name, 0.0) + part.seconds
    measured = {phase.name: phase.seconds for phase in report.measured.phases}
    measured["train"] = sum(measured.pop(name, 0.0) for name in STEP_PHASES)
    return [
        PartSeconds(name=name, predicted_seconds=seconds, measured_seconds=measured.get(name))
        for name, seconds in planned.items()
    ]


def render_speed(predicted: PlannedSpeed, measured: Speed) -> Table:
    """Speed, predicted beside measured; the MFU that was reached follows from the tokens."""
    table = Table(title="Speed, predicted against measured", title_justify="left", box=None, padding=(0, 2))
    for name in ("", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if not name else "right")
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
            table.add_row(name, show(ours), show(theirs), f"{100 * (ours / theirs - 1):+.1f} %")
    return table


def render_parts(predicted: PlannedSpeed, report: RunReport) -> Table:
    """The time of the run's parts, predicted beside measured."""
    table = Table(title="Time, predicted against measured", title_justify="left", box=None, padding=(0, 2))
    for name in ("", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if not name else "right")
    for part in list_part_seconds(predicted, report):
        ours, theirs = part.predicted_seconds, part.measured_seconds
        if theirs:
            error = f"{100 * (ours / theirs - 1):+.1f} %"
            table.add_row(part.name, format_seconds(ours), format_seconds(theirs), error)
    total, taken = predicted.total_seconds, report.speed.total_seconds
    if total is not None and taken:
        table.add_row(
            "the whole run", format_seconds(total), format_seconds(taken), f"{100 * (total / taken - 1):+.1f} %"
        )
    if report.speed.first_step_seconds:
        first = format_seconds(report.speed.first_step_seconds)
        table.caption = f"The first step took {first}: it is left out of tokens a second and of the mean step."
        table.caption_justify = "left"
    return table
