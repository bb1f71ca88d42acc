"""Bytes of weights, adapters, gradients and optimizer states, beside what bitsandbytes itself allocates."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import find_shape, make_strategy

from fitune.planner.arithmetic import (
    count_trainable,
    estimate_adapter_bytes,
    estimate_gradient_bytes,
    estimate_nf4_bytes,
    estimate_optimizer_bytes,
    estimate_state_bytes,
    estimate_weight_bytes,
    list_trainable_tensors,
)
from fitune.planner.catalog import CatalogModel, list_models
from fitune.planner.shape import make_shape
from fitune.planner.strategy import Optimizer

EVERY_MODEL = pytest.mark.parametrize("model", list_models(), ids=lambda model: model.name)
OPTIMIZERS = get_args(Optimizer)
elements = st.integers(min_value=1, max_value=10**10)


def test_nf4_takes_the_published_bytes_a_parameter() -> None:
    assert estimate_nf4_bytes(2**30, double_quantization=False) / 2**30 == pytest.approx(0.5625, abs=1e-6)
    assert estimate_nf4_bytes(2**30, double_quantization=True) / 2**30 == pytest.approx(0.5159, abs=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (576, 1536), (100, 33), (4096, 64)])
@pytest.mark.parametrize("double_quantization", [False, True])
def test_nf4_takes_what_bitsandbytes_allocates(shape: tuple[int, int], double_quantization: bool) -> None:
    import torch
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        torch.randn(shape), blocksize=64, quant_type="nf4", compress_statistics=double_quantization
    )
    tensors = [packed, state.absmax, state.code]
    if double_quantization:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    allocated = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert estimate_nf4_bytes(shape[0] * shape[1], double_quantization=double_quantization) == allocated


@pytest.mark.parametrize("size", [4096, 4095, 100_000, 65_537])
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_32bit"])
def test_optimizer_states_take_what_bitsandbytes_allocates(size: int, optimizer: Optimizer) -> None:
    import bitsandbytes
    import torch

    parameter = torch.nn.Parameter(torch.randn(size))
    kind = bitsandbytes.optim.AdamW8bit if optimizer == "adamw_8bit" else bitsandbytes.optim.AdamW32bit
    real = kind([parameter], lr=1e-3)
    parameter.grad = torch.ones(size)
    real.step()
    names = ("state1", "state2", "absmax1", "absmax2")
    kept = [tensor for name, tensor in real.state[parameter].items() if name in names]
    allocated = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    assert estimate_state_bytes(size, optimizer, "fp32") == allocated


def test_adamw_keeps_its_moments_in_the_parameters_dtype() -> None:
    assert estimate_state_bytes(1000, "adamw", "bf16") == 4 * 1000
    assert estimate_state_bytes(1000, "adamw", "fp32") == 8 * 1000
    assert estimate_state_bytes(1000, "adamw_32bit", "bf16") == 8 * 1000


@given(elements, elements, st.sampled_from(OPTIMIZERS), st.sampled_from(["bf16", "fp32"]))
def test_a_larger_tensor_never_has_smaller_states(first: int, second: int, optimizer: Optimizer, dtype: str) -> None:
    small, large = sorted((first, second))
    if optimizer.endswith("8bit") and small < 4096 <= large:
        return  # the one step down: from there on states are 8-bit
    assert estimate_state_bytes(small, optimizer, dtype) <= estimate_state_bytes(large, optimizer, dtype)  # type: ignore[arg-type]


@given(elements, st.booleans())
def test_nf4_is_smaller_than_16_bits_from_one_block_up(size: int, double_quantization: bool) -> None:
    tables = 64 + 1028
    assert estimate_nf4_bytes(size, double_quantization=double_quantization) <= 0.5625 * size + 8 + tables


def test_double_quantization_saves_where_there_are_constants_to_save() -> None:
    plain, double = (estimate_nf4_bytes(2**24, double_quantization=double) for double in (False, True))
    assert double < 0.92 * plain


def test_the_lectures_full_fine_tuning_takes_12_bytes_a_parameter() -> None:
    shape, strategy = find_shape("falcon3-10b-base"), make_strategy("full", optimizer="adamw_32bit")
    parts = [
        estimate_weight_bytes(shape, strategy),
        estimate_gradient_bytes(shape, strategy),
        estimate_optimizer_bytes(shape, strategy)[0],
    ]
    assert parts == [2 * shape.parameters, 2 * shape.parameters, 8 * shape.parameters]


@EVERY_MODEL
def test_qlora_weights_are_smaller_than_lora_weights(model: CatalogModel) -> None:
    shape = make_shape(model.config)
    lora, qlora = (estimate_weight_bytes(shape, make_strategy(method)) for method in ("lora", "qlora"))
    assert qlora < lora
    if shape.experts is None:
        assert qlora >= 0.25 * lora


@EVERY_MODEL
def test_the_trainable_tensors_add_up_to_the_trainable_parameters(model: CatalogModel) -> None:
    shape = make_shape(model.config)
    for strategy in (make_strategy("full"), make_strategy("lora"), make_strategy("lora", adapter_rank=3)):
        tensors = list_trainable_tensors(shape, strategy)
        assert sum(size * count for size, count in tensors) == count_trainable(shape, strategy)


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_adapters_and_their_gradients_grow_in_proportion_to_the_rank(rank: int, other: int) -> None:
    shape = find_shape("llama-3.2-1b")
    one, two = (make_strategy(adapter_rank=r) for r in (rank, other))
    assert estimate_adapter_bytes(shape, one) * other == estimate_adapter_bytes(shape, two) * rank
    assert estimate_gradient_bytes(shape, one) == estimate_adapter_bytes(shape, one) == 4 * count_trainable(shape, one)


def test_tensors_are_paged_from_100_000_elements_up() -> None:
    shape = find_shape("smollm2-135m-instruct")  # q_proj has 576 inputs and outputs
    below, above = (
        estimate_optimizer_bytes(
            shape, make_strategy(adapter_rank=rank, adapter_targets=("q_proj",), optimizer="paged_adamw")
        )
        for rank in (173, 174)
    )
    assert below == (8 * 173 * 576 * 2 * 30, 0)
    assert above == (0, 8 * 174 * 576 * 2 * 30)


def test_only_paged_optimizers_have_managed_memory() -> None:
    shape = find_shape("llama-3.2-1b")
    managed = {name: estimate_optimizer_bytes(shape, make_strategy("full", optimizer=name))[1] for name in OPTIMIZERS}
    assert {name for name, size in managed.items() if size} == {"paged_adamw", "paged_adamw_8bit"}
