"""Libraries in other versions than the tested ones: the plan says so in one line, and only then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import make_gpu, make_inputs

from fitune.planner.plan import make_plan
from fitune.planner.versions import KNOWN_CHANGES, TESTED, list_version_warnings

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
INSTALLED = {"torch": "2.13.0+cpu", "transformers": "5.23.1", "peft": "0.21.2", "bitsandbytes": "0.50.2"}


def test_the_versions_of_constraints_txt_are_tested_ones() -> None:
    lines = [line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line]
    constrained = {name: version for name, version in lines if name in TESTED}
    assert constrained.keys() == TESTED.keys()
    assert list_version_warnings(constrained) == ()


def test_patch_and_build_of_a_version_do_not_matter() -> None:
    assert list_version_warnings(INSTALLED) == ()
    assert list_version_warnings({"torch": "2.11.3+cu130"}) == ()


@pytest.mark.parametrize("version", ["2.14.0", "2.12.0", "3.13.0", "2.1", "unknown", ""])
def test_another_major_or_minor_version_is_named_with_the_tested_ones(version: str) -> None:
    (line,) = list_version_warnings(INSTALLED | {"torch": version})
    assert f"torch {version} (but with 2.11 and 2.13)" in line
    assert "peft" not in line


def test_several_other_versions_are_one_line() -> None:
    (line,) = list_version_warnings(INSTALLED | {"peft": "0.22.0", "bitsandbytes": "1.0.0"})
    assert "peft 0.22.0 (but with 0.21), bitsandbytes 1.0.0 (but with 0.50)" in line


def test_a_change_that_is_known_to_lie_between_is_named() -> None:
    (line,) = list_version_warnings({"transformers": "4.57.1"})
    assert "from 5.0 on a weight is loaded in full precision" in line
    (line,) = list_version_warnings({"transformers": "5.24.0"})
    assert "full precision" not in line


def test_known_changes_are_of_libraries_that_are_compared() -> None:
    assert KNOWN_CHANGES.keys() <= TESTED.keys()


@given(st.dictionaries(st.sampled_from([*TESTED, "fitune", "accelerate"]), st.text(max_size=12)))
def test_any_version_text_gives_at_most_one_line(versions: dict[str, str]) -> None:
    assert len(list_version_warnings(versions)) <= 1


def test_a_plan_made_with_another_version_says_so() -> None:
    inputs = make_inputs({}, make_gpu("H100 80GB"))
    assert make_plan(replace(inputs, versions=INSTALLED)).warnings == ()
    (warning,) = make_plan(replace(inputs, versions=INSTALLED | {"torch": "2.14.0"})).warnings
    assert "torch 2.14.0" in warning
