"""Frozen layers in float8: what is stored, what is computed, what is kept for backward, and how near the losses stay.

torch._scaled_mm, which a GPU runs on its float8 units, works on the CPU too.
"""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import pytest
import torch
from small_models import build_small_model, make_strategy, make_tokens
from small_steps import train_rows
from test_rehearsal import LLAMA, list_sizes, predict, trace
from test_rehearsal import make_strategy as make_gpu_strategy
from torch import Tensor, nn

from fitune.runtime.model.build import BuiltModel, add_adapters, build_model, prepare_training
from fitune.runtime.model.embedded import load_embedded_model
from fitune.runtime.model.linear_float8 import Float8Linear, use_float8

CPU = torch.device("cpu")


def build(**changes: Any) -> BuiltModel:
    base = build_small_model("qwen2").bfloat16()
    strategy = make_strategy("lora", weights_dtype="bf16", compute_dtype="bf16", **changes)
    torch.manual_seed(1)
    model = add_adapters(base, strategy, alpha=None, adapter=None)
    prepare_training(base, strategy)
    return BuiltModel(model=model, base=base)


def off_by(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_are_within_the_rounding_of_three_bits(bias: bool) -> None:
    """Both factors are rounded by up to 1/16, at random, which a sum of products mostly averages out."""
    torch.manual_seed(0)
    plain = nn.Linear(256, 128, bias=bias).bfloat16().requires_grad_(False)
    base = nn.ModuleDict({"layer": plain, "head": nn.Linear(16, 16)})
    base.get_output_embeddings = lambda: base["head"]  # type: ignore[assignment]
    inputs = torch.randn(3, 40, 256, dtype=torch.bfloat16) * torch.logspace(-3, 3, 40).view(1, 40, 1).bfloat16()
    gradient = torch.randn(3, 40, 128, dtype=torch.bfloat16)
    found = []
    for convert in (False, True):
        if convert:
            use_float8(base)
            assert isinstance(plain, Float8Linear)
        x = inputs.clone().requires_grad_()
        out = plain(x)
        out.backward(gradient)
        assert x.grad is not None
        found.append((out.detach(), x.grad))
    for one, other in zip(*found, strict=True):
        assert 0.001 < off_by(other, one) < 0.05


def test_rows_are_scaled_one_by_one_so_that_small_ones_are_as_exact() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(256, 128, bias=False).bfloat16().requires_grad_(False)
    base = nn.ModuleDict({"layer": plain})
    base.get_output_embeddings = lambda: nn.Identity()  # type: ignore[assignment]
    inputs = torch.randn(2, 256, dtype=torch.bfloat16) * torch.tensor([[1e-6], [1e4]], dtype=torch.bfloat16)
    inputs = torch.cat([inputs, torch.zeros(1, 256, dtype=torch.bfloat16)])
    expected = plain(inputs)
    use_float8(base)
    found = plain(inputs)
    assert all(off_by(found[row], expected[row]) < 0.05 for row in (0, 1))
    assert not found[2].any(), "no division by zero"


def test_frozen_linear_layers_alone_are_stored_in_float8() -> None:
    built = build(float8=True)
    inside = {name: one for name, one in built.model.named_modules() if isinstance(one, Float8Linear)}
    assert len(inside) == 2 * 7 and all(name.endswith("base_layer") for name in inside)
    assert {one.weight.dtype for one in inside.values()} == {torch.float8_e4m3fn}
    assert built.base.get_output_embeddings().weight.dtype == torch.bfloat16
    assert {one.dtype for one in built.trainable} == {torch.float32}
    assert not any("scale" in name for name in built.model.state_dict()), "nothing of it is saved"


def test_losses_of_a_small_model_stay_near_those_of_16_bits() -> None:
    rows = make_tokens(4, 24)
    strategy = make_strategy("lora", weights_dtype="bf16", compute_dtype="bf16", learning_rate=1e-2)
    plain, float8 = (train_rows(build(float8=on), strategy, 20, rows) for on in (False, True))
    assert plain[-1] < 0.7 * plain[0]
    assert float8 == pytest.approx(plain, rel=0.04)
    assert float8 != plain


@pytest.mark.slow
def test_losses_of_a_real_model_stay_within_one_percent_of_those_of_16_bits() -> None:
    folder = load_embedded_model()
    rows = torch.randint(1000, 20000, (8, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for on in (False, True):
        strategy = make_strategy(
            "lora", weights_dtype="bf16", compute_dtype="bf16", learning_rate=1e-3, float8=on, loss_head="fused"
        )
        torch.manual_seed(0)
        found.append(train_rows(build_model(folder, strategy, CPU), strategy, 10, rows))
    assert found[0][-1] < 0.9 * found[0][0]
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_compiled_layers_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    rows = make_tokens(2, 24)
    strategy = make_strategy("lora", weights_dtype="bf16", compute_dtype="bf16")
    eager, compiled = (train_rows(build(float8=True, compile=on), strategy, 2, rows) for on in (False, True))
    torch._dynamo.reset()
    assert compiled == pytest.approx(eager, rel=2e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_stored_weights_take_a_byte_and_nothing_more_is_kept_for_backward(compiled: bool) -> None:
    plain, float8 = (
        predict(LLAMA, make_gpu_strategy("lora", float8=on, compile=compiled, loss_head="fused"), length=1024)
        for on in (False, True)
    )
    assert plain.components.weights - float8.components.weights == pytest.approx(
        9 * (2 * 256 * 256 + 2 * 64 * 256 + 3 * 256 * 768), rel=0.02
    )
    assert float8.components.activations <= 1.01 * plain.components.activations


def test_repeated_layers_in_float8_give_the_whole_models_trace() -> None:
    config = LLAMA | {"num_hidden_layers": 16}
    strategy = make_gpu_strategy("lora", float8=True, checkpointed_layers=7, loss_head="fused")
    short, whole = trace(config, strategy), trace(config, strategy, cut=False)
    assert len(short.model.layers) < len(whole.model.layers)
    assert sorted(list_sizes(short)) == sorted(list_sizes(whole))
