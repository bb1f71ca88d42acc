"""What a host would wait for a GPU for: reads of values, copies that block, shapes that depend on values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "is_nonzero", "equal", "item"}
SHAPED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
COPIES = {"_to_copy", "copy_", "_copy_from_and_resize"}


class WaitsForDevice(TorchDispatchMode):
    """Names, in their order, of the operations on a GPU's tensors that return only when the GPU is done."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name().removeprefix("aten::").partition(".")[0]
        if _waits(name, args, kwargs, result):
            self.names.append(name)
        return result


def _waits(name: str, args: Any, kwargs: Any, result: Any) -> bool:
    if name in COPIES:
        return _crosses(name, args, result) and not _is_asynchronous(name, args, kwargs)
    if not any(isinstance(one, Tensor) and one.is_cuda for one in args):
        return False
    if name in ("index", "index_put_", "index_put"):
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in READS or name in SHAPED_BY_VALUES


def _crosses(name: str, args: Any, result: Any) -> bool:
    """Whether a copy goes from one kind of device to the other."""
    source = args[1] if name == "copy_" else args[0]
    return isinstance(source, Tensor) and bool(source.is_cuda != result.is_cuda)


def _is_asynchronous(name: str, args: Any, kwargs: Any) -> bool:
    """From pinned memory, and where the caller says so; to memory that is not pinned CUDA waits all the same."""
    asked = kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
    source = args[1] if name == "copy_" else args[0]
    return bool(asked and not source.is_cuda)
