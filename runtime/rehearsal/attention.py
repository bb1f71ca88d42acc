"""What scaled dot product attention allocates on a CUDA card: its fused kernels, as autograd functions on fakes.

Sizes from aten/src/ATen/native/transformers/cuda of PyTorch: attention_backward.cu, flash_attn/flash_api.cpp.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from .cost import current_ledger

FLASH_MAX_HEAD_DIM = 256
_documents: ContextVar[int | None] = ContextVar("documents of a micro-batch", default=None)
EFFICIENT_MAX_KEPT_HEAD_DIM = 128
"""Up to this head size the efficient kernel keeps its fp32 accumulators in registers."""


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None, bool], Tensor]
"""Query, key, value, mask, dropout, whether causal, scale, and whether heads are grouped, to the output."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    flash: Kernel | None = None,
    other: Kernel | None = None,
) -> Tensor:
    """F.scaled_dot_product_attention on [batch, heads, sequence, head_dim], with the kernel that CUDA would pick.

    FlashAttention, where the card has it, takes 16 bits without a mask, and heads padded to a multiple of 8.
    flash, other: these kernels in another form; the ones of eager PyTorch where they are not given
    """
    flash, other = flash or _attend_flash, other or _attend_otherwise
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (one.to(dtype) for one in (query, key, value))
    half = query.dtype in (torch.bfloat16, torch.float16)
    width = query.shape[-1]
    takes = half and attn_mask is None and width == value.shape[-1] <= FLASH_MAX_HEAD_DIM
    if not (takes and torch.backends.cuda.flash_sdp_enabled()):
        return other(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    padded = 8 * ceil(width / 8)
    if padded != width:
        query, key, value = (F.pad(one, (0, padded - width)) for one in (query, key, value))
    output = flash(query, key, value, None, dropout_p, is_causal, scale, enable_gqa)
    return output[..., :width] if padded != width else output


def _attend_flash(query: Tensor, key: Tensor, value: Tensor, _: Any, dropout_p: float, *__: Any) -> Tensor:
    return _Flash.apply(query, key, value, dropout_p)  # type: ignore[no-any-return, no-untyped-call]


def _attend_otherwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """The memory-efficient kernel, or plain products for what it does not take."""
    if (enable_gqa and key.shape[1] != query.shape[1]) or query.shape[-1] != value.shape[-1]:
        return torch.ops.aten._scaled_dot_product_attention_math(  # type: ignore[no-any-return]
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    return _Efficient.apply(query, key, value, _make_bias(mask, query, key))  # type: ignore[no-any-return, no-untyped-call]


def _note(
    query: Tensor,
    key: Tensor,
    outputs: list[Tensor],
    *,
    inputs: list[Tensor],
    backward: bool = False,
    is_masked: bool = False,
) -> None:
    """Tell what the kernel costs; without a mask it is causal."""
    ledger = current_ledger()
    if ledger is not None:
        ledger.note_attention(query, key, outputs, inputs=inputs, backward=backward, is_masked=is_masked)


def _make_bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The additive mask that the efficient kernel reads: a boolean one is converted in every layer, and its last
    dimension padded to a multiple of 16."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype), torch.full((), float("-inf"), dtype=query.dtype))
    else:
        mask = mask.to(query.dtype)
    if mask.shape[-1] % 16:
        mask = F.pad(mask, (0, 16 - mask.shape[-1] % 16))[..., : mask.shape[-1]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


@library.custom_op("fitune::flash_attention", mutates_args=())
def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FlashAttention-2's forward: output, log-sum-exp, and two small ones of the random numbers, all without values.

    An operation of its own, as on a card, so that a checkpoint that keeps attention's results finds it.
    """
    return _make_flash_results(query)


@flash_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _make_flash_results(query)


def _make_flash_results(query: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    out = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
    lse = query.new_empty(batch, heads, rows, dtype=torch.float32)
    return out, lse, query.new_empty(2, dtype=torch.int64), query.new_empty((), dtype=torch.int64)


@library.custom_op("fitune::efficient_attention", mutates_args=())
def efficient_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same of the memory-efficient kernel: output and log-sum-exp."""
    return _make_efficient_results(query)


@efficient_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _make_efficient_results(query)


def _make_efficient_results(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, rows, width = query.shape
    out = query.new_empty(batch, rows, heads, width).transpose(1, 2)
    return out, query.new_empty(batch, heads, 32 * ceil(rows / 32), dtype=torch.float32)


class _Flash(torch.autograd.Function):
    """FlashAttention-2: grouped heads are not expanded in forward; backward sums them from expanded gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        out: Tensor
        out, lse, seed, unused = flash_attention(query, key, value)
        if dropout > 0:
            seed = torch.empty(2, dtype=torch.int64)
        ctx.save_for_backward(query, key, value, out, lse, seed, unused)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, out, *_ = ctx.saved_tensors
        batch, heads, rows, width = query.shape
        grad, out = grads[0].transpose(1, 2).contiguous(), out.transpose(1, 2).contiguous()
        parts = [torch.empty_like(one.transpose(1, 2)) for one in (query, key, value)]
        total, columns = _count_backward_rows(batch, rows), _round_head(width)
        delta = torch.empty(heads, total, dtype=torch.float32)
        accumulated = torch.empty(total, heads, columns, dtype=torch.float32)
        expanded = []
        if key.shape[1] != heads:
            expanded = [torch.empty(batch, key.shape[2], heads, width, dtype=query.dtype) for _ in range(2)]
        _note(query, key, parts, backward=True, inputs=[query, key, value, out, grad])
        del grad, out, delta, accumulated, expanded
        return (*(one.transpose(1, 2) for one in parts), None)


def flash_backward_temporaries(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """Bytes that FlashAttention-2's backward allocates beside its results, as in _Flash.backward."""
    batch, heads, rows, width = query.shape
    total = _count_backward_rows(batch, rows)
    expanded = (batch * key.shape[2] * heads * width * query.element_size(),) * 2 if key.shape[1] != heads else ()
    return 4 * heads * total, 4 * total * heads * _round_head(width), *expanded


@contextlib.contextmanager
def known_documents(count: int | None) -> Iterator[None]:
    """Inside, attention is that of `count` documents in a micro-batch, empty ones among them; None: of whole rows."""
    token = _documents.set(count)
    try:
        yield
    finally:
        _documents.reset(token)


def _count_backward_rows(batch: int, rows: int) -> int:
    """Rows of backward's sums in fp32: batch * ceil(rows / 128) * 128, or of documents batch * rows + 128 * documents,
    so that each has a block to spare (mha_bwd, mha_varlen_bwd in flash_api.cpp)."""
    documents = _documents.get()
    return batch * 128 * ceil(rows / 128) if documents is None else batch * rows + 128 * documents


def _round_head(width: int) -> int:
    multiple = 32 if width <= 128 else 64
    return multiple * ceil(width / multiple)


class _Efficient(torch.autograd.Function):
    """The memory-efficient (CUTLASS) kernel: takes an additive mask, fp32 too; its backward stages dQ in fp32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor
        out, lse = efficient_attention(query, key, value, bias)
        if query.shape[-1] > EFFICIENT_MAX_KEPT_HEAD_DIM and query.dtype != torch.float32:
            torch.empty(out.shape, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, bias, _, _ = ctx.saved_tensors
        batch, heads, rows, width = query.shape
        grad = grads[0].transpose(1, 2).contiguous()
        parts = [torch.empty(one.transpose(1, 2).shape, dtype=one.dtype) for one in (query, key, value)]
        delta = torch.empty(batch, heads, rows, dtype=torch.float32)
        staged = []
        if query.dtype != torch.float32:
            staged.append(torch.empty(batch, heads, 64 * ceil(rows / 64), 32 * ceil(width / 32), dtype=torch.float32))
            if width > EFFICIENT_MAX_KEPT_HEAD_DIM:
                staged += [torch.empty(batch, heads, key.shape[2], width, dtype=torch.float32) for _ in range(2)]
        _note(query, key, parts, backward=True, inputs=[query, key, value, grad], is_masked=bias is not None)
        del grad, delta, staged
        return (*(one.transpose(1, 2) for one in parts), None)
