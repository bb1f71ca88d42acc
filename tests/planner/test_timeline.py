"""The timeline of a step: nothing that matters is lost on the way from events to points and from points to a chart."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import GiB, make_gpu, plan_for
from pydantic import ValidationError
from rich.console import Console

from fitune.planner.memory import Memory, Timeline, TimelinePoint
from fitune.planner.show.plan import render_plan
from fitune.planner.show.timeline import COMPONENT_WORDS, render_timeline
from fitune.planner.timeline import (
    COMPONENTS,
    POINTS,
    EventLog,
    is_in_scale,
    list_passes,
    list_spans,
    make_scale,
    make_timeline,
    resample,
    share_out,
)

PHASES = ("forward", "backward", "clip", "optimizer")
MiB = 2**20


@st.composite
def draw_log(draw: st.DrawFn) -> EventLog:
    """Allocations and frees of phases in their order, some of them empty."""
    log = EventLog(start={"weights": draw(st.integers(0, 2**40))})
    held: list[tuple[str, int]] = []
    for phase in PHASES:
        log.enter(phase)
        for size in draw(st.lists(st.integers(1, 2**36), max_size=30)):
            if held and draw(st.booleans()):
                component, old = held.pop()
                log.add(component, -old)
            else:
                held.append((draw(st.sampled_from(COMPONENTS)), size))
                log.add(*held[-1])
    return log


def replay_by_hand(log: EventLog) -> list[tuple[int, ...]]:
    """Live bytes by component before the first event and after each."""
    live = dict.fromkeys(COMPONENTS, 0) | dict(log.start)
    instants = [tuple(live.values())]
    for component, size in log.events:
        live[component] += size
        instants.append(tuple(live.values()))
    return instants


def make_step(*, micro_batches: int = 1, layers: int = 200) -> Timeline:
    """A step that keeps 10 MiB of each layer; 1 GiB of logits are its peak."""
    logs, live = [], {"weights": 2 * GiB, "adapters": 20 * MiB, "optimizer": 40 * MiB}
    for number in range(min(micro_batches, 2)):
        log = EventLog(start=dict(live))
        log.enter("forward")
        for _ in range(layers):
            log.add("activations", 10 * MiB)
        log.add("loss_head", GiB)
        log.enter("backward")
        log.add("loss_head", -GiB)
        for _ in range(layers):
            log.add("activations", -10 * MiB)
            if number == 0:
                log.add("gradients", MiB // 10)
        logs.append(log)
        live["gradients"] = layers * (MiB // 10)
    update = EventLog(start=dict(live))
    update.enter("clip")
    update.add("temporary", 512)
    update.add("temporary", -512)
    update.enter("optimizer")
    update.add("gradients", -live["gradients"])
    return make_timeline([*logs, update], micro_batches=micro_batches)


def make_memory(timeline: Timeline, *, budget_bytes: int = 6 * GiB) -> Memory:
    memory = plan_for({}, make_gpu("RTX 4090")).memory
    changes = {
        "peak_allocated_bytes": timeline.peak.total,
        "required_bytes": timeline.peak.total + GiB,
        "budget_bytes": budget_bytes,
        "timeline": timeline,
    }
    return memory.model_copy(update=changes)


def draw(memory: Memory, width: int = 100, *, color: bool = False) -> list[str]:
    """The chart's lines."""
    assert memory.timeline is not None
    console = Console(
        file=io.StringIO(), width=width, force_terminal=color, color_system="truecolor" if color else None
    )
    console.print(render_timeline(memory, memory.timeline, console))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@given(st.lists(draw_log(), min_size=1, max_size=3))
def test_the_highest_instant_is_a_point_to_the_byte(logs: list[EventLog]) -> None:
    highest = max(sum(live) for log in logs for live in replay_by_hand(log))
    assert make_timeline(logs, micro_batches=1).peak.total == highest == max(log.peak_bytes for log in logs)


@given(st.lists(draw_log(), min_size=1, max_size=3))
def test_every_point_is_an_instant_of_its_log_and_its_components_add_up(logs: list[EventLog]) -> None:
    instants = {live for log in logs for live in replay_by_hand(log)}
    for point in make_timeline(logs, micro_batches=1).points:
        assert point.live_bytes in instants
        assert point.total == sum(getattr(point, name) for name in COMPONENTS)


@given(st.lists(draw_log(), min_size=1, max_size=3))
def test_every_phase_has_a_point_in_the_logs_order(logs: list[EventLog]) -> None:
    spans = list_spans(make_timeline(logs, micro_batches=1))
    assert [span.phase for span in spans] == list(PHASES) * len(logs)
    assert all(before.end == after.start for before, after in pairwise(spans))


def test_a_long_step_has_about_as_many_points_as_a_chart_needs() -> None:
    timeline = make_step(layers=5000)
    assert POINTS - 8 <= len(timeline.points) <= POINTS + len(PHASES)
    assert len(timeline.model_dump_json()) < 20_000


def test_a_timeline_is_read_back_from_its_json() -> None:
    timeline = make_step(micro_batches=3)
    assert Timeline.model_validate_json(timeline.model_dump_json()) == timeline


@pytest.mark.parametrize("points", [[], [[1, 0, 0, 0, 0, 0, 0, 0]], [[0, -1, 0, 0, 0, 0, 0, 0]], [[0, 1]]], ids=repr)
def test_a_broken_timeline_is_refused(points: list[list[int]]) -> None:
    with pytest.raises(ValidationError):
        Timeline.model_validate({"phases": ["forward"], "micro_batches": 1, "points": points})


def test_both_micro_batches_are_named_and_the_update_beside_them() -> None:
    def name(micro_batches: int) -> list[str]:
        timeline = make_step(micro_batches=micro_batches)
        return [one.phase for one in list_passes(timeline, list_spans(timeline))]

    assert name(1) == []
    assert name(2) == ["first micro-batch", "second micro-batch", "update"]
    assert name(16) == ["first micro-batch", "highest of the other 15", "update"]


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=300), st.integers(1, 200))
def test_columns_keep_the_highest_point(sizes: list[int], columns: int) -> None:
    points = [TimelinePoint(0, size, 0, 0, 0, 0, 0, 0) for size in sizes]
    drawn = resample(points, columns)
    assert len(drawn) == columns
    assert max(drawn) == max(points)
    assert (drawn[0] == points[0] and drawn[-1] == points[-1]) or columns < len(points)


@given(st.data(), st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(8, 400))
def test_shares_add_up_and_none_is_below_its_minimum(data: st.DataObject, sizes: list[int], total: int) -> None:
    minimums = data.draw(st.lists(st.integers(1, 12), min_size=len(sizes), max_size=len(sizes)))
    shares = share_out(sizes, minimums, total)
    assert sum(shares) == total
    floors = minimums if sum(minimums) <= total else [1] * len(sizes)
    assert all(share >= floor for share, floor in zip(shares, floors, strict=True))


@given(st.integers(1, 2**45), st.integers(1, 2**45), st.integers(1, 20))
def test_the_scale_holds_what_is_drawn_in_few_steps(required: int, budget: int, most: int) -> None:
    memory = make_memory(make_step()).model_copy(
        update={"required_bytes": required, "budget_bytes": budget, "peak_allocated_bytes": required}
    )
    scale = make_scale(memory, most_steps=most)
    assert 1 <= scale.steps <= most
    assert scale.top_bytes >= required * (1 - 1e-9)
    assert scale.top_bytes >= budget * (1 - 1e-9) or not is_in_scale(memory)
    assert scale.find_row(required) <= scale.steps + 1


@pytest.mark.parametrize("width", [20, 60, 80, 100, 200])
@pytest.mark.parametrize("color", [False, True])
def test_no_line_of_the_chart_is_wider_than_the_terminal(width: int, color: bool) -> None:
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in draw(make_memory(make_step()), width, color=color)]
    assert max(map(len, lines)) <= width
    axis = next(index for index, line in enumerate(lines) if line.startswith("     0 "))
    rows = lines[axis - make_scale(make_memory(make_step()), most_steps=12).steps : axis]
    assert all(re.match(r" *[\d.]* [|┤│]", row) for row in rows), "a row that is too wide goes on in the next line"


def test_the_chart_says_peak_phase_budget_and_what_is_required() -> None:
    timeline = make_step(micro_batches=4)
    text = "\n".join(draw(make_memory(timeline)))
    assert "peak 5.0 GiB, forward" in text
    assert "- budget 6.0 GiB -" in text
    assert "highest of the other 3" in text
    for name in COMPONENTS:
        assert COMPONENT_WORDS[name] in text
    assert "- required 6.0 GiB -" in "\n".join(draw(make_memory(timeline, budget_bytes=9 * GiB)))


def test_a_budget_far_above_is_said_and_not_drawn() -> None:
    text = "\n".join(draw(make_memory(make_step(), budget_bytes=80 * GiB)))
    assert "budget 80.0 GiB, above this chart" in text
    assert "- budget" not in text


def test_the_chart_is_as_high_as_what_is_live() -> None:
    memory = make_memory(make_step())
    rows = [line for line in draw(memory) if "|" in line]
    scale = make_scale(memory, most_steps=12)
    weights = [row for row in rows if "#" * 92 in row]
    assert len(weights) == 2 * GiB // scale.step_bytes
    assert len([row for row in rows if "=" in row]) >= (2 * GiB - 2 * scale.step_bytes) / scale.step_bytes


def test_a_coloured_chart_has_each_large_components_colour() -> None:
    text = "\n".join(draw(make_memory(make_step()), color=True))
    assert all(f"\x1b[{code}m" in text for code in ("44", "42", "41"))


def test_a_plan_shows_its_timeline_and_without_one_bars_of_its_phases() -> None:
    plan = plan_for({}, make_gpu("RTX 4090"))
    timed = plan.model_copy(update={"memory": make_memory(make_step())})
    shown = {}
    for name, one in (("closed forms", plan), ("rehearsed", timed)):
        console = Console(file=io.StringIO(), width=100)
        render_plan(one, console)
        assert isinstance(console.file, io.StringIO)
        shown[name] = console.file.getvalue()
    title = "Live tensors over one optimizer step"
    assert (title in shown["rehearsed"], title in shown["closed forms"]) == (True, False)
    assert re.search(r"backward +[\d.]+  █+\n", shown["closed forms"])
    assert not re.search(r"backward +[\d.]+  █+\n", shown["rehearsed"])
