"""Files that commands write where a person says so."""

from __future__ import annotations

from pathlib import Path

import click

from ..recipes.errors import FituneError


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
