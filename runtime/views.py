"""From a recipe to the views over many plans, printed as tables or as JSON lines; each returns its exit code."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from ..planner.catalog import list_gpus
from ..planner.show.views import render_cards, render_grid, render_what_fits
from ..planner.strategy import DataFacts, Device
from ..planner.sweep import Cell, FailedCell, make_grid, parse_axes
from ..planner.views import Card, Case, find_what_fits, make_card_device, make_cards
from ..recipes.data_table import DataTable
from ..recipes.errors import FituneError, Problem, RecipeError
from ..recipes.schema import BudgetTable, ModelTable
from ..recipes.units import format_seconds
from .machine.devices import has_liger
from .planning import Job
from .redaction import redact
from .rehearsing import TimedRehearser

EXIT_ERROR, EXIT_NOTHING_FITS = 1, 3


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """How a view is made and shown.

    quick:         closed forms alone
    limit_seconds: after which no further plan is rehearsed
    as_json:       JSON lines instead of tables
    """

    quick: bool
    limit_seconds: float
    as_json: bool


@dataclass(frozen=True, kw_only=True)
class Screen:
    """Where a view is shown.

    console:  the tables
    problems: the line that tells how far it is
    """

    console: Console
    problems: Console


def show_view(
    words: Sequence[str], overrides: Sequence[str], sweep: Sequence[str], screen: Screen, options: ViewOptions
) -> int:
    """A sweep where there are axes, else what fits. click gives --sweep one value: further axes are among the words."""
    axes = [word for word in words if sweep and "=" in word and not Path(word).exists()]
    recipes = [word for word in words if word not in axes]
    if len(recipes) != 1:
        raise click.UsageError("--sweep and --what-fits take one recipe")
    recipe = recipes[0]
    try:
        if sweep:
            return show_sweep(recipe, overrides, [*sweep, *axes], screen, options)
        return show_what_fits(recipe, overrides, screen, options)
    except FituneError as error:
        if not options.as_json:
            raise
        click.echo(json.dumps({"recipe": recipe, "error": redact(str(error))}))
        return EXIT_ERROR


def show_cards(path: str, overrides: Sequence[str], screen: Screen, options: ViewOptions) -> int:
    """Every card of the catalog: 0 where one of them can run the recipe."""
    job = Job(path, overrides)
    budget = job.recipe_file.recipe.budget
    # The cards are the catalog's, so nothing of this machine is looked at.
    any_card = make_card_device(list_gpus()[0], budget, has_liger=has_liger())
    inputs = job.find_inputs(quick=options.quick, device=any_card)
    case = Case(name=path, inputs=inputs, config=job.source.config)
    with _rehearser(screen, options) as rehearser:
        cards = make_cards(case, rehearser)
    able = [card for card in cards if isinstance(card, Card) and card.fits]
    if options.as_json:
        _print_json(cards)
    else:
        render_cards(cards, screen.console, sequence_length=inputs.data.longest_row_tokens, limit=budget.memory)
        _print_time_limit(screen.console, rehearser, options)
        if able:
            _print_next(screen.console, path, (*overrides, *_name_card(able[0], budget)))
    return 0 if able else EXIT_NOTHING_FITS


def show_sweep(path: str, overrides: Sequence[str], words: Sequence[str], screen: Screen, options: ViewOptions) -> int:
    """A grid of plans, one for each combination: 1 where a combination is an error, else 0 where one fits."""
    axes = parse_axes(words)
    with _rehearser(screen, options) as rehearser:
        cells = make_grid(axes, _CaseMaker(path, overrides, quick=options.quick), rehearser)
    if options.as_json:
        _print_json(cells)
    else:
        render_grid(axes, cells, screen.console)
        _print_time_limit(screen.console, rehearser, options)
    if any(isinstance(cell, FailedCell) for cell in cells):
        return EXIT_ERROR
    return 0 if any(isinstance(cell, Cell) and cell.fits for cell in cells) else EXIT_NOTHING_FITS


def show_what_fits(path: str, overrides: Sequence[str], screen: Screen, options: ViewOptions) -> int:
    """The longest rows and the largest model for the recipe's device: 0 where there is one or the other.

    Both are of rows as long as they may be, so that the dataset is not read.
    """
    job = Job(path, overrides)
    inputs = job.find_inputs(quick=True)
    case = Case(name=path, inputs=inputs, config=job.source.config)
    with _rehearser(screen, options) as rehearser:
        found = find_what_fits(case, rehearser)
    if options.as_json:
        _print_json([found])
    else:
        render_what_fits(found, screen.console, sequence_length=inputs.data.longest_row_tokens)
        _print_time_limit(screen.console, rehearser, options)
        if found.longest is not None:
            _print_next(screen.console, path, (*overrides, f"data.max_length={found.longest.sequence_length}"))
    return EXIT_NOTHING_FITS if found.longest is None and found.largest is None else 0


class _CaseMaker:
    """Each combination of a sweep as a recipe of its own.

    A device is probed once, so that all have the same budget, and a dataset is tokenised once for each length.
    """

    def __init__(self, path: str, overrides: Sequence[str], *, quick: bool) -> None:
        self._path, self._overrides, self._quick = path, overrides, quick
        self._devices: dict[tuple[BudgetTable, Path], Device] = {}
        self._facts: dict[tuple[ModelTable, DataTable, int], DataFacts] = {}

    def __call__(self, settings: Mapping[str, str]) -> Case:
        words = [f"{key}={value}" for key, value in settings.items()]
        try:
            job = Job(self._path, (*self._overrides, *words))
        except RecipeError as error:
            raise _name_option(error, settings) from error
        recipe = job.recipe_file.recipe
        place, rows = (recipe.budget, job.output_parent), (recipe.model, recipe.data, recipe.train.seed)
        if place not in self._devices:
            self._devices[place] = job.probe_device()
        if rows not in self._facts:
            self._facts[rows] = job.find_data_facts(quick=self._quick)
        inputs = job.find_inputs(quick=self._quick, device=self._devices[place], data=self._facts[rows])
        return Case(name=", ".join(words), inputs=inputs, config=job.source.config)


def _rehearser(screen: Screen, options: ViewOptions) -> contextlib.AbstractContextManager[TimedRehearser | None]:
    return contextlib.nullcontext() if options.quick else TimedRehearser(screen.problems, options.limit_seconds)


def _print_time_limit(console: Console, rehearser: TimedRehearser | None, options: ViewOptions) -> None:
    if rehearser is not None and rehearser.is_over:
        limit = format_seconds(options.limit_seconds)
        console.print(Text(f"not all was rehearsed within {limit}; give it longer with --time-limit SECONDS"))


def _name_card(card: Card, budget: BudgetTable) -> tuple[str, ...]:
    """Overrides that plan for this card; a `budget.memory` that is more than the card has is lowered to it."""
    gpu = f"budget.gpu={card.gpu}"
    is_larger = budget.memory_bytes is not None and budget.memory_bytes > card.budget_bytes
    return (gpu, f'budget.memory="{card.budget_bytes}B"') if is_larger else (gpu,)


def _name_option(error: RecipeError, settings: Mapping[str, str]) -> RecipeError:
    """The same problems; those of a swept key are of --sweep, not of --set."""
    swept = {f"--set {key}": f"--sweep {key}" for key in settings}
    return RecipeError(
        [Problem(where=swept.get(one.where, one.where), what=one.what, hint=one.hint) for one in error.problems]
    )


def _print_json(values: Iterable[BaseModel]) -> None:
    for value in values:
        click.echo(value.model_dump_json())


def _print_next(console: Console, path: str, overrides: Sequence[str]) -> None:
    settings = [word for one in overrides for word in ("--set", one)]
    command = shlex.join(["fitune", "plan", path, *settings])
    console.print(Text.assemble("next: ", (command, "bold")), soft_wrap=True)
