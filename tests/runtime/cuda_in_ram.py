"""A CUDA device in the host's memory: cuda_in_ram.cpp, Python's side of torch.cuda and FlashAttention's operations.

A process that calls `install` before it imports torch runs fitune's code for a GPU, with real numbers, on a machine
without one. What it cannot show: speed, memory beside the tensors, Triton, and CUDA's own kernels.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TOTAL_BYTES = 8 << 30
OnGpu = Callable[..., Any]
"""Calls a function with arguments in a process of its own, on which the stand-in is installed."""
H100: dict[str, Any] = {
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "gcnArchName": "",
}
"""What torch says of the card, Inductor's questions included."""
library: Any = None
"""The stand-in, once it is installed."""
_flash: Any = None


def build(folder: Path) -> Path | None:
    """Compile the stand-in into `folder`; None without a C++ compiler."""
    compiler, found = shutil.which("g++") or shutil.which("c++"), find_spec("torch")
    if compiler is None or found is None or found.origin is None:
        return None
    torch, source = Path(found.origin).parent, Path(__file__).with_suffix(".cpp")
    made = folder / "libcuda_in_ram.so"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-O0", "-w", "-o", str(made), str(source)]
    command += [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{torch / 'lib'}"]
    subprocess.run(command, check=True)
    return made


def install(path: Path) -> None:
    """Load the stand-in into this process, before torch."""
    global library
    library = ctypes.CDLL(str(path))
    library.stand_in_allocated.restype = library.stand_in_peak.restype = ctypes.c_size_t
    library.stand_in_limit.argtypes = [ctypes.c_size_t]
    import bitsandbytes  # noqa: F401  # before torch.cuda says that there is a GPU, for which it would want its library
    import torch
    import torch._dynamo
    import torch._inductor.compile_fx

    for name, value in _make_functions().items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getDeviceCount = lambda: 1  # type: ignore[attr-defined]
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    _register_flash_attention()


class _Stream:
    """A stream or an event: everything is done when it is asked for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: True


def _make_functions() -> dict[str, Any]:
    import torch

    generator = torch.arange(16, dtype=torch.uint8)

    def set_rng_state(state: Tensor, device: Any = "cuda") -> None:
        assert (state.dtype, state.shape, state.device.type) == (torch.uint8, (16,), "cpu")
        generator.copy_(state)

    def make_nothing(*_: Any, **__: Any) -> None: ...

    nothing = ("_lazy_init", "init", "set_device", "synchronize", "empty_cache", "ipc_collect")
    card = SimpleNamespace(total_memory=TOTAL_BYTES, name="stand-in", **H100)
    return {
        **dict.fromkeys((*nothing, "manual_seed", "manual_seed_all"), make_nothing),
        **dict.fromkeys(("is_available", "_is_compiled", "is_initialized", "is_bf16_supported"), lambda *_: True),
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda _=None: card,
        "get_device_capability": lambda _=None: (card.major, card.minor),
        "get_device_name": lambda _=None: "stand-in",
        "get_arch_list": lambda: ["sm_90"],
        "memory_allocated": lambda _=None: library.stand_in_allocated(),
        "memory_reserved": lambda _=None: library.stand_in_allocated(),
        "max_memory_allocated": lambda _=None: library.stand_in_peak(),
        "max_memory_reserved": lambda _=None: library.stand_in_peak(),
        "reset_peak_memory_stats": lambda _=None: library.stand_in_reset_peak(),
        "mem_get_info": lambda _=None: (TOTAL_BYTES - library.stand_in_allocated(), TOTAL_BYTES),
        "set_per_process_memory_fraction": lambda part, _=None: library.stand_in_limit(int(part * TOTAL_BYTES)),
        "get_rng_state": lambda _="cuda": generator.clone(),
        "set_rng_state": set_rng_state,
        "current_stream": lambda _=None: _Stream(),
        "Stream": _Stream,
        "Event": _Stream,
    }


def _register_flash_attention() -> None:
    """Dense arithmetic behind FlashAttention's operations, which exist on a GPU only, with what their sources demand.

    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp of PyTorch: mha_varlen_fwd, mha_varlen_bwd.
    """
    global _flash
    from torch import library as operations

    _flash = operations.Library("aten", "IMPL")
    _flash.impl("_flash_attention_forward", _attend, "CUDA")
    _flash.impl("_flash_attention_backward", _differentiate, "CUDA")


def _check(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> list[int]:
    import torch

    assert query.dtype == key.dtype == value.dtype and query.dtype in (torch.float16, torch.bfloat16), query.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.dim() == 3 and query.shape[2] % 8 == 0 and query.shape[2] <= 256
    assert starts.is_cuda and starts.dtype == torch.int32 and starts.is_contiguous() and isinstance(longest, int)
    places = starts.tolist()
    assert (
        places[0] == 0 and places[-1] == len(query) and max(end - start for start, end in pairwise(places)) <= longest
    )
    return list(places)


def _scores(query: Tensor, key: Tensor, places: list[int], scale: float | None, window: int | None) -> Tensor:
    """Probabilities [heads, tokens, tokens] in float32 of grouped heads laid out in full."""
    import torch

    tokens = torch.arange(query.shape[1], device=query.device)
    document = torch.bucketize(tokens, torch.tensor(sorted(set(places))[1:-1], device=query.device), right=True)
    distance = tokens[:, None] - tokens
    seen = (document[:, None] == document) & (distance >= 0)
    if window is not None and window >= 0:
        seen &= distance <= window
    scores = query @ key.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, float("-inf"))


def _lay_out(heads: Tensor, like: Tensor) -> Tensor:
    return heads.float().transpose(0, 1).repeat_interleave(like.shape[1] // heads.shape[1], 0)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, longest: int, *rest: Any, **more: Any
) -> Any:
    places = _check(query, key, value, starts, longest)
    _check(query, key, value, key_starts, longest)
    scores = _scores(
        *(_lay_out(one, query) for one in (query, key)), places, more.get("scale"), more.get("window_size_left")
    )
    output = (scores.softmax(-1) @ _lay_out(value, query)).transpose(0, 1).to(query.dtype).contiguous()
    seed = starts.new_zeros(2)
    return output, scores.logsumexp(-1), seed, seed[0], query.new_empty(0)


def _differentiate(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, *rest: Any, **more: Any
) -> Any:
    import torch

    starts, _, longest = rest[:3]
    places = _check(query, key, value, starts, longest)
    assert gradient.dtype == output.dtype == query.dtype and sums.dtype == torch.float32
    wide = [_lay_out(one, query) for one in (query, key, value, gradient)]
    scale = query.shape[-1] ** -0.5 if more.get("scale") is None else more["scale"]
    shares = _scores(wide[0], wide[1], places, scale, more.get("window_size_left")).softmax(-1)
    to_shares = wide[3] @ wide[2].transpose(1, 2)
    to_scores = shares * (to_shares - (to_shares * shares).sum(-1, keepdim=True)) * scale
    found = to_scores @ wide[1], to_scores.transpose(1, 2) @ wide[0], shares.transpose(1, 2) @ wide[3]
    return tuple(
        one.reshape(like.shape[1], -1, *one.shape[1:]).sum(1).transpose(0, 1).to(query.dtype).contiguous()
        for one, like in zip(found, (query, key, value), strict=True)
    )
