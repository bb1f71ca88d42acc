"""Watches the storages of a rehearsed step come and go: the event sequence that a caching allocator would see."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from .cost import Ledger
from .model import TensorSpec

WORKSPACES = (0, 1, 2, 3)
"""Numbers of the workspaces that stay: cuBLAS's of the main thread and of autograd's, which has a handle of its own,
and cuBLASLt's of both."""
FIRST_STORAGE = len(WORKSPACES)
"""The number of the first storage that comes and goes."""
LT_WORKSPACE_BYTES = 2**20
"""cuBLASLt's workspace, which products with a bias use (CUDABlas.cpp, CUBLASLT_WORKSPACE_SIZE)."""
FUSED_4BIT = "bitsandbytes::gemm_4bit"
"""bitsandbytes' product with a packed weight."""
ADDED_PRODUCTS = "fitune::add_products"
OTHER_PRODUCTS = frozenset({FUSED_4BIT, ADDED_PRODUCTS})
"""Products with a packed weight: they dequantise it and multiply."""
_aten = torch.ops.aten
_MATRIX_PRODUCTS = frozenset(
    {_aten.mm.default, _aten.addmm.default, _aten.addmm_.default}
    | {_aten.bmm.default, _aten.baddbmm.default, _aten._scaled_mm.default}
)
_LAST_FIRST = frozenset({_aten.native_dropout.default})
"""Operations whose CUDA kernels allocate their results from the last to the first: dropout its mask (Dropout.cu)."""


@dataclass(kw_only=True)
class Recording:
    """What happened, in order; a storage is known by its number.

    sizes:      bytes of each storage
    components: what each storage is counted as
    events:     n for "storage n allocated", ~n for "storage n freed"
    marks:      (index into events, section that begins there)
    updates:    numbers that stand for no storage but for an update of these tensors
    """

    sizes: list[int] = field(default_factory=list)
    components: list[str] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    updates: dict[int, tuple[TensorSpec, ...]] = field(default_factory=dict)

    def allocate(self, size_bytes: int, component: str) -> int:
        """A new storage's number."""
        number = len(self.sizes)
        self.sizes.append(size_bytes)
        self.components.append(component)
        self.events.append(number)
        return number

    def free(self, number: int) -> None:
        self.events.append(~number)

    def copy(self, number: int) -> int:
        """Another storage, or update, of the same kind; its number."""
        self.sizes.append(self.sizes[number])
        self.components.append(self.components[number])
        copied = len(self.sizes) - 1
        if number in self.updates:
            self.updates[copied] = self.updates[number]
        return copied

    def fork(self) -> Recording:
        """One that storages can be added to."""
        return replace(self, sizes=[*self.sizes], components=[*self.components], updates=dict(self.updates))

    def with_workspace(self, size_bytes: int) -> Recording:
        """The same on a card whose cuBLAS takes so much, of which nothing else that is recorded depends."""
        return replace(self, sizes=[size_bytes, size_bytes, *self.sizes[2:]])


class _Storage:
    """A live storage: its number, and the weak reference whose callback reports its end."""

    __slots__ = ("number", "reference")

    def __init__(self, number: int) -> None:
        self.number = number
        self.reference: Any = None


class StorageWatch(TorchDispatchMode):
    """Records every storage that an operation makes, and when it dies.

    cuBLAS's workspaces, allocated at a thread's first matrix product and kept, get their size from the card that a
    recording is used for (`Recording.with_workspace`).

    temporaries: sizes of what an operation's CUDA kernel allocates beside its results and frees
    """

    def __init__(self, *, temporaries: Callable[[Any, Any], tuple[int, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        sizes = [0, 0, LT_WORKSPACE_BYTES, LT_WORKSPACE_BYTES]
        self.recording = Recording(sizes=sizes, components=["temporary"] * len(WORKSPACES))
        self.component = "weights"
        self.backward = False
        self._temporaries = temporaries
        self._live: dict[int, _Storage] = {}
        self._sum: tuple[_Storage, int, int] | None = None
        self._handles: set[int] = set()
        self.ledger = Ledger(
            self.number_of,
            mark_of=lambda: len(self.recording.marks) - 1,
            is_engine=lambda: self.backward and not torch.is_grad_enabled(),
        )
        self._muted = False

    @contextlib.contextmanager
    def muted(self, active: bool) -> Iterator[None]:
        """Inside, if active, results are not recorded: what a compiled kernel never writes to memory."""
        self._muted = active
        try:
            yield
        finally:
            self._muted = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._muted:
            result = func(*args, **(kwargs or {}))
            self.ledger.note_fused(args, kwargs, result)
            return result
        self.settle()
        held = [self.recording.allocate(size, "temporary") for size in self._temporaries(func, args)]
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, list | tuple) else (result,)
        for one in reversed(results) if func in _LAST_FIRST else results:
            if isinstance(one, torch.Tensor):
                self.see(one)
        if func in _MATRIX_PRODUCTS or func.name() in OTHER_PRODUCTS:
            self._hold_workspace(has_bias=_has_bias(func, args, kwargs or {}))
        self.ledger.note(func, args, kwargs, result)
        for number in held:
            self.recording.free(number)
        if self.backward and func is _aten.add.Tensor and not torch.is_grad_enabled():
            self._note_sum(args[0], result)
        return result

    def _hold_workspace(self, *, has_bias: bool) -> None:
        """A thread's first matrix product allocates its workspace, after the result, cuBLASLt's handle being cuBLAS's.

        getCurrentCUDABlasLtHandle in CublasHandlePool.cpp.
        """
        needed = (self.backward, self.backward + 2) if has_bias else (self.backward,)
        for number in needed:
            if number not in self._handles:
                self._handles.add(number)
                self.recording.events.append(WORKSPACES[number])

    def enter(self, section: str, component: str) -> None:
        """From here on the step is in `section`, and new storages count as `component`."""
        self.settle()
        self.component = component
        self.recording.marks.append((len(self.recording.events), section))

    def see(self, tensor: torch.Tensor) -> None:
        """Record a tensor's storage if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        recomputed = self.backward and self.component == "temporary" and torch.is_grad_enabled()
        component = "activations" if recomputed else self.component
        entry = _Storage(self.recording.allocate(storage.nbytes(), component))

        def forget(_: Any) -> None:
            if self._live.get(key) is entry:
                del self._live[key]
            self.recording.free(entry.number)

        entry.reference = weakref.ref(storage, forget)
        self._live[key] = entry

    def note_update(self, tensors: tuple[TensorSpec, ...]) -> None:
        """The optimizer updates these here, in backward."""
        self.settle()
        self.recording.updates[self.recording.allocate(0, "temporary")] = tensors

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """The number of a tensor's storage, None for one that was not seen."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry.number

    def label(self, tensor: torch.Tensor, component: str) -> None:
        """Count a tensor's storage as `component`."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        if entry is not None:
            self.recording.components[entry.number] = component

    def _note_sum(self, first: Any, result: torch.Tensor) -> None:
        """Remember a gradient accumulation, which on plain tensors may be made in place; see settle()."""
        if not isinstance(first, FakeTensor) or first.shape != result.shape or first.dtype != result.dtype:
            return
        if first._is_view():
            return
        made = self._live.get(result.untyped_storage()._cdata)
        old = self._live.get(first.untyped_storage()._cdata)
        if made is not None and old is not None:
            self._sum = made, old.number, len(self.recording.events) - 1

    def settle(self) -> None:
        """Autograd adds a second gradient into the first one's memory if nothing else holds that, as a view's base
        would; tensor subclasses such as fakes get a new tensor instead. Where the first died with the addition, take
        the addition as in place.
        https://github.com/pytorch/pytorch/blob/main/torch/csrc/autograd/input_buffer.cpp
        """
        if self._sum is None:
            return
        made, old, index = self._sum
        self._sum = None
        events = self.recording.events
        for later in range(index + 1, len(events)):
            if events[later] == ~old:
                del events[later], events[index]
                made.number = old
                return


def _has_bias(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a matrix product adds a vector, which cuBLASLt does on the way (useLtInterface in Blas.cpp)."""
    if func is _aten.addmm.default:
        return bool(args[0].dim() == 1)
    if func.name() == ADDED_PRODUCTS:
        return args[2] is not None
    return func.name() == FUSED_4BIT and kwargs.get("bias", args[6] if len(args) > 6 else None) is not None
