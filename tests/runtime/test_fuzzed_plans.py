"""Whatever a recipe or a config.json says, `fitune plan` ends in a plan or in one of fitune's own errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small_configs import TINY

from fitune.planner.catalog import list_gpus, list_models
from fitune.planner.families import FAMILIES
from fitune.planner.plan import Plan
from fitune.planner.search import list_budgets
from fitune.recipes.errors import FituneError, ModelError, PlanError, RecipeError
from fitune.runtime.planning import Job

CONFIGS = [dict(model.config) for model in list_models()]
CONFIG_KEYS = sorted({key for config in CONFIGS for key in config} | {"text_config", "layer_types", "head_dim"})
RECIPE = """
model.id = "config.json"
data.train = "rows.jsonl"
budget.gpu = "H100 80GB"
"""
VALID: dict[str, list[Any]] = {
    "model.id": [*(model.name for model in list_models()), "no-such-model", "./nowhere"],
    "model.dtype": ["auto", "bf16", "fp16", "fp32"],
    "model.attention": ["sdpa", "eager", "flash_attention_2"],
    "data.train": ["rows.jsonl", [{"path": "a.jsonl", "weight": 2.0}]],
    "data.max_length": [2, 64, 1000, 4096, 2**31 - 1],
    "data.packing": [True, False],
    "method.kind": ["auto", "full", "lora", "qlora"],
    "method.prefer": [["lora"], ["qlora", "full"]],
    "method.rank": [1, 8, 256, 2**31 - 1],
    "method.dropout": [0.0, 0.1],
    "method.targets": ["all-linear", ["q_proj"], ["c_attn"], ["lm_head"], ["nothing"]],
    "method.adapter_dtype": ["fp32", "bf16"],
    "method.double_quantization": [True, False],
    "method.adapter": ["no-such-folder"],
    "budget.gpu": [*(gpu.name for gpu in list_gpus()), "RTX 1"],
    "budget.memory": ["1B", "3GiB", "24GB", "1000TiB"],
    "budget.gpus": [1, 8],
    "budget.host_memory": ["1MB", "64GiB"],
    "budget.disk": ["1kB", "100GB"],
    "budget.max_hours": [0.5],
    "train.max_steps": [1, 1000],
    "train.epochs": [1, 3],
    "train.global_batch_size": [1, 7, 16, 96, 2**31 - 1],
    "train.micro_batch_size": ["auto", 1, 3, 16],
    "train.learning_rate": ["auto", 1e-4],
    "train.optimizer": ["auto", "adamw", "adamw_8bit", "adamw_32bit", "paged_adamw_8bit", "paged_adamw", "adafactor"],
    "train.max_grad_norm": [1.0, "off"],
    "train.optimizer_in_backward": ["auto", True, False],
    "train.gradient_checkpointing": ["auto", True, False, 1],
    "train.save_attention": ["auto", True, False],
    "method.fused_adapters": ["auto", True, False],
    "train.loss_head": ["auto", "full", "chunked", "fused"],
    "train.compile": ["auto", True, False],
    "train.activation_offload": [True, False],
    "train.expandable_segments": [True, False],
    "output.dir": ["out", "/", "~/x", "a/b/c"],
    "output.merge": [True, False],
}
ODD = """
true 0 -1 0.5 nan inf -inf 1e400 0x10 9223372036854775807 99999999999999999999 "" "auto" "24" "24GiB" "-1GB" "\\u0000"
[] {} [1,"x"] [[]] [{}] {path="x"} ["full","full"] 1979-05-27 07:32:00 'é' '''x''' 1_000 nonsense = #
"""
odd_values = st.sampled_from(ODD.split()) | st.integers().map(str) | st.text(max_size=6).map(json.dumps)
keys = st.sampled_from([key for key in VALID if key != "model.id"]) | st.sampled_from(["model", "train.x", "x.y", "x"])
odd_lines = st.lists(st.tuples(keys, odd_values), max_size=2)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 3, 7, 64, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "x", "64"])
    | st.integers(-(10**6), 10**6)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(CONFIG_KEYS), inner, max_size=2),
    max_leaves=4,
)
changes = st.dictionaries(st.sampled_from(CONFIG_KEYS), json_values, max_size=3)
omissions = st.sets(st.sampled_from(CONFIG_KEYS), max_size=2)


def fuzz(examples: int) -> Any:
    """Always the same examples, not shrunk: one of them can take seconds."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    phases = [Phase.explicit, Phase.generate]
    return settings(max_examples=examples, derandomize=True, phases=phases, suppress_health_check=checks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


@pytest.fixture
def workspace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FITUNE_CACHE", str(folder / "cache"))
    return folder


def write_toml(value: Any) -> str:
    """A value as TOML; JSON's form of everything but tables is TOML's, too."""
    if isinstance(value, list):
        return f"[{', '.join(write_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {write_toml(item)}' for key, item in value.items())}}}"
    return json.dumps(value)


@st.composite
def recipes(draw: st.DrawFn) -> str:
    """A recipe of valid values, mostly; with a few lines that hold anything."""
    chosen = draw(st.sets(st.sampled_from(sorted(VALID)), max_size=8)) | {"model.id", "data.train"}
    lines = {key: write_toml(draw(st.sampled_from(VALID[key]))) for key in sorted(chosen)}
    lines |= dict(draw(odd_lines))
    return "\n".join(f"{key} = {value}" for key, value in lines.items())


def plan_it(recipe: str, config: dict[str, Any] | None = None, *, quick: bool = True) -> Plan | FituneError:
    """What `fitune plan` makes of a recipe; it writes nothing."""
    Path("recipe.toml").write_text(recipe, encoding="utf-8")
    if config is not None:
        Path("config.json").write_text(json.dumps(config), encoding="utf-8")
    before = sorted(Path().iterdir())
    try:
        plan = Job("recipe.toml").make_plan(quick=quick)
    except FituneError as error:
        assert str(error)
        return error
    finally:
        assert sorted(Path().iterdir()) == before
    check_plan(plan)
    return plan


def check_plan(plan: Plan) -> None:
    memory = plan.memory
    budgets = list_budgets(memory, plan.device).values()
    assert plan.fits == all(needed <= budget for needed, budget in budgets)
    assert memory.components.total == memory.peak_allocated_bytes
    peaks = {phase.name: phase.peak_allocated_bytes for phase in memory.phases}
    assert memory.peak_allocated_bytes == peaks[memory.peak_phase]
    reserved = memory.peak_allocated_bytes if memory.peak_reserved_bytes is None else memory.peak_reserved_bytes
    assert memory.peak_device_bytes >= reserved >= memory.peak_allocated_bytes > 0
    # Of a CPU's resident memory the pages of a file that is being read can be had back.
    least = memory.peak_device_bytes if plan.device.kind == "cuda" else memory.peak_allocated_bytes
    assert memory.required_bytes >= least
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.slow
@fuzz(1000)
@given(recipe=recipes())
def test_any_recipe_is_a_plan_or_an_error_of_ours(workspace: Path, recipe: str) -> None:
    plan_it(recipe)


@pytest.mark.slow
@fuzz(1000)
@given(config=st.sampled_from(CONFIGS), changed=changes, left_out=omissions)
def test_any_config_is_a_plan_or_an_error_of_ours(
    workspace: Path, config: dict[str, Any], changed: dict[str, Any], left_out: set[str]
) -> None:
    whole = {key: value for key, value in {**config, **changed}.items() if key not in left_out}
    plan_it(RECIPE, whole)


@fuzz(100)
@given(
    model_type=st.sampled_from(["glm", "ernie4_5", "helium", "nemotron", "mamba", "deepseek_v3", "gpt_oss", "bloom"]),
    changed=st.dictionaries(st.sampled_from(sorted(TINY)), json_values, max_size=2),
)
def test_any_config_of_a_family_without_closed_forms_is_a_plan_or_an_error_of_ours(
    workspace: Path, model_type: str, changed: dict[str, Any]
) -> None:
    plan_it(RECIPE, {**TINY, "model_type": model_type, **changed})


@st.composite
def tiny_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A small model of a known family whose sizes agree with each other."""
    heads = draw(st.sampled_from([1, 2, 4, 8]))
    return {
        **TINY,
        "model_type": draw(st.sampled_from(sorted(FAMILIES))),
        "num_hidden_layers": draw(st.integers(1, 14)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([one for one in (1, 2, 4, 8) if one <= heads])),
        "head_dim": 64 // heads,
        "intermediate_size": draw(st.sampled_from([32, 96, 200])),
        "tie_word_embeddings": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from([16, 4096])),
        "max_position_embeddings": 512,
    }


KNOBS = {
    "model.dtype": ["auto", "bf16", "fp32"],
    "model.attention": ["sdpa", "eager", "flash_attention_2"],
    "data.max_length": [2, 8, 100, 257],
    "data.packing": [False, False, False, True],
    "method.kind": ["full", "lora", "qlora"],
    "method.rank": [1, 8, 300],
    "method.dropout": [0.0, 0.1],
    "method.adapter_dtype": ["fp32", "bf16"],
    "method.double_quantization": [True, False],
    "budget.gpu": ["H100 80GB", "RTX 4090", "T4"],
    "train.global_batch_size": [3, 6],
    "train.micro_batch_size": [1, 3],
    "train.optimizer": ["adamw", "adamw_8bit", "adamw_32bit", "paged_adamw_8bit", "paged_adamw", "adafactor"],
    "train.max_grad_norm": [1.0, "off"],
    "train.optimizer_in_backward": ["auto", False],
    "train.gradient_checkpointing": [True, False, 1],
    "train.save_attention": ["auto", True],
    "method.fused_adapters": ["auto", False],
    "train.loss_head": ["full", "chunked", "fused"],
    "train.compile": [False, True],
    "train.activation_offload": [False, True],
    "train.expandable_segments": [False, True],
    "output.merge": [False, True],
}
knobs = st.fixed_dictionaries({key: st.sampled_from(values) for key, values in KNOBS.items()})


@pytest.mark.slow
@fuzz(100)
@given(config=tiny_configs(), chosen=knobs)
def test_any_strategy_on_a_small_model_of_any_family_is_rehearsed(
    workspace: Path, config: dict[str, Any], chosen: dict[str, Any]
) -> None:
    lines = [f"{key} = {write_toml(value)}" for key, value in chosen.items()]
    plan = plan_it("\n".join(['model.id = "config.json"', 'data.train = "rows.jsonl"', *lines]), config, quick=False)
    if not isinstance(plan, Plan):
        assert isinstance(plan, PlanError | RecipeError), plan
        return
    assert not any("could not be rehearsed" in text for text in plan.warnings), plan.warnings
    update = set() if plan.strategy.optimizer_in_backward else {"clip", "optimizer"}
    assert {"load", "forward", "backward"} | update <= {phase.name for phase in plan.memory.phases}


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("llama", "hidden_size", -64),
        ("llama", "num_hidden_layers", 10**6),
        ("llama", "num_key_value_heads", 3),
        ("gemma2", "vocab_size", "many"),
        ("mixtral", "num_experts_per_tok", 9),
        ("glm", "num_hidden_layers", 10**12),
        ("glm", "num_attention_heads", 10**12),
        ("glm", "vocab_size", -1),
        ("glm", "hidden_size", 10**30),
        ("glm", "num_attention_heads", 0),
    ],
)
def test_a_config_with_an_impossible_shape_is_an_error_that_names_the_field(
    workspace: Path, model_type: str, key: str, value: Any
) -> None:
    error = plan_it(RECIPE, {**TINY, "model_type": model_type, key: value})
    assert isinstance(error, ModelError)
    assert f"config.json: {key}: " in str(error)
