"""`fitune data make`, shown: what will be sent, progress, what came of it."""

from __future__ import annotations

import shlex
from contextlib import nullcontext

import click
from rich.console import Console
from rich.text import Text

from ...recipes.errors import DataError
from ...recipes.make_spec import SpecFile
from ..shown import ShownConsole, show_text
from .client import read_key
from .dataset import make_dataset
from .render import make_dry_run, render_dry_run, render_made, render_prompts


def show_dry_run(spec_file: SpecFile, console: Console, *, as_json: bool) -> None:
    """Print what would be sent; nothing is."""
    dry_run = make_dry_run(spec_file)
    if as_json:
        click.echo(dry_run.model_dump_json())
        return
    render_dry_run(dry_run, spec_file.spec, console)
    render_prompts(dry_run, console)
    command = shlex.join(["fitune", "data", "make", str(spec_file.path)])
    console.print(Text.assemble("\nnothing was sent; next: ", (command, "bold")), soft_wrap=True)


def run_make(spec_file: SpecFile, console: Console, *, as_json: bool) -> int:
    """Make the dataset; returns the exit code: 0, 1 where the endpoint or its answers were no use, 130 or 143."""
    read_key(spec_file)
    errors = ShownConsole(stderr=True, highlight=False)
    if not as_json:
        render_dry_run(make_dry_run(spec_file), spec_file.spec, console)
    status = console.status("") if console.is_terminal and not as_json else nullcontext()
    with status as line:

        def show(text: str) -> None:
            if line is not None:
                line.update(Text(text))

        def tell(message: str) -> None:
            errors.print(Text.assemble(("note: ", "yellow"), show_text(message)), soft_wrap=True)

        report = make_dataset(spec_file, show_progress=show, tell=tell)
    if as_json:
        click.echo(report.model_dump_json())
    else:
        render_made(report, spec_file, console)
    if report.status == "failed":
        raise DataError(str(report.why))
    if report.why is not None:
        errors.print(Text.assemble(("note: ", "yellow"), f"stopped: {report.why}"), soft_wrap=True)
    return 0 if report.signal is None else 128 + report.signal
