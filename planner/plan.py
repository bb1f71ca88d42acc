"""A recipe, a model's shape and a device become a Plan: the first method that fits, at its fastest, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, Literal, Protocol

from pydantic import Field

from ..recipes.errors import PlanError
from ..recipes.load import RecipeFile
from ..recipes.schema import Recipe
from .advice import list_advice, list_warnings
from .arithmetic import count_trainable
from .candidates import list_methods, list_strategies, order_key
from .estimate import estimate_memory
from .memory import Memory
from .reasons import describe_rejection, find_largest_term
from .shape import ModelShape
from .strategy import DataFacts, Device, Strategy, Value


class Parameters(Value):
    """Counts of parameters.

    total:     without adapters, tied weights once, quantised ones unpacked
    trainable: what the optimizer updates
    """

    total: int = Field(gt=0)
    trainable: int = Field(gt=0)


class Rejected(Value):
    """A candidate that does not fit.

    strategy:     the candidate
    needed_bytes: what it needs of the budget that it breaks, margin included
    budget_bytes: that budget
    component:    the term that broke it: a component of memory, or host or disk
    reason:       the same for people
    """

    strategy: Strategy
    needed_bytes: int
    budget_bytes: int
    component: str
    reason: str


class PlannedModel(Value):
    """The model that a plan is for.

    id:            as the recipe writes it
    model_type:    its family in transformers
    config_sha256: digest of its config: a plan made for another one is stale
    """

    id: str
    model_type: str
    config_sha256: str


class PlannedData(Value):
    """The rows that a plan is for.

    rows:            training rows, None where the dataset is not there
    sequence_length: tokens of the longest row that the plan allows for
    steps:           optimizer steps, None where rows are not known
    source:          where sequence_length comes from
    """

    rows: int | None
    sequence_length: int = Field(ge=1)
    steps: int | None
    source: str


class Plan(Value):
    """What will happen: the document that `fitune plan --json` prints and `fitune run` executes.

    recipe:          path as given
    overrides:       what the command line set over the recipe
    resolved_recipe: with defaults filled in; recipe_sha256 is the digest of its canonical JSON
    fits:            whether required_bytes and the budgets of RAM and disk are kept
    warnings, advice: for people
    strategy:        how to train; where nothing fits, the candidate that comes closest
    estimator:       closed_forms
    rejected:        every candidate that was preferred to the chosen one and does not fit
    versions:        of the libraries it was made with
    """

    format_version: Literal[1] = 1
    recipe: str
    overrides: tuple[str, ...] = ()
    resolved_recipe: dict[str, Any]
    recipe_sha256: str
    fits: bool
    warnings: tuple[str, ...]
    advice: tuple[str, ...]
    device: Device
    model: PlannedModel
    data: PlannedData
    strategy: Strategy
    parameters: Parameters
    memory: Memory
    estimator: Literal["closed_forms"] = "closed_forms"
    rejected: tuple[Rejected, ...]
    versions: dict[str, str]


class Measure(Protocol):
    """Predicts the memory of a strategy; closed forms or, from the runtime, a rehearsal of the step."""

    def __call__(self, strategy: Strategy) -> Memory:
        """The memory of a run of `strategy`."""


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """Everything that a plan is made from.

    recipe_file:   the recipe
    recipe_path:   as the user gave it
    overrides:     of the command line
    shape:         the model's
    config_sha256: digest of the model's config
    device:        the one to plan for
    data:          what is known of the rows
    versions:      of the installed libraries
    """

    recipe_file: RecipeFile
    recipe_path: str
    overrides: tuple[str, ...] = ()
    shape: ModelShape
    config_sha256: str
    device: Device
    data: DataFacts
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    strategy: Strategy
    memory: Memory
    shortfall_bytes: int


def make_plan(inputs: PlanInputs, measure: Measure | None = None) -> Plan:
    """The fastest plan of the first preferred method that fits; where none fits, the candidate that comes closest.

    Raises PlanError for a recipe that no strategy can follow, such as fp16 weights on a CPU.
    """
    recipe, device, shape = inputs.recipe_file.recipe, inputs.device, inputs.shape
    _check_length(recipe, shape)
    length = inputs.data.longest_row_tokens
    measure = measure or make_closed_form_measure(shape, device, length, merge=recipe.output.merge)
    rejected: list[_Candidate] = []
    chosen: _Candidate | None = None
    for strategy in _walk(recipe, device, shape, length):
        memory = measure(strategy)
        candidate = _Candidate(strategy=strategy, memory=memory, shortfall_bytes=_shortfall(memory, device))
        if candidate.shortfall_bytes <= 0:
            chosen = candidate
            break
        rejected.append(candidate)
    closest = chosen or min(rejected, key=lambda one: (one.shortfall_bytes, one.memory.required_bytes))
    return _write_plan(inputs, closest, rejected, fits=chosen is not None)


def _walk(recipe: Recipe, device: Device, shape: ModelShape, length: int) -> Iterable[Strategy]:
    """All candidates: methods in the recipe's order, fastest first within each."""
    problems = []
    for method in list_methods(recipe):
        try:
            strategies = list_strategies(recipe, device, method, has_sdpa=shape.has_sdpa)
            yield from sorted(strategies, key=lambda one: order_key(one, device, length))
        except PlanError as error:
            problems.append(error)
    if len(problems) == len(list_methods(recipe)):
        raise problems[0]


def make_closed_form_measure(shape: ModelShape, device: Device, sequence_length: int, *, merge: bool) -> Measure:
    """The planner's own estimate as a measuring function."""

    @cache
    def measure(strategy: Strategy) -> Memory:
        return estimate_memory(shape, strategy, device, sequence_length=sequence_length, merge=merge)

    return measure


def _check_length(recipe: Recipe, shape: ModelShape) -> None:
    """A model with learned positions has no embedding for a longer row."""
    longest = shape.max_positions
    if longest is not None and shape.has_learned_positions and recipe.data.max_length > longest:
        raise PlanError(
            f"data.max_length: {recipe.data.max_length} is more than the {longest} learned positions of this model"
        )


def _shortfall(memory: Memory, device: Device) -> int:
    """Bytes by which the worst of the budgets is missed; 0 or less where all are kept."""
    return max(needed - budget for needed, budget in list_budgets(memory, device).values())


def list_budgets(memory: Memory, device: Device) -> dict[str, tuple[int, int]]:
    """(needed, budget) in bytes of each memory that is limited: the device's, and RAM and disk where known."""
    budgets = {"device": (memory.required_bytes, memory.budget_bytes)}
    if device.host_memory_bytes is not None and device.kind == "cuda":
        budgets["host"] = (memory.host_bytes, device.host_memory_bytes)
    if device.disk_bytes is not None:
        budgets["disk"] = (memory.disk_bytes, device.disk_bytes)
    return budgets


def _write_plan(inputs: PlanInputs, closest: _Candidate, rejected: list[_Candidate], *, fits: bool) -> Plan:
    recipe_file, shape, strategy = inputs.recipe_file, inputs.shape, closest.strategy
    recipe, data = recipe_file.recipe, inputs.data
    losers = tuple(_reject(one, inputs) for one in rejected)
    return Plan(
        recipe=inputs.recipe_path,
        overrides=inputs.overrides,
        resolved_recipe=recipe_file.resolved,
        recipe_sha256=recipe_file.sha256,
        fits=fits,
        warnings=list_warnings(recipe, inputs.device, strategy, data, shape, versions=inputs.versions),
        advice=() if fits else list_advice(recipe, inputs.device, shape, strategy, closest.memory, data),
        device=inputs.device,
        model=PlannedModel(id=recipe.model.id, model_type=shape.model_type, config_sha256=inputs.config_sha256),
        data=PlannedData(
            rows=data.rows,
            sequence_length=data.longest_row_tokens,
            steps=count_planned_steps(recipe, data.rows),
            source=data.source,
        ),
        strategy=strategy,
        parameters=Parameters(total=shape.parameters, trainable=count_trainable(shape, strategy)),
        memory=closest.memory,
        rejected=losers,
        versions=dict(inputs.versions),
    )


def count_planned_steps(recipe: Recipe, rows: int | None) -> int | None:
    """max_steps, or epochs * ceil(rows / global_batch_size); None where rows are not known."""
    if recipe.train.max_steps is not None:
        return recipe.train.max_steps
    assert recipe.train.epochs is not None, "a recipe has one of max_steps and epochs"
    return None if rows is None else recipe.train.epochs * ceil(rows / recipe.train.global_batch_size)


def _reject(candidate: _Candidate, inputs: PlanInputs) -> Rejected:
    budgets = list_budgets(candidate.memory, inputs.device)
    broken = max(budgets, key=lambda name: budgets[name][0] - budgets[name][1])
    needed, budget = budgets[broken]
    component = broken
    if broken == "device":
        component = find_largest_term(candidate.strategy, candidate.memory, inputs.shape)
    return Rejected(
        strategy=candidate.strategy,
        needed_bytes=needed,
        budget_bytes=budget,
        component=component,
        reason=describe_rejection(
            candidate.strategy,
            candidate.memory,
            inputs.shape,
            broken=broken,
            component=component,
            needed_bytes=needed,
            budget_bytes=budget,
            sequence_length=inputs.data.longest_row_tokens,
        ),
    )
