"""A plan as a person sees it: everything is there, nothing overflows, on any terminal."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import CPU, GiB, make_gpu, plan_for
from rich.console import Console

from fitune.planner.plan import Plan
from fitune.planner.show.plan import COMPONENT_WORDS, render_plan
from fitune.planner.strategy import DeviceConstant
from fitune.recipes.units import format_bytes

CONSTANT = DeviceConstant(
    bytes=763 * 2**20, source="3 runs on this machine, the last on 2026-11-23, 751.0 MiB to 767.0 MiB"
)
LLAMA_8B = {"model": {"id": "llama-3.1-8b"}}
PLANS = {
    "fits": plan_for({}, make_gpu("H100 80GB")),
    "rejects": plan_for(LLAMA_8B, make_gpu("RTX 4090")),
    "nothing fits": plan_for(LLAMA_8B | {"method": {"kind": "full"}}, make_gpu("RTX 4090")),
    "cpu": plan_for({"model": {"id": "smollm2-135m-instruct"}}, CPU, rows=None),
}
EVERY_PLAN = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
EVERY_WIDTH = pytest.mark.parametrize("width", [60, 80, 120])


def render(plan: Plan, width: int = 80, *, command: str | None = None, color: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=color, color_system="truecolor" if color else None)
    render_plan(plan, console, next_command=command)
    return file.getvalue()


def squeeze(text: str) -> str:
    """Words alone: a word may stand on any line."""
    return " ".join(re.sub(r"[│╭╰─╮╯█]", " ", text).split())


@EVERY_PLAN
@EVERY_WIDTH
def test_no_line_is_wider_than_the_terminal(plan: Plan, width: int) -> None:
    assert max(map(len, render(plan, width).splitlines())) <= width


@EVERY_PLAN
@EVERY_WIDTH
def test_nothing_is_cut_off(plan: Plan, width: int) -> None:
    text = render(plan, width)
    assert "…" not in text
    words = squeeze(text)
    for part in (*plan.warnings, *plan.advice, plan.model.id, plan.device.name):
        assert squeeze(part) in words


@EVERY_PLAN
def test_every_figure_of_the_memory_is_shown_in_gib(plan: Plan) -> None:
    lines, memory = render(plan, 120).splitlines(), plan.memory
    for name, size in memory.components:
        shown = [line for line in lines if line.startswith(COMPONENT_WORDS[name] + " ")]
        assert [line.split()[len(COMPONENT_WORDS[name].split())] for line in shown] == (
            [f"{size / GiB:.2f}"] if size else []
        )
    for size in (memory.peak_allocated_bytes, memory.peak_device_bytes, memory.required_bytes, memory.budget_bytes):
        assert any(line.split()[-1:] == [f"{size / GiB:.2f}"] for line in lines)
    for phase in memory.phases:
        figure = rf"{phase.name} +{phase.peak_allocated_bytes / GiB:.2f}"
        assert bool(re.search(figure, "\n".join(lines))) == bool(phase.peak_allocated_bytes)
    assert f"RAM {format_bytes(memory.host_bytes)}, disk {format_bytes(memory.disk_bytes)}" in lines


def test_each_kind_of_rejected_candidate_is_one_line_with_what_it_needs_and_why() -> None:
    plan = PLANS["rejects"]
    lines = render(plan, 120).splitlines()
    assert f"Rejected: {len(plan.rejected)} candidates; of each kind the closest" in [line.strip() for line in lines]
    full = [one for one in plan.rejected if one.strategy.method == "full" and one.strategy.weights_dtype == "bf16"]
    kept = [one for one in full if not one.strategy.checkpointed_layers]
    closest = min(kept, key=lambda one: one.needed_bytes)
    (line,) = [line for line in lines if line.startswith("full bf16 ")]
    assert line.split()[2:4] == [f"{closest.needed_bytes / GiB:.2f}", f"{closest.budget_bytes / GiB:.2f}"]
    assert line.rstrip().endswith(closest.reason.partition(": ")[2])
    assert {line.split("  ")[0] for line in lines if line.startswith(("full ", "LoRA "))} >= {
        "full fp32",
        "full fp32, checkpointed",
        "full bf16",
        "full bf16, checkpointed",
        "LoRA bf16",
    }


def test_the_verdict_says_how_much_is_to_spare_or_missing() -> None:
    memory = PLANS["fits"].memory
    spare = f"{(memory.budget_bytes - memory.required_bytes) / GiB:.2f} GiB to spare"
    needs = f"{memory.required_bytes / GiB:.2f} of {memory.budget_bytes / GiB:.2f} GiB"
    assert f"fits: {needs}, {spare}, " in render(PLANS["fits"])
    memory = PLANS["nothing fits"].memory
    needs = f"{memory.required_bytes / GiB:.2f} of {memory.budget_bytes / GiB:.2f} GiB"
    assert f"nothing fits: the closest candidate needs {needs}, " in render(PLANS["nothing fits"])


def test_the_next_command_is_last_and_on_one_line_however_long() -> None:
    command = "fitune run " + "folder/" * 40 + "recipe.toml"
    assert render(PLANS["fits"], 60, command=command).splitlines()[-1] == f"next: {command}"
    assert "next:" not in render(PLANS["nothing fits"])


def test_paged_states_are_named_where_they_are_counted() -> None:
    tables = LLAMA_8B | {"method": {"kind": "full"}, "train": {"optimizer": "paged_adamw_8bit"}}
    assert "with context, paged states" in render(plan_for(tables, make_gpu("B200")))
    assert "with the CUDA context" in render(PLANS["fits"])
    assert "with Python's libraries" in render(PLANS["cpu"])


def test_offload_and_expandable_segments_are_shown_where_they_are_asked_for() -> None:
    tables = LLAMA_8B | {"train": {"activation_offload": True, "expandable_segments": True}}
    shown = render(plan_for(tables, make_gpu("H100 80GB")), 160)
    assert "activations in RAM" in shown and "expandable segments" in shown
    assert "activations in RAM" not in render(PLANS["fits"]) and "expandable" not in render(PLANS["fits"])


@EVERY_PLAN
def test_colours_carry_nothing_that_the_words_do_not(plan: Plan) -> None:
    colored = render(plan, color=True)
    assert "\x1b[" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == render(plan)
    assert "\x1b[" not in render(plan)


@EVERY_PLAN
def test_a_terminal_without_unicode_gets_plain_characters(plan: Plan) -> None:
    buffer = io.BytesIO()
    console = Console(file=io.TextIOWrapper(buffer, encoding="ascii", write_through=True), width=80)
    render_plan(plan, console)
    assert "####" in buffer.getvalue().decode("ascii")


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=30))
def test_a_name_is_shown_as_it_is_written(name: str) -> None:
    plan = PLANS["fits"]
    named = plan.model_copy(update={"recipe": name, "model": plan.model.model_copy(update={"id": name})})
    text = render(named, 200)
    assert f"Plan for {name} ─" in text
    assert f"model      {name} (llama" in text


def test_square_brackets_are_no_markup() -> None:
    plan = PLANS["fits"].model_copy(update={"recipe": "[bold red]a[/] [link=x].toml", "warnings": ("see [bold]",)})
    text = render(plan)
    assert "Plan for [bold red]a[/] [link=x].toml ─" in text
    assert "note: see [bold]" in text


@EVERY_WIDTH
def test_a_constant_that_was_learnt_is_shown_with_where_it_comes_from(width: int) -> None:
    text = render(plan_for({}, make_gpu("H100 80GB", beside=CONSTANT)), width)
    assert max(map(len, text.splitlines())) <= width
    assert "763.0 MiB beside: 3 runs" in squeeze(text)
    assert set(CONSTANT.source.split()) <= set(squeeze(text).split())
    assert "beside:" not in render(PLANS["fits"], width)


def test_the_ram_of_loading_is_explained_where_it_counts_pages_of_the_weight_file() -> None:
    on_gpu = plan_for({"model": {"id": "qwen3-8b"}}, make_gpu("RTX 4090"))
    text = squeeze(render(on_gpu))
    assert "the load's counts the mapped weight file, whose pages the kernel takes back where RAM is short" in text
    assert f"the run needs {format_bytes(on_gpu.memory.host_bytes)}" in text
    assert "mapped weight file" not in render(plan_for({}, CPU))
