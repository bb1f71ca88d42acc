"""Activation offload: what a forward keeps for backward waits in host memory instead of on the device."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..planner.strategy import Strategy

SMALLEST_BYTES = 4096
"""Smaller tensors, such as dropout's seeds, stay on the device: moving them costs more than it saves."""
HOST = torch.device("cpu")

Packed = Tensor | tuple[Tensor, torch.Size]


@contextlib.contextmanager
def offload_activations(base: Any, strategy: Strategy, device: torch.device) -> Iterator[None]:
    """Inside, the decoder's forward keeps its activations in host memory; nothing where the strategy does not ask for
    it, or on a CPU, whose memory is the host's.

    The loss head is left out: its backward comes next, so a round trip would save nothing.
    """
    if strategy.activation_offload and device.type != "cpu":
        with offload_decoder(base.base_model, OffloadHooks(base, device)):
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

    host_bytes: copied so far
    """

    def __init__(self, model: nn.Module, device: torch.device, *, host: torch.device = HOST) -> None:
        super().__init__(self._pack, self._unpack)
        self.host_bytes = 0
        self._device, self._host = device, host
        self._weights = {one.untyped_storage()._cdata for one in (*model.parameters(), *model.buffers())}
        self._copies: dict[tuple[object, ...], tuple[weakref.ref[Any], Tensor]] = {}

    def forget(self) -> None:
        """Let the copies live for as long as the graph needs them."""
        self._copies.clear()

    def _pack(self, tensor: Tensor) -> Packed:
        storage: Any = tensor.untyped_storage()
        if tensor.device != self._device or tensor.nbytes < SMALLEST_BYTES or storage._cdata in self._weights:
            return tensor
        key = storage._cdata, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version
        source, copy = self._copies.get(key, (None, None))
        # A storage that was freed may have left its address to another one.
        if copy is None or source is None or source() is not storage:
            copy = self._copy(tensor)
            self._copies[key] = weakref.ref(storage), copy
        return copy, tensor.shape

    def _copy(self, tensor: Tensor) -> Tensor:
        """A copy in host memory, pinned for a GPU, with one entry along each broadcast dimension."""
        compact = tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]
        pins = self._device.type == "cuda"
        copy = torch.empty_like(compact, device=self._host, pin_memory=pins).copy_(compact, non_blocking=pins)
        self.host_bytes += copy.nbytes
        return copy

    def _unpack(self, packed: Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        copy, shape = packed
        return torch.empty_like(copy, device=self._device).copy_(copy, non_blocking=True).expand(shape)
