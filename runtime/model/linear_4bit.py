"""4-bit linear layers that can be compiled without keeping their dequantised weights.

bitsandbytes dequantises the weight in backward with an operation that reads nothing of the gradient, so AOTAutograd's
partitioner takes it for a part of the forward and keeps its result: every layer's weight in 16 bits, 29 GiB instead of
10 for an 8B model. The operation here has the gradient among its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, library, nn
from torch.autograd.function import once_differentiable

Storage = tuple[tuple[int, ...], int, str]
"""Of a packed weight: its shape [outputs, inputs], elements of a block, and the quantisation's name."""


def list_packed(layer: Linear4bit) -> tuple[tuple[Tensor, ...], Storage]:
    """A layer's packed weight and its blocks' scales; where those are quantised again, their own scales and with them
    their 8 bits, code and offset."""
    state: Any = layer.quant_state
    nested = (state.absmax, state.state2.code, state.offset) if state.nested else ()
    absmax = state.state2.absmax if state.nested else state.absmax
    return (layer.weight.view(-1, 1), absmax, *nested), (tuple(state.shape), state.blocksize, state.quant_type)


def dequantize(tensors: Sequence[Tensor], storage: Storage, dtype: torch.dtype) -> Tensor:
    """The weight [outputs, inputs] that `list_packed` describes."""
    packed, absmax, *nested = tensors
    shape, blocksize, quant_type = storage
    if nested:
        absmax_8bit, code, offset = nested
        blocks = torch.ops.bitsandbytes.dequantize_blockwise(absmax_8bit, absmax, code, 256, torch.float32)
        absmax = blocks + offset
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype)
    return weight


@library.custom_op("fitune::dequantize_4bit", mutates_args=())
def dequantize_after(
    reader: Tensor, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, quant_type: str
) -> Tensor:
    """The weight, in the dtype of what it is multiplied with, which has to be there before."""
    return dequantize(tensors, (tuple(shape), blocksize, quant_type), reader.dtype)


@dequantize_after.register_fake
def _(reader: Tensor, _: Sequence[Tensor], shape: Sequence[int], *__: Any) -> Tensor:
    return reader.new_empty(tuple(shape))


class _Product(torch.autograd.Function):
    """bitsandbytes' product with a packed weight; backward needs the packed weight only."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, tensors: tuple[Tensor, ...], storage: Storage) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.storage = storage
        packed, absmax, *nested = tensors
        eight_bit, code, offset = nested or (None, None, None)
        return torch.ops.bitsandbytes.gemm_4bit(  # type: ignore[no-any-return]
            inputs,
            packed,
            storage[0],
            absmax,
            *storage[1:],
            bias=bias,
            absmax_8bit=eight_bit,
            absmax_code=code,
            absmax_offset=offset,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0].contiguous()
        weight = dequantize_after(gradient, list(ctx.saved_tensors), *ctx.storage)
        return torch.matmul(gradient, weight), None, None, None


class PackedLinear4bit(Linear4bit):
    """bitsandbytes' layer with the product above; for frozen weights in blocks of 256 constants, as ours are."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        out: Tensor = _Product.apply(x.to(dtype), bias, *list_packed(self))  # type: ignore[no-untyped-call]
        return out.to(x.dtype)


def make_compilable(model: nn.Module) -> None:
    """Give every 4-bit layer of `model` the product that compiles well."""
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = PackedLinear4bit
