"""A recipe file becomes a frozen `RecipeFile`, or one RecipeError that names everything that is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli
from pydantic import ValidationError

from .errors import Problem, RecipeError
from .problems import Key, find_nearest, make_problems, render_key
from .schema import Recipe, make_schema

# Whoever names a weights file by mistake must not wait until it is read.
_MAX_RECIPE_BYTES = 2**20

# Setting one of a pair on the command line replaces the other one in the file.
_REPLACES = {("train", "max_steps"): ("train", "epochs"), ("train", "epochs"): ("train", "max_steps")}


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A valid recipe and where it came from.

    path:      the file as the user gave it; of a shipped recipe given by its name, the shipped file
    recipe:    the recipe, with what the command line overrode
    """

    path: Path
    recipe: Recipe

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    @property
    def folder(self) -> Path:
        """The folder that the recipe's relative paths start from."""
        return self.path.parent

    @property
    def resolved(self) -> dict[str, Any]:
        """The recipe with defaults filled in, ready for JSON; unset is null."""
        return self.recipe.model_dump(mode="json")

    @property
    def sha256(self) -> str:
        """SHA-256 in hexadecimal of `resolved` as canonical JSON: ASCII, keys sorted, no spaces."""
        canonical = json.dumps(self.resolved, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def resolve(self, written: str) -> Path:
        """The path that `written` means in this recipe: `~` is the home folder, relative is to the recipe's folder."""
        try:
            return self.folder / Path(written).expanduser()
        except RuntimeError as error:
            raise RecipeError(
                [Problem(where=printable(self.path), what=f'"{written}": there is no such user')]
            ) from error


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> RecipeFile:
    """Reads a recipe file, or a shipped recipe by its name; `overrides` are such as `train.max_steps=10`."""
    found = _find_file(Path(path))
    return parse_recipe(read_text(found), found, overrides)


def parse_recipe(text: str, path: Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """The recipe in `text`; `path` is where it would lie. Raises RecipeError with all problems at once."""
    given = parse_toml(text, path, hint="`fitune init` writes a recipe to start from")
    overridden, problems = _override(given, overrides)
    return RecipeFile(path=path, recipe=_validate(given, path, overridden, problems))


def parse_toml(text: str, path: Path, *, hint: str) -> dict[str, Any]:
    """The tables in `text`; RecipeError where it is not TOML, with `hint` where it is empty."""
    if not text.strip():
        raise RecipeError([Problem(where=printable(path), what="is empty", hint=hint)])
    try:
        return tomli.loads(text)
    except RecursionError as error:
        raise RecipeError([Problem(where=printable(path), what="is nested too deeply")]) from error
    except tomli.TOMLDecodeError as error:
        raise RecipeError([Problem(where=printable(path), what=f"is not valid TOML: {error}")]) from error
    except ValueError as error:  # int() refuses thousands of digits
        raise RecipeError([Problem(where=printable(path), what="has a number with too many digits")]) from error


def recipe_from_resolved(resolved: Mapping[str, Any], path: Path) -> RecipeFile:
    """The recipe of a plan, from its `resolved_recipe`."""
    return RecipeFile(path=path, recipe=_validate(resolved, path))


def find_shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with fitune, by name; in a checkout and in an installation alike."""
    paths = sorted(Path(__file__).parent.glob("*.toml"))
    return {path.stem: path for path in paths if path.stem != "starter"}


def make_no_such_recipe(name: str) -> RecipeError:
    """There is neither a file nor a shipped recipe of that name; the nearest shipped ones are offered."""
    shipped = list(find_shipped_recipes())
    nearest = find_nearest(Path(name).stem, shipped)
    hint = f'did you mean the shipped recipe "{nearest}"?' if nearest else f"shipped recipes: {', '.join(shipped)}"
    return RecipeError([Problem(where=printable(name), what="no such recipe", hint=hint)])


def printable(given: Path | str) -> str:
    """The text as given; escaped where a terminal could not show it."""
    text = str(given)
    return text if text.isprintable() else ascii(text)


def _find_file(path: Path) -> Path:
    try:
        if path.exists() and not path.is_dir():
            return path
        shipped = find_shipped_recipes().get(str(path))
        if shipped:
            return shipped
        if path.is_dir():
            raise RecipeError([Problem(where=printable(path), what="is a folder", hint="a recipe is a TOML file")])
    except OSError as error:
        raise RecipeError([Problem(where=printable(path), what=f"cannot be read: {error.strerror}")]) from error
    except ValueError as error:  # a null byte in the path
        raise RecipeError([Problem(where=printable(path), what=f"cannot be read: {error}")]) from error
    raise make_no_such_recipe(str(path))


def read_text(path: Path) -> str:
    """The text of a TOML file of at most 1 MiB; RecipeError where it cannot be read or is not UTF-8."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise RecipeError([Problem(where=printable(path), what=f"cannot be read: {error.strerror}")]) from error
    if len(content) > _MAX_RECIPE_BYTES:
        raise RecipeError([Problem(where=printable(path), what="is larger than 1 MiB", hint="a TOML file is expected")])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start}"
        raise RecipeError([Problem(where=printable(path), what=what)]) from error


def _override(given: dict[str, Any], overrides: Sequence[str]) -> tuple[set[Key], list[Problem]]:
    """Writes the overrides into `given`; returns their keys and what is wrong with their form."""
    settings: dict[tuple[str, str], str] = {}
    new_tables: set[Key] = set()
    problems = []
    for override in overrides:
        key, equals, value = override.partition("=")
        table, _, name = (part.strip() for part in key.partition("."))
        if not (equals and table and name) or "." in name:
            what = "is not of the form table.key=value, such as train.max_steps=10"
            problems.append(Problem(where=f"--set {printable(override)}", what=what))
        elif any("\ud800" <= character <= "\udfff" for character in override):
            problems.append(Problem(where=f"--set {printable(key)}", what="is not UTF-8 text"))
        else:
            settings[table, name] = value
    for (table, name), value in settings.items():
        if table not in given:
            new_tables.add((table,))
        keys = given.setdefault(table, {})
        if isinstance(keys, dict):
            replaced = _REPLACES.get((table, name))
            if replaced and replaced not in settings:
                keys.pop(replaced[1], None)
            keys[name] = _parse_value(value)
    return {*settings, *new_tables}, problems


def _parse_value(text: str) -> object:
    """A TOML value, or the text itself where it is none: `lora` need not be quoted."""
    try:
        parsed = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _validate(
    given: Mapping[str, Any], path: Path, overridden: set[Key] | None = None, problems: Sequence[Problem] = ()
) -> Recipe:
    def locate(key: Key) -> str:
        is_override = any(key == other or (len(other) > 1 and key[: len(other)] == other) for other in overridden or ())
        return f"--set {render_key(key)}" if is_override else f"{printable(path)}: {render_key(key)}"

    found = list(problems)
    try:
        recipe = Recipe.model_validate(given)
    except ValidationError as error:
        found += make_problems(error, given, locate, make_schema())
    if found:
        raise RecipeError(found)
    return recipe
