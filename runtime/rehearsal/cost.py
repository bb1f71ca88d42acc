"""What each operation of a rehearsed step costs a device: arithmetic, and bytes read and written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ...planner.rates import CACHED_ROW_BYTES, SOFTMAX_PASSES, HostWork
from ...planner.speed import ATTENTION_BACKWARD_FACTOR, Work

WITHOUT_KERNEL = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::_reshape_alias", "prim::")
"""Operations that allocate or look, and start no kernel."""
PACKED_PRODUCT = "bitsandbytes::gemm_4bit"
ADDED_PRODUCTS = "fitune::add_products"
"""Products one after the other, each added to those before it."""
IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}
"""Products that overwrite what they are added to, to those whose arithmetic is known."""
DEQUANTIZATION = "fitune::dequantize_4bit"
"""Of a packed weight; its first argument has to be there, but is not read."""
TRANSPOSED_PRODUCT = "fitune::multiply_float8"
"""A product in float8, after its weight was copied to lie transposed."""
TABLES = {
    "aten::embedding": 0,
    "aten::gather": 0,
    "aten::index_select": 0,
    "aten::nll_loss_forward": 0,
    "aten::nll_loss_backward": 1,
    "aten::scatter_add_": 0,
}
"""Operations that touch a few elements of a tensor, to its place among their tensors: it does not count."""
SOFTMAX_BACKWARD = "aten::_softmax_backward_data"
SOFTMAX: dict[str, Literal["forward", "backward"]] = {
    "aten::_softmax": "forward",
    "aten::_log_softmax": "forward",
    SOFTMAX_BACKWARD: "backward",
    "aten::_log_softmax_backward_data": "backward",
}
"""Operations that go through their first tensor more than once."""
Traffic = tuple[tuple[int | None, int], ...]
"""(number of a storage, bytes) of tensors; None for a storage that was not seen."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the step.

    mark:   its section, as an index into the recording's marks
    name:   such as `aten::mm`
    work:   what it costs on its own
    reads:  of its inputs
    writes: of its results
    """

    mark: int
    name: str
    work: Work
    reads: Traffic = ()
    writes: Traffic = ()


class Ledger:
    """Takes down what operations cost.

    number_of: the number of a tensor's storage
    mark_of:   the section that the step is in
    is_engine: whether autograd's engine starts the operations, without Python
    """

    def __init__(
        self, number_of: Callable[[Tensor], int | None], mark_of: Callable[[], int], is_engine: Callable[[], bool]
    ) -> None:
        self.operations: list[Operation] = []
        self._number_of, self._mark_of, self._is_engine = number_of, mark_of, is_engine
        self._behind: dict[int, dict[int | None, int]] = {}

    def note_host(self, kind: HostWork) -> None:
        """Work of the host that starts no operation."""
        self.operations.append(Operation(self._mark_of(), kind, Work(kind="none", host=kind)))

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An operation that was run."""
        name = func.name()
        if name.startswith("prim::"):
            return
        if _is_view(func, name):
            self._follow(args, result)
            host: HostWork = "engine_view" if self._is_engine() else "view"
            self.operations.append(Operation(self._mark_of(), name, Work(kind="none", host=host)))
            return
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(result))
        if name == ADDED_PRODUCTS:
            self._note_added(args[0], args[1], result)
            return
        if name == DEQUANTIZATION:
            inputs = inputs[1:]
        if name in TABLES:
            table = _key(inputs[TABLES[name]])
            inputs, outputs = ([one for one in group if _key(one) != table] for group in (inputs, outputs))
        reads, writes = self._list_reads(inputs), self._list_traffic(outputs)
        moved = sum(size for _, size in (*reads, *writes)) + _count_read_again(name, inputs)
        width = outputs[0].element_size() if outputs else 2
        kind: Literal["matrix", "memory"] = "memory"
        flops = 0
        if "attention" in name:
            backward = "backward" in name  # whose first argument is the gradient
            query, key = inputs[1:3] if backward else inputs[:2]
            is_masked = name == "fitune::efficient_attention" and len(inputs) > 3
            outputs = outputs[: 3 if backward else 1]
            self.note_attention(query, key, outputs, inputs=inputs, backward=backward, is_masked=is_masked)
            return
        packet = IN_PLACE.get(func._overloadpacket, func._overloadpacket)
        if packet in flop_registry:
            kind, flops = "matrix", flop_registry[packet](*args, **(kwargs or {}), out_val=result)
            width = inputs[0].element_size()
        elif name == PACKED_PRODUCT:
            shape = args[2]
            rows = args[0].numel() // args[0].shape[-1]
            flops, weight = 2 * rows * shape[0] * shape[1], width * shape[0] * shape[1]
            # The weight is written in the compute dtype, and read.
            self.operations.append(Operation(self._mark_of(), name, Work(kind="memory", bytes=2 * weight, calls=0)))
            kind = "matrix"
        elif name == SOFTMAX_BACKWARD:
            product = 3 * inputs[0].nbytes  # gradient times output, by a kernel of its own
            self.operations.append(Operation(self._mark_of(), name, Work(kind="memory", bytes=product, calls=0)))
        elif name == TRANSPOSED_PRODUCT:
            flops, copied, width = 2 * inputs[0].shape[0] * inputs[2].numel(), 2 * inputs[2].nbytes, 1
            self.operations.append(Operation(self._mark_of(), name, Work(kind="memory", bytes=copied, calls=0)))
            kind = "matrix"
        work = Work(kind=kind, flops=flops, bytes=moved, width=width, host=self._starter())
        self.operations.append(Operation(self._mark_of(), name, work, reads, writes))

    def _note_added(self, lefts: Sequence[Tensor], rights: Sequence[Tensor], result: Tensor) -> None:
        """Products that are added up in place: each but the first reads what is there."""
        for place, (left, right) in enumerate(zip(lefts, rights, strict=True)):
            read = [left, right, *([result] if place else [])]
            reads, writes = self._list_reads(read), self._list_traffic([result])
            work = Work(
                kind="matrix",
                flops=2.0 * left.shape[0] * left.shape[1] * right.shape[1],
                bytes=sum(size for _, size in (*reads, *writes)),
                width=left.element_size(),
                host=self._starter(),
            )
            self.operations.append(Operation(self._mark_of(), ADDED_PRODUCTS, work, reads, writes))

    def _starter(self) -> HostWork:
        return "engine" if self._is_engine() else "operation"

    def note_fused(self, args: Any, kwargs: Any, result: Any) -> None:
        """An operation that a compiled kernel does on the way: whoever reads its result reads what it reads."""
        behind = dict(self._list_reads(list(_tensors((args, kwargs)))))
        for one in _tensors(result):
            self._behind[_key(one)] = behind

    def note_attention(
        self,
        query: Tensor,
        key: Tensor,
        outputs: Sequence[Tensor],
        *,
        inputs: Sequence[Tensor],
        backward: bool,
        is_masked: bool = False,
    ) -> None:
        """Fused attention: 4 * batch * heads * rows * keys * head_dim, half of it without a mask, since it is causal
        then, 2.5 times as much in backward."""
        batch, heads, rows, width = query.shape
        flops = 4.0 * batch * heads * rows * key.shape[2] * width * (1.0 if is_masked else 0.5)
        reads, writes = self._list_reads(inputs), self._list_traffic(outputs)
        work = Work(
            kind="attention",
            flops=flops * (ATTENTION_BACKWARD_FACTOR if backward else 1.0),
            bytes=sum(size for _, size in (*reads, *writes)),
            width=query.element_size(),
            head_dim=width,
            sequence=rows,
            backward=backward,
            is_masked=is_masked,
            host=self._starter(),
        )
        self.operations.append(Operation(self._mark_of(), "attention", work, reads, writes))

    def note_kernel(self, name: str, *, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """A kernel that torch does not know; what it overwrites counts among both."""
        read, written = self._list_traffic(reads), self._list_traffic(writes)
        work = Work(kind="memory", bytes=sum(size for _, size in (*read, *written)))
        self.operations.append(Operation(self._mark_of(), name, work, read, written))

    def note_transfer(self, size_bytes: int) -> None:
        """Bytes between the device and its host."""
        self.operations.append(Operation(self._mark_of(), "copy", Work(kind="transfer", bytes=size_bytes)))

    def _follow(self, args: Any, result: Any) -> None:
        """A view of what is not in memory is not in memory either."""
        first = next(_tensors(args), None)
        behind = None if first is None else self._behind.get(_key(first))
        for one in _tensors(result) if behind is not None else ():
            self._behind[_key(one)] = behind or {}

    def _list_reads(self, tensors: Sequence[Tensor]) -> Traffic:
        found: dict[int | None, int] = {}
        for one in tensors:
            number = self._number_of(one)
            for storage, size in (self._behind.get(_key(one), {}) if number is None else {number: _bytes(one)}).items():
                found[storage] = max(size, found.get(storage, 0))
        return tuple(found.items())

    def _list_traffic(self, tensors: Sequence[Tensor]) -> Traffic:
        return tuple((self._number_of(one), _bytes(one)) for one in tensors)


_ledger: ContextVar[Ledger | None] = ContextVar("_ledger", default=None)
"""Of the rehearsal that is under way: attention is no operation of its own on fakes, and tells its cost itself."""


@contextlib.contextmanager
def kept_ledger(ledger: Ledger) -> Iterator[None]:
    """Inside, `current_ledger` is this one."""
    token = _ledger.set(ledger)
    try:
        yield
    finally:
        _ledger.reset(token)


def current_ledger() -> Ledger | None:
    """The ledger of the rehearsal that is under way."""
    return _ledger.get()


def _is_view(func: Any, name: str) -> bool:
    if name.startswith(WITHOUT_KERNEL):
        return True
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)


def _count_read_again(name: str, inputs: Sequence[Tensor]) -> int:
    """Bytes that a softmax reads again, row by row, from the device's memory: those of rows that no cache holds."""
    if name not in SOFTMAX or inputs[0].shape[-1] * inputs[0].element_size() <= CACHED_ROW_BYTES:
        return 0
    return (SOFTMAX_PASSES[SOFTMAX[name]] - 1) * inputs[0].nbytes


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    """What of a tensor is in memory: broadcast dimensions count once."""
    return int(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))
