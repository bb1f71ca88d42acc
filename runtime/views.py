"""From a recipe to the views over many plans, printed as tables or as JSON lines; each returns its exit code.

All of them plan as `fitune plan --quick` does: closed forms, and rows of `data.max_length` tokens.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import click
from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from ..planner.catalog import list_gpus
from ..planner.plan import Plan, make_plan
from ..planner.show.views import render_cards, render_grid, render_what_fits
from ..planner.strategy import Device
from ..planner.views import (
    Axis,
    Card,
    Cell,
    FailedCell,
    MeasureFactory,
    find_what_fits,
    make_card_device,
    make_cards,
    make_grid,
    parse_axes,
)
from ..recipes.errors import FituneError, Problem, RecipeError
from ..recipes.schema import BudgetTable
from .machine.devices import has_liger
from .planning import Job

EXIT_ERROR, EXIT_NOTHING_FITS = 1, 3


def show_view(
    words: Sequence[str], overrides: Sequence[str], sweep: Sequence[str], console: Console, *, as_json: bool
) -> int:
    """A sweep where there are axes, else what fits. click gives --sweep one value: further axes are among the words."""
    axes = [word for word in words if sweep and "=" in word and not Path(word).exists()]
    recipes = [word for word in words if word not in axes]
    if len(recipes) != 1:
        raise click.UsageError("--sweep and --what-fits take one recipe")
    recipe = recipes[0]
    try:
        if sweep:
            return show_sweep(recipe, overrides, [*sweep, *axes], console, as_json=as_json)
        return show_what_fits(recipe, overrides, console, as_json=as_json)
    except FituneError as error:
        if not as_json:
            raise
        click.echo(json.dumps({"recipe": recipe, "error": str(error)}))
        return EXIT_ERROR


def show_cards(
    path: str,
    overrides: Sequence[str],
    console: Console,
    *,
    as_json: bool,
    make_measure: MeasureFactory | None = None,
) -> int:
    """Every card of the catalog: 0 where one of them can run the recipe."""
    job = Job(path, overrides)
    # The cards are the catalog's, so nothing of this machine is looked at.
    any_card = make_card_device(list_gpus()[0], job.recipe_file.recipe.budget, has_liger=has_liger())
    inputs = job.find_inputs(quick=True, device=any_card)
    cards = make_cards(inputs, make_measure)
    able = [card for card in cards if isinstance(card, Card) and card.fits]
    if as_json:
        _print_json(cards)
    else:
        limit = job.recipe_file.recipe.budget.memory
        render_cards(cards, console, sequence_length=inputs.data.longest_row_tokens, limit=limit)
        if able:
            _print_next(console, path, (*overrides, *_name_card(able[0], job.recipe_file.recipe.budget)))
    return 0 if able else EXIT_NOTHING_FITS


def show_sweep(path: str, overrides: Sequence[str], words: Sequence[str], console: Console, *, as_json: bool) -> int:
    """A grid of plans, one for each combination: 1 where a combination is an error, else 0 where one fits."""
    axes = parse_axes(words)
    cells = plan_sweep(path, overrides, axes)
    if as_json:
        _print_json(cells)
    else:
        render_grid(axes, cells, console)
    if any(isinstance(cell, FailedCell) for cell in cells):
        return EXIT_ERROR
    return 0 if any(isinstance(cell, Cell) and cell.fits for cell in cells) else EXIT_NOTHING_FITS


def show_what_fits(
    path: str,
    overrides: Sequence[str],
    console: Console,
    *,
    as_json: bool,
    make_measure: MeasureFactory | None = None,
) -> int:
    """The longest rows and the largest model for the recipe's device: 0 where there is one or the other."""
    inputs = Job(path, overrides).find_inputs(quick=True)
    found = find_what_fits(inputs, make_measure)
    if as_json:
        _print_json([found])
    else:
        render_what_fits(found, console, sequence_length=inputs.data.longest_row_tokens)
        if found.longest is not None:
            _print_next(console, path, (*overrides, f"data.max_length={found.longest.sequence_length}"))
    return EXIT_NOTHING_FITS if found.longest is None and found.largest is None else 0


def plan_sweep(path: str, overrides: Sequence[str], axes: Sequence[Axis]) -> tuple[Cell | FailedCell, ...]:
    """Each combination as a recipe of its own; a device is probed once, so that all cells have the same budget."""
    devices: dict[tuple[BudgetTable, Path], Device] = {}

    def plan_cell(settings: Mapping[str, str]) -> Plan:
        try:
            job = Job(path, (*overrides, *(f"{key}={value}" for key, value in settings.items())))
        except RecipeError as error:
            raise _name_option(error, settings) from error
        place = job.recipe_file.recipe.budget, job.output_parent
        if place not in devices:
            devices[place] = job.probe_device()
        return make_plan(job.find_inputs(quick=True, device=devices[place]), with_reasons=False)

    return make_grid(axes, plan_cell)


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
