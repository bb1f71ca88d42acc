"""Real models of many architectures, small enough to be made in a test, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_tokenizers import CHATML, build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fitune.planner.strategy import Strategy

VOCABULARY = 400
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 3,
}
DIFFERENT: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 16},
    "gemma3_text": {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 16},
    "granite": {"logits_scaling": 4.0, "tie_word_embeddings": False},
    "granitemoe": {"logits_scaling": 4.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": {"logit_scale": 4.0},
    "cohere2": {"logit_scale": 4.0},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32, "dropout": 0.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
DIFFERENT["gpt2"] |= {"resid_pdrop": 0.0}
ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "granitemoe",
    "cohere",
    "cohere2",
    "phi",
    "phi3",
    "gpt2",
    "opt",
    "gpt_neox",
    "olmo2",
    "smollm3",
    "starcoder2",
    "stablelm",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
)
"""The families that the planner knows in closed form."""


def build_small_model(model_type: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model in fp32 and evaluation mode. Its random weights are large, so that its logits are far from uniform."""
    torch.manual_seed(seed)
    sizes = SIZES | DIFFERENT.get(model_type, {}) | {"initializer_range": 0.1} | changes
    config = AutoConfig.for_model(model_type, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save_small_model(folder: Path, model_type: str = "llama", *, template: str | None = CHATML, **changes: Any) -> Path:
    """A folder that `from_pretrained` loads: weights in fp32, config, tokenizer."""
    build_small_model(model_type, **changes).save_pretrained(folder)
    build_tokenizer(template).save_pretrained(folder)
    return folder


def make_strategy(method: str = "full", **changes: Any) -> Strategy:
    """A strategy in fp32 with AdamW and one micro-batch of two rows, changed by keywords."""
    adapters = {"adapter_dtype": "fp32", "adapter_rank": 4, "adapter_targets": "all-linear"} if method != "full" else {}
    plain = {
        "method": method,
        "weights_dtype": "fp32",
        "compute_dtype": "fp32",
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "checkpointed_layers": 0,
        "loss_head": "full",
        "optimizer": "adamw",
        "learning_rate": 1e-3,
    }
    return Strategy.model_validate(plain | adapters | changes)


def make_tokens(rows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length], none of them special."""
    return torch.randint(4, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
