"""What a forward keeps for backward: the closed forms beside the tensors that autograd really saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import find_shape, make_strategy
from transformers import AutoConfig, AutoModelForCausalLM

from fitune.planner import activations as act
from fitune.planner.catalog import list_models
from fitune.planner.shape import make_shape

SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "mistral": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 32},
    "gpt_neox": {},
}
CASES = [
    (name, attention)
    for name in SMALL
    for attention in ("sdpa", "eager")
    if (name, attention) != ("gemma2", "sdpa")  # soft-capped scores need eager attention
]
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "hidden_dropout": 0.0,
}
ROWS, LENGTH = 2, 192
names = st.sampled_from([model.name for model in list_models()])
methods = st.sampled_from(["full", "lora", "qlora"])


def count_saved_bytes(config: Any, attention: str) -> int:
    """Bytes that autograd keeps for backward in the decoder layers of a forward in fp32, parameters aside."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).train()
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 100, (ROWS, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_a_layer_keeps_what_autograd_saves(model_type: str, attention: str) -> None:
    config = AutoConfig.for_model(model_type, **(SIZES | SMALL[model_type]))
    one_more = AutoConfig.for_model(model_type, **(SIZES | SMALL[model_type] | {"num_hidden_layers": 4}))
    layer = count_saved_bytes(one_more, attention) - count_saved_bytes(config, attention)
    strategy = make_strategy(
        "full", weights_dtype="fp32", compute_dtype="fp32", micro_batch_size=ROWS, attention=attention
    )
    shape = make_shape(config.to_dict())
    estimated = act.estimate_layer_bytes(act.StepShape(shape, strategy, LENGTH), shape.blocks[0])
    assert estimated == pytest.approx(layer, rel=0.15)


@settings(max_examples=60)
@given(names, methods, st.integers(1, 8), st.integers(1, 4096), st.booleans())
def test_activations_are_in_proportion_to_the_rows(name: str, method: str, rows: int, length: int, lossy: bool) -> None:
    shape = find_shape(name)
    dropout = 0.1 if lossy and method != "full" else 0.0
    one, many = (
        act.StepShape(shape, make_strategy(method, micro_batch_size=n, adapter_dropout=dropout), length)
        for n in (1, rows)
    )
    for block in shape.blocks:
        weights = 0 if method == "full" else sum(2 * 16 * (x.inputs + x.outputs) for x in block.linears)
        kept_one, kept_many = (act.estimate_layer_bytes(step, block) - weights for step in (one, many))
        assert kept_many == rows * kept_one > 0


@settings(max_examples=60)
@given(names, methods, st.integers(1, 8192))
def test_a_checkpoint_is_smaller_than_its_layer(name: str, method: str, length: int) -> None:
    shape = find_shape(name)
    step = act.StepShape(shape, make_strategy(method), length)
    assert all(act.estimate_checkpoint_bytes(step) < act.estimate_layer_bytes(step, block) for block in shape.blocks)


@settings(max_examples=60)
@given(names, st.integers(1, 64), st.integers(1, 8192))
def test_the_chunked_head_is_the_full_one_of_at_most_1024_tokens(name: str, rows: int, length: int) -> None:
    shape = find_shape(name)
    full, chunked = (
        act.estimate_head_bytes(act.StepShape(shape, make_strategy(micro_batch_size=rows, loss_head=head), length))
        for head in ("full", "chunked")
    )
    tokens = rows * length
    assert [size * min(tokens, 1024) for size in full] == [size * tokens for size in chunked]


def test_targets_decide_which_inputs_are_kept() -> None:
    shape = find_shape("llama-3.2-1b")
    all_linear, few = (
        act.estimate_layer_bytes(act.StepShape(shape, make_strategy(adapter_targets=targets), 512), shape.blocks[0])
        for targets in ("all-linear", ("q_proj", "v_proj"))
    )
    assert few < all_linear


def test_eager_attention_keeps_scores_that_grow_with_the_square_of_the_length() -> None:
    shape = find_shape("llama-3.2-1b")

    def kept(attention: str, length: int) -> int:
        step = act.StepShape(shape, make_strategy("full", attention=attention), length)
        return act.estimate_layer_bytes(step, shape.blocks[0])

    assert kept("sdpa", 4096) == 4 * kept("sdpa", 1024)
    assert kept("eager", 4096) - kept("sdpa", 4096) > 15 * (kept("eager", 1024) - kept("sdpa", 1024))


def test_qlora_under_layer_norm_keeps_a_residual_stream_in_fp32() -> None:
    for name, factor in (("gpt2-medium", 2), ("llama-3.2-1b", 1)):
        shape = find_shape(name)
        lora, qlora = (act.StepShape(shape, make_strategy(method), 512) for method in ("lora", "qlora"))
        assert act.estimate_checkpoint_bytes(qlora) == factor * act.estimate_checkpoint_bytes(lora)


def test_a_dropped_input_is_kept_beside_its_mask_once_for_each_adapter() -> None:
    shape = find_shape("llama-3.2-1b")
    plain, dropping = (
        act.estimate_layer_bytes(act.StepShape(shape, make_strategy(adapter_dropout=p), 512), shape.blocks[0])
        for p in (0.0, 0.05)
    )
    assert dropping > plain


def test_fp32_adapters_cast_their_inputs_where_a_layer_is_computed_again() -> None:
    shape = find_shape("llama-3.2-1b")
    block, inputs = shape.blocks[0], 6 * 2048 + 8192  # of the seven linear layers
    fp32, bf16 = (
        act.estimate_recast_bytes(
            act.StepShape(shape, make_strategy(adapter_dtype=dtype, recasts_adapter_inputs=True), 512), block
        )
        for dtype in ("fp32", "bf16")
    )
    shared = 2 * 2048 + 8192  # two norms' outputs and the MLP's product, which the forward keeps too
    assert fp32 == (2 * 512 * (inputs - shared), 6 * 512 * 8192)
    assert bf16 == (0, 0)
