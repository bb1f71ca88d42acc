"""NF4: its 16 levels from the quantiles of the normal distribution, and what it costs a parameter."""

from __future__ import annotations

from itertools import pairwise
from statistics import NormalDist

from ..arithmetic import NF4_BLOCK, NF4_NESTED_BLOCK, estimate_nf4_bytes
from ..strategy import DTYPE_BYTES, Value


class Nf4Example(Value):
    """NF4's levels and what it costs.

    levels:                     the 16 values that a weight divided by its block's absmax is rounded to, -1 to 1
    edges:                      the 15 borders of the buckets, midway between levels
    plain_bytes_per_parameter:  4 bits, and an fp32 constant for 64 weights
    double_bytes_per_parameter: 4 bits, an 8-bit constant for 64 weights, and an fp32 one for 256 of those
    matrix_plain_bytes:         the lecture's matrix as bitsandbytes stores it, with its tables
    matrix_double_bytes:        the same with double quantisation
    """

    levels: tuple[float, ...]
    edges: tuple[float, ...]
    plain_bytes_per_parameter: float
    double_bytes_per_parameter: float
    matrix_plain_bytes: int
    matrix_double_bytes: int


def make_nf4_levels() -> tuple[float, ...]:
    """Normal quantiles over the largest: 7 below zero, zero, 8 above.

    q(p) with p from offset to 1/2 in 8 steps above zero and in 7 below, offset = 1 - (1/32 + 1/30) / 2.
    Source: QLoRA, appendix E (https://arxiv.org/abs/2305.14314); bitsandbytes.functional.create_normal_map.
    """
    offset = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(offset + (0.5 - offset) * step / 8) for step in range(8)]
    below = [-quantile(offset + (0.5 - offset) * step / 7) for step in range(7)]
    return tuple(level / above[0] for level in sorted([*below, 0.0, *above]))


def make_nf4_example(weights: int) -> Nf4Example:
    """For a matrix of that many weights: 0.5 + 4/64 bytes a parameter, or 0.5 + 1/64 + 4/(64 * 256)."""
    levels, constant = make_nf4_levels(), DTYPE_BYTES["fp32"]
    return Nf4Example(
        levels=levels,
        edges=tuple((low + high) / 2 for low, high in pairwise(levels)),
        plain_bytes_per_parameter=0.5 + constant / NF4_BLOCK,
        double_bytes_per_parameter=0.5 + 1 / NF4_BLOCK + constant / (NF4_BLOCK * NF4_NESTED_BLOCK),
        matrix_plain_bytes=estimate_nf4_bytes(weights, double_quantization=False),
        matrix_double_bytes=estimate_nf4_bytes(weights, double_quantization=True),
    )
