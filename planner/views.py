"""Views over many plans: every card of the catalog, and the most that fits a device; a grid of settings is in sweep.py.

A view is made of the plans that `make_plan` would make one by one, so what it shows is what `fitune plan` would say.
Closed forms make all of them at once; then they are made again one by one with rehearsals, as long as there is time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import Field

from ..recipes.errors import FituneError
from ..recipes.schema import BudgetTable
from .catalog import CatalogGpu, list_gpus, list_models, make_catalog_device
from .clock import Clock
from .kept import KeptForms, make_closed_form_measure
from .memory import Estimator
from .plan import Plan, PlanInputs, make_plan
from .search import UNSURE_SHARE, Measure, list_budgets
from .shape import ModelShape, make_shape
from .strategy import DataFacts, Device, Strategy, Value

LENGTH_STEP = 64
"""Tokens: the longest length is looked for among the multiples of this."""
LONGEST_LENGTH = 2**20
"""Tokens at which the search ends for a model that names no longest length."""


class Outcome(Value):
    """How one plan came out.

    fits:           whether all budgets are kept
    strategy:       how to train; where nothing fits, the candidate that comes closest
    required_bytes: of the device, margin included
    budget_bytes:   of the device
    limit:          device, or host, disk or time where that is what does not fit
    headroom_bytes: what is left of the limit's budget, of the device's where that is time; below 0 what is missing
    tokens_per_second: None where the device's rates are not known
    total_seconds:  of the whole run, None where that is not known
    estimator:      what the figures come from: a rehearsal of the step, or closed_forms
    """

    fits: bool
    strategy: Strategy
    required_bytes: int = Field(ge=0)
    budget_bytes: int = Field(gt=0)
    limit: str
    headroom_bytes: int
    tokens_per_second: float | None
    total_seconds: float | None
    estimator: Estimator


class Card(Outcome):
    """A card of the catalog and how the recipe runs on it.

    gpu:          its name
    memory_bytes: all of its memory
    """

    gpu: str
    memory_bytes: int = Field(gt=0)


class UnableCard(Value):
    """A card of the catalog that cannot follow the recipe, whatever its memory.

    gpu:          its name
    memory_bytes: all of its memory
    error:        why
    """

    gpu: str
    memory_bytes: int = Field(gt=0)
    error: str


class LongestRows(Outcome):
    """The longest rows that fit.

    sequence_length: tokens, a multiple of 64
    is_model_limit:  whether memory would hold longer ones, and the model was not made for them
    is_longest:      whether longer ones are known not to fit, or the model was not made for them; false where a
                     search by rehearsals ran out of time
    """

    sequence_length: int = Field(ge=1)
    is_model_limit: bool
    is_longest: bool


class LargestModel(Outcome):
    """The largest model of the catalog that fits.

    model:      its name in the catalog
    parameters: tied weights once
    """

    model: str
    parameters: int = Field(gt=0)


class WhatFits(Value):
    """The most that fits a device with the rest of the recipe as it is.

    device:  the one
    longest: None where not even 64 tokens fit
    largest: None where no model of the catalog fits
    """

    device: Device
    longest: LongestRows | None
    largest: LargestModel | None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One plan of a view.

    name:   what tells it from the others, for people
    inputs: what it is made from
    config: of the model, whose step can be rehearsed
    """

    name: str
    inputs: PlanInputs
    config: Mapping[str, Any]


class Rehearser(Protocol):
    """Rehearsals for the cases of a view, for as long as there is time."""

    def plan_each(
        self, cases: Sequence[Case], groups: Sequence[Sequence[int]], plan: Callable[[int], Plan | FituneError]
    ) -> Iterator[tuple[int, Plan | FituneError]]:
        """(number, plan) of as many cases as there is time for, in any order; those of a group before the next one's.

        groups: numbers of cases
        """

    def may_go_on(self, case: Case, *, done: int, total: int | None) -> bool:
        """Whether there is time for one more case; tells a person that it is the next one.

        total: cases to rehearse, None where that shows only in the end
        """

    def rehearse(self, case: Case) -> tuple[Measure | None, Clock | None]:
        """A measuring function and a clock; None where a step on this device cannot be rehearsed."""


def plan_cases(cases: Sequence[Case], rehearser: Rehearser | None) -> list[Plan | FituneError]:
    """Each case's plan, or why it has none: by closed forms, then as many as there is time for by rehearsals, those
    first whose verdict is open."""
    kept: dict[tuple[str, DataFacts, bool], KeptForms] = defaultdict(KeptForms)
    plans = [_plan(case, kept=kept[_find_key(case)]) for case in cases]
    if rehearser is None:
        return plans
    groups: tuple[list[int], ...] = ([], [], [])
    for number, plan in enumerate(plans):
        if isinstance(plan, Plan) and plan.device.kind == "cuda":
            groups[_rank(plan)].append(number)

    def plan_exactly(number: int) -> Plan | FituneError:
        return _plan(cases[number], rehearser, kept=kept[_find_key(cases[number])])

    for number, exact in rehearser.plan_each(cases, groups, plan_exactly):
        plans[number] = exact
    return plans


def _find_key(case: Case) -> tuple[str, DataFacts, bool]:
    """What closed forms depend on beside strategy and device."""
    inputs = case.inputs
    return inputs.config_sha256, inputs.data, inputs.recipe_file.recipe.output.merge


def _rank(plan: Plan) -> int:
    """In which order plans are made more exact: misses that a rehearsal may turn, what fits, and what is far off."""
    return 1 if plan.fits else 0 if _may_fit(plan) else 2


def _may_fit(plan: Plan) -> bool:
    """Whether closed forms can be so far off that a plan fits which they take for too large."""
    return plan.fits or plan.memory.peak_device_bytes * (1 - UNSURE_SHARE) <= plan.memory.budget_bytes


def _plan(case: Case, rehearser: Rehearser | None = None, *, kept: KeptForms | None = None) -> Plan | FituneError:
    measure, clock = (None, None) if rehearser is None else rehearser.rehearse(case)
    try:
        return make_plan(case.inputs, measure, clock, with_reasons=False, kept=kept)
    except FituneError as error:
        return error


def make_cards(case: Case, rehearser: Rehearser | None = None) -> tuple[Card | UnableCard, ...]:
    """How the recipe runs on each card of the catalog, least memory first; of the case's own device only what is
    installed there matters."""
    inputs = case.inputs
    budget = inputs.recipe_file.recipe.budget
    gpus = sorted(list_gpus(), key=lambda gpu: (gpu.memory_bytes, gpu.name))
    devices = [make_card_device(gpu, budget, has_liger=inputs.device.has_liger) for gpu in gpus]
    cases = [replace(case, name=device.name, inputs=replace(inputs, device=device)) for device in devices]
    return tuple(_make_card(gpu, plan) for gpu, plan in zip(gpus, plan_cases(cases, rehearser), strict=True))


def make_card_device(gpu: CatalogGpu, budget: BudgetTable, *, has_liger: bool) -> Device:
    """A card as the device of a plan: what can be used of its memory, or `budget.memory` where that is less."""
    device = make_catalog_device(gpu, budget)
    usable = min(device.budget_bytes, gpu.usable_bytes)
    return device.model_copy(update={"budget_bytes": usable, "has_liger": has_liger})


def _make_card(gpu: CatalogGpu, plan: Plan | FituneError) -> Card | UnableCard:
    if isinstance(plan, FituneError):
        return UnableCard(gpu=gpu.name, memory_bytes=gpu.memory_bytes, error=str(plan))
    return Card(gpu=gpu.name, memory_bytes=gpu.memory_bytes, **sum_up(plan))


def find_what_fits(case: Case, rehearser: Rehearser | None = None) -> WhatFits:
    """The longest rows and the largest model for the case's device."""
    return WhatFits(
        device=case.inputs.device,
        longest=find_longest_rows(case, rehearser),
        largest=find_largest_model(case, rehearser),
    )


def find_longest_rows(case: Case, rehearser: Rehearser | None = None) -> LongestRows | None:
    """The longest of the multiples of 64 up to what the model was made for; memory grows with the length.

    By bisection over closed forms. Rehearsals begin there, and go on to where closed forms, as far off as the last
    rehearsal showed them to be, expect the end, until one length fits and the next one does not.
    """
    made_for = case.inputs.shape.max_positions
    most = (made_for or LONGEST_LENGTH) // LENGTH_STEP
    steps, plan = _bisect(case, 0, most)
    is_longest = True
    if rehearser is not None and case.inputs.device.kind == "cuda":
        low, high, exact = _close_in(case, rehearser, start=max(steps, 1), most=most)
        if exact is not None or high == 1:
            steps, plan, is_longest = low, exact, high - low == 1
    if plan is None:
        return None
    at_limit = made_for is not None and steps == most
    return LongestRows(
        sequence_length=steps * LENGTH_STEP, is_model_limit=at_limit, is_longest=is_longest, **sum_up(plan)
    )


def _bisect(case: Case, low: int, high: int) -> tuple[int, Plan | None]:
    """(multiples of 64 tokens, plan) of the longest rows up to `high` that fit by closed forms; (low, None) where
    nothing longer than `low` does."""
    found = None
    while low < high:
        middle = (low + high + 1) // 2
        plan = _plan(_with_length(case, middle))
        if isinstance(plan, FituneError):
            raise plan
        if plan.fits:
            low, found = middle, plan
        else:
            high = middle - 1
    return low, found


def _close_in(case: Case, rehearser: Rehearser, *, start: int, most: int) -> tuple[int, int, Plan | None]:
    """(low, high, plan): the longest rows that are shown to fit, in multiples of 64 tokens, with their plan, and the
    shortest that are shown not to; they are neighbours unless time ran out."""
    low, high, found = 0, most + 1, None
    guess, stride, done = start, 1, 0
    while high - low > 1:
        one = _with_length(case, guess)
        if not rehearser.may_go_on(one, done=done, total=None):
            break
        plan, done = _plan(one, rehearser), done + 1
        if isinstance(plan, FituneError):
            raise plan
        if plan.fits:
            low, found = guess, plan
        else:
            high = guess
        expected, _ = _bisect(_scale_budget(one, plan), low, high - 1)
        if low < expected < high - 1 or low < expected == most:
            guess, stride = expected, 1
        else:
            guess = min(low + stride, high - 1) if expected == low else max(high - stride, low + 1)
            stride *= 2
    return low, high, found


def _scale_budget(case: Case, exact: Plan) -> Case:
    """The case with its device's budget as closed forms would need it that are as far off as for this plan."""
    inputs = case.inputs
    length = inputs.data.longest_row_tokens
    merge = inputs.recipe_file.recipe.output.merge
    quick = make_closed_form_measure(inputs.shape, inputs.device, length, merge=merge)(exact.strategy)
    budget_bytes = max(1, inputs.device.budget_bytes * quick.required_bytes // exact.memory.required_bytes)
    device = inputs.device.model_copy(update={"budget_bytes": budget_bytes})
    return replace(case, inputs=replace(inputs, device=device))


def find_largest_model(case: Case, rehearser: Rehearser | None = None) -> LargestModel | None:
    """The catalog's model of most parameters that can be trained on rows of this length and fits."""
    done = 0
    for one in _list_models(case):
        plan = _plan(one)
        if isinstance(plan, FituneError) or not _may_fit(plan):  # it has no such target, or no such attention
            continue
        if rehearser is not None and rehearser.may_go_on(one, done=done, total=None):
            plan, done = _plan(one, rehearser), done + 1
        if isinstance(plan, Plan) and plan.fits:
            return LargestModel(model=one.name, parameters=plan.parameters.total, **sum_up(plan))
    return None


def _list_models(case: Case) -> Iterator[Case]:
    """The models of the catalog, largest first, that may fit and were made for rows of this length."""
    inputs = case.inputs
    for model in sorted(list_models(), key=lambda one: one.parameters, reverse=True):
        shape = make_shape(model.config)
        if shape.max_positions is not None and shape.max_positions < inputs.data.longest_row_tokens:
            continue
        if _estimate_least_weight_bytes(shape) <= inputs.device.budget_bytes:
            other = replace(inputs, shape=shape, stored_bytes=None, tokenizer_bytes=None, files_of=None)
            yield Case(name=model.name, inputs=other, config=model.config)


def _estimate_least_weight_bytes(shape: ModelShape) -> int:
    """Every parameter in 4 bits, which no method undercuts: spares the plans of models that are far too large."""
    return shape.parameters // 2


def _with_length(case: Case, steps: int) -> Case:
    """The case with rows of so many multiples of 64 tokens."""
    length, inputs = steps * LENGTH_STEP, case.inputs
    recipe = inputs.recipe_file.recipe
    longer = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": length})})
    data = DataFacts(rows=inputs.data.rows, longest_row_tokens=length, source=inputs.data.source)
    recipe_file = replace(inputs.recipe_file, recipe=longer)
    return replace(case, name=f"{length:,} tokens", inputs=replace(inputs, recipe_file=recipe_file, data=data))


def sum_up(plan: Plan) -> dict[str, Any]:
    """An Outcome's values."""
    budgets = list_budgets(plan.memory, plan.device)
    left = {name: budget - needed for name, (needed, budget) in budgets.items()}
    worst = min(left, key=lambda name: left[name])
    limit = "device" if plan.fits else worst if left[worst] < 0 else "time"
    return {
        "fits": plan.fits,
        "strategy": plan.strategy,
        "required_bytes": plan.memory.required_bytes,
        "budget_bytes": plan.memory.budget_bytes,
        "limit": limit,
        "headroom_bytes": left["device" if limit == "time" else limit],
        "tokens_per_second": None if plan.speed is None else plan.speed.tokens_per_second,
        "total_seconds": None if plan.speed is None else plan.speed.total_seconds,
        "estimator": plan.estimator,
    }
