"""Counts what the host does in Python over a rehearsed step, beside the operations that it starts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from ...planner.rates import HostWork
from .cost import current_ledger

_mode: ContextVar[TorchDispatchMode | None] = ContextVar("_mode", default=None)
"""That is active while a step is rehearsed, and not while a layer is compiled. What is compiled in one rehearsal keeps
the counting functions, and counts for those after it."""


@contextlib.contextmanager
def counted_host_work(mode: TorchDispatchMode) -> Iterator[None]:
    """Inside, calls of modules, autograd functions written in Python and hooks on saved tensors are noted in the
    current ledger while `mode` is active."""
    token, handle = _mode.set(mode), register_module_forward_pre_hook(_count_module)
    function: Any = torch.autograd.Function
    backward: Any = BackwardCFunction
    hooks: Any = saved_tensors_hooks
    make_hooks, forward_apply, backward_apply = hooks.__init__, function.__dict__["apply"], backward.apply

    def make_counted(self: Any, pack: Callable[..., Any], unpack: Callable[..., Any]) -> None:
        make_hooks(self, _counted(pack, "hook"), _counted(unpack, "hook"))

    try:
        hooks.__init__ = make_counted
        function.apply = classmethod(_counted(forward_apply.__func__, "function"))
        backward.apply = _counted(backward_apply, "function")
        yield
    finally:
        _mode.reset(token)
        handle.remove()
        hooks.__init__, function.apply, backward.apply = make_hooks, forward_apply, backward_apply


def _counted(function: Callable[..., Any], kind: HostWork) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        _count(kind)
        return function(*args, **kwargs)

    return call


def _count_module(module: nn.Module, _: Any) -> None:
    _count("module")
    if isinstance(module, BaseTunerLayer):
        _count("adapter")


def _count(kind: HostWork) -> None:
    ledger, mode = current_ledger(), _mode.get()
    if ledger is not None and mode in _get_current_dispatch_mode_stack():
        ledger.note_host(kind)
