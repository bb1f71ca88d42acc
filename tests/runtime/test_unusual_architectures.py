"""Architectures that are no plain decoder are rehearsed; those that cannot be are planned with closed forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_configs import TINY

from fitune.planner.families import FAMILIES
from fitune.planner.plan import Plan
from fitune.planner.strategy import Strategy
from fitune.recipes.errors import ModelError, TraceError
from fitune.runtime.model.meta_shape import make_shape_of_model
from fitune.runtime.planning import Job
from fitune.runtime.rehearsal.accuracy import make_device
from fitune.runtime.rehearsal.measure import rehearse

MiB = 2**20
RECIPE = """
model.id = "config.json"
data.train = "rows.jsonl"
data.max_length = 64
budget.gpu = "H100 80GB"
method.kind = "full"
"""
LATENT_ATTENTION = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
UNUSUAL: dict[str, dict[str, Any]] = {
    "bamba": {},  # Mamba layers among attention
    "bloom": {},  # ALiBi, eager attention only
    "deepseek_v3": LATENT_ATTENTION,
    "falcon": {"head_dim": None},  # parallel residual, fused projections, one key-value head
    "gemma3_text": {"sliding_window": 16},
    "gpt_bigcode": {},
    "gpt_neox": {},  # parallel residual
    "gpt_oss": {},  # attention sinks, biased experts
    "hunyuan_v1_moe": {},
    "mistral": {"sliding_window": 16},
    "phi3": {},  # fused projections
    "qwen2_moe": {},  # shared experts
    "qwen3_next": {"linear_num_value_heads": 4, "linear_num_key_heads": 2},  # gated delta net
}


def make_config(model_type: str, changed: dict[str, Any]) -> dict[str, Any]:
    whole = {**TINY, "model_type": model_type, **changed}
    return {key: value for key, value in whole.items() if value is not None}


def make_strategy(config: dict[str, Any], method: str, **changes: Any) -> Strategy:
    values: dict[str, Any] = {
        "method": method,
        "weights_dtype": "bf16",
        "compute_dtype": "bf16",
        "attention": "sdpa" if make_shape_of_model(config).has_sdpa else "eager",
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "checkpointed_layers": 99,
        "loss_head": "chunked",
        "optimizer": "adamw",
        "learning_rate": 1e-4,
    }
    if method != "full":
        values |= {"adapter_dtype": "fp32", "adapter_rank": 8, "adapter_targets": "all-linear"}
    return Strategy(**(values | changes))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("model_type", UNUSUAL)
def test_an_unusual_architecture_is_rehearsed(model_type: str, method: str) -> None:
    config = make_config(model_type, UNUSUAL[model_type])
    memory = rehearse(config, make_strategy(config, method), make_device(), sequence_length=32, merge=False)
    assert memory.components.total == memory.peak_allocated_bytes
    assert memory.peak_allocated_bytes <= (memory.peak_reserved_bytes or 0) < memory.peak_device_bytes
    assert {"load", "forward", "backward", "clip", "optimizer"} <= {phase.name for phase in memory.phases}


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_experts_that_compute_in_another_dtype_than_bf16_are_rehearsed(dtype: str) -> None:
    config = make_config("mixtral", {})
    strategy = make_strategy(config, "lora", weights_dtype=dtype, compute_dtype=dtype)
    memory = rehearse(config, strategy, make_device(), sequence_length=32, merge=False)
    assert memory.components.weights > make_shape_of_model(config).parameters * (2 if dtype == "fp16" else 4)


def test_a_model_that_peft_cannot_adapt_is_an_error_that_names_the_targets() -> None:
    config = make_config("mamba", {})
    assert rehearse(config, make_strategy(config, "full"), make_device(), sequence_length=32, merge=False)
    with pytest.raises(ModelError, match=r"method\.targets: .*out_proj"):
        rehearse(config, make_strategy(config, "lora"), make_device(), sequence_length=32, merge=False)


@pytest.mark.parametrize("model_type", ["jetmoe", "xlm", "prophetnet"])
def test_what_cannot_be_traced_is_an_error_that_names_it(model_type: str) -> None:
    config = {"model_type": model_type, "vocab_size": 128}
    with pytest.raises(TraceError, match=r"config\.json: \w+ cannot be rehearsed: "):
        rehearse(config, make_strategy(config, "full"), make_device(), sequence_length=32, merge=False)


def plan_config(folder: Path, config: dict[str, Any], *overrides: str, quick: bool = False) -> Plan:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "recipe.toml").write_text(RECIPE)
    return Job(str(folder / "recipe.toml"), overrides).make_plan(quick=quick)


def margin_bytes(plan: Plan) -> int:
    return plan.memory.required_bytes - plan.memory.peak_device_bytes


def test_a_guessed_architecture_that_cannot_be_traced_is_planned_with_twice_the_margin(tmp_path: Path) -> None:
    assert "xlm" not in FAMILIES
    plan = plan_config(tmp_path, {"model_type": "xlm", "vocab_size": 128})
    assert plan.estimator == "closed_forms"
    assert margin_bytes(plan) == pytest.approx(0.3 * plan.memory.peak_device_bytes + 1024 * MiB, abs=2)
    (text,) = [text for text in plan.warnings if "could not be rehearsed" in text]
    assert "closed forms and a margin of 30% and 1.0 GiB" in text
    assert "XLMWithLMHeadModel" in text


def test_a_known_architecture_that_cannot_be_traced_keeps_its_own_margin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    config = make_config("llama", {})
    exact = plan_config(tmp_path, config, 'train.kernels="torch"')
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, hidden: hidden * hidden.sum().item())
    plan = plan_config(tmp_path, config, 'train.kernels="torch"')
    assert (exact.estimator, plan.estimator) == ("rehearsal", "closed_forms")
    assert margin_bytes(plan) == pytest.approx(0.15 * plan.memory.peak_device_bytes + 512 * MiB, abs=2)
    assert any("a margin of 15% and 512.0 MiB: the step could not be rehearsed" in text for text in plan.warnings)
    assert not any("could not be rehearsed" in text for text in exact.warnings)


def test_packed_rows_are_rehearsed_with_the_mask_that_attention_gets(tmp_path: Path) -> None:
    config = make_config("llama", {})
    plain, packed = plan_config(tmp_path, config), plan_config(tmp_path, config, "data.packing=true")
    assert packed.estimator == "rehearsal"
    assert packed.strategy.packing
    assert packed.memory.peak_allocated_bytes > plain.memory.peak_allocated_bytes


def test_closed_forms_of_a_guessed_architecture_say_so_where_quick_is_asked_for(tmp_path: Path) -> None:
    guessed, known = (plan_config(tmp_path, make_config(one, {}), quick=True) for one in ("glm", "llama"))
    assert any(text.startswith("planned with closed forms of a plain decoder") for text in guessed.warnings)
    assert margin_bytes(guessed) > 1024 * MiB > margin_bytes(known)
    assert not any("closed forms" in text for text in known.warnings)


def test_a_config_that_cannot_be_built_is_no_case_for_closed_forms(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: transformers cannot build it: .*nonsense"):
        plan_config(tmp_path, make_config("llama", {"hidden_act": "nonsense"}))
