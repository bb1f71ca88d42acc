"""A picture of predictions beside measurements: a panel for each estimator, both axes logarithmic and alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fitune.planner.memory import Estimator

PANELS: Mapping[Estimator, str] = {"rehearsal": "rehearsal", "closed_forms": "closed forms (--quick)"}
SIDE = 300
"""Width and height of a panel, in the picture's units."""
BAND = 0.10
"""Share by which the shaded band is wide on either side of the diagonal."""
METHODS = ("full", "lora", "qlora")
MARKS = {"full": "m-3.5-3.5h7v7h-7z", "lora": "m0-4.5l4.5 8h-9z", "qlora": "m0-4.5l4.5 4.5l-4.5 4.5l-4.5-4.5z"}
STYLE = """
text { font: 12px sans-serif; fill: #24292f } .title { font-size: 14px; font-weight: bold }
.page { fill: #ffffff } .grid { stroke: #d0d7de } .band { fill: #8c959f; opacity: .25 } .diagonal { stroke: #57606a }
.full { fill: #0072b2 } .lora { fill: #d55e00 } .qlora { fill: #009e73 } path { opacity: .8 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .page { fill: #0d1117 } .grid { stroke: #30363d }
.band { fill: #8b949e } .diagonal { stroke: #8b949e }
.full { fill: #56b4e9 } .lora { fill: #ff9f4a } .qlora { fill: #2fd0a0 } }
"""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What both axes show.

    name:            of the figure
    unit:            of it
    lowest, highest: ends, in the unit
    ticks:           where the grid's lines are, in the unit
    """

    name: str
    unit: str
    lowest: float
    highest: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Where a value lies, from 0 to SIDE."""
        return SIDE * math.log(value / self.lowest) / math.log(self.highest / self.lowest)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured step.

    method:    full, lora or qlora
    measured:  in the axis's unit
    predicted: the same, by each estimator
    """

    method: str
    measured: float
    predicted: Mapping[Estimator, float]


def draw_scatter(points: Sequence[Point], axis: Axis) -> str:
    """The picture as SVG."""
    width, height = 2 * (SIDE + 90), SIDE + 110
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="Predicted against measured {axis.name}, {len(points)} steps">',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
    ]
    for index, (estimator, name) in enumerate(PANELS.items()):
        parts.append(f'<g transform="translate({60 + index * (SIDE + 85)} 40)">')
        parts += _draw_axes(axis, name, labelled=index == 0)
        parts += [
            _draw_mark(one.method, axis.at(one.measured), SIDE - axis.at(one.predicted[estimator])) for one in points
        ]
        parts.append("</g>")
    for index, method in enumerate(METHODS):
        x, y = 60 + index * 80, height - 14
        parts.append(f'{_draw_mark(method, x, y - 4)}<text x="{x + 10}" y="{y}">{method}</text>')
    note = f"{len(points)} steps, one H100; band: {100 * BAND:.0f} % either way"
    parts.append(f'<text x="{width - 35}" y="{height - 14}" text-anchor="end">{note}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw_axes(axis: Axis, name: str, *, labelled: bool) -> Iterator[str]:
    yield f'<text class="title" x="0" y="-14">{name}</text>'
    for tick in axis.ticks:
        x = axis.at(tick)
        yield f'<path class="grid" d="M{x:.1f} 0V{SIDE}M0 {SIDE - x:.1f}H{SIDE}"/>'
        yield f'<text x="{x:.1f}" y="{SIDE + 16}" text-anchor="middle">{tick}</text>'
        yield f'<text x="-8" y="{SIDE - x + 4:.1f}" text-anchor="end">{tick}</text>'
    low, high = axis.at(axis.lowest * (1 - BAND)), axis.at(axis.lowest * (1 + BAND))
    corners = f"{-low:.1f},{SIDE} 0,{SIDE} 0,{SIDE - high:.1f} {SIDE - high:.1f},0 {SIDE},0 {SIDE},{-low:.1f}"
    yield f'<polygon class="band" points="{corners}"/>'
    yield f'<path class="diagonal" d="M0 {SIDE}L{SIDE} 0"/>'
    yield f'<text x="{SIDE / 2}" y="{SIDE + 36}" text-anchor="middle">{axis.name} measured, {axis.unit}</text>'
    if labelled:
        words = f"predicted, {axis.unit}"
        yield f'<text transform="translate(-40 {SIDE / 2}) rotate(-90)" text-anchor="middle">{words}</text>'


def _draw_mark(method: str, x: float, y: float) -> str:
    return f'<path class="{method}" d="M{x:.1f} {y:.1f}{MARKS[method]}"/>'
