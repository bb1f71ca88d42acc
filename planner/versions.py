"""Versions of the libraries that the planner's figures were tested with, and those known to change memory."""

from __future__ import annotations

import re
from collections.abc import Mapping

Release = tuple[int, int]

TESTED: dict[str, tuple[Release, ...]] = {
    "torch": ((2, 11), (2, 13)),
    "transformers": ((5, 23),),
    "peft": ((0, 21),),
    "bitsandbytes": ((0, 50),),
}
"""Major and minor versions: those of constraints.txt, and of torch also the one that measured tests/data."""
KNOWN_CHANGES: dict[str, tuple[tuple[Release, str], ...]] = {
    "transformers": (((5, 0), "a weight is loaded in full precision before it is quantised"),),
}
"""Since which version memory differs, and how: only what was seen."""


def list_version_warnings(versions: Mapping[str, str]) -> tuple[str, ...]:
    """One line that names every library in another major or minor version than the tested ones, or none.

    versions: of the installed libraries by name; one that is not there is not compared
    """
    others = [
        _describe_other(name, versions[name], tested)
        for name, tested in TESTED.items()
        if name in versions and _parse_release(versions[name]) not in tested
    ]
    return (f"memory may differ from the plan: it is not tested with {', '.join(others)}",) if others else ()


def _describe_other(name: str, version: str, tested: tuple[Release, ...]) -> str:
    """Such as `transformers 4.57.1 (but with 5.23; from 5.0 on a weight is loaded ...)`."""
    installed = _parse_release(version)
    known = " and ".join(_write_release(one) for one in tested)
    between = [
        f"; from {_write_release(since)} on {what}"
        for since, what in KNOWN_CHANGES.get(name, ())
        if installed is not None and min(installed, tested[-1]) < since <= max(installed, tested[-1])
    ]
    return f"{name} {version} (but with {known}{''.join(between)})"


def _parse_release(version: str) -> Release | None:
    """Major and minor: `2.13.0+cpu` is (2, 13); None for what does not begin with them."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return None if match is None else (int(match[1]), int(match[2]))


def _write_release(release: Release) -> str:
    return ".".join(map(str, release))
