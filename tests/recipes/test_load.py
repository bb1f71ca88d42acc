"""Loading a recipe: what a user sees when something is wrong, overrides, paths, digests; and a fuzz of all of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fitune.recipes import RecipeError, RecipeFile, load_recipe, make_schema, parse_recipe, recipe_from_resolved
from fitune.recipes.load import find_shipped_recipes

VALID = """
[model]
id = "smollm2-135m-instruct"
[data]
train = "rows/train.jsonl"
[train]
epochs = 2
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("recipe.toml")
    path.write_text(VALID)
    return path


def read_problems(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [str(problem) for problem in caught.value.problems]


def test_a_valid_recipe_keeps_the_path_as_given_and_fills_in_defaults(recipe: Path) -> None:
    loaded = load_recipe("recipe.toml")
    assert (loaded.path, loaded.name, loaded.folder) == (Path("recipe.toml"), "recipe", Path())
    assert loaded.resolved["train"]["epochs"] == 2
    assert loaded.resolved["method"]["rank"] == 16


def test_all_errors_come_at_once_one_a_key_with_what_is_allowed(recipe: Path) -> None:
    recipe.write_text(
        '[model]\ndtype = 3\n[data]\ntrain = [{path = "a", weight = true, pth = 1}, {weight = 2.0}]\n'
        '[method]\nkind = "qlra"\nrnak = 3\ntargets = ["q_proj", 3]\nlearning_rate = 1e-4\n'
        '[train]\nmax_steps = "10"\ncompile = "false"\nmicro_batch_size = "many"\nbogus = 1\n[outptu]\nmerge = true\n'
    )
    expected = [
        "model.id: is required and missing (The model: a folder or config.json",
        "model.dtype: 3 is not one of auto, bf16, fp16, fp32",
        "data.train[0].weight: true is not a number above 0",
        'data.train[0].pth: is not a key of [data.train[0]] (did you mean "path"?)',
        "data.train[1].path: is required and missing",
        'method.kind: "qlra" is not one of auto, full, lora, qlora (did you mean "qlora"?)',
        "method.targets[1]: 3 is not text",
        'method.rnak: is not a key of [method] (did you mean "rank"?)',
        "method.learning_rate: is not a key of [method] (it is a key of [train])",
        'train.max_steps: "10" is not a whole number from 1 to 2147483647 (write 10 without quotes)',
        'train.micro_batch_size: "many" is not "auto" or a whole number from 1 to 2147483647',
        'train.compile: "false" is not one of auto, true, false (write false without quotes)',
        "train.bogus: is not a key of [train] (allowed: max_steps, epochs,",
        'outptu: is not a table of a recipe (did you mean "output"?)',
    ]
    problems = read_problems("recipe.toml")
    assert len(problems) == len(expected)
    for problem, beginning in zip(problems, expected, strict=True):
        assert problem.startswith(f"recipe.toml: {beginning}")


def test_a_missing_table_is_missing_its_required_keys(recipe: Path) -> None:
    recipe.write_text("[train]\nseed = 1\n")
    assert [problem.split(" is ")[0] for problem in read_problems(recipe)] == [
        "recipe.toml: model.id:",
        "recipe.toml: data.train:",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model = 3\n" + VALID.replace("[model]\nid", "[output]\ndir"), "recipe.toml: model: 3 is not a table"),
        (
            VALID.replace("[model]", "[[model]]"),
            "recipe.toml: model: [a table] is not a table (a table is written [name]",
        ),
        ("seed = 3\n" + VALID, "recipe.toml: seed: is not a table of a recipe (it is a key of [train])"),
        (VALID + '"a\\nb" = 1', 'recipe.toml: train."a\\nb": is not a key of [train]'),
        (VALID + "seed = 1979-05-27", "recipe.toml: train.seed: 1979-05-27 is not a whole number"),
        (VALID + "seed = 0x" + "f" * 6000, "recipe.toml: train.seed: 0xffff"),
        (VALID + "seed = " + "9" * 6000, "recipe.toml: has a number with too many digits"),
        (VALID + "seed = " + "[" * 100_000, "recipe.toml: is nested too deeply"),
        (VALID + "seed =\n", "recipe.toml: is not valid TOML: Invalid value (at line 8, column 7)"),
        (VALID + "[model]\n", "recipe.toml: is not valid TOML: Cannot declare ('model',) twice (at line 8, column 7)"),
        ("", "recipe.toml: is empty (`fitune init` writes a recipe to start from)"),
        (" \n\n", "recipe.toml: is empty"),
    ],
)
def test_a_broken_file_is_one_clear_problem(recipe: Path, text: str, problem: str) -> None:
    recipe.write_text(text)
    (message,) = read_problems(recipe)
    assert message.startswith(problem)
    assert "\n" not in message


def test_a_file_that_is_not_text_is_refused(recipe: Path) -> None:
    recipe.write_bytes(b"[model]\n\xff")
    assert read_problems(recipe) == ["recipe.toml: is not UTF-8 text: byte 0xff at offset 8"]
    recipe.write_bytes(b" " * (2**20 + 1))
    assert read_problems(recipe) == ["recipe.toml: is larger than 1 MiB (a TOML file is expected)"]


def test_a_byte_order_mark_and_windows_line_ends_are_read(recipe: Path) -> None:
    recipe.write_bytes(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())
    assert load_recipe(recipe).recipe.train.epochs == 2


def test_a_path_that_is_no_file_is_refused(recipe: Path) -> None:
    Path("folder").mkdir()
    assert read_problems("folder") == ["folder: is a folder (a recipe is a TOML file)"]
    assert read_problems("quickstrt.toml") == [
        'quickstrt.toml: no such recipe (did you mean the shipped recipe "quickstart"?)'
    ]
    assert "shipped recipes: " in read_problems("zzz/yyy")[0]
    assert "cannot be read: File name too long" in read_problems("x" * 5000)[0]
    assert read_problems("a\0b")[0].startswith(r"'a\x00b': ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_refused(recipe: Path) -> None:
    recipe.chmod(0)
    assert read_problems(recipe) == ["recipe.toml: cannot be read: Permission denied"]


def test_a_shipped_recipe_is_found_by_its_name_unless_a_file_has_it(recipe: Path) -> None:
    assert load_recipe("quickstart").path == find_shipped_recipes()["quickstart"]
    Path("quickstart").write_text(VALID)
    assert load_recipe("quickstart").path == Path("quickstart")


def test_an_override_is_toml_or_plain_text(recipe: Path) -> None:
    overrides = [
        "train.seed=7",
        "method.kind=lora",
        'method.targets=["q_proj"]',
        "data.eval = 0.1",
        "budget.memory=2GiB",
    ]
    recipe_ = load_recipe(recipe, overrides).recipe
    assert (recipe_.train.seed, recipe_.method.kind, recipe_.method.targets) == (7, "lora", ("q_proj",))
    assert (recipe_.data.eval, recipe_.budget.memory) == (0.1, "2GiB")


def test_an_override_cannot_bring_in_a_second_key(recipe: Path) -> None:
    data = load_recipe(recipe, ['data.system="brief"\nseed = 1']).recipe.data
    assert data.system == '"brief"\nseed = 1'


def test_overriding_max_steps_replaces_the_files_epochs_and_the_other_way_round(recipe: Path) -> None:
    train = load_recipe(recipe, ["train.max_steps=10"]).recipe.train
    assert (train.max_steps, train.epochs) == (10, None)
    recipe.write_text(VALID.replace("epochs", "max_steps"))
    train = load_recipe(recipe, ["train.epochs=3"]).recipe.train
    assert (train.max_steps, train.epochs) == (None, 3)
    assert read_problems(recipe, "train.epochs=3", "train.max_steps=2") == [
        "--set train.epochs: excludes train.max_steps: give one of the two"
    ]


def test_a_bad_override_is_named_as_such_beside_the_files_own_errors(recipe: Path) -> None:
    recipe.write_text(VALID + "sede = 1")
    overrides = ["train.seed=-1", "train.rnak=3", "model.id=", "nonsense", "a.b.c=1", ".x=1", "model.\udcff=1"]
    assert [problem.split(" (")[0] for problem in read_problems(recipe, *overrides)] == [
        "--set nonsense: is not of the form table.key=value, such as train.max_steps=10",
        "--set a.b.c=1: is not of the form table.key=value, such as train.max_steps=10",
        "--set .x=1: is not of the form table.key=value, such as train.max_steps=10",
        r"--set 'model.\udcff': is not UTF-8 text",
        "--set model.id: is empty",
        "--set train.seed: -1 is not a whole number from 0 to 4294967295",
        "recipe.toml: train.sede: is not a key of [train]",
        "--set train.rnak: is not a key of [train]",
    ]


def test_paths_are_relative_to_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/pavlos")
    loaded = parse_recipe(VALID, tmp_path / "deep" / "recipe.toml")
    assert loaded.resolve("rows/a.jsonl") == tmp_path / "deep" / "rows" / "a.jsonl"
    assert loaded.resolve("/data/a.jsonl") == Path("/data/a.jsonl")
    assert loaded.resolve("~/a.jsonl") == Path("/home/pavlos/a.jsonl")
    with pytest.raises(RecipeError, match="there is no such user"):
        loaded.resolve("~no-such-user-here/a.jsonl")


def test_the_digest_is_of_what_the_recipe_says_not_of_how_it_is_written(tmp_path: Path) -> None:
    digest = parse_recipe(VALID, tmp_path / "a.toml").sha256
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert parse_recipe("# comment\n" + VALID + "seed = 0\n", tmp_path / "b.toml").sha256 == digest
    assert parse_recipe(VALID + "seed = 1\n", tmp_path / "a.toml").sha256 != digest


def test_the_digest_is_that_of_canonical_json_whatever_the_order_of_keys() -> None:
    loaded = parse_recipe(VALID, Path("a.toml"))
    shuffled = {table: dict(reversed(keys.items())) for table, keys in reversed(loaded.resolved.items())}
    canonical = json.dumps(shuffled, sort_keys=True, separators=(",", ":"))
    assert loaded.sha256 == hashlib.sha256(canonical.encode("ascii")).hexdigest()


def test_a_plans_resolved_recipe_that_was_tampered_with_is_refused() -> None:
    resolved = parse_recipe(VALID, Path("a.toml")).resolved
    resolved["train"]["seed"] = None
    with pytest.raises(RecipeError, match=r"a\.toml: train\.seed: null is not a whole number"):
        recipe_from_resolved(resolved, Path("a.toml"))


SCHEMA = make_schema()
TABLES = {
    name: list(SCHEMA["$defs"][node["$ref"].rpartition("/")[2]]["properties"])
    for name, node in SCHEMA["properties"].items()
}
KEYS = st.sampled_from([f"{table}.{key}" for table, keys in TABLES.items() for key in keys])
ODD_VALUES = """
true|false|0|1|16|-1|0.5|nan|-inf|1e400|0xfffffffffffffffff|"auto"|"lora"|"full"|"24GiB"|"1"|""|"\\u0000"|[]|{}|[[]]|[{}]
{path="x"}|[{path="x",weight=2}]|["full"]|["full","full"]|[1,"x"]|1979-05-27T07:32:00Z|07:32:00|1979-05-27
"""
TOML_VALUES = st.one_of(
    st.sampled_from([value for line in ODD_VALUES.split() for value in line.split("|")]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8).map(lambda text: json.dumps(text, ensure_ascii=False)),
    st.text(max_size=8),
)
LINES = st.one_of(
    st.tuples(KEYS, TOML_VALUES).map(lambda pair: f"{pair[0]} = {pair[1]}"),
    st.tuples(st.sampled_from(["model", "train[0]", "x", '"é\\n"', "budget.x.y"]), TOML_VALUES).map(" = ".join),
    st.sampled_from(["[model]", "[[data]]", "[train]", "[x.y]", "# comment", "]"]),
    st.text(max_size=12),
)
SHIPPED = [path.read_text(encoding="utf-8") for path in find_shipped_recipes().values()]


@st.composite
def mutated_recipes(draw: st.DrawFn) -> str:
    """A shipped recipe with some pieces cut out, doubled or replaced, or with keys set to anything."""
    text = draw(st.sampled_from(SHIPPED))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 8)))
        piece = draw(st.one_of(st.just(""), st.just(text[start:end] * 2), st.text(max_size=4), TOML_VALUES))
        text = text[:start] + piece + text[end:]
    return text


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "recipe.toml"


def check_outcome(path: Path, overrides: list[str]) -> None:
    """A recipe that survives JSON, or problems of one line each, one a key; never any other exception."""
    try:
        loaded = load_recipe(path, overrides)
    except RecipeError as error:
        assert overrides or len(error.problems) == len({problem.where for problem in error.problems})
        assert len(str(error).split("\n")) == len(error.problems)
        return
    assert isinstance(loaded, RecipeFile)
    resolved: dict[str, Any] = json.loads(json.dumps(loaded.resolved, allow_nan=False))
    assert recipe_from_resolved(resolved, path) == loaded
    assert recipe_from_resolved(resolved, path).sha256 == loaded.sha256


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FUZZ
@given(lines=st.lists(LINES, max_size=8))
def test_any_text_is_a_recipe_or_a_recipe_error(scratch: Path, lines: list[str]) -> None:
    scratch.write_text("\n".join(lines), encoding="utf-8", newline="")
    check_outcome(scratch, [])


@FUZZ
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_recipe_or_a_recipe_error(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    check_outcome(scratch, [])


@FUZZ
@given(text=mutated_recipes())
def test_a_damaged_recipe_is_a_recipe_or_a_recipe_error(scratch: Path, text: str) -> None:
    scratch.write_text(text, encoding="utf-8", newline="")
    check_outcome(scratch, [])


OVERRIDES = st.one_of(
    st.tuples(KEYS, TOML_VALUES).map("=".join), st.text(st.characters(), max_size=12), st.just("data.train=\udcff")
)


@FUZZ
@given(text=st.sampled_from(SHIPPED), overrides=st.lists(OVERRIDES, max_size=5, unique=True))
def test_any_overrides_give_a_recipe_or_a_recipe_error(scratch: Path, text: str, overrides: list[str]) -> None:
    scratch.write_text(text, encoding="utf-8")
    check_outcome(scratch, overrides)
