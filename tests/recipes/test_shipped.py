"""The recipes that ship, and the starter."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fitune.recipes import (
    RecipeError,
    ShippedRecipe,
    list_shipped,
    load_recipe,
    make_starter,
    parse_recipe,
    read_shipped,
)

SHIPPED = list_shipped()


def test_the_promised_recipes_ship() -> None:
    models = {"llama-3.1-8b": {"full", "lora", "qlora"}, "mistral-7b-v0.3": {"lora", "qlora"}, "qwen3-8b": {"qlora"}}
    recipes = [load_recipe(shipped.name).recipe for shipped in SHIPPED]
    for model, kinds in models.items():
        assert kinds == {recipe.method.kind for recipe in recipes if recipe.model.id == model}
    assert {"quickstart", "lecture-10b", "gpt2-medium-lora-r4"} <= {shipped.name for shipped in SHIPPED}


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.name)
def test_a_shipped_recipe_is_valid_described_and_has_its_data(shipped: ShippedRecipe) -> None:
    loaded = load_recipe(shipped.path)
    assert loaded.recipe == load_recipe(shipped.name).recipe
    assert 20 < len(shipped.description) < 130
    assert not shipped.description.startswith("#")
    assert isinstance(loaded.recipe.data.train, str)
    assert loaded.resolve(loaded.recipe.data.train).is_file()


def test_the_lectures_lora_has_rank_4_on_the_attention_matrix() -> None:
    method = load_recipe("gpt2-medium-lora-r4").recipe.method
    assert (method.kind, method.rank, method.targets) == ("lora", 4, ("c_attn",))


def test_the_text_of_a_shipped_recipe_can_be_read_by_name() -> None:
    text = read_shipped("quickstart")
    assert text.startswith(f"# {next(shipped.description for shipped in SHIPPED if shipped.name == 'quickstart')}\n")
    with pytest.raises(RecipeError, match='did you mean the shipped recipe "quickstart"'):
        read_shipped("quikstart")
    with pytest.raises(RecipeError):
        read_shipped("starter")


def test_the_starter_is_a_valid_recipe_for_the_embedded_model() -> None:
    recipe = parse_recipe(make_starter(None, None), Path("recipe.toml")).recipe
    assert (recipe.model.id, recipe.data.train) == ("smollm2-135m-instruct", "train.jsonl")


def test_the_starter_is_valid_with_every_commented_key_switched_on() -> None:
    text = re.sub(r"^# (\w+ = )", r"\1", make_starter(None, None), flags=re.MULTILINE)
    resolved = parse_recipe(text, Path("recipe.toml")).resolved
    assert (resolved["budget"]["gpu"], resolved["output"]["dir"]) == ("RTX 4090", "runs/my-run")


@pytest.mark.parametrize("name", ['a"b', "$data", "$model", "é\\n", "C:\\models", "#x"])
def test_the_starter_quotes_what_it_is_given(name: str) -> None:
    recipe = parse_recipe(make_starter(name, f"{name}.jsonl"), Path("recipe.toml")).recipe
    assert (recipe.model.id, recipe.data.train) == (name, f"{name}.jsonl")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\x7f"])
def test_the_starter_refuses_a_name_that_no_recipe_can_have(name: str) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.toml: model\.id: "):
        make_starter(name, None)


def test_loading_a_recipe_imports_neither_torch_nor_transformers() -> None:
    code = "import sys; from fitune.recipes import load_recipe; load_recipe('quickstart')"
    code += "; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
