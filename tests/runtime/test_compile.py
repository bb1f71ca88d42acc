"""Compiled layers do what eager ones do, in as many graphs as there are kinds of layers, and 4-bit ones stay packed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build_small_model, make_strategy, make_tokens, save_small_model
from small_steps import build_adapted
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from fitune.runtime.model.build import BuiltModel
from fitune.runtime.model.linear_4bit import PackedLinear4bit, make_compilable
from fitune.runtime.training.losses import compute_loss
from fitune.runtime.training.step import uncast_adapter_inputs, uncompiled

CPU = torch.device("cpu")
ROWS, LENGTH = 3, 20
LAYERS = 3


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Layers are compiled to AOTAutograd's graphs, run eagerly: all of torch.compile but the generated code."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model_type in ("llama", "gemma2"):
        save_small_model(folder / model_type, model_type, num_hidden_layers=LAYERS)
    return folder


def train(built: BuiltModel, saved: list[Tensor] | None = None, *, head: str = "full") -> dict[str, Tensor]:
    """Loss and gradients of a step; what autograd keeps for backward is added to `saved`."""

    def keep(tensor: Tensor) -> Tensor:
        if saved is not None:
            saved.append(tensor)
        return tensor

    ids = make_tokens(ROWS, LENGTH)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept), uncast_adapter_inputs(built.model):
        loss = compute_loss(built.model, built.base, ids, ids, loss_head=head, tokens=57)
    loss.backward()
    found = {name: one.grad for name, one in built.model.named_parameters() if one.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("checkpointed", [0, 1, LAYERS])
@pytest.mark.parametrize(
    ("model_type", "method"), [("llama", "full"), ("llama", "lora"), ("llama", "qlora"), ("gemma2", "lora")]
)
def test_compiled_layers_give_the_loss_and_gradients_of_eager_ones(
    models: Path, model_type: str, method: str, checkpointed: int, graphs: Any
) -> None:
    changes = {"checkpointed_layers": checkpointed, "attention": "eager" if model_type == "gemma2" else "sdpa"}
    expected = train(build_adapted(models / model_type, method, **changes))
    found = train(build_adapted(models / model_type, method, compile=True, **changes))
    assert graphs["unique_graphs"] > 0
    assert found.keys() == expected.keys() and len(found) > 2 * LAYERS
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_layers_of_one_class_share_their_graphs(tmp_path: Path, graphs: Any) -> None:
    """Two: the first layer's input needs no gradient."""
    save_small_model(tmp_path / "deep", num_hidden_layers=6)
    train(build_adapted(tmp_path / "deep", "lora", compile=True))
    assert graphs["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_evaluation_and_generation_run_eagerly(models: Path, graphs: Any) -> None:
    built = build_adapted(models / "llama", "lora", compile=True)
    with torch.no_grad(), uncompiled(make_strategy(compile=True)):
        built.model(input_ids=make_tokens(1, 7))
    assert not graphs


@pytest.mark.parametrize("checkpointed", [0, LAYERS])
def test_compiled_4_bit_layers_keep_no_dequantised_weight(models: Path, checkpointed: int) -> None:
    saved: list[Tensor] = []
    built = build_adapted(models / "llama", "qlora", compile=True, checkpointed_layers=checkpointed)
    train(built, saved)
    packed = [module for module in built.base.modules() if isinstance(module, PackedLinear4bit)]
    weights = {tuple(sorted((one.in_features, one.out_features))) for one in packed}
    assert len(packed) == 7 * LAYERS and saved
    assert not [one.shape for one in saved if one.is_floating_point() and tuple(sorted(one.shape)) in weights]


def test_the_packed_product_is_that_of_bitsandbytes(models: Path) -> None:
    expected = train(build_adapted(models / "llama", "qlora"))
    for double in (True, False):
        reference = train(build_adapted(models / "llama", "qlora", double_quantization=double))
        built = build_adapted(models / "llama", "qlora", double_quantization=double)
        make_compilable(built.base)
        found = train(built)
        for name in reference:
            torch.testing.assert_close(found[name], reference[name])
        assert double == torch.equal(found["loss"], expected["loss"])


def test_the_compiled_fused_head_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from fitune.runtime.training import losses

    monkeypatch.setattr(losses, "CHUNK_ROWS", 16)
    compiled = torch.compile(losses._differentiate_chunk, backend="aot_eager")
    monkeypatch.setattr(losses, "_compile_chunk", lambda: compiled)
    for model_type in ("llama", "gemma2", "granite"):
        model, ids = build_small_model(model_type), make_tokens(2, 24)
        results = []
        for chosen in (False, True):
            loss = compute_loss(model, model, ids, ids, loss_head="fused", tokens=46, compiled=chosen)
            loss.backward()
            results.append([loss.detach(), *(one.grad for one in model.parameters())])
            model.zero_grad(set_to_none=True)
        torch.testing.assert_close(*results)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("model_type", ["llama", "granite", "gemma2"])
def test_the_compiled_fused_head_writes_no_logits_in_float32(model_type: str) -> None:
    """By the code that Inductor generates: the one for a GPU allocates the same."""
    model, ids = build_small_model(model_type).bfloat16(), make_tokens(2, 24)
    torch._dynamo.reset()
    loss, codes = run_and_get_code(compute_loss, model, model, ids, ids, loss_head="fused", tokens=46, compiled=True)
    expected = compute_loss(model, model, ids, ids, loss_head="fused", tokens=46)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    width = model.config.vocab_size
    written = re.findall(rf"empty_strided_cpu\(\(\d+, {width}\), .*?(torch\.\w+)", "".join(codes))
    assert set(written) == {"torch.bfloat16"}
