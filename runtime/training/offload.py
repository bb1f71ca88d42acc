"""Activation offload: what a forward keeps for backward waits in host memory instead of on the device."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ...planner.activations import OFFLOAD_BLOCK_BYTES
from ...planner.strategy import Strategy
from ..model.parts import find_decoder

SMALLEST_BYTES = 4096
"""Smaller tensors, such as dropout's seeds, stay on the device: moving them costs more than it saves."""


@dataclass(frozen=True, kw_only=True)
class HostCopy:
    """A tensor in host memory.

    blocks: its elements as they lay in memory, OFFLOAD_BLOCK_BYTES at most in each
    dtype:  of its elements
    shape:  its size, dimensions with the largest stride first
    order:  the tensor's own number of each of these dimensions
    whole:  its size with broadcast dimensions, of which one entry is kept
    """

    blocks: tuple[Tensor, ...]
    dtype: torch.dtype
    shape: torch.Size
    order: tuple[int, ...]
    whole: torch.Size


@contextlib.contextmanager
def offload_activations(base: Any, strategy: Strategy, device: torch.device) -> Iterator[None]:
    """Inside, the decoder's forward keeps its activations in host memory; nothing where the strategy does not ask for
    it, or on a CPU, whose memory is the host's.

    The loss head is left out: its backward comes next, so a round trip would save nothing.
    """
    if strategy.activation_offload and device.type != "cpu":
        with offload_decoder(find_decoder(base), OffloadHooks(base, device)):
            yield
    else:
        yield


@contextlib.contextmanager
def offload_decoder(decoder: nn.Module, hooks: OffloadHooks) -> Iterator[None]:
    """Inside, `hooks` see what forwards of `decoder` save for backward, and nothing else."""
    handles = (
        decoder.register_forward_pre_hook(lambda *_: hooks.__enter__()),
        decoder.register_forward_hook(lambda *_: hooks.__exit__(), always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        hooks.forget()


class OffloadHooks(saved_tensors_hooks):
    """torch's save_on_cpu, but the model's own weights stay, what several operations save is copied once, and
    broadcast dimensions, such as those of an attention mask, are not written out.

    A checkpointed layer shows the hooks its input only.
    https://docs.pytorch.org/docs/stable/autograd.html#torch.autograd.graph.save_on_cpu

    host_bytes: of all copies
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(self._pack, self._unpack)
        self.host_bytes = 0
        self.device = device
        self._weights = {one.untyped_storage()._cdata for one in (*model.parameters(), *model.buffers())}
        self._copies: dict[tuple[object, ...], tuple[weakref.ref[Any], HostCopy]] = {}

    def forget(self) -> None:
        """Let the copies live for as long as the graph needs them."""
        self._copies.clear()

    def store(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Copy flat [elements] to host memory, pinned beside a GPU.

        In blocks of one size: torch rounds each piece of pinned memory to a power of two and never gives it back, so
        rows of many lengths would fill the host. https://docs.pytorch.org/docs/stable/notes/cuda.html
        """
        pins, blocks = self.device.type == "cuda", []
        for piece in flat.split(OFFLOAD_BLOCK_BYTES // flat.itemsize):
            block = torch.empty(OFFLOAD_BLOCK_BYTES, dtype=torch.uint8, pin_memory=pins)
            self.host_bytes += block.nbytes
            blocks.append(block[: piece.nbytes].view(piece.dtype).copy_(piece, non_blocking=pins))
        return tuple(blocks)

    def bring(self, flat: Tensor, blocks: tuple[Tensor, ...]) -> None:
        """Copy what `store` returned to flat [elements] on the device."""
        for piece, block in zip(flat.split(OFFLOAD_BLOCK_BYTES // flat.itemsize), blocks, strict=True):
            piece.copy_(block, non_blocking=True)

    def _pack(self, tensor: Tensor) -> Tensor | HostCopy:
        storage: Any = tensor.untyped_storage()
        if tensor.device != self.device or tensor.nbytes < SMALLEST_BYTES or storage._cdata in self._weights:
            return tensor
        key = storage._cdata, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version
        known = self._copies.get(key)
        # A storage that was freed may have left its address to another one.
        if known is None or known[0]() is not storage:
            known = self._copies[key] = weakref.ref(storage), self._copy(tensor)
        return known[1]

    def _copy(self, tensor: Tensor) -> HostCopy:
        compact = tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]
        order = tuple(sorted(range(compact.dim()), key=compact.stride, reverse=True))
        dense = compact.permute(order)
        return HostCopy(
            blocks=self.store(dense.reshape(-1)),
            dtype=tensor.dtype,
            shape=dense.shape,
            order=order,
            whole=tensor.shape,
        )

    def _unpack(self, packed: Tensor | HostCopy) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        flat = torch.empty(packed.shape.numel(), dtype=packed.dtype, device=self.device)
        self.bring(flat, packed.blocks)
        dimensions = sorted(range(len(packed.order)), key=packed.order.__getitem__)
        return flat.view(packed.shape).permute(dimensions).expand(packed.whole)
