"""The spec of `fitune data make`: what is allowed, and what is said about the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from fitune.recipes.errors import RecipeError
from fitune.recipes.load import parse_toml
from fitune.recipes.make_spec import MakeSpec, load_spec, make_spec_file, read_example

SPEC = """
[source]
topics = ["feta"]
[persona]
name = "Pavlos"
description = "You are Pavlos."
[output]
file = "out.jsonl"
rows = 8
[endpoint]
base_url = "http://localhost:8000/v1"
model = "m"
"""


def load(folder: Path, text: str, **limits: Any) -> MakeSpec:
    path = folder / "spec.toml"
    path.write_text(text, encoding="utf-8")
    return load_spec(path, limits).spec


def read_problems(folder: Path, text: str, **limits: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, **limits)
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


def test_the_shipped_example_is_a_valid_spec(tmp_path: Path) -> None:
    spec = load(tmp_path, read_example())
    assert spec.persona.name == "Pavlos"
    assert spec.requests_needed == 12


def test_twice_the_needed_requests_are_allowed_unless_the_spec_says_otherwise(tmp_path: Path) -> None:
    assert load(tmp_path, SPEC).max_requests == 4
    assert load(tmp_path, SPEC, max_requests=3).max_requests == 3


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('topics = ["feta"]', "", "spec.toml: source.topics: give either source.documents or source.topics"),
        (
            'topics = ["feta"]',
            'topics = ["feta"]\ndocuments = "a.md"',
            "spec.toml: source.topics: give either source.documents or source.topics",
        ),
        ("rows = 8", "row = 8", 'spec.toml: output.row: is not a key of [output] (did you mean "rows"?)'),
        ("[persona]", "[person]", 'spec.toml: person: is not a table of a spec (did you mean "persona"?)'),
        ('"out.jsonl"', '"out.csv"', 'spec.toml: output.file: "out.csv" does not end in .jsonl'),
        (
            "rows = 8",
            "rows = 8\ninclude_passage = true",
            "spec.toml: output: include_passage needs source.documents: a topic is no passage",
        ),
        (
            'model = "m"',
            'model = "m"\nprice_input = 1',
            "spec.toml: endpoint.price_output: give both endpoint.price_input and endpoint.price_output, or neither",
        ),
        (
            'model = "m"',
            'model = "m"\n[generation.extra]\nmodel = "x"',
            "spec.toml: generation.extra: cannot set model: fitune sets them itself",
        ),
        (
            'model = "m"',
            'model = "m"\n[generation.extra]\nday = 2026-11-23',
            "spec.toml: generation.extra: is not JSON: Object of type date is not JSON serializable",
        ),
    ],
)
def test_a_mistake_is_named_with_its_key_and_what_is_allowed(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert problem in read_problems(tmp_path, SPEC.replace(old, new))


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    text = SPEC.replace("rows = 8", "rows = 0").replace('name = "Pavlos"', 'name = ""').replace('model = "m"', "")
    assert len(read_problems(tmp_path, text)) == 3


def test_a_limit_of_the_command_line_is_named_as_its_option(tmp_path: Path) -> None:
    assert read_problems(tmp_path, SPEC, concurrency=0) == ["--concurrency: 0 is not a whole number from 1 to 256"]
    assert read_problems(tmp_path, SPEC, max_cost=1.0) == [
        "spec.toml: limits: max_cost needs endpoint.price_input and endpoint.price_output"
    ]


@pytest.mark.parametrize("key", ["sk-abcdefgh12345678", "abc", "A KEY", "hf_AbCd", "ÄÖ", "A" * 65])
def test_a_key_in_place_of_its_variables_name_is_refused_and_not_shown(tmp_path: Path, key: str) -> None:
    (problem,) = read_problems(tmp_path, SPEC + f'api_key_env = "{key}"\n')
    assert key not in problem
    assert "never the key itself" in problem


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host/v1",
        "http://",
        "https://user:secret@host/v1",
        "https://host/v1?key=secret",
        "https://host/v1#secret",
        "http://host:99999/v1",
        "http://ho st/v1",
    ],
)
def test_a_url_is_a_host_and_a_path_and_never_holds_a_key(tmp_path: Path, url: str) -> None:
    (problem,) = read_problems(tmp_path, SPEC.replace("http://localhost:8000/v1", url))
    assert problem.startswith("spec.toml: endpoint.base_url: ")
    assert "secret" not in problem


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)
KEYS = {name: list(field.annotation.model_fields) for name, field in MakeSpec.model_fields.items()}  # type: ignore


@settings(max_examples=1000)
@given(data=st.data())
def test_any_value_for_any_key_is_taken_or_is_a_message(data: st.DataObject) -> None:
    spec = tomli.loads(SPEC)
    for _ in range(data.draw(st.integers(1, 3))):
        table = data.draw(st.sampled_from([*KEYS, "other"]))
        key = data.draw(st.sampled_from([*KEYS.get(table, []), "other"]))
        tables = spec.setdefault(table, {})
        if isinstance(tables, dict):
            tables[key] = data.draw(VALUES)
        if data.draw(st.booleans()):
            spec[table] = data.draw(VALUES)
    try:
        made = make_spec_file(Path("spec.toml"), spec, {})
    except RecipeError as error:
        assert all(str(problem).startswith("spec.toml: ") for problem in error.problems)
    else:
        assert made.spec.max_requests >= 1


@settings(max_examples=1000)
@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from('[]="\n#.{},')), max_size=200))
def test_any_text_is_a_spec_or_a_message(text: str) -> None:
    try:
        given_spec = parse_toml(text, Path("spec.toml"), hint="")
        make_spec_file(Path("spec.toml"), given_spec, {"max_cost": 1.0})
    except RecipeError as error:
        assert str(error)


def test_an_empty_file_says_where_to_start(tmp_path: Path) -> None:
    (problem,) = read_problems(tmp_path, " \n")
    assert problem == "spec.toml: is empty (`fitune data make --example` prints a spec to start from)"
