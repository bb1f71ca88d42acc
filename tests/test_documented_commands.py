"""Every command line in README.md and docs/ is one that fitune takes, and every command is in one of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fitune.runtime.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDER = re.compile(r"[A-Z][A-Z_.0-9]*|\.\.\.|\[.*\]")


def list_command_lines(page: Path) -> Iterator[str]:
    """What follows `fitune` in code: in spans, and in lines of blocks (after a prompt, before a pipe or a comment)."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for part in block.splitlines() for line in re.split(r"&&|;", part)]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in [*lines, *spans]:
        found = re.match(r"\s*(?:\$ )?fitune +(.+)", line)
        if found:
            yield found[1]


def walk(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and what is left of them."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words:
        named = command.commands.get(words[0])
        if named is None:
            # `fitune data RECIPE`: the group's first word may be a recipe.
            return command.commands.get("check", command), words
        command, words = named, words[1:]
    return command, words


def list_all(group: click.Group, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        yield (*prefix, name)
        if isinstance(command, click.Group):
            yield from list_all(command, (*prefix, name))


LINES = sorted({(page.name, line) for page in PAGES for line in list_command_lines(page)})


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line}" for page, line in LINES])
def test_a_command_line_of_the_documents_names_a_command_and_its_options(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    if PLACEHOLDER.fullmatch(words[0]):
        return
    command, rest = walk(words)
    assert command is not cli or words[0].startswith("-"), f"{page}: there is no command {words[0]}"
    known = {name for one in (*cli.params, *command.params) for name in (*one.opts, *one.secondary_opts)}
    given = {word.split("=")[0] for word in rest if word.startswith("-") and len(word) > 1}
    assert given - known - {"-h", "--help", "--version"} == set(), f"{page}: fitune {line}"


def test_there_are_command_lines_to_check() -> None:
    assert len(LINES) > 30


def test_every_command_is_in_a_document() -> None:
    lines = [line for page in PAGES for line in list_command_lines(page)]
    named = [" ".join(path) for path in list_all(cli)]
    assert [name for name in named if not any(f"{line} ".startswith(f"{name} ") for line in lines)] == []
