"""A Plan as one HTML page that needs nothing else: no network, no fonts, no scripts but its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

from ..memory import Memory
from ..plan import Plan, Rejected
from .chart import make_chart_data, render_chart
from .plan import (
    closest_of_each_kind,
    describe_candidate,
    describe_facts,
    describe_need,
    describe_verdict,
    list_figures,
)
from .timeline import COMPONENT_WORDS

GiB = 2**30


def render_page(plan: Plan) -> str:
    """The page; everything from the recipe is escaped."""
    verdict, needs = describe_verdict(plan)
    sections = [
        _render_timeline(plan.memory),
        '<div class="pair">' + _render_memory(plan) + _render_phases(plan.memory) + "</div>",
        render_section("The run", _render_facts(plan)),
        _render_rejected(plan.rejected),
        _render_list("Notes", plan.warnings),
        _render_list("Advice", plan.advice),
    ]
    return fill_page(
        title=f"Plan for {plan.recipe}",
        verdict=f'<b class="{"yes" if plan.fits else "no"}">{verdict}</b>: {escape(needs)}',
        body="\n".join(section for section in sections if section),
        footer=_render_footer(plan),
        timeline=make_chart_data(plan.memory.timeline),
    )


def fill_page(*, title: str, verdict: str, body: str, footer: str, timeline: str = "null") -> str:
    """A page in fitune's style; verdict and body are HTML, title and footer text, the timeline JSON for its script."""
    template = Template((files(__package__) / "plan.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title), verdict=verdict, body=body, footer=escape(footer), timeline=timeline
    )


def render_section(title: str, content: str) -> str:
    """A card of the page; both are HTML."""
    return f"<section><h2>{title}</h2>{content}</section>"


def _render_timeline(memory: Memory) -> str:
    if memory.timeline is None:
        return ""
    note = (
        '<p class="soft">From left to right the allocations and frees of the rehearsed step, in their order; not time. '
        "Each point is the highest instant of its part.</p>"
    )
    return render_section("Live tensors over one optimizer step", render_chart(memory, memory.timeline) + note)


def render_table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """Cells are HTML; the columns `numbers` are aligned right."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="n"' if number in numbers else "" for number in range(len(cells)))
        written = (f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(written)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table><thead>{row(heads, "th")}</thead><tbody>{body}</tbody></table></div>'


def _render_bars(sizes: Mapping[str, int], colors: Mapping[str, str], figures: Iterable[tuple[str, int, str]]) -> str:
    """A row with a bar for each name, and under them `figures`: (name, bytes, note); `colors` are the page's."""
    most = max([*sizes.values(), 1])
    rows = []
    for name, size in sizes.items():
        color = f";background:var(--{colors[name]})" if name in colors else ""
        bar = f'<i style="width:{100 * size / most:.1f}%{color}"></i>'
        rows.append(f'<tr><td>{escape(name)}</td><td class="n">{_gib(size)}</td><td class="bar">{bar}</td></tr>')
    below = (
        f'<tr><td>{escape(name)}</td><td class="n">{_gib(size)}</td><td class="bar">{escape(note)}</td></tr>'
        for name, size, note in figures
    )
    head = '<thead><tr><th></th><th class="n">GiB</th><th></th></tr></thead>'
    body = f'<tbody>{"".join(rows)}</tbody><tbody class="figures">{"".join(below)}</tbody>'
    return f"<table>{head}{body}</table>"


def _render_memory(plan: Plan) -> str:
    memory = plan.memory
    live = {COMPONENT_WORDS[name]: size for name, size in memory.components if size}
    colors = {COMPONENT_WORDS[name]: name for name, _ in memory.components}
    content = _render_bars(live, colors, list_figures(plan))
    return render_section(f"Memory at its peak: {escape(memory.peak_phase)}", content)


def _render_phases(memory: Memory) -> str:
    peaks = {phase.name: phase.peak_allocated_bytes for phase in memory.phases if phase.peak_allocated_bytes}
    beside = [("RAM", memory.host_bytes, ""), ("disk", memory.disk_bytes, "")]
    return render_section("Live tensors by phase", _render_bars(peaks, {memory.peak_phase: "ink"}, beside))


def _render_facts(plan: Plan) -> str:
    pairs = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in describe_facts(plan))
    return f"<dl>{pairs}</dl>"


def _render_rejected(rejected: Sequence[Rejected]) -> str:
    if not rejected:
        return ""
    closest = [
        (escape(kind), *describe_need(one), escape(one.reason)) for kind, one in closest_of_each_kind(rejected).items()
    ]
    every = [(escape(describe_candidate(one.strategy)), *describe_need(one), escape(one.reason)) for one in rejected]
    heads = ("", "GiB", "of", "why")
    content = render_table(heads, closest, numbers=(1, 2))
    if len(every) > len(closest):
        listed = render_table(heads, every, numbers=(1, 2))
        content += f"<details><summary>All {len(every)} rejected candidates</summary>{listed}</details>"
    return render_section("Rejected, of each kind the closest", content)


def _render_list(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return render_section(title, "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>")


def _render_footer(plan: Plan) -> str:
    source = "a rehearsal of the step" if plan.estimator == "rehearsal" else "closed forms"
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    return f"Planned by fitune from {source}. Recipe {plan.recipe_sha256[:12]}. {versions}"


def _gib(size: int) -> str:
    return f"{size / GiB:.2f}"
