"""Which layers get adapters where all linear ones are asked for: of mixtures not the routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fitune.planner.strategy import Strategy
from fitune.runtime.model.build import is_adaptable
from fitune.runtime.model.meta_shape import make_shape_of_model
from fitune.runtime.rehearsal.accuracy import make_device
from fitune.runtime.rehearsal.measure import rehearse

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
}
PHIMOE = {**SMALL, "model_type": "phimoe", "num_experts_per_tok": 2}
LLAMA4 = {**SMALL, "model_type": "llama4_text", "intermediate_size_mlp": 96, "head_dim": 16}
LORA = Strategy(
    method="lora",
    weights_dtype="bf16",
    compute_dtype="bf16",
    adapter_dtype="fp32",
    adapter_rank=8,
    adapter_targets="all-linear",
    micro_batch_size=2,
    gradient_accumulation_steps=1,
    checkpointed_layers=0,
    loss_head="full",
    optimizer="adamw",
    learning_rate=1e-4,
)


class Router(nn.Linear):
    """Returns scores and choices, as some mixtures' routers do."""

    def forward(self, hidden: torch.Tensor) -> Any:
        """Both of the best."""
        return super().forward(hidden).topk(2)


class Scaled(nn.Linear):
    """A linear layer in its own words."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Without a bias."""
        return hidden @ self.weight.T


@pytest.mark.parametrize("config", [PHIMOE, LLAMA4], ids=["phimoe", "llama4"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_mixture_whose_router_is_a_linear_layer_is_rehearsed(config: dict[str, Any], method: str) -> None:
    strategy = LORA.model_copy(update={"method": method})
    assert rehearse(config, strategy, make_device(), sequence_length=64, merge=False).estimator == "rehearsal"


@pytest.mark.parametrize("config", [PHIMOE, LLAMA4], ids=["phimoe", "llama4"])
def test_the_planner_counts_adapters_of_the_same_layers(config: dict[str, Any]) -> None:
    names = make_shape_of_model(config).lora_target_names("all-linear")
    assert "self_attn.q_proj" in names
    assert not [name for name in names if name.endswith(("router", "gate"))]


DEEPSEEK = {
    **SMALL,
    "model_type": "deepseek_v2",
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


def test_where_peft_takes_linear_layers_for_experts_neither_get_adapters() -> None:
    shape = make_shape_of_model(DEEPSEEK)
    memory = rehearse(DEEPSEEK, LORA, make_device(), sequence_length=64, merge=False)
    adapters = 4 * shape.lora_parameters(8, "all-linear")
    assert adapters <= memory.components.adapters < 1.5 * adapters
    assert not [name for name in shape.lora_target_names("all-linear") if name.endswith(("gate_proj", "down_proj"))]


def test_a_models_own_class_of_linear_layers_is_not_quantised() -> None:
    falcon = {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = make_shape_of_model({**falcon, "vocab_size": 512})
    assert shape.quantized_parameters == 0
    strategy = LORA.model_copy(update={"method": "qlora"})
    memory = rehearse({**falcon, "vocab_size": 512}, strategy, make_device(), sequence_length=64, merge=False)
    assert memory.components.weights >= 2 * shape.parameters


@pytest.mark.parametrize("head", ["full", "chunked", "fused"])
def test_a_decoder_under_another_name_has_every_loss_head(head: str) -> None:
    strategy = LORA.model_copy(update={"loss_head": head})
    assert rehearse(LLAMA4, strategy, make_device(), sequence_length=64, merge=False).estimator == "rehearsal"


def test_a_linear_layer_that_returns_no_tensor_is_left_alone() -> None:
    assert not is_adaptable(Router(8, 4))
    assert not is_adaptable(nn.Embedding(8, 4))
    assert is_adaptable(Scaled(8, 4))
    assert is_adaptable(nn.Linear(8, 4))
