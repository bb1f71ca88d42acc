"""torch.compile's code for an H100 on the stand-in of a GPU: allocations are real, Triton kernels are left out.

Products, fused adapters and 4-bit layers run; attention is the operation that CUDA runs, which here returns zeros.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from small_models import save_small_model
from small_runs import plan_recipe, write_recipe
from torch import Tensor

from fitune.planner.strategy import Strategy
from fitune.runtime.training.train import run_job

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
_operations: Any = None


class _LeftOut:
    def run(self, *_: Any, **__: Any) -> None: ...


def _attend(query: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
    sums = torch.zeros(query.shape[:3], dtype=torch.float32, device=query.device)
    seed, offset = (torch.zeros(shape, dtype=torch.uint64, device=query.device) for shape in ((2,), ()))
    return torch.zeros_like(query), sums, None, None, query.shape[2], key.shape[2], seed, offset, query.new_empty(0)


def _differentiate(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Tensor, ...]:
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


def _choose_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    assert attn_mask is None
    options.pop("enable_gqa", None)
    attended = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, **options)
    return attended[0]  # type: ignore[no-any-return]


def _generate_code_for_a_gpu() -> None:
    """For the rest of this process, on which the stand-in is installed."""
    global _operations
    from torch._C._dynamo import guards
    from torch._functorch import partitioners
    from torch._inductor.async_compile import AsyncCompile
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    torch.cuda._get_device_properties = torch.cuda.get_device_properties  # type: ignore[attr-defined]
    torch.cuda._exchange_device = lambda _: 0
    torch.cuda._maybe_exchange_device = lambda _: 0
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    # Attention is computed again with the random numbers of its forward; a CPU build has no generator for them.
    partitioners.functionalize_rng_ops = lambda _, forward, backward, __: (forward, backward)  # type: ignore[assignment]
    AsyncCompile.triton = lambda *_, **__: _LeftOut()  # type: ignore[method-assign,assignment,return-value]
    _operations = torch.library.Library("aten", "IMPL")
    _operations.impl("_scaled_dot_product_flash_attention", _attend, "CUDA")
    _operations.impl("_scaled_dot_product_flash_attention_backward", _differentiate, "CUDA")


def run_compiled(
    folder: Path, model_type: str, method: dict[str, Any], checkpointing: bool
) -> tuple[Strategy, dict[str, int], dict[str, int]]:
    """(strategy, planned and counted peaks of live bytes by phase) of three steps of 4 rows of 512 tokens.

    Results are what was in memory before, so that steps may be left out as not finite. Once in a process, on which the
    stand-in is installed.
    """
    _generate_code_for_a_gpu()
    save_small_model(folder / "model", model_type, **SIZES)
    train = {"max_steps": 3, "micro_batch_size": 4, "compile": True, "loss_head": "fused", "on_nonfinite": "skip"}
    train["gradient_checkpointing"] = checkpointing
    data = {"eval": None, "max_length": 512, "max_truncated": 1.0}
    recipe = write_recipe(folder, folder / "model", model={"dtype": "bf16"}, method=method, data=data, train=train)
    row = {"instruction": "What is feta?", "output": "A good cheese, my friend." * 100}
    (folder / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 24)
    job, plan = plan_recipe(recipe, compute_dtype="bf16")
    attend, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _choose_flash_attention
    try:
        report = run_job(job, plan, folder / "run", Console(file=io.StringIO()))
    finally:
        F.scaled_dot_product_attention = attend
    counted = {one.name: one.peak_allocated_bytes for one in report.measured.phases}
    planned = {one.name: one.peak_allocated_bytes for one in plan.memory.phases}
    return plan.strategy, planned, counted
