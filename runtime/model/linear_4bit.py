"""4-bit linear layers that can be compiled without keeping their dequantised weights.

bitsandbytes dequantises the weight in backward with an operation of its own. It reads nothing of the gradient, so
AOTAutograd's partitioner takes it for a part of the forward and keeps its result: every layer's weight in 16 bits, 29
GiB instead of 10 for an 8B model. Here dequantisation and product are one operation, which reads the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, library, nn
from torch.autograd.function import once_differentiable


@library.custom_op("fitune::multiply_4bit", mutates_args=())
def multiply_4bit(
    gradient: Tensor,
    packed: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
) -> Tensor:
    """gradient [..., outputs] times the packed weight [outputs, inputs]: [..., inputs].

    absmax:  scales of the blocks, or, where those are quantised again to absmax_8bit, theirs
    """
    if absmax_8bit is not None:
        assert absmax_code is not None and absmax_offset is not None, "nested constants come together"
        blocks = torch.ops.bitsandbytes.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax = blocks + absmax_offset
    weight = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, gradient.dtype)
    return torch.matmul(gradient, weight)


@multiply_4bit.register_fake
def _(gradient: Tensor, packed: Tensor, shape: Sequence[int], *_: Any) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], shape[1]))


class _Product(torch.autograd.Function):
    """bitsandbytes' product with a packed weight; backward needs the packed weight only."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, bias: Tensor | None, state: tuple[Any, ...]) -> Tensor:
        shape, absmax, blocksize, quant_type, nested = state
        ctx.save_for_backward(packed, absmax, *nested)
        ctx.static = shape, blocksize, quant_type
        eight_bit, code, offset = nested or (None, None, None)
        return torch.ops.bitsandbytes.gemm_4bit(  # type: ignore[no-any-return]
            inputs,
            packed,
            shape,
            absmax,
            blocksize,
            quant_type,
            bias=bias,
            absmax_8bit=eight_bit,
            absmax_code=code,
            absmax_offset=offset,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        packed, absmax, *nested = ctx.saved_tensors
        shape, blocksize, quant_type = ctx.static
        constants = nested or (None, None, None)
        product = multiply_4bit(gradients[0].contiguous(), packed, shape, absmax, blocksize, quant_type, *constants)
        return product, None, None, None


class PackedLinear4bit(Linear4bit):
    """bitsandbytes' layer with the product above; for frozen weights in blocks of 256 constants, as ours are."""

    def forward(self, x: Tensor) -> Tensor:
        state: Any = self.quant_state
        nested = (state.absmax, state.state2.code, state.offset) if state.nested else ()
        absmax = state.state2.absmax if state.nested else state.absmax
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        constants = tuple(state.shape), absmax, state.blocksize, state.quant_type, nested
        out: Tensor = _Product.apply(x.to(dtype), self.weight.view(-1, 1), bias, constants)  # type: ignore[no-untyped-call]
        return out.to(x.dtype)


def make_compilable(model: nn.Module) -> None:
    """Give every 4-bit layer of `model` the product that compiles well."""
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = PackedLinear4bit
