"""The recipe's tables: keys, defaults, ranges and the rules between keys."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fitune.recipes import Recipe, RecipeError, make_schema, parse_recipe

DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"revision": None, "dtype": "auto", "attention": "sdpa", "trust_remote_code": False},
    "data": {
        "eval": None,
        "forgetting": None,
        "max_forgotten": 0.1,
        "format": "auto",
        "columns": None,
        "max_length": 2048,
        "overlong": "truncate",
        "max_truncated": 0.05,
        "max_leaked": 0.0,
        "train_on": "assistant",
        "packing": False,
        "streaming": False,
        "chat_template": None,
        "system": None,
    },
    "method": {
        "kind": "auto",
        "prefer": ["full", "lora", "qlora"],
        "rank": 16,
        "alpha": None,
        "dropout": 0.0,
        "targets": "all-linear",
        "adapter_dtype": "fp32",
        "double_quantization": True,
        "fused_adapters": "auto",
        "adapter": None,
    },
    "budget": {
        "gpu": None,
        "memory": None,
        "gpus": 1,
        "host_memory": None,
        "disk": None,
        "max_hours": None,
        "price_per_hour": None,
    },
    "train": {
        "epochs": 1,
        "max_steps": None,
        "global_batch_size": 16,
        "micro_batch_size": "auto",
        "learning_rate": "auto",
        "schedule": "cosine",
        "warmup": 0.03,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optimizer": "auto",
        "optimizer_in_backward": "auto",
        "gradient_checkpointing": "auto",
        "save_attention": "auto",
        "loss_head": "auto",
        "compile": "auto",
        "kernels": "auto",
        "float8": False,
        "activation_offload": False,
        "expandable_segments": False,
        "eval_every": None,
        "early_stopping_patience": None,
        "on_nonfinite": "stop",
        "seed": 0,
    },
    "output": {
        "dir": None,
        "merge": False,
        "save_every": "auto",
        "keep_checkpoints": 2,
        "keep_best": False,
    },
}


def make_recipe(**tables: dict[str, Any]) -> Recipe:
    given = {"model": {"id": "m"}, "data": {"train": "d"}}
    return Recipe.model_validate(given | {name: given.get(name, {}) | keys for name, keys in tables.items()})


def test_a_recipe_of_two_keys_gets_the_documented_defaults() -> None:
    expected = {table: dict(keys) for table, keys in DEFAULTS.items()}
    expected["model"]["id"] = "m"
    expected["data"]["train"] = "d"
    assert make_recipe().model_dump(mode="json") == expected


def test_the_json_schema_offers_and_describes_exactly_the_recipes_keys() -> None:
    schema = make_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["model", "data"]
    for table, defaults in DEFAULTS.items():
        node = schema["$defs"][schema["properties"][table]["$ref"].rpartition("/")[2]]
        assert set(node["properties"]) == set(defaults) | {"model": {"id"}, "data": {"train"}}.get(table, set())
        assert node["additionalProperties"] is False
        assert all(key["description"] for key in node["properties"].values())


def test_the_json_schema_offers_no_null_because_toml_has_none() -> None:
    assert "null" not in str(make_schema())


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_recipe().train.seed = 1
    assert isinstance(make_recipe(method={"targets": ["q_proj"]}).method.targets, tuple)


def test_epochs_is_unset_where_max_steps_is_set() -> None:
    train = make_recipe(train={"max_steps": 10}).train
    assert (train.epochs, train.max_steps) == (None, 10)


def test_sizes_stay_as_written_and_are_known_in_bytes() -> None:
    budget = make_recipe(budget={"memory": "24 GiB", "host_memory": "64GB", "disk": "1.5TB"}).budget
    assert budget.memory == "24 GiB"
    assert (budget.memory_bytes, budget.host_memory_bytes, budget.disk_bytes) == (24 * 2**30, 64 * 10**9, 15 * 10**11)
    assert make_recipe().budget.memory_bytes is None


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert make_recipe(method={"rank": 8}).method.lora_alpha == 16
    assert make_recipe(method={"rank": 8, "alpha": 8}).method.lora_alpha == 8


def test_a_mixture_names_its_sources_with_weights() -> None:
    data = make_recipe(data={"train": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2, "format": "text"}]}).data
    assert not isinstance(data.train, str)
    assert [(source.path, source.weight, source.format) for source in data.train] == [
        ("a", 1.0, "auto"),
        ("b", 2.0, "text"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            '[method]\nkind = "full"\nadapter = "a"',
            'method.adapter: an adapter cannot be continued with method.kind = "f',
        ),
        (
            '[method]\nprefer = ["full"]\nadapter = "a"',
            "method.adapter: an adapter cannot be continued with method.pref",
        ),
        ('[method]\nprefer = ["lora", "lora"]', "method.prefer: names lora more than once"),
        ("[method]\nprefer = []", "method.prefer: [] is not a non-empty list of full, lora, qlora"),
        ("[method]\ntargets = []", 'method.targets: [] is not "all-linear" or a non-empty list of texts'),
        ("[method]\ndropout = 1.0", "method.dropout: 1.0 is not a number at least 0 and below 1"),
        ("[train]\nepochs = 1\nmax_steps = 5", "train.epochs: excludes train.max_steps: give one of the two"),
        ('[train]\ncompile = true\nkernels = "liger"', 'train.kernels: "liger" excludes train.compile = true'),
        (
            "[train]\nmicro_batch_size = 3",
            "train.micro_batch_size: 3 does not divide train.global_batch_size = 16; nearest",
        ),
        ("[train]\nmicro_batch_size = 32", "nearest that do is 16"),
        ("max_length = 1", "data.max_length: 1 is not a whole number from 2 to 2147483647"),
        ("[train]\nseed = -1", "train.seed: -1 is not a whole number from 0 to 4294967295"),
        ("[train]\nlearning_rate = 0", 'train.learning_rate: 0 is not "auto" or a number above 0 and at most 1'),
        ("[train]\nlearning_rate = nan", 'train.learning_rate: nan is not "auto" or a number above 0 and at most 1'),
        ("[train]\nmax_grad_norm = inf", 'train.max_grad_norm: inf is not "off" or a number above 0'),
        (
            "[train]\noptimizer_in_backward = true",
            "train.optimizer_in_backward: true excludes clipping, which needs all gradients at once: "
            'set train.max_grad_norm = "off" too',
        ),
        (
            '[train]\nmax_grad_norm = "off"\nmicro_batch_size = 8\noptimizer_in_backward = true',
            "train.optimizer_in_backward: true excludes gradient accumulation: leave train.micro_batch_size = 8 out, "
            "or set it to train.global_batch_size = 16",
        ),
        (
            '[method]\nkind = "lora"\n[train]\nmax_grad_norm = "off"\noptimizer_in_backward = true',
            'train: optimizer_in_backward = true is for method.kind = "full"',
        ),
        (
            '[method]\nadapter = "old"\n[train]\nmax_grad_norm = "off"\noptimizer_in_backward = true',
            'train: optimizer_in_backward = true is for method.kind = "full"',
        ),
        (
            "[train]\ngradient_checkpointing = false\nsave_attention = true",
            "train.save_attention: true is for checkpointed layers, and train.gradient_checkpointing is false",
        ),
        (
            '[method]\nkind = "full"\nfused_adapters = true',
            'method.fused_adapters: true is for adapters, which method.kind = "full" has none of',
        ),
        (
            "[method]\ndropout = 0.1\nfused_adapters = true",
            "method.fused_adapters: true excludes method.dropout = 0.1",
        ),
        (
            "[train]\nsave_attention = true\nactivation_offload = true",
            "train.activation_offload: excludes train.save_attention = true",
        ),
        ("[train]\nglobal_batch_size = 8.0", "train.global_batch_size: 8.0 is not a whole number from 1 to 2147483647"),
        ("[train]\neval_every = true", "train.eval_every: true is not a whole number from 1 to 2147483647"),
        ("[output]\nmerge = 1", "output.merge: 1 is not one of true, false"),
        ("[budget]\nmemory = 24", 'budget.memory: 24 is not a size with its unit, such as "24GiB" or "80GB"'),
        ('[budget]\nmemory = "24"', 'budget.memory: "24" has no unit: write "24GiB" or "24GB"'),
        ('[budget]\ndisk = "0GB"', 'budget.disk: "0GB" is less than one byte'),
        ("[budget]\ngpus = 0", "budget.gpus: 0 is not a whole number from 1 to 1024"),
    ],
)
def test_a_value_that_makes_no_sense_is_one_problem(line: str, problem: str, tmp_path: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f'[model]\nid = "m"\n[data]\ntrain = "d"\n{line}', tmp_path / "recipe.toml")
    assert len(caught.value.problems) == 1
    assert problem in str(caught.value)


@pytest.mark.parametrize("value", ["0", "1", "1.0", "-0.1", "true", "[]"])
def test_the_held_out_fraction_is_between_nothing_and_everything(value: str, tmp_path: Any) -> None:
    with pytest.raises(RecipeError, match=r"data\.eval: .* is not text or a number above 0 and below 1|non-empty"):
        parse_recipe(f'[model]\nid = "m"\n[data]\ntrain = "d"\neval = {value}', tmp_path / "recipe.toml")


def test_a_system_prompt_may_have_several_lines_and_a_path_may_not() -> None:
    assert make_recipe(data={"system": "You are Pavlos.\nBe brief."}).data.system == "You are Pavlos.\nBe brief."
    with pytest.raises(ValidationError, match="control character"):
        make_recipe(data={"train": "a\nb"})


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ('train = [{path = "a", weight = 1}, {path = "b"}]', "data.train: give every source a weight, or none"),
        ('train = "a"\neval = [{path = "a", weight = 1}]', "data.eval: held-out sources have no weight"),
        (
            'train = "a"\nstreaming = true',
            "train: data.streaming does not know how many rows there are: give max_steps",
        ),
        ('train = "a"\nstreaming = true\npacking = true', "data.streaming: excludes data.packing"),
        ('train = "a"\nstreaming = true\noverlong = "split"', 'data.streaming: excludes data.overlong = "split"'),
        ('train = "a"\nstreaming = true\neval = 0.1', "data.streaming: excludes a fraction in data.eval"),
        ('train = [{path = "a"}, {path = "b"}]\nstreaming = true', "data.streaming: of several sources needs their w"),
        ('train = "a"\ncolumns = {promt = "a"}', 'data.columns.promt: is not a key of [data.columns] (did you mean "p'),
        ('train = "a"\ncolumns = {prompt = 3}', "data.columns.prompt: 3 is not text"),
        ('train = "a"\ncolumns = "a"', 'data.columns: "a" is not a table'),
        ('train = "a"\noverlong = "cut"', 'data.overlong: "cut" is not one of truncate, split, drop'),
        ('train = "a"\nmax_truncated = 2', "data.max_truncated: 2 is not a number at least 0 and at most 1"),
        ('train = "a"\ntrain_on = "answers"', 'data.train_on: "answers" is not one of assistant, last, all'),
    ],
)
def test_what_is_wrong_with_the_data_table_is_told(keys: str, problem: str, tmp_path: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f'[model]\nid = "m"\n[data]\n{keys}', tmp_path / "recipe.toml")
    assert problem in str(caught.value)
