"""A run as one HTML page that needs nothing else: its losses, its memory over time, predicted against measured."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..planner.plan import Plan
from ..planner.show.page import fill_page, render_section, render_table
from ..planner.show.reasons import describe_strategy
from ..recipes.units import GiB, format_bytes, format_seconds
from .report import RunReport
from .report_view import list_memory, list_speed, list_times
from .rundir import METRICS_NAME, SAMPLES_NAME

WIDTH, HEIGHT = 1000, 288
LEFT, RIGHT, TOP, BOTTOM = 60, 988, 22, 262
"""The plot's edges, in the SVG's own units."""
MOST_POINTS = 400
"""Points of a line; of more values the highest of each part is drawn."""

MOST_DOTS = 40
"""Points of a line that are drawn as dots, too."""
COLORS = ("weights", "activations")
"""The page's colours of lines, in the order of the lines."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A plot of lines over one axis.

    lines:  points by name, each line from left to right
    levels: horizontal lines by name
    unit:   of the vertical axis
    across: what the horizontal axis counts: step, or s
    """

    lines: Mapping[str, Points]
    levels: Mapping[str, float]
    unit: str
    across: str


def render_report_page(plan: Plan, report: RunReport, run: Path) -> str:
    """The page of a run; everything from recipe, rows and model is escaped."""
    loss = report.loss
    verdict = f"<b>{report.status}</b>: {escape(describe_strategy(plan.strategy))}"
    if loss.before is not None and loss.after is not None:
        kind = "yes" if loss.after < loss.before else "no"
        change = 100 * (loss.after / loss.before - 1)
        words = f"held-out loss {loss.before:.3f} → {loss.after:.3f} ({change:+.1f} %)"
        verdict += f'<br><b class="{kind}">{words}</b>'
    sections = [
        _render_losses(_read_lines(run / METRICS_NAME)),
        _render_memory_over_time(plan, _read_lines(run / SAMPLES_NAME)),
        _render_answers(report),
        _compare("Memory", list_memory(plan, report)),
        _compare("Speed", list_speed(plan, report)),
        _compare("Time", list_times(plan, report)),
        _render_notes(report),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return fill_page(
        title=f"Run of {report.recipe}",
        verdict=verdict,
        body="\n".join(section for section in sections if section),
        footer=f"{run.name}: {format_seconds(report.speed.total_seconds)} in all. {versions}",
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line that a kill has cut is left out."""
    if not path.is_file():
        return []
    read = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if isinstance(one, dict):
            read.append(one)
    return read


def _pick(lines: Iterable[Mapping[str, Any]], across: str, up: str) -> list[tuple[float, float]]:
    """Two numbers of each line that has both."""
    pairs = ((line.get(across), line.get(up)) for line in lines)
    return [(float(x), float(y)) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float)]


def _render_losses(metrics: Sequence[Mapping[str, Any]]) -> str:
    lines = {"training": _pick(metrics, "step", "loss"), "held out": _pick(metrics, "step", "eval_loss")}
    return _render_chart("Loss a token", Chart(lines=lines, levels={}, unit="nats", across="step"))


def _render_memory_over_time(plan: Plan, samples: Sequence[Mapping[str, Any]]) -> str:
    """The device's memory, or on a CPU the process's, since the first sample; of all sessions, without the gaps."""
    key = "device_bytes" if plan.device.kind == "cuda" else "rss_bytes"
    points, elapsed, before = [], 0.0, None
    for at, size in _pick(samples, "seconds", key):
        elapsed += max(at - before, 0.0) if before is not None else 0.0
        before = at
        points.append((elapsed, size / GiB))
    memory = plan.memory
    levels = {
        f"predicted {format_bytes(memory.peak_device_bytes)}": memory.peak_device_bytes / GiB,
        f"budget {format_bytes(memory.budget_bytes)}": memory.budget_bytes / GiB,
    }
    highest = max([memory.required_bytes / GiB, *(size for _, size in points)])
    shown = {name: level for name, level in levels.items() if level < 1.6 * highest}
    return _render_chart("Memory over the run", Chart(lines={"measured": points}, levels=shown, unit="GiB", across="s"))


def _render_chart(title: str, chart: Chart) -> str:
    """The chart with its legend; nothing where there is no line to draw."""
    points = [point for line in chart.lines.values() for point in line]
    if len(points) < 2:
        return ""
    place = _make_place(points, chart.levels.values())
    colors = {name: color for name, color in zip(chart.lines, COLORS, strict=False) if chart.lines[name]}
    parts = [
        *_draw_axes(chart, place),
        *(_draw_line(chart.lines[name], color, place) for name, color in colors.items()),
        *_draw_levels(chart.levels, place),
    ]
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    key = "".join(f'<span><i style="background:var(--{color})"></i>{name}</span>' for name, color in colors.items())
    return render_section(
        title, f'<div class="wide"><div class="chart">{drawn}</div></div><div class="key">{key}</div>'
    )


def _make_place(points: Points, levels: Collection[float]) -> _Place:
    """Room for everything; from 0 where levels are compared with."""
    ups = [y for _, y in points] + list(levels)
    room = 0.08 * (max(ups) - (0.0 if levels else min(ups)) or 1.0)
    low = 0.0 if levels else min(ups) - room
    return _Place(last=max(x for x, _ in points) or 1.0, low=low, high=max(ups) + room)


def _draw_line(line: Points, color: str, place: _Place) -> str:
    path = "L".join(f"{place.x(x):g} {place.y(y):g}" for x, y in _thin(line))
    drawn = f'<path d="M{path}" fill="none" stroke="var(--{color})" stroke-width="2"/>'
    if len(line) <= MOST_DOTS:
        drawn += "".join(
            f'<circle cx="{place.x(x):g}" cy="{place.y(y):g}" r="3" style="fill:var(--{color})"/>' for x, y in line
        )
    return drawn


def _draw_levels(levels: Mapping[str, float], place: _Place) -> Iterable[str]:
    for name, level in levels.items():
        y, kind = place.y(level), "budget" if name.startswith("budget") else "required"
        yield f'<line class="{kind}" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="{kind}" x="{RIGHT - 6}" y="{y - 6:.1f}" text-anchor="end">{escape(name)}</text>'


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where values lie in the plot: from 0 to `last` across, from `low` to `high` up."""

    last: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * value / self.last, 1)

    def y(self, value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low), 1)


def _draw_axes(chart: Chart, place: _Place) -> Iterable[str]:
    yield f'<text x="{LEFT - 8}" y="{TOP - 10}" text-anchor="end">{chart.unit}</text>'
    for part in range(5):
        value = place.low + (place.high - place.low) * part / 4
        y = place.y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>'
    for across in sorted({round(place.last * part / 4) for part in range(5)}):
        words = f"step {across:,}" if chart.across == "step" else format_seconds(across)
        anchor = "start" if across == 0 else "end" if place.x(across) > RIGHT - 40 else "middle"
        yield f'<text x="{min(place.x(across), RIGHT)}" y="{BOTTOM + 20}" text-anchor="{anchor}">{words}</text>'


def _thin(line: Points) -> Points:
    """At most MOST_POINTS of the points: of equal parts the highest one each."""
    if len(line) <= MOST_POINTS:
        return line
    edges = [len(line) * part // MOST_POINTS for part in range(MOST_POINTS + 1)]
    parts = (line[start:end] for start, end in pairwise(edges))
    return [max(part, key=lambda point: point[1]) for part in parts]


def _compare(what: str, rows: Iterable[Sequence[str]]) -> str:
    cells = [tuple(escape(cell) for cell in row) for row in rows]
    if not cells:
        return ""
    heads = ("", "predicted", "measured", "error")
    return render_section(f"{what}, predicted against measured", render_table(heads, cells, numbers=(1, 2, 3)))


def _render_answers(report: RunReport) -> str:
    if report.sample is None:
        return ""
    sample = report.sample
    pairs = (("question", sample.question), ("before", sample.before), ("after", sample.after))
    told = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
    return render_section("A held-out question", f"<dl>{told}</dl>")


def _render_notes(report: RunReport) -> str:
    notes = [str(event["message"]) for event in report.events]
    if report.forgetting is not None and report.forgetting.warning is not None:
        notes.append(report.forgetting.warning)
    if not notes:
        return ""
    return render_section("Notes", "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
