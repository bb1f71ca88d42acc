"""Compiled steps allocate on a GPU what their plan says: by the code that torch.compile generates for an H100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cuda_in_ram import OnGpu

from fitune.planner.estimate import CUDA_WORKSPACE_BYTES

pytest.importorskip("triton")
from inductor_on_stand_in import generate_code_for_a_gpu, run_compiled

WORKSPACES = 2 * CUDA_WORKSPACE_BYTES
"""cuBLAS's, of forward and of backward: the stand-in has none."""
METHODS: dict[str, dict[str, Any]] = {
    "full fine-tuning": {"kind": "full"},
    "peft's adapters": {"kind": "lora", "fused_adapters": False},
    "fused adapters": {"kind": "lora", "fused_adapters": True},
    "fused adapters on 4-bit weights": {"kind": "qlora", "fused_adapters": True},
}


@pytest.fixture(scope="module")
def on_compiling_gpu(on_gpu: OnGpu) -> OnGpu:
    on_gpu(generate_code_for_a_gpu)
    return on_gpu


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_keeps_what_its_plan_says(method: str, on_compiling_gpu: OnGpu, tmp_path: Path) -> None:
    strategy, planned, counted = on_compiling_gpu(run_compiled, tmp_path, METHODS[method])
    assert (strategy.compile, strategy.loss_head, strategy.attention) == (True, "fused", "sdpa")
    assert strategy.fused_adapters == METHODS[method].get("fused_adapters", False)
    for phase in ("forward", "backward", "clip", "optimizer"):
        assert planned[phase] - WORKSPACES == pytest.approx(counted[phase], rel=0.02), phase
