"""The timeline of live tensors as a stacked area chart: inline SVG, and the data that its read-out needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from itertools import accumulate
from typing import Any

from ...recipes.units import format_bytes
from ..memory import Memory, Timeline
from ..timeline import COMPONENTS, Scale, Span, is_in_scale, list_passes, list_spans, make_scale, share_out
from .timeline import COMPONENT_WORDS

WIDTH, HEIGHT = 1000, 400
LEFT, RIGHT, TOP, BOTTOM = 52, 988, 26, 346
"""The plot's edges, in the SVG's own units."""
LINE_HEIGHT = 18
"""Room that words above a line need."""
LEAST_SPAN = 66
"""Width that the name of the shortest phase needs."""
MOST_TICKS = 7


def render_chart(memory: Memory, timeline: Timeline) -> str:
    """The chart with its legend, and the element that shows the figures under the pointer."""
    spans = list_spans(timeline)
    widths = _share_width(spans)
    places = place_points(timeline)
    scale = make_scale(memory, most_steps=MOST_TICKS)
    peak = timeline.peak
    label = f"Live tensors over one optimizer step; peak {format_bytes(peak.total)} in {timeline.phases[peak.phase]}"
    parts = [
        f'<svg id="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(label)}">',
        *_draw_phases(timeline, spans, widths),
        *_draw_grid(scale),
        *_draw_areas(timeline, places, scale),
        *_draw_lines(memory, scale),
        *_draw_peak(timeline, places, scale),
        f'<line id="cursor" class="cursor" y1="{TOP}" y2="{BOTTOM}" visibility="hidden"/>',
        "</svg>",
    ]
    key = "".join(
        f'<span><i style="background:var(--{name})"></i>{COMPONENT_WORDS[name]}</span>'
        for name in COMPONENTS
        if any(getattr(point, name) for point in timeline.points)
    )
    chart = f'<div class="chart">{"".join(parts)}<div id="tip" class="tip" hidden></div></div>'
    return f'<div class="wide">{chart}</div><div class="key">{key}</div>'


def make_chart_data(timeline: Timeline | None) -> str:
    """What the page's script reads, as JSON that cannot end its element."""
    data: dict[str, Any] | None = None
    if timeline is not None:
        data = {
            "width": WIDTH,
            "x": place_points(timeline),
            "phases": timeline.phases,
            "components": COMPONENTS,
            "words": [COMPONENT_WORDS[name] for name in COMPONENTS],
            "points": timeline.points,
        }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def place_points(timeline: Timeline) -> list[float]:
    """The x of each point; a phase gets its share of the width, and at least what its name needs."""
    spans = list_spans(timeline)
    places, left = [], float(LEFT)
    for span, width in zip(spans, _share_width(spans), strict=True):
        count = span.end - span.start
        places += [round(left + width * (index + 0.5) / count, 1) for index in range(count)]
        left += width
    return places


def _share_width(spans: Sequence[Span]) -> list[int]:
    return share_out([span.end - span.start for span in spans], [LEAST_SPAN] * len(spans), RIGHT - LEFT)


def _height(size_bytes: float, scale: Scale) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * size_bytes / scale.top_bytes, 1)


def _draw_grid(scale: Scale) -> list[str]:
    parts = [f'<text x="{LEFT - 8}" y="{TOP - 12}" text-anchor="end">{scale.unit}</text>']
    for tick in range(scale.steps + 1):
        y = _height(tick * scale.step_bytes, scale)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick * scale.step:g}</text>')
    return parts


def _draw_areas(timeline: Timeline, places: Sequence[float], scale: Scale) -> list[str]:
    """One area for each component, from the sum of those below it to the sum with it."""
    bounds = [[0, *accumulate(point.live_bytes)] for point in timeline.points]
    across = [LEFT, *places, RIGHT]
    parts = []
    for number, name in enumerate(COMPONENTS):
        if not any(point.live_bytes[number] for point in timeline.points):
            continue
        upper, lower = ([_height(one[number + side], scale) for one in bounds] for side in (1, 0))
        edge = list(zip(across, [upper[0], *upper, upper[-1]], strict=True))
        back = list(zip(across, [lower[0], *lower, lower[-1]], strict=True))[::-1]
        path = "L".join(f"{x:g} {y:g}" for x, y in edge + back)
        parts.append(f'<path d="M{path}Z" style="fill:var(--{name})"/>')
    return parts


def _draw_phases(timeline: Timeline, spans: Sequence[Span], widths: Sequence[int]) -> list[str]:
    """Every other phase is shaded; names below, and below them which micro-batches they belong to."""
    edges = [LEFT, *(LEFT + width for width in accumulate(widths))]
    parts = []
    for number, span in enumerate(spans):
        x, width = edges[number], widths[number]
        if number % 2:
            parts.append(f'<rect class="band" x="{x}" width="{width}" y="{TOP}" height="{BOTTOM - TOP}"/>')
        parts.append(f'<line class="edge" x1="{x}" x2="{x}" y1="{BOTTOM}" y2="{BOTTOM + 6}"/>')
        parts.append(f'<text x="{x + 4}" y="{BOTTOM + 20}">{escape(span.phase)}</text>')
    for group in list_passes(timeline, spans):
        x, end = edges[group.start], edges[group.end]
        parts.append(f'<line class="edge" x1="{x + 4}" x2="{end - 8}" y1="{BOTTOM + 30}" y2="{BOTTOM + 30}"/>')
        parts.append(f'<text x="{x + 4}" y="{BOTTOM + 46}">{escape(group.phase)}</text>')
    return parts


def _draw_lines(memory: Memory, scale: Scale) -> list[str]:
    """What is required, words at the left and below the line where the budget is close, and the budget, words at the
    right."""
    required, lines = _height(memory.required_bytes, scale), []
    lines.append(f'<line class="required" x1="{LEFT}" x2="{RIGHT}" y1="{required}" y2="{required}"/>')
    budget, words = float(TOP), f"budget {format_bytes(memory.budget_bytes)}"
    if is_in_scale(memory):
        budget = _height(memory.budget_bytes, scale)
        lines.append(f'<line class="budget" x1="{LEFT}" x2="{RIGHT}" y1="{budget}" y2="{budget}"/>')
    else:
        words += ", above this chart ↑"
    above = not is_in_scale(memory) or not 0 <= required - budget < LINE_HEIGHT
    needs = f"required, with context, fragmentation and margin: {format_bytes(memory.required_bytes)}"
    return [
        *lines,
        f'<text class="required" x="{LEFT + 6}" y="{required - 6 if above else required + 15:.1f}">{needs}</text>',
        f'<text class="budget" x="{RIGHT - 6}" y="{budget - 6:.1f}" text-anchor="end">{words}</text>',
    ]


def _draw_peak(timeline: Timeline, places: Sequence[float], scale: Scale) -> list[str]:
    peak = timeline.peak
    x, y = places[timeline.points.index(peak)], _height(peak.total, scale)
    after, anchor = (x + 9, "start") if x < (LEFT + RIGHT) / 2 else (x - 9, "end")
    words = f"peak {format_bytes(peak.total)}"
    return [
        f'<circle class="peak" cx="{x}" cy="{y}" r="4"/>',
        f'<text class="peak" x="{after:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{words}</text>',
    ]
