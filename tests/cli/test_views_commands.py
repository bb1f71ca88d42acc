"""`fitune gpus`, `fitune plan --sweep` and `fitune plan --what-fits`: what they print, and their exit codes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from commands import RECIPE, TINY_LLAMA, Commands

from fitune.planner.catalog import list_gpus

OUTCOME = {
    "fits",
    "strategy",
    "required_bytes",
    "budget_bytes",
    "limit",
    "headroom_bytes",
    "estimator",
    "tokens_per_second",
    "total_seconds",
}
SMALL = (
    "model.id=config.json",
    "method.kind=lora",
    "train.micro_batch_size=4",
    "train.gradient_checkpointing=false",
    "train.loss_head=full",
    "train.optimizer=adamw",
    "train.compile=false",
)
ONE_WAY = ("--set", "model.id=llama-3.1-8b", *(word for one in SMALL[2:] for word in ("--set", one)))
ISSUE = ("train.micro_batch_size=1,2,4", "data.max_length=1024,4096")


@pytest.fixture
def workspace(workspace: Path) -> Path:
    """The recipe is for a card of the catalog: this machine's own memory does not matter."""
    text = RECIPE.replace('memory = "3GiB"', 'gpu = "RTX 4090"')
    (workspace / "recipe.toml").write_text(text, encoding="utf-8")
    return workspace


def test_gpus_prints_a_json_line_a_card(fitune: Commands, workspace: Path) -> None:
    result = fitune("gpus", "--quick", "recipe.toml", "--json")
    cards = result.plans
    assert (result.code, result.err) == (0, "")
    assert len(cards) == len(list_gpus())
    assert all(set(card) == OUTCOME | {"gpu", "memory_bytes"} for card in cards)


def test_gpus_ends_with_the_plan_for_the_smallest_card_that_fits(fitune: Commands, workspace: Path) -> None:
    settings = ONE_WAY
    result = fitune("gpus", "--quick", "recipe.toml", *settings)
    fitting = [
        card["gpu"] for card in fitune("gpus", "--quick", "recipe.toml", "--json", *settings).plans if card["fits"]
    ]
    *_, count, estimator, command = result.out.splitlines()
    assert count == f"{len(fitting)} of {len(list_gpus())} cards can run it"
    assert "closed forms" in estimator
    expected = ["next:", "fitune", "plan", "recipe.toml", *settings, "--set", f"budget.gpu={fitting[0]}"]
    assert shlex.split(command) == expected
    assert fitune(*expected[2:], "--quick").code == 0


def test_a_budget_larger_than_the_card_is_lowered_in_the_next_command(fitune: Commands, workspace: Path) -> None:
    settings = (*ONE_WAY, "--set", 'budget.memory="60GiB"')
    smallest = next(
        card for card in fitune("gpus", "--quick", "recipe.toml", "--json", *settings).plans if card["fits"]
    )
    words = shlex.split(fitune("gpus", "--quick", "recipe.toml", *settings).out.splitlines()[-1])[2:]
    (plan,) = fitune(*words, "--quick", "--json").plans
    assert plan["device"]["name"] == smallest["gpu"]
    assert plan["strategy"] == smallest["strategy"]
    assert plan["memory"]["required_bytes"] == smallest["required_bytes"]


def test_a_card_in_gpus_needs_what_its_plan_needs(fitune: Commands, workspace: Path) -> None:
    (plan,) = fitune("plan", "--quick", "--json", "recipe.toml").plans
    (card,) = [card for card in fitune("gpus", "--quick", "--json", "recipe.toml").plans if card["gpu"] == "RTX 4090"]
    assert (card["fits"], card["strategy"]) == (plan["fits"], plan["strategy"])
    assert card["required_bytes"] == plan["memory"]["required_bytes"]
    assert card["budget_bytes"] == plan["memory"]["budget_bytes"]


@pytest.mark.parametrize(
    "words",
    [
        ["recipe.toml", "--sweep", *ISSUE],
        ["recipe.toml", "--sweep", ISSUE[0], "--sweep", ISSUE[1]],
        ["--sweep", *ISSUE, "recipe.toml"],
    ],
)
def test_a_sweep_prints_a_json_line_a_cell_however_it_is_written(
    fitune: Commands, workspace: Path, words: list[str]
) -> None:
    result = fitune("plan", "--json", "--quick", *words)
    assert (result.code, result.err) == (0, "")
    assert all(set(cell) == OUTCOME | {"settings"} for cell in result.plans)
    assert [tuple(cell["settings"].items()) for cell in result.plans] == [
        (("train.micro_batch_size", micro), ("data.max_length", length))
        for micro in ("1", "2", "4")
        for length in ("1024", "4096")
    ]


def test_a_cell_of_a_sweep_is_the_plan_with_its_settings(fitune: Commands, workspace: Path) -> None:
    for cell in fitune("plan", "--quick", "--json", "recipe.toml", "--sweep", *ISSUE).plans:
        words = [word for key, value in cell["settings"].items() for word in ("--set", f"{key}={value}")]
        (plan,) = fitune("plan", "--quick", "--json", "recipe.toml", *words).plans
        assert (cell["fits"], cell["strategy"]) == (plan["fits"], plan["strategy"])
        assert cell["required_bytes"] == plan["memory"]["required_bytes"]
        assert cell["budget_bytes"] == plan["memory"]["budget_bytes"]


def test_a_sweep_is_a_grid_that_names_every_value(fitune: Commands, workspace: Path) -> None:
    text = fitune("plan", "--quick", "recipe.toml", "--sweep", *ISSUE).out
    assert all(word in text for word in ("train.micro_batch_size", "max_length = 1024", "max_length = 4096"))
    assert text.count(" GiB\n") + text.count(" GiB ") >= 6


def test_models_and_cards_are_swept_too(fitune: Commands, workspace: Path) -> None:
    result = fitune(
        "plan", "--quick", "recipe.toml", "--sweep", "budget.gpu=RTX 4090,H100 80GB", "model.id=gpt2,qwen3-8b", "--json"
    )
    assert [cell["settings"]["budget.gpu"] for cell in result.plans] == ["RTX 4090"] * 2 + ["H100 80GB"] * 2
    assert len({cell["required_bytes"] for cell in result.plans}) > 1


def test_a_recipe_whose_name_looks_like_an_axis_is_a_recipe(fitune: Commands, workspace: Path) -> None:
    name = "train.seed=1,2"
    Path("recipe.toml").rename(name)
    assert len(fitune("plan", "--quick", "--json", name, "--sweep", "train.seed=3,4").plans) == 2


@pytest.mark.parametrize(
    ("axis", "what"),
    [
        ("train.micro_batch=1,2", 'error: --sweep train.micro_batch: is not a key of [train] (did you mean "micro_'),
        ("train.micro_batch_size=", "error: --sweep train.micro_batch_size=: has an empty value"),
        ("train.micro_batch_size", "error: --sweep train.micro_batch_size: is not of the form table.key=value,value"),
        ("train.micro_batch_size=one,two", 'error: --sweep train.micro_batch_size: "one" is not "auto" or a whole'),
        ("budget.memory=24,48", "error: --sweep budget.memory: 24 is not a size with its unit"),
    ],
)
def test_a_wrong_axis_gives_one_clear_message(fitune: Commands, workspace: Path, axis: str, what: str) -> None:
    result = fitune("plan", "--quick", "recipe.toml", "--sweep", axis)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(what)
    (line,) = fitune("plan", "--quick", "--json", "recipe.toml", "--sweep", axis).plans
    assert set(line) == {"recipe", "error"}


def test_one_impossible_combination_leaves_the_others(fitune: Commands, workspace: Path) -> None:
    words = ("recipe.toml", "--sweep", "train.micro_batch_size=2,3")
    result = fitune("plan", "--json", "--quick", *words)
    assert result.code == 1
    assert [set(cell) == {"settings", "error"} for cell in result.plans] == [False, True]
    text = fitune("plan", "--quick", *words).out
    assert "error: --sweep train.micro_batch_size: 3 does not divide" in text


def test_what_fits_is_one_json_object(fitune: Commands, workspace: Path) -> None:
    result = fitune("plan", "--quick", "recipe.toml", "--what-fits", "--json")
    (found,) = result.plans
    assert (result.code, result.err) == (0, "")
    assert set(found) == {"device", "longest", "largest"}
    assert found["device"]["name"] == "RTX 4090"
    assert set(found["longest"]) == OUTCOME | {"sequence_length", "is_model_limit", "is_longest"}
    assert set(found["largest"]) == OUTCOME | {"model", "parameters"}


def test_the_longest_rows_can_be_planned_and_longer_ones_cannot(fitune: Commands, workspace: Path) -> None:
    words = ("recipe.toml", "--set", "train.micro_batch_size=2")
    last = shlex.split(fitune("plan", "--quick", "--what-fits", *words).out.splitlines()[-1])
    assert last[:3] == ["next:", "fitune", "plan"]
    assert fitune(*last[2:], "--quick").code == 0
    longest = json.loads(fitune("plan", "--quick", "--what-fits", "--json", *words).out)["longest"]
    assert last[-1] == f"data.max_length={longest['sequence_length']}"
    if not longest["is_model_limit"]:
        longer = f"data.max_length={longest['sequence_length'] + 64}"
        assert fitune("plan", "--quick", *words, "--set", longer).code == 3


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["plan", "recipe.toml", "--sweep", *ISSUE], 0),
        (["plan", "recipe.toml", "--sweep", "budget.memory=1MiB,2MiB"], 3),
        (["plan", "recipe.toml", "--sweep", "budget.memory=1MiB,20GiB"], 0),
        (["plan", "missing.toml", "--sweep", *ISSUE], 1),
        (["plan", "--sweep", *ISSUE], 2),
        (["plan", "recipe.toml", "recipe.toml", "--sweep", *ISSUE], 2),
        (["plan", "recipe.toml", "--sweep", ISSUE[0], "-o", "plan.json"], 2),
        (["plan", "recipe.toml", "--sweep", ISSUE[0], "--what-fits"], 2),
        (["plan", "recipe.toml", "--what-fits", "-o", "plan.json"], 2),
        (["plan", "recipe.toml", "recipe.toml", "--what-fits"], 2),
        (["plan", "recipe.toml", "--what-fits", "--set", 'budget.memory="1MiB"'], 3),
        (["plan", "recipe.toml", "--what-fits"], 0),
        (["gpus", "recipe.toml"], 0),
        (["gpus", "recipe.toml", "--set", 'budget.memory="1MiB"'], 3),
        (["gpus", "missing.toml"], 1),
        (["gpus"], 2),
    ],
)
def test_exit_codes(fitune: Commands, workspace: Path, words: list[str], code: int) -> None:
    assert fitune(*words, *(["--quick"] if words[-1] != "gpus" else [])).code == code


@pytest.fixture
def small_model(workspace: Path) -> tuple[str, ...]:
    """Settings of a model whose step is rehearsed in no time."""
    (workspace / "config.json").write_text(json.dumps(TINY_LLAMA), encoding="utf-8")
    return tuple(word for one in SMALL for word in ("--set", one))


def test_a_sweep_is_rehearsed_and_says_what_the_plans_say(
    fitune: Commands, workspace: Path, small_model: tuple[str, ...]
) -> None:
    result = fitune("plan", "--json", "recipe.toml", *small_model, "--sweep", "budget.gpu=RTX 4090,H100 80GB,T4")
    assert (result.code, result.err) == (0, "")
    for cell in result.plans:
        words = (*small_model, "--set", f"budget.gpu={cell['settings']['budget.gpu']}")
        (plan,) = fitune("plan", "--json", "recipe.toml", *words).plans
        assert cell["estimator"] == plan["estimator"] == "rehearsal"
        assert cell["required_bytes"] == plan["memory"]["required_bytes"]
        assert cell["tokens_per_second"] == plan["speed"]["tokens_per_second"]


def test_the_longest_rows_are_rehearsed(fitune: Commands, workspace: Path, small_model: tuple[str, ...]) -> None:
    (plan,) = fitune("plan", "--json", "recipe.toml", *small_model, "--set", "data.max_length=256").plans
    words = ("recipe.toml", *small_model, "--set", f'budget.memory="{plan["memory"]["required_bytes"]}B"')
    longest = fitune("plan", "--json", "--what-fits", *words).plans[0]["longest"]
    assert (longest["estimator"], longest["is_longest"], longest["is_model_limit"]) == ("rehearsal", True, False)
    codes = [
        fitune("plan", *words, "--set", f"data.max_length={longest['sequence_length'] + more}").code for more in (0, 64)
    ]
    assert codes == [0, 3]


def test_without_time_a_view_says_so_and_shows_closed_forms(
    fitune: Commands, workspace: Path, small_model: tuple[str, ...]
) -> None:
    result = fitune("gpus", "recipe.toml", *small_model, "--time-limit", "0")
    assert "not all was rehearsed within 0 s; give it longer with --time-limit SECONDS" in result.out
    assert "estimated by closed forms" in result.out


def test_a_sweep_does_not_write_anything(fitune: Commands, workspace: Path) -> None:
    before = sorted(workspace.rglob("*"))
    fitune("plan", "--quick", "recipe.toml", "--sweep", *ISSUE)
    fitune("plan", "--quick", "recipe.toml", "--what-fits")
    fitune("gpus", "--quick", "recipe.toml")
    assert sorted(workspace.rglob("*")) == before
