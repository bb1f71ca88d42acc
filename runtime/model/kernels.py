"""Liger's kernels in place of a model's own norms, rotary positions and gated MLPs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ...recipes.errors import RunError
from ..quiet import quiet_libraries

ROTARY = "apply_rotary_pos_emb"
"""What transformers calls the function in each family's module, where attention looks it up."""


def use_liger_kernels(base: Any) -> None:
    """Give this model Liger's kernels, and no other one; the loss stays fitune's own.

    Liger binds its norms and MLPs to the instance's modules, but also exchanges the classes in the family's module for
    all models to come, and the rotary function for all there are: the classes are put back, and this model's attention
    alone gets the function. Its Triton kernel is called directly: which one Liger's registry would pick depends on what
    else is installed.
    """
    with quiet_libraries():
        try:
            from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
        except ImportError as error:
            raise RunError(
                f"train.kernels: the plan has Liger's kernels, which cannot be imported: {error}: pip install "
                '"fitune[liger]", or plan again without them'
            ) from error
    family = vars(sys.modules[type(base).__module__])
    own = dict(family)
    try:
        _apply_liger_kernel_to_instance(base, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    finally:
        family.update(own)
    for module in base.modules():
        forward = inspect.unwrap(type(module).forward)
        if ROTARY in getattr(getattr(forward, "__code__", None), "co_names", ()):
            _exchange_rotary(module, forward)


def _exchange_rotary(attention: nn.Module, forward: Callable[..., Any]) -> None:
    """Bind the module's own forward, to which the global function is Liger's."""
    assert isinstance(forward, FunctionType), "what has code is a function"
    names = {**forward.__globals__, ROTARY: _rotate}
    exchanged = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    exchanged.__kwdefaults__ = forward.__kwdefaults__
    vars(attention)["forward"] = MethodType(exchanged, attention)


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotary positions of [batch, heads, sequence, head_dim], in place."""
    from liger_kernel.ops.rope import LigerRopeFunction

    rotated: tuple[Tensor, Tensor] = LigerRopeFunction.apply(query, key, cos, sin, None, unsqueeze_dim)
    return rotated
