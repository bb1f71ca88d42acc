"""A recipe, a model's shape and a device become a Plan: the first method that fits, at its fastest, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, Literal

from pydantic import Field

from ..recipes.errors import PlanError
from ..recipes.load import RecipeFile
from ..recipes.schema import Recipe
from ..recipes.units import format_bytes
from .advice import list_advice, list_warnings
from .arithmetic import count_trainable
from .clock import Clock, Timer, make_row_clock
from .estimate import estimate_weight_files, find_margin
from .files import (
    FilesOf,
    RunFiles,
    WeightFiles,
    count_kept,
    estimate_beside_weights,
    lay_files,
    list_checkpoint_counts,
)
from .host import lay_host
from .kept import KeptForms, make_closed_form_measure
from .logs import estimate_log_bytes
from .memory import Estimator, Memory
from .run_time import LoadFacts, count_evaluations
from .search import Candidate, Found, Measure, find_alike, list_budgets, search, walk_methods
from .shape import ModelShape
from .show.reasons import describe_lateness, describe_rejection, find_largest_term
from .speed import Speed
from .strategy import DataFacts, Device, Strategy, Value
from .widths import count_evaluated_widths, estimate_distinct_widths

STORED_BYTES = 2
"""Of a parameter in a checkpoint on a hub, where its files are not here to be measured."""


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
    needed_bytes: what it needs of the memory that it breaks, margin included; of the device where it is too slow
    budget_bytes: that budget
    needed_seconds, budget_seconds: of the whole run and of `budget.max_hours`, where it is too slow
    component:    the term that broke it: a component of memory, or host, disk or time
    reason:       the same for people
    """

    strategy: Strategy
    needed_bytes: int
    budget_bytes: int
    needed_seconds: float | None = None
    budget_seconds: float | None = None
    component: str
    reason: str


class PlannedModel(Value):
    """The model that a plan is for.

    id:            as the recipe writes it
    model_type:    its family in transformers
    config_sha256: digest of its config: a plan made for another one is stale
    layers:        decoder layers
    """

    id: str
    model_type: str
    config_sha256: str
    layers: int = Field(ge=1)


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
    fits:            whether required_bytes and the budgets of RAM, disk and hours are kept
    warnings, advice: for people
    strategy:        how to train; where nothing fits, the candidate that comes closest
    speed:           how fast it goes; None where the device's rates are not known
    estimator:       what memory comes from: a rehearsal of the step, or closed_forms
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
    speed: Speed | None
    estimator: Estimator = "closed_forms"
    rejected: tuple[Rejected, ...]
    versions: dict[str, str]


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
    files_of:      the exact files of a strategy, None where only closed forms are wanted
    stored_bytes:  size of the model's weight files, None where they are not here
    tokenizer_bytes: size of its tokenizer's files, None where they are not here
    like:          strategy of a run that goes on with another plan: only what changes no result may differ from it
    """

    recipe_file: RecipeFile
    recipe_path: str
    overrides: tuple[str, ...] = ()
    shape: ModelShape
    config_sha256: str
    device: Device
    data: DataFacts
    versions: Mapping[str, str]
    files_of: FilesOf | None = None
    stored_bytes: int | None = None
    tokenizer_bytes: int | None = None
    like: Strategy | None = None


def make_plan(
    inputs: PlanInputs,
    measure: Measure | None = None,
    clock: Clock | None = None,
    *,
    with_reasons: bool = True,
    kept: KeptForms | None = None,
) -> Plan:
    """The fastest plan of the first preferred method that fits; where none fits, the candidate that comes closest.

    measure: memory from a rehearsal of the step; None for closed forms
    clock:   step times on rows like the dataset's, from a rehearsal or measured; None for closed forms
    with_reasons: whether `rejected` and `advice` are made too, which takes longer than the choice itself
    kept: closed forms of this model and these rows, for many plans

    Raises PlanError for a recipe that no strategy can follow, such as fp16 weights on a CPU.
    """
    recipe, device, shape = inputs.recipe_file.recipe, inputs.device, inputs.shape
    _check_length(recipe, shape)
    length = inputs.data.longest_row_tokens
    timer = make_timer(inputs, clock, kept=kept)
    closed_forms = make_closed_form_measure(shape, device, length, merge=recipe.output.merge, kept=kept)
    quick = _complete(closed_forms, inputs, timer)
    exact = None if measure is None else _complete(measure, inputs, timer)
    if inputs.like is None:
        methods = walk_methods(recipe, device, shape)
    else:
        methods = iter([find_alike(recipe, device, shape, like=inputs.like)])
    found = search(methods, device, timer=timer, quick=quick, exact=exact)
    return _write_plan(inputs, found, timer, with_reasons=with_reasons)


def make_timer(inputs: PlanInputs, clock: Clock | None, *, kept: KeptForms | None = None) -> Timer:
    """What candidates are timed by; clock: a rehearsal's, None for closed forms alone; kept: as in make_plan."""
    recipe, shape = inputs.recipe_file.recipe, inputs.shape
    return Timer(
        recipe,
        inputs.device,
        quick=make_row_clock(shape, inputs.device, inputs.data, kept=kept),
        exact=clock,
        steps=count_planned_steps(recipe, inputs.data.rows),
        model=LoadFacts(
            shape=shape,
            weight_file_bytes=inputs.stored_bytes or STORED_BYTES * shape.parameters,
            on_cpu=inputs.device.kind == "cpu",
        ),
        data=inputs.data,
    )


def _complete(measure: Measure, inputs: PlanInputs, timer: Timer) -> Measure:
    """The measure, with RAM and files by phase, each strategy once."""
    recipe, shape, length = inputs.recipe_file.recipe, inputs.shape, inputs.data.longest_row_tokens
    steps = count_planned_steps(recipe, inputs.data.rows)
    counts = list_checkpoint_counts(recipe.output, steps, count_evaluations(recipe, steps))
    beside_bytes = estimate_beside_weights(shape.vocab_size, inputs.tokenizer_bytes)

    @cache
    def complete(strategy: Strategy) -> Memory:
        weights = _weigh_files(inputs, strategy)
        log_bytes = estimate_log_bytes(inputs.device, steps=steps, seconds=timer.find_run_seconds(strategy))
        options = [
            RunFiles(weights=weights, beside_bytes=beside_bytes, checkpoints=kept, at_once=at_once, log_bytes=log_bytes)
            for kept, at_once in counts
        ]
        memory = lay_files(measure(strategy), _choose_files(options, inputs.device))
        return lay_host(
            memory,
            shape,
            strategy,
            inputs.device,
            sequence_length=length,
            weights=weights,
            stored_bytes=inputs.stored_bytes,
            widths=estimate_distinct_widths(inputs.data, strategy, steps=steps),
            evaluated=count_evaluated_widths(inputs.data, strategy),
        )

    return complete


def _weigh_files(inputs: PlanInputs, strategy: Strategy) -> WeightFiles:
    """The weights that a run writes: exactly where they can be had, else by closed forms."""
    weights = None if inputs.files_of is None else inputs.files_of(strategy)
    return weights or estimate_weight_files(inputs.shape, strategy, merge=inputs.recipe_file.recipe.output.merge)


def _choose_files(options: list[RunFiles], device: Device) -> RunFiles:
    """The first that the disk has room for, else the smallest."""
    disk = device.disk_bytes
    return next((files for files in options if disk is None or files.total_bytes <= disk), options[-1])


def _check_length(recipe: Recipe, shape: ModelShape) -> None:
    """A model with learned positions has no embedding for a longer row."""
    longest = shape.max_positions
    if longest is not None and shape.has_learned_positions and recipe.data.max_length > longest:
        raise PlanError(
            f"data.max_length: {recipe.data.max_length} is more than the {longest} learned positions of this model"
        )


def _write_plan(inputs: PlanInputs, found: Found, timer: Timer, *, with_reasons: bool) -> Plan:
    recipe_file, shape, strategy = inputs.recipe_file, inputs.shape, found.closest.strategy
    recipe, data = recipe_file.recipe, inputs.data
    memory = found.closest.memory
    losers = tuple(_reject(one, inputs, timer) for one in found.rejected) if with_reasons else ()
    speed = timer.make_speed(strategy, found.closest.time, memory)
    advice: tuple[str, ...] = ()
    if with_reasons and not found.closest.fits:
        advice = list_advice(recipe, inputs.device, shape, strategy, memory, data, speed)
    warnings = list_warnings(recipe, inputs.device, strategy, data, shape, versions=inputs.versions)
    warnings = (*warnings, *_describe_checkpoints(recipe, memory), *_describe_closed_forms(found, shape, inputs.device))
    return Plan(
        recipe=inputs.recipe_path,
        overrides=inputs.overrides,
        resolved_recipe=recipe_file.resolved,
        recipe_sha256=recipe_file.sha256,
        fits=found.closest.fits,
        warnings=warnings,
        advice=advice,
        device=inputs.device,
        model=PlannedModel(
            id=recipe.model.id,
            model_type=shape.model_type,
            config_sha256=inputs.config_sha256,
            layers=shape.layers,
        ),
        data=PlannedData(
            rows=data.rows,
            sequence_length=data.longest_row_tokens,
            steps=count_planned_steps(recipe, data.rows),
            source=data.source,
        ),
        strategy=strategy,
        parameters=Parameters(total=shape.parameters, trainable=count_trainable(shape, strategy)),
        memory=memory,
        speed=speed,
        estimator=memory.estimator,
        rejected=losers,
        versions=dict(inputs.versions),
    )


def _describe_checkpoints(recipe: Recipe, memory: Memory) -> Iterator[str]:
    """Where the disk is too small for the checkpoints that `save_every = "auto"` would keep."""
    kept = count_kept(recipe.output, memory.checkpoints)
    if recipe.output.save_every != "auto" or kept >= recipe.output.keep_checkpoints:
        return
    if kept < 1:
        yield "no checkpoints are written, the disk has no room for two: a run that is killed starts again"
    else:
        yield f"only the last {kept} checkpoint stays: the disk is too small for {recipe.output.keep_checkpoints}"


def _describe_closed_forms(found: Found, shape: ModelShape, device: Device) -> Iterator[str]:
    """Why a plan is less exact than others, and the margin that it has instead."""
    if found.closest.memory.estimator != "closed_forms":
        return
    share, extra_bytes = find_margin(shape, found.closest.strategy, device)
    margin = f"{share:.0%}" + (f" and {format_bytes(extra_bytes)}" if extra_bytes else "")
    if found.failure is not None:
        yield f"planned with closed forms and a margin of {margin}: the step could not be rehearsed: {found.failure}"
    elif shape.is_guess:
        yield f"planned with closed forms of a plain decoder and a margin of {margin}: {shape.model_type} has none"


def count_planned_steps(recipe: Recipe, rows: int | None) -> int | None:
    """max_steps, or epochs * ceil(rows / global_batch_size); None where rows are not known."""
    if recipe.train.max_steps is not None:
        return recipe.train.max_steps
    assert recipe.train.epochs is not None, "a recipe has one of max_steps and epochs"
    return None if rows is None else recipe.train.epochs * ceil(rows / recipe.train.global_batch_size)


def _reject(candidate: Candidate, inputs: PlanInputs, timer: Timer) -> Rejected:
    budgets = list_budgets(candidate.memory, inputs.device)
    broken = max(budgets, key=lambda name: budgets[name][0] - budgets[name][1])
    needed, budget = budgets[broken]
    if candidate.shortfall_bytes <= 0:
        return Rejected(
            strategy=candidate.strategy,
            needed_bytes=candidate.memory.required_bytes,
            budget_bytes=candidate.memory.budget_bytes,
            needed_seconds=candidate.late_seconds + (timer.limit_seconds or 0.0),
            budget_seconds=timer.limit_seconds,
            component="time",
            reason=describe_lateness(
                candidate.late_seconds + (timer.limit_seconds or 0.0),
                timer.limit_seconds or 0.0,
                step_seconds=candidate.time.seconds,
                startup_seconds=timer.estimate_startup_seconds(candidate.strategy),
                steps=timer.steps or 0,
            ),
        )
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
