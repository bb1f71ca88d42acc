"""The parts of docs/accuracy.md that come from the comparison: its tables and its plot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from fitune.planner.memory import Estimator
from fitune.runtime.rehearsal.accuracy import FIGURES, MiB, make_left_out, make_spread, render_phase
from fitune.runtime.rehearsal.accuracy import Comparison as Row

GiB = 2**30
PANELS: Mapping[Estimator, str] = {"rehearsal": "rehearsal", "closed_forms": "closed forms (--quick)"}
LOWEST_GIB, HIGHEST_GIB = 1.0, 100.0
TICKS_GIB = (1, 2, 5, 10, 20, 50, 100)
SIDE = 300
"""Width and height of a panel, in the picture's units."""
BAND = 0.10
"""Share by which the shaded band is wide on either side of the diagonal."""
METHODS = ("full", "lora", "qlora")
STYLE = """
text { font: 12px sans-serif; fill: #24292f } .title { font-size: 14px; font-weight: bold }
.page { fill: #ffffff } .grid { stroke: #d0d7de } .band { fill: #8c959f; opacity: .25 } .diagonal { stroke: #57606a }
.full { fill: #0072b2 } .lora { fill: #d55e00 } .qlora { fill: #009e73 } path { opacity: .8 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .page { fill: #0d1117 } .grid { stroke: #30363d }
.band { fill: #8b949e } .diagonal { stroke: #8b949e }
.full { fill: #56b4e9 } .lora { fill: #ff9f4a } .qlora { fill: #2fd0a0 } }
"""


def fill_page(page: str, parts: Mapping[str, str]) -> str:
    """The page with each part put between its two marks, `<!-- name -->` and `<!-- /name -->`."""
    for name, part in parts.items():
        before, rest = page.split(f"<!-- {name} -->", 1)
        after = rest.split(f"<!-- /{name} -->", 1)[1]
        page = f"{before}<!-- {name} -->\n{part}\n<!-- /{name} -->{after}"
    return page


def make_parts(rows: Sequence[Row]) -> dict[str, str]:
    """The page's parts by name."""
    return {
        "summary": make_summary(rows),
        "margin": make_margin(rows),
        "left-out": make_left_out_table(rows),
        "rows": "\n".join([ROWS_HEAD, *map(make_row, rows)]),
    }


ROWS_HEAD = (
    "| row | peak in | allocated | off | reserved | off | device | off "
    "| closed forms: allocated | reserved | device |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def make_row(row: Row) -> str:
    """A measured row: GiB predicted / measured and the error of each figure, then the closed forms' errors."""
    cells = [row.id, render_phase(row)]
    for figure, measured in FIGURES.items():
        cells += [f"{row.bytes_of(figure) / GiB:.3f} / {row.measured[measured] / GiB:.3f}", _off(row.error(figure))]
    return _line(cells + [_off(row.error(figure, "closed_forms")) for figure in FIGURES])


def make_summary(rows: Sequence[Row]) -> str:
    """Both estimators' spread over the rows, a line a figure."""
    lines = ["| | figure | median | 95 % of the rows within | worst |", "|---|---|---|---|---|"]
    for estimator, name in PANELS.items():
        for figure in FIGURES:
            spread = make_spread(row.error(figure, estimator) for row in rows)
            lines.append(_line([name, figure, *(f"{100 * share:.2f} %" for share in spread)]))
    return "\n".join(lines)


def make_margin(rows: Sequence[Row]) -> str:
    """What the margin costs, and the rows that lie above it."""
    cost = 100 * median(row.margin for row in rows)
    short = [
        f"- `{row.id}`: {-100 * row.margin:.2f} % of what was measured is missing" for row in rows if row.margin < 0
    ]
    first = f"Median cost: {cost:.2f} % of the measured device peak. Rows above: {len(short)} of {len(rows)}."
    return "\n".join([first, "", *short])


def make_left_out_table(rows: Sequence[Row]) -> str:
    """A line a model: the constant from the other models' rows, and how far off the model's own rows are with it."""
    lines = ["| model left out | rows | constant from the others | device: median | worst |", "|---|---|---|---|---|"]
    for one in make_left_out(rows):
        constants = ", ".join(f"{size / MiB:.0f} MiB ({name})" for name, size in one.constant_bytes.items())
        spread = make_spread(one.errors)
        off = [f"{100 * share:.2f} %" for share in (spread.median, spread.worst)]
        lines.append(_line([one.model, str(len(one.errors)), constants, *off]))
    return "\n".join(lines)


def _off(error: float) -> str:
    return f"{100 * error:+.2f} %"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def make_plot(rows: Sequence[Row]) -> str:
    """docs/images/accuracy.svg: the device peak, predicted against measured, a panel for each estimator."""
    width, height = 2 * (SIDE + 90), SIDE + 110
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="Predicted against measured device peak of {len(rows)} steps">',
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


def _at(gib: float) -> float:
    """Where a figure lies on an axis, from 0 to SIDE."""
    return SIDE * math.log(gib / LOWEST_GIB) / math.log(HIGHEST_GIB / LOWEST_GIB)


def _draw_axes(name: str, *, labelled: bool) -> Iterator[str]:
    yield f'<text class="title" x="0" y="-14">{name}</text>'
    for tick in TICKS_GIB:
        x = _at(tick)
        yield f'<path class="grid" d="M{x:.1f} 0V{SIDE}M0 {SIDE - x:.1f}H{SIDE}"/>'
        yield f'<text x="{x:.1f}" y="{SIDE + 16}" text-anchor="middle">{tick}</text>'
        yield f'<text x="-8" y="{SIDE - x + 4:.1f}" text-anchor="end">{tick}</text>'
    low, high = _at(LOWEST_GIB * (1 - BAND)), _at(LOWEST_GIB * (1 + BAND))
    corners = f"{-low:.1f},{SIDE} 0,{SIDE} 0,{SIDE - high:.1f} {SIDE - high:.1f},0 {SIDE},0 {SIDE},{-low:.1f}"
    yield f'<polygon class="band" points="{corners}"/>'
    yield f'<path class="diagonal" d="M0 {SIDE}L{SIDE} 0"/>'
    yield f'<text x="{SIDE / 2}" y="{SIDE + 36}" text-anchor="middle">device peak measured, GiB</text>'
    if labelled:
        yield f'<text transform="translate(-40 {SIDE / 2}) rotate(-90)" text-anchor="middle">predicted, GiB</text>'


def _draw_row(row: Row, estimator: Estimator) -> str:
    measured, predicted = row.measured[FIGURES["device"]] / GiB, row.bytes_of("device", estimator) / GiB
    return _draw_mark(row.row["method"], _at(measured), SIDE - _at(predicted))


def _draw_mark(method: str, x: float, y: float) -> str:
    shapes = {"full": "m-3.5-3.5h7v7h-7z", "lora": "m0-4.5l4.5 8h-9z", "qlora": "m0-4.5l4.5 4.5l-4.5 4.5l-4.5-4.5z"}
    return f'<path class="{method}" d="M{x:.1f} {y:.1f}{shapes[method]}"/>'
