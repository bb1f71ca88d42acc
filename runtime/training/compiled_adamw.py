"""AdamW's update of a bf16 tensor as one compiled kernel, which moves 14 bytes an element and keeps nothing in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from .rounding import NOISE_BITS, add_noise

COLUMNS = 16
"""Of the matrices as which a compiled update sees tensors: an element count that is known to be a multiple of 16 is
what Triton needs to read several elements at once."""


def fold(tensor: Tensor) -> Tensor:
    """The tensor as a matrix [rows, COLUMNS], or of one column, whose rows are not to be compiled for."""
    folded = tensor.view(-1, 1 if tensor.numel() % COLUMNS else COLUMNS)
    torch._dynamo.maybe_mark_dynamic(folded, 0)
    return folded


@cache
def compile_update() -> Callable[..., None]:
    return torch.compile(_update_rounded, fullgraph=True)


def _update_rounded(
    kept: Sequence[Tensor],
    gradient: Tensor,
    counter: Tensor,
    rate: Tensor,
    decay: Tensor,
    found_inf: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One update of weight w and moments m and v by gradient g, rate r, decay d, in step t:

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
    w = (1 - d) w - r / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

    AdamW (algorithm 2 of https://arxiv.org/abs/1711.05101), in the order of torch's fused kernel. torch.optim's own
    code for a rate that is a tensor divides by it: NaN where rate and moments are 0, as in the first step of a warmup.

    rate, decay: learning rate, and its product with the weight decay; tensors, so that no schedule compiles anew
    found_inf:   nothing changes where it is not 0

    One random number serves all three, as making it is most of the kernel's instructions.
    """
    weight, mean, square = exact = [tensor.to(torch.float32, copy=True) for tensor in kept]
    counted, skipped, exact_gradient = counter + 1, found_inf != 0, gradient.float()
    mean.lerp_(exact_gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(exact_gradient, exact_gradient, value=1 - betas[1])
    denominator = square.sqrt().div_((1 - betas[1] ** counted).sqrt()).add_(eps)
    weight.mul_(1 - decay).sub_(rate / (1 - betas[0] ** counted) * mean / denominator)
    noise = torch.randint(0, 1 << NOISE_BITS * len(kept), gradient.shape, device=gradient.device)
    for number, (tensor, value) in enumerate(zip(kept, exact, strict=True)):
        if tensor.dtype != torch.float32:
            bits = (noise >> NOISE_BITS * number).bitwise_and((1 << NOISE_BITS) - 1)
            value = add_noise(value, bits.to(torch.int32))
        tensor.copy_(torch.where(skipped, tensor, value))
    counter.copy_(torch.where(skipped, counter, counted))
