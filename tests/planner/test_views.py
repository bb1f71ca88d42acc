"""Views over many plans say what the plans would say one by one, and what they call the most is the most."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import CPU, GiB, find_shape, make_case, make_gpu, plan_for
from rich.console import Console

from fitune.planner.catalog import find_gpu, list_gpus, list_models
from fitune.planner.clock import Clock, make_closed_form_clock
from fitune.planner.kept import make_closed_form_measure
from fitune.planner.memory import Memory
from fitune.planner.plan import Plan, make_plan
from fitune.planner.search import Measure
from fitune.planner.shape import make_shape
from fitune.planner.show.views import render_cards, render_grid, render_what_fits
from fitune.planner.strategy import Device, Strategy
from fitune.planner.sweep import Axis, Cell, FailedCell, make_grid, parse_axes
from fitune.planner.views import (
    Card,
    Case,
    UnableCard,
    WhatFits,
    find_largest_model,
    find_longest_rows,
    find_what_fits,
    make_card_device,
    make_cards,
)
from fitune.recipes.errors import FituneError, RecipeError
from fitune.recipes.schema import BudgetTable

RTX_4090 = make_gpu("RTX 4090")
LLAMA_8B = {"model": {"id": "llama-3.1-8b"}}
ONE_WAY = LLAMA_8B | {
    "method": {"kind": "qlora"},
    "train": {"micro_batch_size": 1, "gradient_checkpointing": True, "optimizer": "adamw", "loss_head": "fused"},
}
TABLES = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"id": st.sampled_from(["gpt2", "llama-3.2-1b", "qwen3-8b", "mixtral-8x7b"])}),
        "data": st.fixed_dictionaries({"train": st.just("rows.jsonl"), "max_length": st.sampled_from([64, 300, 1024])}),
        "method": st.fixed_dictionaries({"kind": st.sampled_from(["auto", "full", "lora", "qlora"])}),
        "train": st.fixed_dictionaries({"micro_batch_size": st.sampled_from(["auto", 1, 4])}),
    }
)
DEVICES = st.builds(lambda size: RTX_4090.model_copy(update={"budget_bytes": size}), st.integers(2 * GiB, 200 * GiB))


def render(width: int = 100, *, what: Any, **values: Any) -> str:
    file = io.StringIO()
    what(console=Console(file=file, width=width), **values)
    return file.getvalue()


def make_cell(settings_: Mapping[str, str]) -> Case:
    """A case of a micro-batch and, where given, an optimizer; the recipe's global batch is 16."""
    train: dict[str, Any] = {"micro_batch_size": int(settings_["train.micro_batch_size"])}
    if "train.optimizer" in settings_:
        train["optimizer"] = settings_["train.optimizer"]
    return make_case(LLAMA_8B | {"train": train}, RTX_4090)


@settings(max_examples=8, deadline=None)
@given(TABLES)
def test_a_card_with_more_memory_never_fits_less(tables: dict[str, Any]) -> None:
    bf16 = {gpu.name: gpu.bf16 for gpu in list_gpus()}
    cards = [card for card in make_cards(make_case(tables, CPU)) if isinstance(card, Card)]
    for can_bf16 in (True, False):
        fits = [card.fits for card in cards if bf16[card.gpu] == can_bf16]
        assert fits == sorted(fits)


@pytest.mark.parametrize("kind", ["auto", "full", "qlora"])
def test_every_card_is_there_once_by_memory_and_says_what_its_own_plan_says(kind: str) -> None:
    tables = LLAMA_8B | {"method": {"kind": kind}}
    cards = make_cards(make_case(tables, CPU))
    assert sorted(card.gpu for card in cards) == sorted(gpu.name for gpu in list_gpus())
    assert all(a.memory_bytes <= b.memory_bytes for a, b in pairwise(cards))
    for card in cards[::7]:
        assert isinstance(card, Card)
        plan = plan_for(tables, make_card_device(find_gpu(card.gpu), BudgetTable(), has_liger=False))
        memory = plan.memory
        assert (card.fits, card.strategy) == (plan.fits, plan.strategy)
        assert (card.required_bytes, card.budget_bytes) == (memory.required_bytes, memory.budget_bytes)
        assert card.headroom_bytes == memory.budget_bytes - memory.required_bytes
        assert (card.headroom_bytes >= 0) == card.fits


def test_budget_memory_is_the_most_that_is_used_of_a_card() -> None:
    for card in make_cards(make_case({"budget": {"memory": "20GiB"}}, CPU)):
        assert isinstance(card, Card)
        whole = make_card_device(find_gpu(card.gpu), BudgetTable(), has_liger=False).budget_bytes
        assert card.budget_bytes == min(whole, 20 * GiB)
        assert whole <= card.memory_bytes


def test_ram_that_is_too_small_is_named_with_what_is_missing() -> None:
    cards = make_cards(make_case({"budget": {"host_memory": "1GiB"}}, CPU))
    largest = cards[-1]
    assert isinstance(largest, Card)
    assert (largest.fits, largest.limit) == (False, "host")
    assert largest.headroom_bytes < 0
    assert "RAM" in render(what=render_cards, cards=cards, sequence_length=2048)


def test_a_card_that_cannot_follow_the_recipe_says_why() -> None:
    cards = make_cards(make_case({"model": {"id": "llama-3.2-1b", "attention": "flash_attention_2"}}, CPU))
    unable = {card.gpu: card.error for card in cards if isinstance(card, UnableCard)}
    assert set(unable) == {gpu.name for gpu in list_gpus() if not gpu.bf16}
    assert "compute capability 8.0" in unable["T4"]


@settings(max_examples=25, deadline=None)
@given(TABLES, DEVICES)
def test_rows_longer_than_the_longest_do_not_fit(tables: dict[str, Any], device: Device) -> None:
    def fits(length: int) -> bool:
        return plan_for(tables | {"data": {"train": "rows.jsonl", "max_length": length}}, device).fits

    longest = find_longest_rows(make_case(tables, device))
    most = find_shape(tables["model"]["id"]).max_positions
    if longest is None:
        assert not fits(64)
        return
    assert longest.sequence_length % 64 == 0
    assert fits(longest.sequence_length)
    assert longest.is_model_limit == (longest.sequence_length == most)
    assert longest.is_model_limit or not fits(longest.sequence_length + 64)


@pytest.mark.parametrize("budget_gib", [3, 24])
def test_no_larger_model_of_the_catalog_fits(budget_gib: int) -> None:
    device = RTX_4090.model_copy(update={"budget_bytes": budget_gib * GiB})
    data = {"train": "rows.jsonl", "max_length": 4096}
    largest = find_largest_model(make_case({"data": data}, device))
    assert largest is not None
    fitting = [
        model.parameters
        for model in list_models()
        if (make_shape(model.config).max_positions or 4096) >= 4096
        and plan_for({"model": {"id": model.name}, "data": data}, device).fits
    ]
    assert largest.parameters == max(fitting)
    assert largest.strategy == plan_for({"model": {"id": largest.model}, "data": data}, device).strategy


def test_where_nothing_fits_there_is_neither_a_length_nor_a_model() -> None:
    tiny = RTX_4090.model_copy(update={"budget_bytes": 2**20})
    found = find_what_fits(make_case({}, tiny))
    assert (found.longest, found.largest) == (None, None)
    text = render(what=render_what_fits, found=found, sequence_length=2048)
    assert "not even 64 tokens fit" in text
    assert "no model of the catalog fits" in text


class Inexact:
    """Stands for rehearsals: closed forms times a factor, for as many cases as `limit` says."""

    def __init__(self, factor: float, limit: int | None = None) -> None:
        self.factor, self.limit = factor, limit
        self.names: list[str] = []

    def may_go_on(self, case: Case, *, done: int, total: int | None) -> bool:
        is_over = self.limit is not None and len(self.names) >= self.limit
        self.names += [] if is_over else [case.name]
        return not is_over

    def plan_each(
        self, cases: Sequence[Case], groups: Sequence[Sequence[int]], plan: Callable[[int], Plan | FituneError]
    ) -> Iterator[tuple[int, Plan | FituneError]]:
        for number in (number for group in groups for number in group):
            if self.may_go_on(cases[number], done=0, total=None):
                yield number, plan(number)

    def rehearse(self, case: Case) -> tuple[Measure, Clock]:
        inputs = case.inputs
        device, length = inputs.device, inputs.data.longest_row_tokens
        merge = inputs.recipe_file.recipe.output.merge
        quick = make_closed_form_measure(inputs.shape, device, length, merge=merge)

        def measure(strategy: Strategy) -> Memory:
            memory = quick(strategy)
            needed = int(self.factor * memory.required_bytes)
            return memory.model_copy(update={"required_bytes": needed, "estimator": "rehearsal"})

        return measure, make_closed_form_clock(inputs.shape, device, length)

    def plan(self, case: Case) -> Plan:
        return make_plan(case.inputs, *self.rehearse(case))


def test_every_rehearsed_card_says_what_its_rehearsed_plan_says() -> None:
    case, rehearser = make_case(ONE_WAY, RTX_4090), Inexact(0.8)
    cards = make_cards(case, rehearser)
    assert sorted(rehearser.names) == sorted(card.gpu for card in cards)
    for card in cards[::9]:
        assert isinstance(card, Card)
        device = make_card_device(find_gpu(card.gpu), BudgetTable(), has_liger=False)
        plan = rehearser.plan(replace(case, inputs=replace(case.inputs, device=device)))
        assert (card.fits, card.strategy, card.estimator) == (plan.fits, plan.strategy, plan.estimator)
        assert card.required_bytes == plan.memory.required_bytes


def test_when_time_is_over_the_other_rows_keep_their_closed_forms_and_the_open_ones_came_first() -> None:
    quick = {card.gpu: card for card in make_cards(make_case(ONE_WAY, RTX_4090))}
    rehearser = Inexact(0.8, limit=5)
    cards = [card for card in make_cards(make_case(ONE_WAY, RTX_4090), rehearser) if isinstance(card, Card)]
    rehearsed = {card.gpu for card in cards if card.estimator == "rehearsal"}
    assert len(rehearser.names) == 5
    assert rehearsed <= set(rehearser.names)
    assert all(card == quick[card.gpu] for card in cards if card.gpu not in rehearser.names)
    first = quick[rehearser.names[0]]
    assert isinstance(first, Card)
    assert not first.fits
    assert first.required_bytes < 2 * first.budget_bytes
    text = render(what=render_cards, cards=cards, sequence_length=2048)
    assert text.count("~") == len(cards) - len(rehearsed) + 1
    assert "the others by a rehearsal of the step" in " ".join(text.split())


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([0.6, 0.9, 1.0, 1.15]), st.integers(6, 40))
def test_rehearsals_find_the_length_that_fits_while_64_tokens_more_do_not(factor: float, budget_gib: int) -> None:
    device = RTX_4090.model_copy(update={"budget_bytes": budget_gib * GiB})
    rehearser = Inexact(factor)
    longest = find_longest_rows(make_case(ONE_WAY, device), rehearser)

    def fits(length: int) -> bool:
        data = {"train": "rows.jsonl", "max_length": length}
        return rehearser.plan(make_case(ONE_WAY | {"data": data}, device)).fits

    if longest is None:
        assert not fits(64)
        return
    assert longest.is_longest
    assert fits(longest.sequence_length)
    assert longest.is_model_limit or not fits(longest.sequence_length + 64)
    assert len(rehearser.names) <= 8


def test_a_search_for_the_longest_rows_without_time_for_its_end_says_at_least() -> None:
    case = make_case(ONE_WAY, RTX_4090)
    longest = find_longest_rows(case, Inexact(0.8, limit=1))
    assert longest is not None
    assert (longest.is_longest, longest.estimator) == (False, "rehearsal")
    assert find_longest_rows(case, Inexact(0.8, limit=0)) == find_longest_rows(case)
    found = WhatFits(device=RTX_4090, longest=longest, largest=None)
    text = render(what=render_what_fits, found=found, sequence_length=2048)
    assert f"at least {longest.sequence_length:,} tokens" in " ".join(text.split())


def test_a_rehearsal_finds_a_larger_model_than_closed_forms_that_are_too_careful() -> None:
    case = make_case({"method": ONE_WAY["method"], "train": ONE_WAY["train"]}, RTX_4090)
    quick, exact = find_largest_model(case), find_largest_model(case, Inexact(0.7))
    assert quick is not None
    assert exact is not None
    assert exact.parameters > quick.parameters
    assert exact.estimator == "rehearsal"


def test_an_axis_is_a_key_and_its_values() -> None:
    assert parse_axes(["train.micro_batch_size=1,2, 4", "data.max_length=1024"]) == (
        Axis(key="train.micro_batch_size", values=("1", "2", "4")),
        Axis(key="data.max_length", values=("1024",)),
    )


def test_a_comma_within_quotes_or_brackets_is_part_of_a_value() -> None:
    (axis,) = parse_axes(["method.targets=['q_proj','v_proj'],\"all,linear\",all-linear"])
    assert axis.values == ("['q_proj','v_proj']", '"all,linear"', "all-linear")


NAME = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
VALUES = st.lists(st.from_regex(r"[a-z0-9.]{1,6}", fullmatch=True), min_size=1, max_size=5, unique=True)


@given(st.dictionaries(st.tuples(NAME, NAME), VALUES, min_size=1, max_size=4))
def test_axes_written_and_read_are_the_same(axes: dict[tuple[str, str], list[str]]) -> None:
    words = [f"{'.'.join(key)}={','.join(values)}" for key, values in axes.items()]
    assert {axis.key: list(axis.values) for axis in parse_axes(words)} == {
        ".".join(key): values for key, values in axes.items()
    }


@given(st.lists(st.text(max_size=20), min_size=1, max_size=3))
def test_any_text_is_an_axis_or_a_problem_with_its_place(words: list[str]) -> None:
    try:
        axes = parse_axes(words)
    except RecipeError as error:
        assert all(str(problem).startswith("--sweep ") for problem in error.problems)
    else:
        assert len(axes) == len(words)


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("train.seed", "not of the form"),
        ("seed=1,2", "not of the form"),
        ("a.b.c=1,2", "not of the form"),
        ("=1,2", "not of the form"),
        ("train.seed=", "empty value"),
        ("train.seed=1,,2", "empty value"),
        ("train.seed=1,2,1", "more than once"),
    ],
)
def test_a_malformed_axis_is_refused(word: str, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        parse_axes([word])


def test_all_malformed_axes_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_axes(["train.seed", "train.epochs=1", "data.max_length=64,", "train.epochs=2"])
    assert len(caught.value.problems) == 3


AXES = parse_axes(["train.micro_batch_size=1,2,16", "train.optimizer=adamw,adamw_8bit"])


def test_the_cells_of_a_grid_are_the_single_plans_in_order() -> None:
    cells = make_grid(AXES, make_cell)
    assert [tuple(cell.settings.values()) for cell in cells] == [
        (micro, optimizer) for micro in ("1", "2", "16") for optimizer in ("adamw", "adamw_8bit")
    ]
    for cell in cells:
        assert isinstance(cell, Cell)
        plan = make_plan(make_cell(cell.settings).inputs)
        assert (cell.fits, cell.strategy) == (plan.fits, plan.strategy)
        assert (cell.required_bytes, cell.budget_bytes) == (plan.memory.required_bytes, plan.memory.budget_bytes)


def test_a_combination_that_is_no_recipe_fails_alone() -> None:
    cells = make_grid(parse_axes(["train.micro_batch_size=4,3"]), make_cell)
    assert isinstance(cells[0], Cell)
    assert isinstance(cells[1], FailedCell)
    assert "does not divide" in cells[1].error


def test_where_every_combination_fails_the_first_ones_error_is_raised() -> None:
    with pytest.raises(RecipeError, match="3 does not divide"):
        make_grid(parse_axes(["train.micro_batch_size=3,5"]), make_cell)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_keep_within_the_terminal(width: int) -> None:
    case = make_case({}, RTX_4090)
    texts = [
        render(width, what=render_cards, cards=make_cards(case), sequence_length=2048),
        render(width, what=render_grid, axes=AXES, cells=make_grid(AXES, make_cell)),
        render(width, what=render_what_fits, found=find_what_fits(case), sequence_length=2048),
    ]
    for text in texts:
        assert max(map(len, text.splitlines())) <= width
        assert "closed forms" in " ".join(text.split())


def test_further_axes_make_a_table_each() -> None:
    cells = make_grid(AXES, make_cell)
    axes = (AXES[0], Axis(key="train.seed", values=("0",)), AXES[1])
    wider = [
        cell.model_copy(update={"settings": {"a": cell.settings[AXES[0].key], "b": "0", "c": optimizer}})
        for cell in cells
        for optimizer in [cell.settings[AXES[1].key]]
    ]
    text = render(what=render_grid, axes=axes, cells=wider)
    assert text.count("train.optimizer = ") == 2
    assert text.count("fits") + text.count("too much") == len(cells)


def test_what_fits_is_json_in_and_json_out() -> None:
    found = find_what_fits(make_case(LLAMA_8B, RTX_4090))
    assert WhatFits.model_validate_json(found.model_dump_json()) == found
    for card in make_cards(make_case({}, CPU))[:3]:
        assert Card.model_validate_json(card.model_dump_json()) == card
