"""`fitune run plan.json`: exactly that plan, or a refusal that says why it is stale."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import TINY_LLAMA, Commands, list_files, write_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from small_tokenizers import build_tokenizer

from fitune.planner.plan import Plan
from fitune.recipes.errors import PlanError
from fitune.runtime.machine.devices import probe_gpus
from fitune.runtime.planning import check_data_fits_plan, load_plan, reopen_plan

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def saved(fitune: Commands, workspace: Path) -> Path:
    """A plan that was saved for recipe.toml on a tiny model with its tokenizer, and fits."""
    model = workspace / "model"
    build_tokenizer().save_pretrained(model)
    (model / "config.json").write_text(json.dumps(TINY_LLAMA))
    recipe = (workspace / "recipe.toml").read_text().replace("smollm2-135m-instruct", "model")
    (workspace / "recipe.toml").write_text(recipe)
    assert fitune("plan", "--quick", "recipe.toml", "-o", "plan.json").code == 0
    return workspace / "plan.json"


def edit(path: Path, change: Edit) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def refuse(fitune: Commands, path: Path) -> str:
    """What `fitune run` says as it refuses a plan; and it leaves nothing behind."""
    before = list_files(path.parent)
    result = fitune("run", path.name)
    assert result.code == 1
    assert list_files(path.parent) == before
    assert "Traceback" not in result.err
    assert result.err.startswith("error: ")
    return result.err


def test_a_fresh_plan_is_reopened_as_it_was_saved(saved: Path) -> None:
    job, plan, warnings = reopen_plan(saved)
    assert plan == Plan.model_validate_json(saved.read_text())
    assert warnings == ()
    check_data_fits_plan(job, plan)


def test_a_plan_is_found_to_be_stale_where_its_recipe_changed(fitune: Commands, saved: Path) -> None:
    recipe = saved.with_name("recipe.toml")
    recipe.write_text(recipe.read_text().replace("max_length = 64", "max_length = 65"))
    message = refuse(fitune, saved)
    assert "plan.json: stale: the recipe was " in message
    assert "make a new plan with `fitune plan recipe.toml -o plan.json`" in message


def test_a_comment_in_the_recipe_makes_no_plan_stale(saved: Path) -> None:
    recipe = saved.with_name("recipe.toml")
    recipe.write_text("# a remark\n" + recipe.read_text())
    assert reopen_plan(saved)[1].recipe == "recipe.toml"


def test_a_plan_is_found_to_be_stale_where_its_recipe_is_gone_or_broken(fitune: Commands, saved: Path) -> None:
    recipe = saved.with_name("recipe.toml")
    recipe.write_text("[model]\n")
    assert "stale: its recipe recipe.toml cannot be used any more: recipe.toml: model.id" in refuse(fitune, saved)
    recipe.unlink()
    assert "stale: its recipe recipe.toml cannot be used any more" in refuse(fitune, saved)


def test_a_plan_is_found_to_be_stale_where_the_models_config_changed(fitune: Commands, saved: Path) -> None:
    config = saved.with_name("model") / "config.json"
    config.write_text(json.dumps(TINY_LLAMA | {"hidden_size": 128}))
    assert "stale: the model's config was " in refuse(fitune, saved)


def test_a_plan_is_found_to_be_stale_on_another_device(fitune: Commands, saved: Path) -> None:
    edit(saved, lambda plan: plan["device"].update(name="Other CPU, 96 cores"))
    assert "stale: the device was Other CPU, 96 cores" in refuse(fitune, saved)


def test_a_plan_for_a_card_that_is_not_here_is_refused(fitune: Commands, saved: Path) -> None:
    if probe_gpus().visible:
        pytest.skip("this machine has a GPU")
    assert fitune("plan", "--quick", "recipe.toml", "--set", 'budget.gpu="H100 80GB"', "-o", "plan.json").code == 0
    assert "the plan is for H100 80GB, which is not in this machine" in refuse(fitune, saved)


def test_a_plan_is_found_to_be_stale_where_the_dataset_has_longer_rows(fitune: Commands, saved: Path) -> None:
    assert fitune("plan", "recipe.toml", "-o", "plan.json").code == 0
    planned = load_plan(saved).data.sequence_length
    assert planned < 64
    write_rows(saved.with_name("rows.jsonl"), [{"prompt": "Which?", "completion": "cheese " * 40}])
    assert f"stale: the plan allows for rows of {planned} tokens, the dataset's longest has " in refuse(fitune, saved)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Invalid JSON"),
        (b"{", "Invalid JSON"),
        (b"[]", "Input should be an object"),
        (b"{}", "Field required"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"null", "Input should be an object"),
    ],
)
def test_what_is_no_plan_is_refused(fitune: Commands, saved: Path, content: bytes, words: str) -> None:
    saved.write_bytes(content)
    message = refuse(fitune, saved)
    assert "plan.json: not a plan of this version of fitune: " in message
    assert words in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.update(format_version=2), "format_version: Input should be 1"),
        (lambda plan: plan.pop("memory"), "memory: Field required"),
        (lambda plan: plan.update(surprise=1), "surprise: Extra inputs are not permitted"),
        (lambda plan: plan["strategy"].update(method="magic"), "strategy: method: Input should be 'full'"),
        (lambda plan: plan["strategy"].update(micro_batch_size=0), "strategy: micro_batch_size: "),
        (lambda plan: plan["memory"].update(required_bytes="much"), "memory: required_bytes: "),
    ],
)
def test_a_plan_of_another_form_is_refused(fitune: Commands, saved: Path, change: Edit, words: str) -> None:
    edit(saved, change)
    assert words in refuse(fitune, saved)


def test_a_plan_in_which_nothing_fits_is_not_run(fitune: Commands, saved: Path) -> None:
    assert fitune("plan", "--quick", "recipe.toml", "--set", "budget.memory=1MiB", "-o", "plan.json").code == 3
    before = list_files(saved.parent)
    result = fitune("run", "plan.json")
    assert result.code == 3
    assert "nothing fits" in result.out
    assert list_files(saved.parent) == before


def test_other_library_versions_warn_and_do_not_refuse(saved: Path) -> None:
    edit(saved, lambda plan: plan["versions"].update(torch="1.0.0", gone="2.0"))
    warnings = reopen_plan(saved)[2]
    assert any(text.startswith("planned with torch 1.0.0, running with ") for text in warnings)
    assert "planned with gone 2.0, running with none" in warnings
    assert len(warnings) == 2


def test_a_saved_plan_takes_no_overrides(fitune: Commands, saved: Path) -> None:
    result = fitune("run", "plan.json", "--set", "train.max_steps=1")
    assert result.code == 1
    assert "plan.json: a saved plan is executed as it is: --set needs the recipe" in result.err


def test_the_overrides_of_a_saved_plan_are_part_of_it(fitune: Commands, saved: Path) -> None:
    assert fitune("plan", "--quick", "recipe.toml", "--set", "train.max_steps=3", "-o", "plan.json").code == 0
    job, plan, _ = reopen_plan(saved)
    assert job.recipe_file.recipe.train.max_steps == plan.data.steps == 3


def test_a_recipe_beside_the_plan_is_found_from_another_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reopen_plan(saved)[1].recipe == "recipe.toml"


def test_a_plan_file_that_is_not_there_is_an_error(workspace: Path) -> None:
    with pytest.raises(PlanError, match=r"no\.json: cannot be read: No such file"):
        load_plan(Path("no.json"))
    with pytest.raises(PlanError, match="cannot be read: Is a directory"):
        load_plan(workspace)
