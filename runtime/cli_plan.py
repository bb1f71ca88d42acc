"""`fitune plan`, `fitune gpus` and `fitune validate`: what is said of recipes before anything runs."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click
from rich.text import Text

from ..recipes.errors import FituneError
from .cli_shared import (
    EXIT_ERROR,
    EXIT_NOTHING_FITS,
    SET_OPTION,
    check_written,
    console,
    print_error,
    problems,
    write_text,
)
from .redaction import redact

TIME_LIMIT_OPTION = click.option(
    "--time-limit",
    type=click.FloatRange(min=0),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="Of many plans, those that were not rehearsed by then are shown by closed forms.",
)


@click.command()
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@SET_OPTION
@click.option("--json", "as_json", is_flag=True, help="One JSON object a recipe, one a line.")
@click.option("--quick", is_flag=True, help="Closed forms alone: no torch, and the dataset is not read.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    callback=check_written,
    metavar="FILE.json",
    help="Save the plan, for `fitune run FILE.json`.",
)
@click.option(
    "--html",
    type=click.Path(dir_okay=False),
    callback=check_written,
    metavar="FILE.html",
    help="Write the plan and the step's timeline as one HTML page.",
)
@click.option(
    "--sweep",
    multiple=True,
    metavar="KEY=V1,V2 [KEY=V1,V2...]",
    help="A grid of plans: one for each combination of the values.",
)
@click.option("--what-fits", is_flag=True, help="The longest rows and the largest model for the device.")
@TIME_LIMIT_OPTION
def plan(
    recipes: tuple[str, ...],
    overrides: tuple[str, ...],
    as_json: bool,
    quick: bool,
    output: str | None,
    html: str | None,
    sweep: tuple[str, ...],
    what_fits: bool,
    time_limit: float,
) -> None:
    """Show what a run would need, without weights and without a GPU."""
    if sweep or what_fits:
        from .views import Screen, ViewOptions, show_view

        if output is not None or html is not None or (sweep and what_fits):
            raise click.UsageError("--sweep, --what-fits, and -o or --html exclude each other")
        options = ViewOptions(quick=quick, limit_seconds=time_limit, as_json=as_json)
        sys.exit(show_view(recipes, overrides, sweep, Screen(console=console, problems=problems), options))
    from ..planner.show.plan import render_plan
    from .planning import Job

    if (output is not None or html is not None) and len(recipes) != 1:
        raise click.UsageError("-o and --html write one plan: give one recipe")
    codes = [0]
    for path in recipes:
        try:
            made = Job(path, overrides).make_plan(quick=quick)
        except FituneError as error:
            _show_plan_error(path, error, as_json=as_json)
            codes.append(EXIT_ERROR)
            continue
        if output is not None:
            write_text(Path(output), made.model_dump_json(indent=2) + "\n")
        if html is not None:
            from ..planner.show.page import render_page

            write_text(Path(html), render_page(made))
        codes.append(0 if made.fits else EXIT_NOTHING_FITS)
        if as_json:
            click.echo(made.model_dump_json())
        else:
            settings = [word for one in overrides for word in ("--set", one)]
            command = shlex.join(["fitune", "run", *([output] if output else [path, *settings])])
            render_plan(made, console, next_command=command if made.fits else None)
    sys.exit(EXIT_ERROR if EXIT_ERROR in codes else max(codes))


@click.command()
@click.argument("recipe")
@SET_OPTION
@click.option("--json", "as_json", is_flag=True, help="One JSON object a card, one a line.")
@click.option("--quick", is_flag=True, help="Closed forms alone: no torch, and the dataset is not read.")
@TIME_LIMIT_OPTION
def gpus(recipe: str, overrides: tuple[str, ...], as_json: bool, quick: bool, time_limit: float) -> None:
    """Show which cards of the catalog can run a recipe, and how."""
    from .views import Screen, ViewOptions, show_cards

    options = ViewOptions(quick=quick, limit_seconds=time_limit, as_json=as_json)
    sys.exit(show_cards(recipe, overrides, Screen(console=console, problems=problems), options))


@click.command()
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@SET_OPTION
def validate(recipes: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Check recipes: keys, model, every row of the dataset."""
    from .planning import Job, validate_job

    failed = False
    for path in recipes:
        try:
            found = validate_job(Job(path, overrides))
        except FituneError as error:
            failed = True
            _show_plan_error(path, error, as_json=False)
        else:
            console.print(Text.assemble(("ok", "green"), f" {path}: {found}"), soft_wrap=True)
    sys.exit(EXIT_ERROR if failed else 0)


def _show_plan_error(path: str, error: FituneError, *, as_json: bool) -> None:
    if click.get_current_context().find_root().obj["debug"]:
        raise error
    if as_json:
        click.echo(json.dumps({"recipe": path, "error": redact(str(error))}))
    else:
        print_error(str(error))
