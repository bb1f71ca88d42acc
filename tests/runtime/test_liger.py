"""Liger's kernels: the same training as with a model's own operations, on that model alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build_small_model, make_strategy
from test_rehearsal import LLAMA, list_sizes, predict, trace
from test_rehearsal import make_strategy as make_gpu_strategy

from fitune.planner.candidates import LIGER_ACTIVATIONS
from fitune.recipes.errors import RunError
from fitune.runtime.model.build import prepare_training

pytest.importorskip("triton")
monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")

SCRIPT = Path(__file__).parent / "interpreted_liger.py"
CASES = [*LIGER_ACTIVATIONS, "llama:lora", "qwen3:lora", "gemma2:lora"]
"""With adapters: checkpointed layers, and the fused loss head."""


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    """Steps in a process of its own: Triton reads TRITON_INTERPRET when kernels are defined."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(SCRIPT), *CASES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_models_own_operations(compared: dict[str, Any], case: str) -> None:
    one = compared[case if ":" in case else f"{case}:full"]
    assert one["liger_losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["liger_norms"] == pytest.approx(one["norms"], rel=1e-5)
    assert {name.removeprefix("SmolLM3")[-3:] for name in one["exchanged"]} == {"ion", "MLP", "orm"}, "all three kinds"
    assert one["untouched"], "other models of the family, built before or after, keep their own"


def test_liger_knows_the_families_that_the_planner_gives_it() -> None:
    assert set(LIGER_ACTIVATIONS) <= set(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN)


def test_only_the_model_that_asks_gets_the_kernels() -> None:
    asked, other = build_small_model(), build_small_model()
    prepare_training(asked, make_strategy(kernels="liger"))
    later = build_small_model()
    names = {type(one).__name__ for one in asked.modules() if "forward" in vars(one)}
    assert names == {"LlamaAttention", "LlamaMLP", "LlamaRMSNorm"}
    for model in (other, later):
        assert not any("forward" in vars(one) for one in model.modules())
        assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


def test_a_plan_with_kernels_that_are_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(RunError, match=r'pip install "fitune\[liger\]"'):
        prepare_training(build_small_model(), make_strategy(kernels="liger"))


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_repeated_layers_with_the_kernels_give_the_whole_models_trace(method: str) -> None:
    config = LLAMA | {"num_hidden_layers": 16}
    strategy = make_gpu_strategy(method, kernels="liger", checkpointed_layers=7, loss_head="fused")
    short, whole = trace(config, strategy), trace(config, strategy, cut=False)
    assert len(short.model.layers) < len(whole.model.layers)
    assert sorted(list_sizes(short)) == sorted(list_sizes(whole))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_kernels_keep_less_for_backward(method: str) -> None:
    own, liger = (predict(LLAMA, make_gpu_strategy(method, kernels=one), length=1024) for one in ("torch", "liger"))
    tokens, hidden, width = 2 * 1024, 256, 768
    less = own.components.activations - liger.components.activations
    assert less > 0.9 * 9 * tokens * (2 * 2 * hidden + 2 * width), (
        "norms' fp32 inputs and the activation are computed again"
    )
