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
from ...planner.strategy import Rates
from ..model.embedded import cache_folder
from ..rundir import write_whole
from ..versions import find_versions
from .host import Cpu, probe_cpu

PRODUCT_SIZE = 768
"""Rows and columns of the probed products: large enough for the best kernels, and done within a slice of time that the
kernel gives where others compute, too."""
COPY_ELEMENTS = 2**24
"""fp32 elements of the probed copies, 64 MiB: more than caches hold."""
SMALL_LAYERS = 64
"""Of the small network whose operations take no time but to start."""
WORK_A_LAYER: dict[HostWork, int] = {"operation": 3, "module": 3, "engine": 5, "engine_view": 3}
"""What the host does for one of its layers, forward and backward: linear, activation, sum, and their gradients."""
PROBE_SECONDS = 0.25
"""Of each of the figures."""


def find_cpu_rates(*, may_probe: bool) -> Rates | None:
    """This machine's rates: from the cache, else probed; None where that would have to import torch and may not."""
    path, key = cache_folder() / "cpu_rates.json", _make_key(probe_cpu())
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


def _make_key(cpu: Cpu) -> str:
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return f"{cpu.name}, {cpu.cores} cores, {threads or 'all'} threads, torch {find_versions().get('torch')}, host work"


def _load(path: Path) -> dict[str, Rates]:
    """What was probed before; nothing where the file is missing or not ours."""
    try:
        return {name: Rates.model_validate(one) for name, one in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, ValidationError):
        return {}


def probe_cpu_rates() -> Rates:
    """Products in fp32 and bf16, copies, and operations too small to compute: a second in all. Imports torch."""
    import torch

    full = _measure_products(torch.float32)
    half = _measure_products(torch.bfloat16) if probe_cpu().bf16 else full
    return Rates(
        peak_flops=max(full, half),
        half_flops=half,
        full_flops=full,
        memory_bytes=_measure_copies(),
        operation_seconds=_measure_operations(),
        kernel_seconds=0.0,
        overlaps=False,
        attention="cpu",
        source=f"measured on this machine with {torch.get_num_threads()} threads",
    )


def _measure_products(dtype: object) -> float:
    """Floating point operations a second."""
    import torch

    assert isinstance(dtype, torch.dtype), "a dtype of torch"
    left, right = (torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype) for _ in range(2))
    return 2 * PRODUCT_SIZE**3 / _time_one(lambda: left @ right)


def _measure_copies() -> float:
    """Bytes read and written a second."""
    import torch

    source, target = (torch.ones(COPY_ELEMENTS) for _ in range(2))
    return 2 * 4 * COPY_ELEMENTS / _time_one(lambda: target.copy_(source))


def _measure_operations() -> float:
    """Seconds that Python takes to call an operation, from a forward and backward of modules."""
    import torch
    from torch import nn

    layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU()) for _ in range(SMALL_LAYERS))

    def step() -> None:
        hidden = torch.ones(1, 8)
        for layer in layers:
            hidden = hidden + layer(hidden)
        hidden.sum().backward()

    work = sum(HOST_PRICES[kind] * count for kind, count in WORK_A_LAYER.items())
    return _time_one(step) / (SMALL_LAYERS * work)


def _time_one(work: Callable[[], object]) -> float:
    """Seconds of one call: the fastest of those that fit PROBE_SECONDS, after one to warm up."""
    work()
    fastest, end = math.inf, time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
