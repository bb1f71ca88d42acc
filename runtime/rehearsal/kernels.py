"""Triton's kernels in a rehearsal: Liger's own code runs on fakes and allocates, and what it launches is noted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...planner.strategy import Strategy
from .cost import Ledger

READ_AND_WRITTEN = {
    "_triton_rope": (0, 2),
    "_swiglu_backward_kernel": (1, 2),
    "_geglu_tanh_backward_kernel": (1, 2),
}
"""Which arguments a kernel reads and overwrites; all other tensors are read or written once."""


@contextlib.contextmanager
def noted_launches(ledger: Ledger, strategy: Strategy) -> Iterator[None]:
    """Inside, a launch of a Triton kernel computes nothing, and the ledger knows what it moves; for strategies with
    such kernels."""
    if strategy.kernels == "torch":
        yield
        return
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, **_: Any) -> None:
        tensors = [one for one in args if isinstance(one, Tensor)]
        again = [args[place] for place in READ_AND_WRITTEN.get(kernel.__name__, ())]
        ledger.note_kernel(kernel.__name__, reads=tensors, writes=again)

    launch = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = launch
