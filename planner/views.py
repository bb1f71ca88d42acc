"""Views over many plans: every card of the catalog, a grid of settings, and the most that fits a device.

A view is made of the plans that `make_plan` would make one by one, so what it shows is what `fitune plan` would say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from pydantic import Field

from ..recipes.errors import FituneError, Problem, RecipeError
from ..recipes.schema import BudgetTable
from .catalog import CatalogGpu, list_gpus, list_models, make_catalog_device
from .plan import Plan, PlanInputs, make_plan
from .search import Measure, list_budgets
from .shape import ModelShape, make_shape
from .strategy import Device, Strategy, Value

MeasureFactory = Callable[[Device, int], Measure]
"""Makes what measures the recipe's model on a device, for rows of so many tokens."""

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
    estimator:      what the figures come from
    """

    fits: bool
    strategy: Strategy
    required_bytes: int = Field(ge=0)
    budget_bytes: int = Field(gt=0)
    limit: str
    headroom_bytes: int
    tokens_per_second: float | None
    total_seconds: float | None
    estimator: str


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


class Axis(Value):
    """A key of the recipe and the values to try.

    key:    dotted, such as `train.micro_batch_size`
    values: one or more, as on the command line
    """

    key: str
    values: tuple[str, ...] = Field(min_length=1)


class Cell(Outcome):
    """One combination of a sweep's values.

    settings: dotted key to value, as on the command line
    """

    settings: dict[str, str]


class FailedCell(Value):
    """A combination that makes no valid recipe or that no strategy can follow.

    settings: dotted key to value, as on the command line
    error:    why
    """

    settings: dict[str, str]
    error: str


class LongestRows(Outcome):
    """The longest rows that fit.

    sequence_length: tokens, a multiple of 64
    is_model_limit:  whether memory would hold longer ones, and the model was not made for them
    """

    sequence_length: int = Field(ge=1)
    is_model_limit: bool


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


def make_cards(inputs: PlanInputs, make_measure: MeasureFactory | None = None) -> tuple[Card | UnableCard, ...]:
    """How the recipe runs on each card of the catalog, least memory first; of the inputs' own device only what is
    installed there matters."""
    budget = inputs.recipe_file.recipe.budget
    gpus = sorted(list_gpus(), key=lambda gpu: (gpu.memory_bytes, gpu.name))
    devices = [(gpu, make_card_device(gpu, budget, has_liger=inputs.device.has_liger)) for gpu in gpus]
    return tuple(_make_card(gpu, replace(inputs, device=device), make_measure) for gpu, device in devices)


def make_card_device(gpu: CatalogGpu, budget: BudgetTable, *, has_liger: bool) -> Device:
    """A card as the device of a plan: what can be used of its memory, or `budget.memory` where that is less."""
    device = make_catalog_device(gpu, budget)
    usable = min(device.budget_bytes, gpu.usable_bytes)
    return device.model_copy(update={"budget_bytes": usable, "has_liger": has_liger})


def _make_card(gpu: CatalogGpu, inputs: PlanInputs, make_measure: MeasureFactory | None) -> Card | UnableCard:
    try:
        plan = _plan(inputs, make_measure)
    except FituneError as error:
        return UnableCard(gpu=gpu.name, memory_bytes=gpu.memory_bytes, error=str(error))
    return Card(gpu=gpu.name, memory_bytes=gpu.memory_bytes, **_sum_up(plan))


def parse_axes(words: Sequence[str]) -> tuple[Axis, ...]:
    """Axes of a sweep such as `train.micro_batch_size=1,2,4`. Raises RecipeError with all that is wrong with them.

    A comma within quotes or brackets does not separate values.
    """
    axes: list[Axis] = []
    problems = []
    for word in words:
        key, equals, written = (part.strip() for part in word.partition("="))
        values = tuple(value.strip() for value in _split_values(written))
        problem = partial(Problem, where=f"--sweep {word if word.isprintable() else ascii(word)}")
        if not equals or key.count(".") != 1 or not all(key.split(".")):
            form = "table.key=value,value, such as train.micro_batch_size=1,2"
            problems.append(problem(what=f"is not of the form {form}"))
        elif not all(values):
            problems.append(problem(what="has an empty value", hint="write the values with one comma between them"))
        elif len(set(values)) < len(values):
            problems.append(problem(what="has a value more than once"))
        elif key in (axis.key for axis in axes):
            problems.append(problem(what=f"{key} is swept more than once", hint="give all its values at once"))
        else:
            axes.append(Axis(key=key, values=values))
    if problems:
        raise RecipeError(problems)
    return tuple(axes)


def _split_values(text: str) -> Iterator[str]:
    value, depth, quote = "", 0, ""
    for character in text:
        if character == "," and not depth and not quote:
            yield value
            value = ""
            continue
        value += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
    yield value


def make_grid(axes: Sequence[Axis], plan_cell: Callable[[Mapping[str, str]], Plan]) -> tuple[Cell | FailedCell, ...]:
    """The plan of every combination, the last axis changing fastest; where none makes a plan, the first one's error.

    plan_cell: plans for one combination of settings
    """
    cells: list[Cell | FailedCell] = []
    errors = []
    for values in product(*(axis.values for axis in axes)):
        settings = {axis.key: value for axis, value in zip(axes, values, strict=True)}
        try:
            cells.append(Cell(settings=settings, **_sum_up(plan_cell(settings))))
        except FituneError as error:
            cells.append(FailedCell(settings=settings, error=str(error)))
            errors.append(error)
    if len(errors) == len(cells):
        raise errors[0]
    return tuple(cells)


def find_what_fits(inputs: PlanInputs, make_measure: MeasureFactory | None = None) -> WhatFits:
    """The longest rows and the largest model for the inputs' device; models are compared by closed forms."""
    return WhatFits(
        device=inputs.device, longest=find_longest_rows(inputs, make_measure), largest=find_largest_model(inputs)
    )


def find_longest_rows(inputs: PlanInputs, make_measure: MeasureFactory | None = None) -> LongestRows | None:
    """By bisection over the multiples of 64 up to what the model was made for; memory grows with the length."""
    made_for = inputs.shape.max_positions
    most = (made_for or LONGEST_LENGTH) // LENGTH_STEP
    low, high, found = 0, most, None
    while low < high:
        middle = (low + high + 1) // 2
        plan = _plan(_with_length(inputs, middle * LENGTH_STEP), make_measure)
        if plan.fits:
            low, found = middle, plan
        else:
            high = middle - 1
    if found is None:
        return None
    at_limit = made_for is not None and low == most
    return LongestRows(sequence_length=low * LENGTH_STEP, is_model_limit=at_limit, **_sum_up(found))


def find_largest_model(inputs: PlanInputs) -> LargestModel | None:
    """The catalog's model of most parameters that can be trained on rows of this length and fits."""
    length = inputs.data.longest_row_tokens
    for model in sorted(list_models(), key=lambda one: one.parameters, reverse=True):
        shape = make_shape(model.config)
        if shape.max_positions is not None and shape.max_positions < length:
            continue
        if _estimate_least_weight_bytes(shape) > inputs.device.budget_bytes:
            continue
        try:
            plan = make_plan(replace(inputs, shape=shape, stored_bytes=None), with_reasons=False)
        except FituneError:  # it has no such target, or no such attention
            continue
        if plan.fits:
            return LargestModel(model=model.name, parameters=plan.parameters.total, **_sum_up(plan))
    return None


def _estimate_least_weight_bytes(shape: ModelShape) -> int:
    """Every parameter in 4 bits, which no method undercuts: spares the plans of models that are far too large."""
    return shape.parameters // 2


def _plan(inputs: PlanInputs, make_measure: MeasureFactory | None) -> Plan:
    measure = None if make_measure is None else make_measure(inputs.device, inputs.data.longest_row_tokens)
    return make_plan(inputs, measure, with_reasons=False)


def _with_length(inputs: PlanInputs, length: int) -> PlanInputs:
    recipe = inputs.recipe_file.recipe
    longer = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": length})})
    return replace(
        inputs,
        recipe_file=replace(inputs.recipe_file, recipe=longer),
        data=inputs.data.model_copy(update={"longest_row_tokens": length}),
    )


def _sum_up(plan: Plan) -> dict[str, Any]:
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
