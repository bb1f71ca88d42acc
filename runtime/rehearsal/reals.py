"""Turns a model on meta into a real one of random weights, its 4-bit weights included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...planner.strategy import Strategy
from ..model.build import make_quantization
from ..training.step import TORCH_DTYPES
from .model import is_nf4, replace_tensors

SCALE = 0.02
"""Standard deviation of the weights, as most models are initialised."""
DRAWN_ELEMENTS = 2**20
"""Random numbers that are drawn; larger tensors repeat them."""


def make_reals(model: nn.Module, strategy: Strategy) -> None:
    """Replace every parameter and buffer by one in memory; shared ones stay shared."""
    drawn = torch.randn(DRAWN_ELEMENTS, generator=torch.Generator().manual_seed(0)) * SCALE

    def make(module: Any, name: str, tensor: Tensor) -> Tensor:
        if is_nf4(module, name):
            return _make_nf4(module, strategy, drawn)
        return _fill(torch.empty(tensor.shape, dtype=tensor.dtype), drawn)

    replace_tensors(model, make)


def _fill(tensor: Tensor, drawn: Tensor) -> Tensor:
    """Random numbers; ones in vectors, as norms have them, so that activations stay of ordinary size."""
    if not tensor.dtype.is_floating_point:
        return tensor.zero_()
    if tensor.dim() < 2:
        return tensor.fill_(1.0)
    for part in tensor.view(-1).split(drawn.numel()):
        part.copy_(drawn[: part.numel()])
    return tensor


def _make_nf4(module: Any, strategy: Strategy, drawn: Tensor) -> Tensor:
    """A weight as bitsandbytes quantises it when a model is loaded."""
    from bitsandbytes.nn import Params4bit

    settings = make_quantization(strategy)
    weight = torch.empty(module.out_features, module.in_features, dtype=TORCH_DTYPES[strategy.compute_dtype])
    packed: Any = Params4bit(
        _fill(weight, drawn),
        requires_grad=False,
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
        module=module,
    )
    quantized: Tensor = packed.to("cpu")
    return quantized
