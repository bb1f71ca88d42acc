"""The parts of docs/accuracy.md that come from the comparison: its tables and its plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from scatter import PANELS, Axis, Point, draw_scatter

from fitune.runtime.rehearsal.accuracy import FIGURES, MiB, make_left_out, make_spread, render_phase
from fitune.runtime.rehearsal.accuracy import Comparison as Row

GiB = 2**30
AXIS = Axis(name="device peak", unit="GiB", lowest=1.0, highest=100.0, ticks=(1, 2, 5, 10, 20, 50, 100))


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
    """docs/images/accuracy.svg: the device peak, predicted against measured."""
    points = [
        Point(
            method=row.row["method"],
            measured=row.measured[FIGURES["device"]] / GiB,
            predicted={estimator: row.bytes_of("device", estimator) / GiB for estimator in PANELS},
        )
        for row in rows
    ]
    return draw_scatter(points, AXIS)
