"""Turns a model on meta into one of fake tensors, its 4-bit weights included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...planner.arithmetic import NF4_BLOCK, NF4_NESTED_BLOCK
from ...planner.strategy import Strategy
from ..training.step import TORCH_DTYPES
from .model import is_nf4

Slot = tuple[dict[str, Any], str]
"""A place that holds a tensor: a table and its key."""


def make_fakes(model: nn.Module, strategy: Strategy) -> None:
    """Replace every parameter and buffer by a fake one; call it under FakeTensorMode."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _make_fake(module, name, tensor, strategy)
                    made[id(made[id(tensor)])] = made[id(tensor)]
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _make_fake(module: nn.Module, name: str, tensor: Tensor, strategy: Strategy) -> Tensor:
    if is_nf4(module, name):
        return _make_nf4(module, strategy)
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


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
