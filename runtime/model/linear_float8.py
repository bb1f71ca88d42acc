"""Frozen linear layers that are stored and multiplied in float8: half the bytes of 16 bits, at twice their rate.

Weights are quantised once, with one scale each, so that the same bytes serve the forward and the gradients of inputs.
Inputs and gradients are quantised as they come, with a scale a row. There is no gradient of a weight. torchao has
float8 training that keeps 16-bit weights, casts them in every product and computes their gradients (torchao.float8),
and stored float8 weights that are quantised for inference (torchao.quantization).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library, nn
from torch.autograd.function import once_differentiable

FLOAT8 = torch.float8_e4m3fn
MOST = torch.finfo(FLOAT8).max
LEAST = 1e-12
"""Smallest maximum that a scale is made of, so that rows of zeros stay zeros."""
MULTIPLE = 16
"""What the sizes of a float8 product must be multiples of (torch._scaled_mm)."""


class Float8Linear(nn.Linear):
    """A frozen linear layer: weight [outputs, inputs] in float8, times `scale` in fp32."""

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: Tensor = _Product.apply(x, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Product(torch.autograd.Function):
    """Nothing but the weight is kept for backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        rows, row_scales = quantize(inputs.reshape(-1, inputs.shape[-1]), dim=-1)
        out = _multiply(rows, row_scales, weight.t(), scale, inputs.dtype)
        return out.view(*inputs.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, scale = ctx.saved_tensors
        gradient = gradients[0]
        rows, row_scales = quantize(gradient.reshape(-1, gradient.shape[-1]), dim=-1)
        out = multiply_transposed(rows, row_scales, weight, scale, gradient.dtype)
        return out.view(*gradient.shape[:-1], weight.shape[1]), None, None


@library.custom_op("fitune::multiply_float8", mutates_args=())
def multiply_transposed(rows: Tensor, row_scales: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [tokens, outputs] times the weight [outputs, inputs], both in float8: [tokens, inputs].

    The kernels want the columns of the second one together, so the weight is copied. That is one operation with the
    product, as otherwise AOTAutograd takes the copy, which reads no gradient, for a part of the forward and keeps it.
    """
    return _multiply(rows, row_scales, weight.t().contiguous().t(), scale, dtype)


@multiply_transposed.register_fake
def _(rows: Tensor, _: Tensor, weight: Tensor, __: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]), dtype=dtype)


def _multiply(rows: Tensor, row_scales: Tensor, right: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    columns = scale.expand(1, right.shape[1]).contiguous()
    return torch._scaled_mm(rows, right, scale_a=row_scales, scale_b=columns, out_dtype=dtype, use_fast_accum=True)


def quantize(values: Tensor, *, dim: int | None) -> tuple[Tensor, Tensor]:
    """Values in float8 and the fp32 scale to multiply them with: one for each row, or one where dim is None."""
    most = values.abs().amax(dim, keepdim=True) if dim is not None else values.abs().amax()
    scale = most.float().clamp(min=LEAST) / MOST
    return (values.float() / scale).to(FLOAT8), scale


def find_convertible(base: Any) -> list[nn.Linear]:
    """The frozen linear layers whose sizes float8 products take, all but the LM head."""
    kept = set(base.get_output_embeddings().modules())
    return [
        module
        for module in base.modules()
        if type(module) is nn.Linear
        and module not in kept
        and not module.weight.requires_grad
        and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
    ]


def use_float8(base: Any) -> None:
    """Store these layers of `base` in float8, one by one."""
    for module in find_convertible(base):
        with torch.no_grad():
            weight, scale = quantize(module.weight, dim=None)
        module.__class__ = Float8Linear
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.register_buffer("scale", scale, persistent=False)
    torch.cuda.empty_cache()
