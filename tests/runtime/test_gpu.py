"""On a real GPU: what the stand-in of test_on_cuda.py cannot show. `python -m benchmarks.gpu --check` runs these."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_work import (
    BF16,
    CASES,
    attend_documents_of_rows,
    run_as_planned,
    run_out_of_memory,
    run_with,
    stop_and_go_on,
    update_with_bad_gradients,
    write_large_step,
)
from small_models import make_strategy, make_tokens, save_small_model
from small_runs import read_losses, write_recipe
from torch import Tensor, nn

from fitune.planner.rates import FLOAT8_CAPABILITY
from fitune.runtime.model.build import BuiltModel, build_model
from fitune.runtime.model.linear_4bit import PackedLinear4bit
from fitune.runtime.training.losses import compute_loss
from fitune.runtime.training.offload import offload_activations
from fitune.runtime.training.optimizers import make_optimizer
from fitune.runtime.training.step import autocast, uncast_adapter_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")]
GPU = torch.device("cuda", 0)
ROWS, LENGTH, LAYERS = 3, 64, 3
MIB = 2**20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model_type in ("llama", "gemma2", "gpt2"):
        save_small_model(folder / model_type, model_type, **({} if model_type == "gpt2" else {"num_hidden_layers": 3}))
    return folder


def build(folder: Path, method: str, **changes: Any) -> tuple[BuiltModel, Any]:
    """A model whose adapters do something, and its strategy in bf16."""
    torch.manual_seed(0)
    strategy = make_strategy(method, compute_dtype="bf16", **changes)
    built = build_model(folder, strategy, GPU)
    for name, parameter in built.model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.05)
    return built, strategy


def train(built: BuiltModel, strategy: Any, length: int = LENGTH) -> dict[str, Tensor]:
    """Loss and gradients of a step."""
    built.model.zero_grad(set_to_none=True)
    ids = make_tokens(ROWS, length).to(GPU)
    with autocast(strategy, GPU), uncast_adapter_inputs(built.model), offload_activations(built.base, strategy, GPU):
        loss = compute_loss(built.model, built.base, ids, ids, loss_head="full", tokens=ROWS * (length - 1))
    loss.backward()
    found = {name: one.grad for name, one in built.model.named_parameters() if one.grad is not None}
    return {"loss": loss.detach(), **found}


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest, over loss and gradients, of norm(difference) / norm(expected)."""
    assert found.keys() == expected.keys() and len(found) > LAYERS
    return max(float((found[one] - expected[one]).norm() / expected[one].norm().clamp(min=1e-6)) for one in expected)


@pytest.mark.parametrize("window", [None, 4])
def test_documents_are_attended_at_once_as_one_by_one(window: int | None) -> None:
    assert attend_documents_of_rows(window) < 0.1


def test_an_update_that_is_not_finite_is_left_out_on_the_device() -> None:
    assert update_with_bad_gradients() == (True, False)


@pytest.mark.parametrize("name", ["adamw_32bit", "paged_adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_every_optimizer_of_bitsandbytes_updates_as_adamw(name: str) -> None:
    """8-bit states are off by a few percent, and the first updates are the learning rate's size."""
    weights = []
    for chosen in ("adamw", name):
        torch.manual_seed(0)
        model = nn.Linear(512, 512, bias=False).to(GPU)
        optimizer = make_optimizer(chosen, model, learning_rate=0.01, weight_decay=0.1, rounding="nearest")
        for _ in range(3):
            model.weight.grad = torch.randn_like(model.weight)
            optimizer.step()
        torch.cuda.synchronize()
        weights.append(model.weight.detach())
    assert float((weights[0] - weights[1]).abs().mean()) < 0.002


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_compiled_layers_give_the_loss_and_gradients_of_eager_ones(models: Path, method: str) -> None:
    expected = train(*build(models / "llama", method))
    found = train(*build(models / "llama", method, compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert relative_difference(found, expected) < 0.1


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_ligers_kernels_give_the_loss_and_gradients_of_the_models_own_operations(
    models: Path, method: str, model_type: str
) -> None:
    pytest.importorskip("liger_kernel")
    expected = train(*build(models / model_type, method))
    for checkpointed in (0, LAYERS):
        found = train(*build(models / model_type, method, kernels="liger", checkpointed_layers=checkpointed))
        assert relative_difference(found, expected) < 0.05


@pytest.mark.parametrize("compiled", [False, True])
def test_frozen_layers_in_float8_give_nearly_the_loss_and_gradients_of_16_bits(models: Path, compiled: bool) -> None:
    if torch.cuda.get_device_capability(GPU) < FLOAT8_CAPABILITY:
        pytest.skip("no float8 products")
    expected = train(*build(models / "llama", "lora", weights_dtype="bf16"))
    found = train(*build(models / "llama", "lora", weights_dtype="bf16", float8=True, compile=compiled))
    assert relative_difference(found, expected) < 0.4, "0.27 on a CPU"
    assert float(abs(found["loss"] - expected["loss"]) / expected["loss"]) < 0.02


def test_rows_of_ten_lengths_need_few_graphs(models: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    built, strategy = build(models / "llama", "lora", compile=True)
    for width in range(32, 112, 8):
        train(built, strategy, width)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_4_bit_layers_keep_no_dequantised_weight(models: Path) -> None:
    saved: list[Tensor] = []
    built, strategy = build(models / "llama", "qlora", compile=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        train(built, strategy)
    packed = [module for module in built.base.modules() if isinstance(module, PackedLinear4bit)]
    weights = {tuple(sorted((one.in_features, one.out_features))) for one in packed}
    assert len(packed) == 7 * LAYERS and saved
    assert not [one.shape for one in saved if one.is_floating_point() and tuple(sorted(one.shape)) in weights]


def test_offloaded_activations_come_back_as_they_were(models: Path) -> None:
    expected = train(*build(models / "llama", "lora"))
    found = train(*build(models / "llama", "lora", activation_offload=True))
    assert relative_difference(found, expected) < 0.01


@pytest.mark.parametrize("case", CASES)
def test_a_run_learns(case: str, models: Path, tmp_path: Path) -> None:
    model_type, tables, strategy = CASES[case]
    found = run_with(write_recipe(tmp_path, models / model_type, **{**BF16, **tables}), strategy)
    assert (found["status"], found["kinds"]) == ("finished", [])
    assert found["losses"][-1] < found["losses"][0]


def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(models: Path, tmp_path: Path) -> None:
    """Some of CUDA's kernels add in an order of their own, so the losses are alike, not equal."""
    tables: dict[str, Any] = {"method": {"kind": "lora", "dropout": 0.1}, "output": {"dir": "run", "save_every": 2}}
    recipes = [write_recipe(tmp_path / name, models / "llama", **tables) for name in ("stopped", "whole")]
    assert stop_and_go_on(recipes[0]) == [4]
    run_as_planned(recipes[1])
    losses = [read_losses(recipe.parent / "run") for recipe in recipes]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_run_keeps_within_its_budget_and_says_what_it_lacked(models: Path, tmp_path: Path) -> None:
    message = run_out_of_memory(write_large_step(tmp_path, models / "llama"))
    assert message.startswith("out of memory in phase ")
    assert "the plan has " in message


EXPANDABLE = """
import torch
from fitune.runtime.training.allocation import use_expandable_segments
use_expandable_segments()
kept = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
assert any(one["is_expandable"] for one in torch.cuda.memory_snapshot())
"""


def test_segments_are_expandable_where_they_are_asked_for() -> None:
    subprocess.run([sys.executable, "-c", EXPANDABLE], check=True, timeout=120)


def test_a_run_is_watched_and_its_memory_is_near_the_plan(tmp_path: Path) -> None:
    """From the command line, so that CUDA's context is made under the monitor."""
    settings = {"output.dir": str(tmp_path / "run"), "train.max_steps": "4", "train.compile": "false"}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "fitune.runtime.cli", "run", "quickstart", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 0, done.stderr[-1000:]
    plan, report = (json.loads((tmp_path / "run" / name).read_text()) for name in ("plan.json", "report.json"))
    memory, measured = plan["memory"], report["measured"]
    assert not report["events"], report["events"]
    assert measured["peak_allocated_bytes"] <= measured["peak_reserved_bytes"] < measured["peak_device_bytes"]
    assert 200 * MIB < measured["peak_device_bytes"] - measured["peak_reserved_bytes"] < 2048 * MIB
    for name in ("peak_allocated_bytes", "peak_reserved_bytes"):
        assert measured[name] == pytest.approx(memory[name], rel=0.05, abs=40 * MIB), name
    assert measured["peak_device_bytes"] <= memory["required_bytes"]
