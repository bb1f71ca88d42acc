"""`fitune data RECIPE`: the data check, and the commands that make data."""

from __future__ import annotations

import json
import sys

import click
from rich.console import Console

from ..recipes.errors import FituneError

console = Console(highlight=False)


class DataGroup(click.Group):
    """A group whose first word may be a recipe instead of a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = [word for word in args if not word.startswith("-")]
        if words and words[0] not in self.commands:
            args = ["check", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "RECIPE [--set TABLE.KEY=VALUE] [--json] | COMMAND")


@click.group(cls=DataGroup)
def data() -> None:
    """Check the data of a recipe: rows, tokens, what is trained, duplicates, leaks; some rows as the model sees them.

    A problem that a run would be refused for ends it with exit code 1.
    """


@data.command(hidden=True)
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a key of the recipe.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def check(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check the data of a recipe."""
    from .data_view import render_data
    from .planning import Job

    try:
        report = Job(recipe, overrides).data_report
    except FituneError as error:
        if as_json:
            click.echo(json.dumps({"recipe": recipe, "problems": str(error).splitlines()}))
            sys.exit(1)
        raise
    if as_json:
        click.echo(report.model_dump_json())
    else:
        render_data(report, console)
    sys.exit(1 if report.problems else 0)
