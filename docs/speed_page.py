"""The parts of docs/speed.md that come from the comparison: its tables and its plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scatter import PANELS, Axis, Point, draw_scatter

from fitune.runtime.rehearsal.accuracy import make_spread
from fitune.runtime.rehearsal.accuracy_speed import TimedRow, render_host_cost, render_issue_share

AXIS = Axis(name="time of a step", unit="s", lowest=0.04, highest=6.0, ticks=(0.05, 0.1, 0.2, 0.5, 1, 2, 5))
PARTS: dict[str, Callable[[TimedRow], bool]] = {
    "all over 0.5 s": lambda row: row.is_long,
    "over 0.5 s, without a pause": lambda row: row.is_long and not row.is_late,
    "of them, that wait for the device": lambda row: row.is_long and not row.is_late and row.limit == "device",
    "of them, that wait for the host, in part or in all": lambda row: (
        row.is_long and not row.is_late and row.limit != "device"
    ),
    "up to 0.5 s": lambda row: not row.is_long,
}
"""Which rows a line of the summary is about."""


def make_speed_parts(rows: Sequence[TimedRow]) -> dict[str, str]:
    """The page's parts by name."""
    rows = sorted(rows, key=lambda row: row.measured_seconds)
    return {
        "summary": _make_summary(rows),
        "host": "\n".join(f"- {line}" for line in render_host_cost(rows)),
        "update": "\n".join(f"- {line}" for line in render_issue_share(rows)),
        "late": _make_late([row for row in rows if row.is_late]),
        "rows": _make_table([row for row in rows if row.is_long]),
        "short": _make_table([row for row in rows if not row.is_long]),
    }


def _make_summary(rows: Sequence[TimedRow]) -> str:
    """Both estimators' spread over parts of the rows."""
    lines = ["| steps | rows | | median | 95 % within | worst |", "|---|---|---|---|---|---|"]
    for words, is_part in PARTS.items():
        part = [row for row in rows if is_part(row)]
        for estimator, name in PANELS.items():
            spread = make_spread(row.error(estimator) for row in part)
            shares = " | ".join(f"{100 * share:.1f} %" for share in spread)
            lines.append(f"| {words} | {len(part)} | {name} | {shares} |")
    return "\n".join(lines)


def _make_late(rows: Sequence[TimedRow]) -> str:
    """By how much a row is late."""
    lines = ["| row | measured | rehearsed | longer by |", "|---|---|---|---|"]
    lines += [
        f"| {row.id} | {row.measured_seconds:.3f} s | {row.rehearsed.seconds:.3f} s | {row.late_seconds:.2f} s |"
        for row in rows
    ]
    return "\n".join(lines)


def _make_table(rows: Sequence[TimedRow]) -> str:
    """A line a row."""
    lines = ["| row | measured | rehearsed | off | closed forms, off | waits for |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row.id} | {row.measured_seconds:.3f} s | {row.rehearsed.seconds:.3f} s | {100 * row.error():+.1f} % | "
        f"{100 * row.error('closed_forms'):+.1f} % | {row.limit} |"
        for row in rows
    ]
    return "\n".join(lines)


def make_speed_plot(rows: Sequence[TimedRow]) -> str:
    """docs/images/speed.svg: the time of a step, predicted against measured."""
    points = [
        Point(
            method=str(row.row["method"]),
            measured=row.measured_seconds,
            predicted={estimator: row.time(estimator).seconds for estimator in PANELS},
        )
        for row in rows
    ]
    return draw_scatter(points, AXIS)
