"""Puts right what CUDA does differently from the fake CPU on which a step is rehearsed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..model import attention
from .attention import attend, flash_backward_temporaries
from .watch import FUSED_4BIT

_T = torch.Tensor
CASTS_INPUTS = frozenset(
    {torch.pow, _T.pow, _T.__pow__, _T.__rpow__, _T.pow_, torch.rsqrt, _T.rsqrt, torch.reciprocal, _T.reciprocal}
    | {torch.exp, _T.exp, torch.expm1, _T.expm1, torch.log, _T.log, torch.log1p, _T.log1p, torch.log2, torch.log10}
    | {torch.logsumexp, _T.logsumexp, F.softplus, F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm}
    | {F.group_norm, F.nll_loss, F.mse_loss, F.cross_entropy, F.cosine_similarity, torch.cosh, torch.sinh, torch.tan}
)
"""Functions whose 16-bit inputs CUDA's autocast copies to float32 (AT_FORALL_FP32 in ATen/autocast_mode.h)."""
TAKES_DTYPE = frozenset(
    {torch.softmax, _T.softmax, F.softmax, torch.log_softmax, _T.log_softmax, F.log_softmax}
    | {torch.sum, _T.sum, torch.cumsum, _T.cumsum, torch.prod, _T.prod, torch.cumprod, _T.cumprod}
)
"""Functions that CUDA's autocast calls with dtype=float32 unless one is given (AT_FORALL_FP32_SET_OPT_DTYPE)."""
GROUPED = frozenset(
    getattr(module, name) for module, name in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(module, name)
)
"""The matrix products of all experts. On CUDA those in fp16 and fp32 work too, one expert at a time, with the same
results in memory; on fakes torch refuses them, and transformers' stand-in has them."""
HALF = (torch.bfloat16, torch.float16)
FUSED_4BIT_ROWS = 32
"""Rows up to which bitsandbytes' fused 4-bit kernel runs whatever the weight's shape; beyond it depends on the card."""

SORTED_EMBEDDING_TOKENS = 3072
"""Up to so many tokens an embedding's gradient is summed without sorting them (Embedding.cu)."""
EMBEDDING_INDEX_BUFFERS = 6
"""Sorted and original indices, offsets of segments and of partial ones, and how many partial ones each has."""


@dataclass(frozen=True, kw_only=True)
class CudaCard:
    """What of a card decides what is allocated on it.

    major: compute capability before the point; 9 stands for all later ones, which allocate alike
    """

    major: int = 9

    @property
    def workspace_bytes(self) -> int:
        """cuBLAS's workspace: 4096 KiB * 8 on Hopper and later, else 2 * 4096 KiB + 8 * 16 KiB.

        https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/cuda/CublasHandlePool.cpp
        """
        return 4096 * 8 * 1024 if self.major >= 9 else 4096 * 2 * 1024 + 16 * 8 * 1024


def list_temporaries(func: Any, args: Any) -> tuple[int, ...]:
    """Bytes that an operation's CUDA kernel allocates beside its results and frees."""
    if func.name() == FUSED_4BIT:
        return _gemm_4bit_temporaries(*args)
    if func.name() == "fitune::dequantize_4bit":
        return _constants(args[2])
    if func.name() == "fitune::multiply_float8":
        return (args[2].nbytes,)
    if func is torch.ops.aten._scaled_dot_product_flash_attention_backward.default:
        return flash_backward_temporaries(*args[1:3])
    if func is torch.ops.aten.embedding_dense_backward.default:
        return _embedding_temporaries(*args)
    if func is torch.ops.aten._softmax_backward_data.default:
        return (args[0].nbytes,)  # gradient times output (softmax_backward_cuda_out in SoftMax.cu)
    return ()


def _gemm_4bit_temporaries(
    activations: Tensor, packed: Tensor, shape: Any, absmax: Tensor, *rest: Any
) -> tuple[int, ...]:
    """The dequantised weight and its constants; few rows go through a fused kernel that needs neither.

    bitsandbytes/backends/cuda/ops.py: from 513 rows on every card but the A100 dequantises.
    """
    rows = activations.numel() // activations.shape[-1]
    return () if rows <= FUSED_4BIT_ROWS else _dequantization(shape, activations)


def _dequantization(shape: Any, like: Tensor) -> tuple[int, ...]:
    """A weight's constants, and the weight itself in the dtype that is computed in."""
    return *_constants(shape), shape[0] * shape[1] * like.element_size()


def _constants(shape: Any) -> tuple[int, int]:
    """Those of a weight's blocks, twice for a moment."""
    constants = 4 * -(-shape[0] * shape[1] // 64)
    return constants, constants


def _embedding_temporaries(gradient: Tensor, indices: Tensor, *_: Any) -> tuple[int, ...]:
    """Sorted indices, their segments and partial sums in fp32; few tokens go through a kernel without any.

    aten/src/ATen/native/cuda: Embedding.cu, EmbeddingBackwardKernel.cu.
    """
    tokens = indices.numel()
    if tokens <= SORTED_EMBEDDING_TOKENS:
        return ()
    return (*[8 * tokens] * EMBEDDING_INDEX_BUFFERS, 4 * tokens * gradient.shape[-1])


class CudaFunctions(TorchFunctionMode):
    """Calls of torch's functions as they would run on CUDA: autocast's lists, fused attention, fused dropout."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attend(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func in GROUPED and args[1].dtype is not torch.bfloat16:
            return _multiply_grouped(*args, **kwargs)
        if func in CASTS_INPUTS or func in TAKES_DTYPE:
            return _widen(func, args, kwargs)
        return func(*args, **kwargs)


def _widen(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.is_autocast_enabled("cpu"):
        return func(*args, **kwargs)
    if func in TAKES_DTYPE:
        if args[0].dtype in HALF and kwargs.get("dtype") is None:
            kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)
    args = tuple(_to_float(one) for one in args)
    return func(*args, **{key: _to_float(value) for key, value in kwargs.items()})


def _to_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA's fused dropout keeps a mask of one byte an element; the CPU's keeps one in the input's dtype."""
    if p == 0 or not training:
        return input
    return torch.native_dropout(input, p, True)[0]


def _multiply_grouped(input: Tensor, weight: Tensor, offs: Tensor, *_: Any, **__: Any) -> Any:
    return torch.ops.transformers.grouped_mm_fallback(input, weight, offs)


@contextlib.contextmanager
def cuda_semantics() -> Iterator[None]:
    """Inside, torch functions allocate as on CUDA, and code that asks for CUDA's autocast sees the CPU's."""
    asked = torch.is_autocast_enabled

    def is_autocast_enabled(device_type: str = "cpu") -> bool:
        return asked(device_type)

    with (
        _replaced(torch, "is_autocast_enabled", is_autocast_enabled),
        _replaced(attention, "_attend_one_by_one", _attend_at_once),
        CudaFunctions(),
    ):
        yield


def _attend_at_once(query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float | None, __: Any) -> Tensor:
    """FlashAttention's kernel for many lengths, which allocates what the one for rows does, but for backward's sums."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)
