"""The recipes that ship with fitune, and the starter that `fitune init` writes."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from .load import find_shipped_recipes, make_no_such_recipe, parse_recipe, printable


@dataclass(frozen=True, kw_only=True)
class ShippedRecipe:
    """A recipe that ships with fitune.

    name:         what `load_recipe` and `fitune recipes show` know it by
    path:         its file
    description:  one line: the file's first comment
    """

    name: str
    path: Path
    description: str


def list_shipped() -> list[ShippedRecipe]:
    """All shipped recipes, by name."""
    return [
        ShippedRecipe(name=name, path=path, description=_read_description(path))
        for name, path in find_shipped_recipes().items()
    ]


def read_shipped(name: str) -> str:
    """The text of a shipped recipe; RecipeError with the nearest name if there is none."""
    path = find_shipped_recipes().get(name)
    if path is None:
        raise make_no_such_recipe(name)
    return path.read_text(encoding="utf-8")


def make_starter(
    model: str | None, data: str | None, held_out: str | None = None, *, path: Path = Path("recipe.toml")
) -> str:
    """A commented recipe to start from; None leaves the embedded model, `train.jsonl` beside the recipe, no eval.

    path: where it will be written: files that are named from the current folder are written as seen from there
    """
    model, data, held_out = (None if one is None else _write_from(path.parent, one) for one in (model, data, held_out))
    text = Path(__file__).with_name("starter.toml").read_text(encoding="utf-8")
    # Markers are replaced from the end, so that text put in is never searched for the other marker.
    before, rest = text.split('"$model"')
    before = before.replace(" recipe.toml ", f" {shlex.quote(printable(path))} ")
    between, after = rest.split('"$data"')
    if held_out is not None:
        after = after.replace("# eval = 0.1", f"eval = {_quote(held_out)}", 1)
    text = (
        before
        + _quote("smollm2-135m-instruct" if model is None else model)
        + between
        + _quote("train.jsonl" if data is None else data)
        + after
    )
    parse_recipe(text, path)
    return text


def _write_from(folder: Path, named: str) -> str:
    """A file or folder of the current folder as a recipe in `folder` names it; anything else as it is."""
    try:
        is_here = bool(named) and Path(named).exists()
    except (OSError, ValueError):  # a name too long, a null byte
        return named
    if not is_here or Path(named).is_absolute() or folder.resolve() == Path.cwd():
        return named
    return os.path.relpath(named, folder)


def _read_description(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()


def _quote(text: str) -> str:
    """A TOML basic string; JSON's escapes are TOML's, but for the delete character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
