"""The timeline of live tensors as a stacked area of block characters; in letters where there is no colour."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, groupby

from rich.console import Console, Group, RenderableType
from rich.text import Text

from ...recipes.units import format_bytes
from ..memory import Memory, Timeline, TimelinePoint
from ..timeline import COMPONENTS, Scale, Span, is_in_scale, list_passes, list_spans, make_scale, resample, share_out

COMPONENT_COLORS = {
    "weights": "blue",
    "adapters": "cyan",
    "gradients": "magenta",
    "optimizer": "yellow",
    "activations": "green",
    "loss_head": "red",
    "temporary": "bright_black",
}
COMPONENT_WORDS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "loss_head": "loss head",
    "temporary": "short-lived buffers",
}
COMPONENT_MARKS = dict(zip(COMPONENTS, "#agO=%.", strict=True))
"""What a component is drawn with where there is no colour."""
ROWS = 12
MOST_COLUMNS = 92
GUTTER = 8
BLOCKS = " ▁▂▃▄▅▆▇"
EIGHTHS = len(BLOCKS)

Cell = tuple[str, str]
"""A character and its style."""
EMPTY: Cell = " ", ""


def render_timeline(memory: Memory, timeline: Timeline, console: Console) -> RenderableType:
    """The chart with its title, axis, phases and legend."""
    plain = console.color_system is None or console.options.ascii_only
    width = max(min(console.width - GUTTER, MOST_COLUMNS), 1)
    spans = list_spans(timeline)
    widths = share_out([one.end - one.start for one in spans], [len(one.phase) + 1 for one in spans], width)
    columns = [
        point
        for span, share in zip(spans, widths, strict=True)
        for point in resample(timeline.points[span.start : span.end], share)
    ]
    scale = make_scale(memory, most_steps=ROWS)
    peak = timeline.peak
    title = Text.assemble(
        (f"Live tensors over one optimizer step, {scale.unit}", "italic"),
        f"  peak {format_bytes(peak.total)}, {timeline.phases[peak.phase]}",
    )
    return Group(
        Text(),
        title,
        *_render_far_budget(memory, width),
        *_render_rows(columns, memory, scale, plain=plain),
        *_render_axis(spans, widths, timeline, plain=plain),
        _render_legend(timeline, console.width, plain=plain),
    )


def _render_far_budget(memory: Memory, width: int) -> list[Text]:
    """A word on the budget where its line would be far above the chart."""
    if is_in_scale(memory):
        return []
    text = f"budget {format_bytes(memory.budget_bytes)}, above this chart"
    return [Text(text.rjust(GUTTER + width)[-GUTTER - width :], style="red")]


def _render_rows(columns: Sequence[TimelinePoint], memory: Memory, scale: Scale, *, plain: bool) -> list[Text]:
    """From the highest row down; a row's label is the value at its upper edge."""
    bounds = [list(accumulate(point.live_bytes)) for point in columns]
    every = 3 if scale.steps > ROWS // 2 else 2
    lines = _place_lines(memory, scale)
    rows = []
    for row in range(scale.steps, 0, -1):
        label = f"{row * scale.step:g}" if row % every == 0 else ""
        text = Text(f"{label:>{GUTTER - 2}} " + ("|" if plain else "┤" if label else "│"))
        draw = _draw_mark if plain else _draw_blocks
        cells = [draw(one, (row - 1) * scale.step_bytes, scale.step_bytes) for one in bounds]
        if row in lines:
            cells = _underlay(cells, *lines[row], plain=plain)
        for style, run in groupby(cells, key=lambda cell: cell[1]):
            text.append("".join(character for character, _ in run), style)
        rows.append(text)
    return rows


def _place_lines(memory: Memory, scale: Scale) -> dict[int, tuple[str, str]]:
    """Row to (words, style) of the requirement's line and the budget's; the budget's where both are in one row."""
    lines = {scale.find_row(memory.required_bytes): (f"required {format_bytes(memory.required_bytes)}", "bright_black")}
    if is_in_scale(memory):
        lines[scale.find_row(memory.budget_bytes)] = f"budget {format_bytes(memory.budget_bytes)}", "red"
    return lines


def _underlay(cells: list[Cell], words: str, style: str, *, plain: bool) -> list[Cell]:
    """A line through the empty cells of a row, with its words at the right end where there is room."""
    line = "-" if plain else "─"
    drawn = [(line, style) if cell == EMPTY else cell for cell in cells]
    text = f" {words} "
    start = len(cells) - len(text) - 1
    if start >= 0 and all(cell == EMPTY for cell in cells[start:]):
        drawn[start : start + len(text)] = [(character, style) for character in text]
    return drawn


def _find_component(bounds: Sequence[int], level: float) -> str | None:
    index = bisect_right(bounds, level)
    return COMPONENTS[index] if index < len(COMPONENTS) else None


def _draw_mark(bounds: Sequence[int], bottom: float, height: float) -> Cell:
    """The letter of the component at the middle of a cell."""
    component = _find_component(bounds, bottom + height / 2)
    return (COMPONENT_MARKS[component], "") if component else EMPTY


def _draw_blocks(bounds: Sequence[int], bottom: float, height: float) -> Cell:
    """A block with one component below and another, or none, above: the two that fit the cell's eighths best.

    A full cell is coloured background, which leaves no gap between lines.
    """
    eighths = [_find_component(bounds, bottom + height * (part + 0.5) / EIGHTHS) for part in range(EIGHTHS)]
    if len(set(eighths)) == 1:
        return EMPTY if eighths[0] is None else (" ", f"on {COMPONENT_COLORS[eighths[0]]}")
    split = max(range(1, EIGHTHS), key=lambda at: _count_common(eighths[:at]) + _count_common(eighths[at:]))
    below, above = _find_common(eighths[:split]), _find_common(eighths[split:])
    assert below is not None, "what is empty lies above"
    style = COMPONENT_COLORS[below] + (f" on {COMPONENT_COLORS[above]}" if above else "")
    return BLOCKS[split], style


def _find_common(parts: Sequence[str | None]) -> str | None:
    return max(parts, key=parts.count)


def _count_common(parts: Sequence[str | None]) -> int:
    return max(map(parts.count, parts))


def _render_axis(spans: Sequence[Span], widths: Sequence[int], timeline: Timeline, *, plain: bool) -> list[Text]:
    """The axis with a tick where a phase begins, the phases' names, and which micro-batches they belong to."""
    corner, tick, line = "++-" if plain else "┼┬─"
    axis = "".join((tick if number else line) + line * (width - 1) for number, width in enumerate(widths))
    lines = [Text(f"{'0':>{GUTTER - 2}} {corner}{axis}")]
    lines.append(_write_names([span.phase for span in spans], widths, "bright_black"))
    passes = list_passes(timeline, spans)
    if len(passes) > 1:
        groups = [sum(widths[one.start : one.end]) for one in passes]
        lines.append(_write_names([one.phase for one in passes], groups, "bright_black italic"))
    return [text for text in lines if text.plain.strip()]


def _write_names(names: Sequence[str], widths: Sequence[int], style: str) -> Text:
    """Each name at the left of its columns; none where it does not fit."""
    fitting = [(name if len(name) < width else "").ljust(width) for name, width in zip(names, widths, strict=True)]
    return Text(" " * GUTTER + "".join(fitting).rstrip(), style=style)


def _render_legend(timeline: Timeline, width: int, *, plain: bool) -> Text:
    """The components that the timeline has."""
    sizes = {name: max(getattr(point, name) for point in timeline.points) for name in COMPONENTS}
    legend, used = Text(" " * GUTTER), GUTTER
    for name, size in sizes.items():
        if not size:
            continue
        needed = len(COMPONENT_WORDS[name]) + 4
        if used + needed > width and used > GUTTER:
            legend.append("\n" + " " * GUTTER)
            used = GUTTER
        legend.append(COMPONENT_MARKS[name] if plain else "■", "" if plain else COMPONENT_COLORS[name])
        legend.append(f" {COMPONENT_WORDS[name]}  ")
        used += needed
    legend.rstrip()
    return legend
