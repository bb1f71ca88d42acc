"""Stochastic rounding to bf16: updates of weights that do not get lost.

A bf16 weight has 8 significant bits: an update smaller than 1/512 of it rounds to nothing, and at usual learning
rates most are. So where bf16 weights are trained, the update is computed in fp32 and rounded stochastically: up or down
with probabilities that make the expected weight the exact one. https://arxiv.org/abs/2010.06192
"""

from __future__ import annotations

import torch
from torch import Tensor

NOISE_BITS = 16
"""Bits of an fp32 that bf16 has not."""


def round_stochastically(target: Tensor, exact: Tensor) -> None:
    """Write fp32 `exact` into bf16 `target`, rounded up or down at random so that its expectation is exact.

    bf16 is the upper half of an fp32's bits: adding a uniform 16-bit integer to the bits and cutting the lower half
    carries into the upper one with just the probability of the part cut off. Infinities and NaN stay what they are.
    A target in fp32, which a few models keep among bf16 ones, takes the exact values.
    """
    if target.dtype == torch.float32:
        target.copy_(exact)
        return
    noise = torch.randint(0, 1 << NOISE_BITS, exact.shape, dtype=torch.int32, device=exact.device)
    target.copy_(add_noise(exact, noise))


def add_noise(exact: Tensor, noise: Tensor) -> Tensor:
    """fp32 `exact` rounded up or down to bf16's values by a uniform integer of NOISE_BITS each, int32, which is written
    over."""
    cut = noise.add_(exact.view(torch.int32)).bitwise_and_(-1 << NOISE_BITS).view(torch.float32)
    return torch.where(torch.isfinite(exact), cut, exact)
