"""Turns a model on meta into one of fake tensors, its 4-bit weights included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...planner.arithmetic import NF4_BLOCK, NF4_NESTED_BLOCK
from ...planner.strategy import Strategy
from ..training.step import TORCH_DTYPES
from .model import is_nf4, replace_tensors

Slot = tuple[dict[str, Any], str]
"""A place that holds a tensor: a table and its key."""


def make_fakes(model: nn.Module, strategy: Strategy) -> None:
    """Replace every parameter and buffer by a fake one; call it under FakeTensorMode."""

    def make(module: Any, name: str, tensor: Tensor) -> Tensor:
        return _make_nf4(module, strategy) if is_nf4(module, name) else torch.empty(tensor.shape, dtype=tensor.dtype)

    replace_tensors(model, make)


def _make_nf4(module: Any, strategy: Strategy) -> Tensor:
    """A packed weight with its quantisation state, as bitsandbytes leaves them."""
    from bitsandbytes.functional import QuantState

    elements = module.in_features * module.out_features
    blocks = -(-elements // NF4_BLOCK)
    nested: dict[str, Any] = {}
    if strategy.double_quantization:
        second = QuantState(
            absmax=torch.empty(-(-blocks // NF4_NESTED_BLOCK)),
            blocksize=NF4_NESTED_BLOCK,
            code=torch.empty(256),
            dtype=torch.float32,
        )
        nested = {"offset": torch.empty(()), "state2": second}
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size((module.out_features, module.in_features)),
        code=torch.empty(16),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=TORCH_DTYPES[strategy.compute_dtype],
        **nested,
    )
    weight = nn.Parameter(torch.empty(-(-elements // 2), 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = module.quant_state = state  # type: ignore[attr-defined]
    return weight


def list_slots(model: nn.Module) -> list[Slot]:
    """Where a module's tensors are: parameters, buffers, and the constants of 4-bit weights."""
    slots: list[Slot] = []
    for module in model.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        state = getattr(module, "quant_state", None)
        if state is not None:
            tables += [vars(state)] + ([vars(state.state2)] if state.nested else [])
        slots += [(table, key) for table in tables for key, one in table.items() if isinstance(one, Tensor)]
    return slots
