"""How fast this machine's CPU computes: a short probe, kept in fitune's cache for the CPU, its threads and torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from ...planner.rates import HOST_PRICES, HostWork
from ...planner.step_cost import MLP_BYTES, NORM_BYTES, RESIDUAL_BYTES
from ...planner.strategy import Rates
from ..model.embedded import cache_folder
from ..rundir import write_whole
from ..versions import find_versions
from .host import probe_cpu

PRODUCT_SIZE = 768
"""Rows and columns of the probed products: large enough for the best kernels, and done within a slice of time that the
kernel gives where others compute, too."""
ROWS, WIDTH = 1024, 768
"""Of the hidden states whose norm, activation and sum are probed: what lies between the products of a small model."""
BYTES_A_FEATURE = sum(map(sum, (NORM_BYTES["torch"], MLP_BYTES["torch"], RESIDUAL_BYTES)))
"""What closed forms take these for, forward and backward. Copies would be several times as fast: they convert nothing,
and find their results' memory mapped."""
SMALL_LAYERS = 64
"""Of the small network whose operations take no time but to start."""
WORK_A_LAYER: dict[HostWork, int] = {"operation": 3, "module": 3, "engine": 5, "engine_view": 3}
"""What the host does for one of its layers, forward and backward: linear, activation, sum, and their gradients."""
PROBE_SECONDS = 0.06
"""Of each of the figures in one round."""
ROUNDS = 4
"""The fastest of all rounds counts: beside other work one of them may find the cores free."""


def find_cpu_rates(*, may_probe: bool) -> Rates | None:
    """This machine's rates: from the cache, else probed; None where that would have to import torch and may not."""
    path, key = cache_folder() / "cpu_rates.json", f"{name_cpu()}, norms"
    known = _load(path)
    if key in known:
        return known[key]
    if not may_probe:
        return None
    try:
        rates = probe_cpu_rates()
    except ImportError:
        return None
    kept = {name: one.model_dump() for name, one in {**known, key: rates}.items()}
    with contextlib.suppress(OSError):  # it is probed again then
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(kept, indent=1) + "\n")
    return rates


def name_cpu() -> str:
    """What measured times hold for: the processor, the threads that compute, and torch."""
    cpu, threads = probe_cpu(), os.environ.get("OMP_NUM_THREADS", "")
    return f"{cpu.name}, {cpu.cores} cores, {threads or 'all'} threads, torch {find_versions().get('torch')}"


def _load(path: Path) -> dict[str, Rates]:
    """What was probed before; nothing where the file is missing or not ours."""
    try:
        return {name: Rates.model_validate(one) for name, one in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, ValidationError):
        return {}


def probe_cpu_rates() -> Rates:
    """Products in fp32 and bf16, what lies between them, and operations too small to compute: a second in all. Imports
    torch."""
    import torch

    works = {"full": _make_product(torch.float32), "between": _make_between(), "host": _make_small_step()}
    if probe_cpu().bf16:
        works["half"] = _make_product(torch.bfloat16)
    seconds = dict.fromkeys(works, math.inf)
    for _ in range(ROUNDS):
        for name, work in works.items():
            seconds[name] = min(seconds[name], _time_one(work))
    full = 2 * PRODUCT_SIZE**3 / seconds["full"]
    half = 2 * PRODUCT_SIZE**3 / seconds["half"] if "half" in seconds else full
    host = sum(HOST_PRICES[kind] * count for kind, count in WORK_A_LAYER.items())
    return Rates(
        peak_flops=max(full, half),
        half_flops=half,
        full_flops=full,
        memory_bytes=ROWS * WIDTH * BYTES_A_FEATURE / seconds["between"],
        operation_seconds=seconds["host"] / (SMALL_LAYERS * host),
        kernel_seconds=0.0,
        overlaps=False,
        attention="cpu",
        source=f"measured on this machine with {torch.get_num_threads()} threads",
    )


def _make_product(dtype: object) -> Callable[[], object]:
    import torch

    assert isinstance(dtype, torch.dtype), "a dtype of torch"
    left, right = (torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype) for _ in range(2))
    return lambda: left @ right


def _make_between() -> Callable[[], object]:
    """An RMSNorm, a gated activation and a sum, forward and backward, in the dtype that the CPU computes in."""
    import torch
    from torch.nn import functional

    dtype = torch.bfloat16 if probe_cpu().bf16 else torch.float32
    hidden = torch.ones(ROWS, WIDTH, dtype=dtype, requires_grad=True)

    def step() -> None:
        exact = hidden.float()
        normed = (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
        (hidden + functional.silu(normed) * normed).sum().backward()

    return step


def _make_small_step() -> Callable[[], object]:
    """Forward and backward of modules whose operations take no time but to start."""
    import torch
    from torch import nn

    layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU()) for _ in range(SMALL_LAYERS))

    def step() -> None:
        hidden = torch.ones(1, 8)
        for layer in layers:
            hidden = hidden + layer(hidden)
        hidden.sum().backward()

    return step


def _time_one(work: Callable[[], object]) -> float:
    """Seconds of one call: the fastest of those that fit PROBE_SECONDS, after one to warm up."""
    work()
    fastest, end = math.inf, time.perf_counter() + PROBE_SECONDS
    while fastest == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
