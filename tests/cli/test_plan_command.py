"""`fitune plan`: the contract of its JSON, its exit codes, and saved plans."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
from commands import RECIPE, TINY_LLAMA, Commands

from fitune.planner.memory import PHASES
from fitune.planner.strategy import Dtype, Method, Optimizer
from fitune.recipes.shipped import list_shipped

Kinds = dict[str, Any]
NUMBER: Any = (int, float)
TEXT_OR_NONE: Any = (str, type(None))
CONTRACT: Kinds = {
    "format_version": int,
    "recipe": str,
    "resolved_recipe": dict,
    "recipe_sha256": str,
    "fits": bool,
    "warnings": list,
    "device": {"name": str, "memory_bytes": int, "budget_bytes": int},
    "strategy": {
        "method": str,
        "weights_dtype": str,
        "adapter_dtype": TEXT_OR_NONE,
        "micro_batch_size": int,
        "gradient_accumulation_steps": int,
        "gradient_checkpointing": bool,
        "checkpointed_layers": int,
        "loss_head": str,
        "optimizer": str,
        "compile": bool,
        "learning_rate": NUMBER,
    },
    "parameters": {"total": int, "trainable": int},
    "memory": {
        "peak_allocated_bytes": int,
        "peak_reserved_bytes": (int, type(None)),
        "peak_device_bytes": int,
        "required_bytes": int,
        "budget_bytes": int,
        "host_bytes": int,
        "disk_bytes": int,
        "peak_phase": str,
        "components": {
            "weights": int,
            "adapters": int,
            "gradients": int,
            "optimizer": int,
            "activations": int,
            "loss_head": int,
            "temporary": int,
        },
        "phases": list,
    },
    "rejected": list,
}
REJECTED: Kinds = {"strategy": dict, "needed_bytes": int, "budget_bytes": int, "component": str, "reason": str}


def check_keys(given: dict[str, Any], kinds: Kinds, where: str = "plan") -> None:
    for key, kind in kinds.items():
        assert key in given, f"{where}.{key}"
        if isinstance(kind, dict):
            check_keys(given[key], kind, f"{where}.{key}")
        else:
            assert isinstance(given[key], kind), f"{where}.{key} is {given[key]!r}"
            assert kind is not int or not isinstance(given[key], bool), f"{where}.{key}"


def check_contract(plan: dict[str, Any]) -> None:
    check_keys(plan, CONTRACT)
    memory, strategy = plan["memory"], plan["strategy"]
    assert set(memory["components"]) == set(CONTRACT["memory"]["components"])
    assert sum(memory["components"].values()) == memory["peak_allocated_bytes"]
    assert [phase["name"] for phase in memory["phases"]] == list(PHASES)
    assert max(phase["peak_allocated_bytes"] for phase in memory["phases"]) == memory["peak_allocated_bytes"]
    assert memory["peak_phase"] in PHASES
    assert memory["budget_bytes"] == plan["device"]["budget_bytes"]
    assert strategy["method"] in get_args(Method)
    assert strategy["optimizer"] in get_args(Optimizer)
    assert strategy["weights_dtype"] in get_args(Dtype)
    assert (strategy["adapter_dtype"] is None) == (strategy["method"] == "full")
    for rejected in plan["rejected"]:
        check_keys(rejected, REJECTED, "rejected")
        check_keys(rejected["strategy"], CONTRACT["strategy"], "rejected.strategy")
        assert rejected["needed_bytes"] > rejected["budget_bytes"]
        assert rejected["component"] in {*CONTRACT["memory"]["components"], "host", "disk"}
    canonical = json.dumps(plan["resolved_recipe"], sort_keys=True, separators=(",", ":"))
    assert plan["recipe_sha256"] == hashlib.sha256(canonical.encode()).hexdigest()


def test_the_json_keeps_its_contract_on_a_cpu(fitune: Commands, workspace: Path) -> None:
    result = fitune("plan", "--json", "--quick", "recipe.toml")
    assert (result.code, result.err) == (0, "")
    (plan,) = result.plans
    check_contract(plan)
    assert plan["format_version"] == 1
    assert plan["recipe"] == "recipe.toml"
    assert plan["fits"] is True
    assert plan["memory"]["peak_reserved_bytes"] is None
    assert plan["device"]["budget_bytes"] == 3 * 2**30
    assert plan["resolved_recipe"]["train"]["learning_rate"] == "auto"


@pytest.mark.parametrize("shipped", list_shipped(), ids=lambda shipped: shipped.name)
def test_every_shipped_recipe_plans_within_the_contract(fitune: Commands, workspace: Path, shipped: Any) -> None:
    wide = "budget.disk=1TB", "budget.host_memory=1TB"
    result = fitune("plan", "--json", "--quick", shipped.name, *(word for one in wide for word in ("--set", one)))
    assert result.code == 0, result
    (plan,) = result.plans
    check_contract(plan)
    assert plan["fits"]


def test_a_plan_for_a_card_of_the_catalog_has_a_reserved_peak(fitune: Commands, workspace: Path) -> None:
    (plan,) = fitune("plan", "--json", "--quick", "recipe.toml", "--set", 'budget.gpu="RTX 4090"').plans
    check_contract(plan)
    assert plan["memory"]["peak_reserved_bytes"] > plan["memory"]["peak_allocated_bytes"]
    assert plan["device"]["name"] == "RTX 4090"
    assert plan["device"]["memory_bytes"] > plan["device"]["budget_bytes"] == 3 * 2**30


def test_recipes_come_one_a_line_in_the_order_given(fitune: Commands, workspace: Path) -> None:
    paths = ["recipe.toml", "missing.toml", "quickstart", "recipe.toml"]
    result = fitune("plan", "--json", "--quick", *paths)
    assert [plan["recipe"] for plan in result.plans] == paths
    assert set(result.plans[1]) == {"recipe", "error"}
    assert "no such recipe" in result.plans[1]["error"]
    assert result.code == 1


SMALL, BROKEN = ("--set", "budget.memory=1MiB"), "missing.toml"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["recipe.toml"], 0),
        (["recipe.toml", "recipe.toml"], 0),
        (["recipe.toml", *SMALL], 3),
        (["recipe.toml", "recipe.toml", *SMALL], 3),
        ([BROKEN], 1),
        ([BROKEN, "recipe.toml"], 1),
        (["recipe.toml", BROKEN, *SMALL], 1),
        ([BROKEN, "recipe.toml", *SMALL], 1),
        ([], 2),
        (["--no-such-option"], 2),
        (["recipe.toml", "recipe.toml", "-o", "plan.json"], 2),
    ],
)
@pytest.mark.parametrize("json_option", [["--json"], []], ids=["json", "table"])
def test_exit_codes_put_errors_before_what_does_not_fit(
    fitune: Commands, workspace: Path, words: list[str], code: int, json_option: list[str]
) -> None:
    assert fitune("plan", "--quick", *json_option, *words).code == code


def test_where_nothing_fits_the_json_holds_the_closest_candidate(fitune: Commands, workspace: Path) -> None:
    (plan,) = fitune("plan", "--json", "--quick", "recipe.toml", *SMALL).plans
    check_contract(plan)
    assert plan["fits"] is False
    assert plan["memory"]["required_bytes"] > plan["memory"]["budget_bytes"]
    assert plan["strategy"] in [rejected["strategy"] for rejected in plan["rejected"]]


def test_an_error_goes_to_stdout_as_json_and_to_stderr_as_text(fitune: Commands, workspace: Path) -> None:
    as_json, as_text = fitune("plan", "--json", BROKEN), fitune("plan", BROKEN)
    assert as_json.err == as_text.out == ""
    assert as_text.err.startswith("error: ")
    assert as_json.plans[0]["error"] in as_text.err


def test_an_override_is_in_the_plan_and_in_the_next_command(fitune: Commands, workspace: Path) -> None:
    words = ["--set", "train.max_steps=7", "--set", 'budget.gpu="RTX 4090"']
    (plan,) = fitune("plan", "--json", "--quick", "recipe.toml", *words).plans
    assert plan["resolved_recipe"]["train"]["max_steps"] == 7
    last = fitune("plan", "--quick", "recipe.toml", *words).out.splitlines()[-1]
    assert shlex.split(last) == ["next:", "fitune", "run", "recipe.toml", *words]


def test_a_saved_plan_is_the_printed_one(fitune: Commands, workspace: Path) -> None:
    result = fitune("plan", "--json", "--quick", "recipe.toml", "-o", "my plan.json")
    saved = json.loads(Path("my plan.json").read_text(encoding="utf-8"))
    (printed,) = result.plans
    # What is free changes between two looks at a busy machine; this is one look, so all of it is the same.
    assert saved == printed
    last = fitune("plan", "--quick", "recipe.toml", "-o", "my plan.json").out.splitlines()[-1]
    assert shlex.split(last) == ["next:", "fitune", "run", "my plan.json"]


def test_missing_rows_are_planned_at_the_longest_length_and_the_plan_says_so(fitune: Commands, workspace: Path) -> None:
    (workspace / "rows.jsonl").unlink()
    result = fitune("plan", "--json", "recipe.toml")
    (plan,) = result.plans
    assert result.code == 0
    assert plan["data"]["rows"] is None
    assert plan["data"]["sequence_length"] == 64
    assert any("data.train: rows.jsonl is not here" in text for text in plan["warnings"])


def test_rows_that_are_there_are_counted_though_the_tokenizer_is_not(fitune: Commands, workspace: Path) -> None:
    (plan,) = fitune("plan", "--json", "recipe.toml").plans
    assert (plan["data"]["rows"], plan["data"]["steps"]) == (8, 2)
    assert "tokenizer is not here yet" in plan["data"]["source"]


def test_a_config_json_alone_is_enough_to_plan(fitune: Commands, workspace: Path) -> None:
    Path("config.json").write_text(json.dumps(TINY_LLAMA))
    (plan,) = fitune("plan", "--json", "recipe.toml", "--set", "model.id=config.json").plans
    assert plan["fits"]
    assert plan["parameters"]["total"] == 400 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64) + 64


@pytest.mark.parametrize(
    "name",
    [
        "with space.toml",
        "[bold]red[bold].toml",
        "τυρί 🧀.toml",
        "it's.toml",
        ":smile: \\[x].toml",
        "a" * 240 + ".toml",
        "$x.toml",
    ],
)
def test_any_file_name_is_shown_as_it_is_and_quoted_in_the_next_command(
    fitune: Commands, workspace: Path, name: str
) -> None:
    Path(name).write_text(RECIPE, encoding="utf-8")
    (plan,) = fitune("plan", "--json", "--quick", name).plans
    assert plan["recipe"] == name
    result = fitune("plan", "--quick", name)
    assert result.code == 0
    assert shlex.split(result.out.splitlines()[-1])[-1] == name


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("budget.disk=1KiB", "of disk free: the files that it writes"),
        ("budget.memory=1MiB", "of 0.00 GiB"),
    ],
)
def test_the_last_line_says_which_budget_the_closest_candidate_breaks(
    fitune: Commands, workspace: Path, setting: str, why: str
) -> None:
    result = fitune("plan", "--quick", "recipe.toml", "--set", setting)
    assert result.code == 3
    last = [line for line in result.out.splitlines() if line.strip()][-1]
    assert last.startswith("nothing fits: the closest candidate needs ") and last.rstrip().endswith(why)
