"""`fitune data RECIPE`: the data check, and the commands that make data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from ..recipes.errors import FituneError
from ..recipes.load import find_shipped_recipes
from ..recipes.problems import find_nearest
from .cli_shared import EXIT_ERROR, SET_OPTION, console
from .redaction import redact


class DataGroup(click.Group):
    """A group whose first word may be a recipe instead of a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = [word for word in args if not word.startswith("-")]
        if words and words[0] not in self.commands:
            commands = [name for name, command in self.commands.items() if not command.hidden]
            meant = find_nearest(words[0], commands)
            if meant is not None and words[0] not in find_shipped_recipes() and not Path(words[0]).exists():
                raise click.UsageError(f'there is no command and no recipe "{words[0]}" (did you mean "{meant}"?)', ctx)
            args = ["check", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "RECIPE [--set TABLE.KEY=VALUE] [--json] | COMMAND")


@click.group(cls=DataGroup)
def data() -> None:
    """Check the data of a recipe, or make data (`fitune data make`).

    The check shows rows, tokens, what is trained, duplicates, leaks, and some rows as the model sees them.
    A problem that a run would be refused for ends it with exit code 1.
    """


@data.command(hidden=True)
@click.argument("recipe")
@SET_OPTION
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def check(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check the data of a recipe."""
    from .data.view import render_data
    from .planning import Job

    try:
        report = Job(recipe, overrides).data_report
    except FituneError as error:
        if as_json:
            click.echo(json.dumps({"recipe": recipe, "problems": redact(str(error)).splitlines()}))
            sys.exit(EXIT_ERROR)
        raise
    if as_json:
        click.echo(report.model_dump_json())
    else:
        render_data(report, console)
    sys.exit(EXIT_ERROR if report.problems else 0)


@data.command()
@click.argument("spec", required=False, type=click.Path(path_type=Path), metavar="SPEC.toml")
@click.option(
    "--dry-run", is_flag=True, help="Show prompts, number of requests and the most they can cost; send nothing."
)
@click.option("--max-cost", type=float, help="Most that all requests may cost, by the spec's prices.")
@click.option("--max-requests", type=int, help="Most requests, repeated ones included.")
@click.option("--requests-per-minute", type=int, help="Most requests in any 60 seconds.")
@click.option("--tokens-per-minute", type=int, help="Most tokens in any 60 seconds, prompt and answer.")
@click.option("--concurrency", type=int, help="Requests under way at once.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--example", is_flag=True, help="Print a spec to start from.")
def make(
    spec: Path | None,
    dry_run: bool,
    max_cost: float | None,
    max_requests: int | None,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    concurrency: int | None,
    as_json: bool,
    example: bool,
) -> None:
    """Make an instruction dataset: questions about documents or topics, answered by a persona.

    SPEC.toml says what about, who answers, which endpoint, what it may cost. An interrupted run goes on where it was
    when it is started again: no answer is paid for twice.
    """
    from ..recipes.make_spec import load_spec, read_example

    if example:
        click.echo(read_example(), nl=False)
        return
    if spec is None:
        raise click.UsageError("give a SPEC.toml; --example prints one to start from")
    limits = {
        "max_cost": max_cost,
        "max_requests": max_requests,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrency": concurrency,
    }
    from .make.command import run_make, show_dry_run

    spec_file = load_spec(spec, limits)
    if dry_run:
        show_dry_run(spec_file, console, as_json=as_json)
    else:
        sys.exit(run_make(spec_file, console, as_json=as_json))
