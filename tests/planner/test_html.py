"""A plan's page: whole, self-contained, and safe whatever the recipe says."""

from __future__ import annotations

import json
import re
from html import escape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import CPU, GiB, make_gpu, plan_for
from test_timeline import make_memory, make_step

from fitune.planner.plan import Plan
from fitune.planner.show.page import render_page

VOID = {"meta", "hr", "br", "input", "link", "img"}
CLOSED_FORMS = plan_for({"model": {"id": "llama-3.1-8b"}}, make_gpu("RTX 4090"))
REHEARSED = CLOSED_FORMS.model_copy(
    update={"memory": make_memory(make_step(micro_batches=4)), "estimator": "rehearsal"}
)
MISSES = plan_for({"model": {"id": "llama-3.1-8b"}, "method": {"kind": "full"}}, make_gpu("RTX 4090"))
PLANS = {
    "closed forms": CLOSED_FORMS,
    "rehearsed": REHEARSED,
    "nothing fits": MISSES,
    "cpu": plan_for({"model": {"id": "smollm2-135m-instruct"}}, CPU, rows=None),
}
EVERY_PLAN = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


class Page(HTMLParser):
    """Tags with their attributes, and all text outside of script and style; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += data


def read_data(page: str) -> object:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="timeline">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@EVERY_PLAN
def test_the_page_holds_the_whole_plan(plan: Plan) -> None:
    text, memory = Page(render_page(plan)).text, plan.memory
    sizes = [
        memory.peak_allocated_bytes,
        memory.peak_device_bytes,
        memory.required_bytes,
        memory.budget_bytes,
        *(size for _, size in memory.components if size),
        *(phase.peak_allocated_bytes for phase in memory.phases if phase.peak_allocated_bytes),
    ]
    for size in sizes:
        assert f"{size / GiB:.2f}" in text
    words = [plan.recipe, plan.model.id, plan.device.name, memory.peak_phase, *plan.warnings, *plan.advice]
    assert [word for word in words if word not in text] == []
    assert [one.reason for one in plan.rejected if one.reason not in text] == []
    assert ("nothing fits" in text) == (not plan.fits)


@EVERY_PLAN
def test_the_page_asks_nothing_of_a_network(plan: Plan) -> None:
    page = render_page(plan)
    parsed = Page(page)
    assert not {"src", "href", "srcset", "action"} & {name for _, attributes in parsed.tags for name in attributes}
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    assert re.search(r"https?://|@import|url\(", page) is None
    policy = [attributes["content"] for _, attributes in parsed.tags if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


HOSTILE = '</script><script>alert(1)</script><b onclick="x">&amp;\'$recipe'


def test_what_a_recipe_says_is_text_and_never_markup() -> None:
    model = REHEARSED.model.model_copy(update={"id": HOSTILE})
    device = REHEARSED.device.model_copy(update={"name": HOSTILE})
    timeline = make_step().model_copy(update={"phases": (HOSTILE, "backward", "clip", "optimizer")})
    changes = {"recipe": HOSTILE, "model": model, "device": device, "warnings": (HOSTILE,), "advice": (HOSTILE,)}
    memory = make_memory(timeline).model_copy(update={"peak_phase": HOSTILE})
    page = render_page(REHEARSED.model_copy(update=changes | {"memory": memory}))
    parsed, harmless = Page(page), Page(render_page(REHEARSED))
    assert sum(tag == "script" for tag, _ in parsed.tags) == sum(tag == "script" for tag, _ in harmless.tags)
    assert not any("onclick" in attributes for _, attributes in parsed.tags)
    assert parsed.text.count(HOSTILE) >= 6
    data = read_data(page)
    assert isinstance(data, dict) and data["phases"][0] == HOSTILE


@given(st.text(min_size=1, max_size=40))
@settings(max_examples=50)
def test_any_name_is_shown_as_it_is(name: str) -> None:
    page = render_page(CLOSED_FORMS.model_copy(update={"recipe": name}))
    assert f"<h1>Plan for {escape(name)}</h1>" in page


def test_the_chart_has_a_point_for_each_of_the_timeline() -> None:
    timeline = REHEARSED.memory.timeline
    assert timeline is not None
    data = read_data(render_page(REHEARSED))
    assert isinstance(data, dict)
    assert [tuple(point) for point in data["points"]] == list(timeline.points)
    assert len(data["x"]) == len(timeline.points)
    assert [0, *data["x"], data["width"]] == sorted([0, *data["x"], data["width"]])


def test_the_chart_is_well_formed_and_stacks_each_component_on_those_below_it() -> None:
    page = render_page(REHEARSED)
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    areas = {path.attrib["style"]: path.attrib["d"] for path in svg.iter("path")}
    assert list(areas) == [f"fill:var(--{name})" for name in REHEARSED.memory.components.__class__.model_fields]
    tops = []
    for path in areas.values():
        corners = [tuple(map(float, pair.split())) for pair in path.strip("MZ").split("L")]
        half = len(corners) // 2
        upper, lower = [y for _, y in corners[:half]], [y for _, y in corners[half:]][::-1]
        assert all(above <= below for above, below in zip(upper, lower, strict=True))
        assert not tops or lower == tops[-1]
        tops.append(upper)
    peak = svg.find("circle")
    assert peak is not None and float(peak.attrib["cy"]) == min(tops[-1])


def test_a_plan_from_closed_forms_has_bars_and_no_chart() -> None:
    page = render_page(CLOSED_FORMS)
    assert "<svg" not in page
    assert read_data(page) is None
    assert page.count('<td class="bar"><i style="width:') >= len(CLOSED_FORMS.memory.phases)
