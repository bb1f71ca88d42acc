"""The parts of docs/speed.md that come from the comparison: its tables and its plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from accuracy_page import METHODS, PANELS, STYLE

from fitune.planner.memory import Estimator
from fitune.runtime.rehearsal.accuracy import make_spread
from fitune.runtime.rehearsal.accuracy_speed import TimedRow, render_host_cost

LOWEST_SECONDS, HIGHEST_SECONDS = 0.1, 6.0
TICKS_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5)
SIDE = 300
"""Width and height of a panel, in the picture's units."""
BAND = 0.10
"""Share by which the shaded band is wide on either side of the diagonal."""
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
    """docs/images/speed.svg: the time of a step, predicted against measured, a panel for each estimator."""
    width, height = 2 * (SIDE + 90), SIDE + 110
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="Predicted against measured time of {len(rows)} steps">',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
    ]
    for index, (estimator, name) in enumerate(PANELS.items()):
        parts.append(f'<g transform="translate({60 + index * (SIDE + 85)} 40)">')
        parts += [*_draw_axes(name, labelled=index == 0), *(_draw_row(row, estimator) for row in rows), "</g>"]
    for index, method in enumerate(METHODS):
        x, y = 60 + index * 80, height - 14
        parts.append(f'{_draw_mark(method, x, y - 4)}<text x="{x + 10}" y="{y}">{method}</text>')
    note = f"{len(rows)} steps, one H100; band: {100 * BAND:.0f} % either way"
    parts.append(f'<text x="{width - 35}" y="{height - 14}" text-anchor="end">{note}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _at(seconds: float) -> float:
    """Where a time lies on an axis, from 0 to SIDE."""
    return SIDE * math.log(seconds / LOWEST_SECONDS) / math.log(HIGHEST_SECONDS / LOWEST_SECONDS)


def _draw_axes(name: str, *, labelled: bool) -> Iterator[str]:
    yield f'<text class="title" x="0" y="-14">{name}</text>'
    for tick in TICKS_SECONDS:
        x = _at(tick)
        yield f'<path class="grid" d="M{x:.1f} 0V{SIDE}M0 {SIDE - x:.1f}H{SIDE}"/>'
        yield f'<text x="{x:.1f}" y="{SIDE + 16}" text-anchor="middle">{tick}</text>'
        yield f'<text x="-8" y="{SIDE - x + 4:.1f}" text-anchor="end">{tick}</text>'
    low, high = _at(LOWEST_SECONDS * (1 - BAND)), _at(LOWEST_SECONDS * (1 + BAND))
    corners = f"{-low:.1f},{SIDE} 0,{SIDE} 0,{SIDE - high:.1f} {SIDE - high:.1f},0 {SIDE},0 {SIDE},{-low:.1f}"
    yield f'<polygon class="band" points="{corners}"/>'
    yield f'<path class="diagonal" d="M0 {SIDE}L{SIDE} 0"/>'
    yield f'<text x="{SIDE / 2}" y="{SIDE + 36}" text-anchor="middle">time of a step measured, s</text>'
    if labelled:
        yield f'<text transform="translate(-40 {SIDE / 2}) rotate(-90)" text-anchor="middle">predicted, s</text>'


def _draw_row(row: TimedRow, estimator: Estimator) -> str:
    predicted = row.time(estimator).seconds
    return _draw_mark(str(row.row["method"]), _at(row.measured_seconds), SIDE - _at(predicted))


def _draw_mark(method: str, x: float, y: float) -> str:
    shapes = {"full": "m-3.5-3.5h7v7h-7z", "lora": "m0-4.5l4.5 8h-9z", "qlora": "m0-4.5l4.5 4.5l-4.5 4.5l-4.5-4.5z"}
    return f'<path class="{method}" d="M{x:.1f} {y:.1f}{shapes[method]}"/>'
