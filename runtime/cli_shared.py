"""What the commands share: exit codes, consoles, options, and files that they write where a person says so."""

from __future__ import annotations

from pathlib import Path

import click
from rich.text import Text

from ..recipes.errors import FituneError
from .redaction import redact
from .shown import ShownConsole, show_text

EXIT_ERROR, EXIT_USAGE, EXIT_NOTHING_FITS, EXIT_INTERRUPTED = 1, 2, 3, 130

console = ShownConsole(highlight=False)
problems = ShownConsole(stderr=True, highlight=False)

SET_OPTION = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Override a key of the recipe; may be repeated.",
)


def print_error(message: str) -> None:
    """One error, on stderr."""
    problems.print(Text.assemble(("error: ", "bold red"), show_text(redact(message))), soft_wrap=True)


def check_written(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """A file to write, before anything is planned for it: its suffix keeps a recipe from being overwritten."""
    suffix = "." + str(parameter.metavar).partition(".")[2]
    if value is None:
        return None
    if Path(value).suffix != suffix:
        raise click.BadParameter(f'"{value}" does not end in {suffix}', context, parameter)
    if not Path(value).absolute().parent.is_dir():
        raise FituneError(f"{value}: cannot be written: there is no folder {Path(value).parent}")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a whole file; FituneError says why it cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FituneError(f"{path}: cannot be written: {error.strerror}") from error
