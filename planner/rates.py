"""How fast devices work: what of a data sheet's rates a training step reaches.

The shares below are those of one H100 (tests/data and the sources named); no other card was measured, and they are
taken to hold for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .strategy import Optimizer, Rates

if TYPE_CHECKING:
    from .catalog import CatalogGpu

HostWork = Literal["operation", "view", "engine", "engine_view", "module", "adapter", "function", "hook"]
"""What the host does: an operation that Python calls, one that only looks at a tensor otherwise, the same two started
by autograd's engine in backward; a call of a module, of a LoRA layer beside it, of an autograd function written in
Python, of a hook on a saved tensor."""

AttentionKernels = Literal["cudnn", "flash", "flash_on_hopper", "efficient", "cpu"]
MATRIX_SHARE = 0.76
"""Of the dense matrix rate that large products reach: 711 to 791 of 989 TFLOP/s measured on Llama-3.1-8B's shapes."""
FLOAT8_CAPABILITY = (8, 9)
"""The oldest compute capability with float8 products."""
FLOAT8_FACTOR = 2
"""Dense float8 products with fp32 sums beside 16-bit ones, by the data sheets of every card that has them (H100: 1,979
and 989 TFLOP/s, L4: 242 and 121)."""
MEMORY_SHARE = 0.80
"""Of the memory's bandwidth that element-wise operations reach: 78 to 84 % of an H100's is what profiles of such
kernels show; strided and mixed-dtype ones reach less, cached ones more."""
ISSUE_SHARE = 0.63
"""Of the instructions that a card can issue, what bitsandbytes' 8-bit update does: over the measured steps of full
fine-tuning of which it is a fifth or more, together (docs/speed.md)."""
SLOW_FP32 = ("7.0", "7.2", "7.5", "8.0")
"""Compute capabilities whose multiprocessors issue twice as many instructions as they have lanes for fp32: 4 warps of
32 a cycle, 64 lanes (CUDA C++ programming guide, arithmetic instructions)."""
HOST_SHARE = 0.80
"""Of PCIe's nominal rate that copies of pinned memory reach: 25 of 31.5 GB/s is usual. Not measured here."""
UNKNOWN_HOST_GB_PER_SECOND = 15.75
"""PCIe 3.0 x16, for cards of which it is not known."""
OPERATION_SECONDS = 19.3e-6
"""Host time of an operation of eager PyTorch that Python calls. The one constant of host work that is fitted, the
middle of the measured steps that wait for the host (docs/speed.md): 2.6 times what the CPU took that HOST_PRICES are
from."""
HOST_PRICES: dict[HostWork, float] = {
    "operation": 1.0,
    "view": 0.0,
    "engine": 0.95,
    "engine_view": 0.35,
    "module": 3.5,
    "adapter": 1.5,
    "function": 13.9,
    "hook": 1.4,
}
"""What the host does for a step, in units of an operation that Python calls. Measured on a CPU: processor time of 204
forwards and backwards of 15 architectures, cut to 4 layers and 64 features so that nothing computes for long, against
how often a rehearsal counts each kind; least squares. An operation was 7.5 microseconds there; half of the 204 are met
within 13 %. The price of a module has the Python of its forward in it. `python -m benchmarks.host` measures them."""
CLIP_CALLS = 1.5
"""In the same units, of a tensor in gradient clipping; measured the same way, as are those of an update."""
UPDATE_CALLS: dict[Optimizer, float] = {
    "adamw": 1.6,
    "adamw_32bit": 4.2,
    "paged_adamw": 4.2,
    "adamw_8bit": 4.2,
    "paged_adamw_8bit": 4.2,
    "adafactor": 8.7,
}
"""Of a tensor in an update: torch's AdamW takes all at once, bitsandbytes goes through them in Python (its kernels left
out of the measurement) and waits for the device after each, Adafactor starts ten operations for each."""
COMPILED_UPDATE_CALLS = 8
"""Of a tensor in a compiled update: measured in steps of a small model on a CPU, 38 microseconds for each of 39 tensors
without what their elements took, where torch's AdamW took 7.5."""
SOFTMAX_PASSES: dict[Literal["forward", "backward"], int] = {"forward": 3, "backward": 2}
"""How often torch's kernels go through a row of a softmax that shared memory does not hold: for its maximum, its sum
and its results; in backward for the gradients' sum and the results (cunn_SoftMaxForward, cunn_SoftMaxBackward in
https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cuda/SoftMax.cu)."""
CACHED_ROW_BYTES = 190_000
"""The longest row that is read from the cache when it is read again: an H100's 50 MB of level 2 for the rows that are
under way, two blocks of 1,024 threads on each of 132 multiprocessors. Of fp32 logits, a vocabulary of 47,500."""
KERNEL_SECONDS = 2.5e-6
"""The shortest kernel with the gap to the next one."""
HALF_LENGTH = 350
"""Tokens at which fused attention has half its rate: read off figures 5 and 6 of FlashAttention-3 (arXiv 2407.08608),
where H100 kernels reach 315, 410, 484, 518, 529 and 539 TFLOP/s at 512 to 16,384 tokens; so do the other curves."""
ATTENTION_SHARES: dict[tuple[AttentionKernels, bool], dict[int, float]] = {
    ("cudnn", False): {64: 0.40, 128: 0.555, 256: 0.525},
    ("cudnn", True): {64: 0.445, 128: 0.535, 256: 0.535},
    ("flash", False): {64: 0.55, 128: 0.65, 256: 0.65},
    ("flash", True): {64: 0.50, 128: 0.58, 256: 0.58},
    ("flash_on_hopper", False): {64: 0.35, 128: 0.35, 256: 0.35},
    ("flash_on_hopper", True): {64: 0.33, 128: 0.33, 256: 0.33},
    ("efficient", False): {64: 0.30, 128: 0.30, 256: 0.20},
    ("efficient", True): {64: 0.25, 128: 0.25, 256: 0.15},
    ("cpu", False): {64: 0.50, 128: 0.50, 256: 0.50},
    ("cpu", True): {64: 0.50, 128: 0.50, 256: 0.50},
}
"""(kernels, whether backward) to head size to the share of the peak matrix rate that causal attention of long rows
reaches. cudnn: the same figures of FlashAttention-3; backward at 256 as at 128. flash: FlashAttention-2 on an A100
(arXiv 2307.08691: 50 to 73 % forward, up to 63 % backward). flash_on_hopper: the same kernels on an H100, which reach
35 % of it (FlashAttention-3, abstract), in backward 1 / 1.6 of FlashAttention-3's (1.5 to 1.75 times as fast, section
4.1). efficient and cpu: guesses."""


def make_gpu_rates(gpu: CatalogGpu) -> Rates:
    """The rates of a card of the catalog."""
    peak = gpu.tensor_tflops * 1e12
    host = gpu.host_gb_per_second or UNKNOWN_HOST_GB_PER_SECOND
    return Rates(
        peak_flops=peak,
        half_flops=MATRIX_SHARE * peak,
        full_flops=None if gpu.fp32_tflops is None else MATRIX_SHARE * gpu.fp32_tflops * 1e12,
        float8_flops=FLOAT8_FACTOR * MATRIX_SHARE * peak if gpu.capability >= FLOAT8_CAPABILITY else None,
        memory_bytes=MEMORY_SHARE * gpu.bandwidth_gb_per_second * 1e9,
        instructions=_estimate_issue_rate(gpu),
        host_bytes=HOST_SHARE * host * 1e9,
        operation_seconds=OPERATION_SECONDS,
        kernel_seconds=KERNEL_SECONDS,
        attention=_find_attention(gpu),
        board_watts=gpu.board_watts,
        source=f"{gpu.source}; shares of it as measured on an H100",
    )


def _estimate_issue_rate(gpu: CatalogGpu) -> float | None:
    """Instructions a second: the data sheet's fp32 operations are two for each, a product and a sum."""
    if gpu.fp32_tflops is None:
        return None
    issued = gpu.fp32_tflops * 1e12 / 2 * (2 if gpu.compute_capability in SLOW_FP32 else 1)
    return ISSUE_SHARE * issued


def _find_attention(gpu: CatalogGpu) -> Literal["cudnn", "flash", "efficient"]:
    """The kernels that SDPA picks: cuDNN's on Hopper and data-centre Blackwell (torch 2.11 and later, whose cuDNN is
    above 9.15.1), FlashAttention-2 from capability 8.0 up, else the memory-efficient ones.

    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
    """
    if gpu.compute_capability in ("9.0", "10.0"):
        return "cudnn"
    return "flash" if gpu.bf16 else "efficient"
