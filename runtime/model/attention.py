"""Attention over rows that hold several documents, without a mask and without seeing across their borders.

Registered with transformers as `varlen`: a GPU runs FlashAttention's kernels for sequences of many lengths, a CPU one
document after the other. A quadratic mask is neither made nor read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_KERNELS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_flash_attention_forward",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "fitune::flash_attention",
        "fitune::efficient_attention",
    }
)
"""Attention in one operation: PyTorch's, the flash-attn package's, and a rehearsal's for those on fakes."""


def keep_attention() -> tuple[Any, Any]:
    """For a checkpoint's `context_fn`: what attention returns is kept, and not computed again in backward.

    torch.utils.checkpoint's selective checkpointing; torch.compile reads the same policy off it.
    """
    forward, recomputation = create_selective_checkpoint_contexts(choose_kept)
    return forward, recomputation


def choose_kept(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    """What becomes of an operation's results in a checkpointed layer."""
    is_attention = isinstance(operation, torch._ops.OpOverload) and operation._schema.name in _KERNELS
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def attention_kernels(attention: str) -> Iterator[None]:
    """Inside, SDPA has the kernels that a strategy's attention is planned with.

    efficient: cards before compute capability 8.0 have no FlashAttention, and PyTorch's memory-efficient kernel takes
    no grouped heads (sdp_utils.cpp): transformers, which asks for them wherever there is no mask, would be given plain
    products and all scores. So keys and values are repeated for all heads, as it does beside a mask.
    """
    if attention != "efficient":
        yield
        return
    from transformers.integrations import sdpa_attention

    asks, has_flash = sdpa_attention.use_gqa_in_sdpa, torch.backends.cuda.flash_sdp_enabled()
    sdpa_attention.use_gqa_in_sdpa = lambda *_: False
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = asks
        torch.backends.cuda.enable_flash_sdp(has_flash)


@contextlib.contextmanager
def known_packing(packed: bool) -> Iterator[None]:
    """Inside, transformers need not find out whether rows are packed, for which it would wait for the device at the
    start of every forward (masking_utils.find_packed_sequence_indices)."""
    from transformers import masking_utils

    find = masking_utils.find_packed_sequence_indices

    def find_known(position_ids: Tensor) -> Tensor | None:
        """The number of the document of each token, from position_ids [rows, tokens]."""
        if not packed:
            return None
        before = position_ids[:, :1] - 1
        return (torch.diff(position_ids, prepend=before, dim=-1) != 1).cumsum(-1)

    masking_utils.find_packed_sequence_indices = find_known
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


def list_document_inputs(position_ids: Tensor | None, document_starts: Tensor | None) -> dict[str, Any]:
    """What a model of transformers is given of packed rows, position_ids [rows, tokens]; nothing of others."""
    if position_ids is None:
        return {}
    if document_starts is None:
        return {"position_ids": position_ids}
    tokens = position_ids.shape[1]
    return {
        "position_ids": position_ids,
        "cu_seq_lens_q": document_starts,
        "cu_seq_lens_k": document_starts,
        "max_length_q": tokens,
        "max_length_k": tokens,
    }


def attend_documents(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [rows, heads, tokens, head_dim] to [rows, tokens, heads, head_dim].

    cu_seq_lens_q: where documents begin in the rows laid end to end, and their end; None: each row is one document
    """
    if cu_seq_lens_q is None or dropout > 0:
        assert cu_seq_lens_q is None, "dropout of attention scores has no kernel for packed rows"
        output = _attend_rows(query, key, value, scaling, dropout, sliding_window)
    elif query.device.type == "cpu":
        output = _attend_one_by_one(query, key, value, cu_seq_lens_q, scaling, sliding_window)
    else:
        output = _attend_at_once(query, key, value, cu_seq_lens_q, scaling, sliding_window)
    return output.transpose(1, 2).contiguous(), None


def _attend_rows(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    """Causal attention of whole rows; queries are the last ones of the keys, which a cache may have more of."""
    rows, columns = query.shape[2], key.shape[2]
    mask = None
    if rows != columns or (window is not None and columns > window):
        distance = torch.arange(columns - rows, columns, device=query.device)[:, None] - torch.arange(
            columns, device=query.device
        )
        mask = (distance >= 0) & (distance < (window or columns))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    batch, heads, rows, _ = query.shape
    query, key, value = (_lay_flat(one).transpose(0, 1).unsqueeze(0) for one in (query, key, value))
    parts = [
        _attend_rows(query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], scaling, 0.0, window)
        for start, end in pairwise(starts.tolist())
        if end > start
    ]
    return torch.cat(parts, dim=2).reshape(heads, batch, rows, -1).transpose(0, 1)


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """FlashAttention's kernel for many lengths, as torch.nn.attention.varlen calls it; longest is the row at most."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (one.to(dtype) for one in (query, key, value))
    batch, heads, rows, width = query.shape
    output = torch.ops.aten._flash_attention_forward(
        *(_lay_flat(one) for one in (query, key, value)),
        starts,
        starts,
        rows,
        rows,
        0.0,
        True,
        return_debug_mask=False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
    return output.view(batch, rows, heads, width).transpose(1, 2)  # type: ignore[no-any-return]


def _lay_flat(heads: Tensor) -> Tensor:
    """[rows, heads, tokens, head_dim] to [rows * tokens, heads, head_dim]."""
    return heads.transpose(1, 2).flatten(0, 1)
