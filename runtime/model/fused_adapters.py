"""LoRA layers that add the adapter's product where the frozen one is computed, instead of beside it.

    y = x W^T + b + s (x A^T) B^T

peft writes x W^T, (x A^T) B^T, that times s, and their sum: four tensors as wide as the output. Here s (x A^T) B^T is
written, and x W^T added to it by the product that computes it, whose kernel reads what it adds to while it multiplies.
Layers that read the same input (queries, keys and values; gate and up) are computed together: x A^T once for all of
them, and the gradients of x summed in one tensor. With g = s dY B:

    dX = g A + dY W,  dA = g^T x,  dB = s dY^T (x A^T)

Only x and x A^T are kept for backward. Unsloth (fast_lora.py) and NeMo AutoModel (lora_mlp.py) add in the other order,
the adapter's product last: a kernel that waits for memory then reads and writes all of the output once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, library, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ...planner.model_shape import TOGETHER
from ...planner.strategy import Strategy
from ..training.step import TORCH_DTYPES
from .linear_4bit import PackedLinear4bit, Storage, dequantize, dequantize_after, list_packed

Weight = tuple[tuple[Tensor, ...], Storage | None]
"""A frozen weight [outputs, inputs], or the tensors that it is packed in, and how."""


@library.custom_op("fitune::add_products", mutates_args=())
def add_products(lefts: Sequence[Tensor], rights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """bias + the sum of left @ right, each but the first added in place.

    For compiled layers: of an addition in place AOTAutograd would make a copy.
    """
    out = _multiply(lefts[0], rights[0], bias)
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        out.addmm_(left, right)
    return out


@add_products.register_fake
def _(lefts: Sequence[Tensor], rights: Sequence[Tensor], _: Tensor | None) -> Tensor:
    return lefts[0].new_empty((lefts[0].shape[0], rights[0].shape[1]))


def _multiply(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)


class _Products(torch.autograd.Function):
    """What layers make of the same inputs [tokens, inputs]: [tokens, outputs] each."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        frozen: tuple[Weight, ...],
        biases: tuple[Tensor | None, ...],
        scales: tuple[float, ...],
        compiled: bool,
        *adapters: Tensor,
    ) -> tuple[Tensor, ...]:
        """adapters: A [rank, inputs] of each layer, then B [outputs, rank] of each."""
        count, dtype = len(scales), inputs.dtype
        ranks = [one.shape[0] for one in adapters[:count]]
        inner = torch.mm(inputs, torch.cat([one.to(dtype) for one in adapters[:count]]).t())
        outputs = []
        for place, part in enumerate(inner.split(ranks, dim=1)):
            up = (scales[place] * adapters[count + place]).to(dtype)
            outputs.append(_add(part, up.t(), biases[place], [inputs], frozen[place : place + 1], True, compiled))
        # What is saved may be offloaded, and hooks see each of it; compiled layers have no other way to their backward.
        packed = [one for tensors, _ in frozen for one in tensors] if compiled else []
        ctx.save_for_backward(inputs, inner, *adapters, *packed)
        ctx.frozen = None if compiled else frozen
        ctx.storages, ctx.counts = tuple(storage for _, storage in frozen), tuple(len(one) for one, _ in frozen)
        ctx.scales, ctx.compiled = scales, compiled
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        count, scales = len(ctx.scales), ctx.scales
        inputs, inner, *tensors = ctx.saved_tensors
        downs, ups, packed = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        ranks = [one.shape[0] for one in downs]
        given = [one.contiguous() for one in gradients]
        flowing, of_ups = [], []
        for place, part in enumerate(inner.split(ranks, dim=1)):
            flowing.append(torch.mm(given[place], (scales[place] * ups[place]).to(inputs.dtype)))
            of_ups.append(scales[place] * torch.mm(given[place].t(), part).to(ups[place].dtype))
        joined = torch.cat(flowing, dim=1)
        of_downs = torch.mm(joined.t(), inputs).to(downs[0].dtype).split(ranks)
        of_inputs = None
        if ctx.needs_input_grad[0]:
            frozen = ctx.frozen if ctx.frozen is not None else _regroup(packed, ctx.counts, ctx.storages)
            down = torch.cat([one.to(inputs.dtype) for one in downs])
            of_inputs = _add(joined, down, None, given, frozen, False, ctx.compiled)
        return of_inputs, None, None, None, None, *of_downs, *of_ups


def _regroup(tensors: Sequence[Tensor], counts: Sequence[int], storages: Sequence[Storage | None]) -> list[Weight]:
    frozen, start = [], 0
    for count, storage in zip(counts, storages, strict=True):
        frozen.append((tuple(tensors[start : start + count]), storage))
        start += count
    return frozen


def _add(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    inputs: Sequence[Tensor],
    frozen: Sequence[Weight],
    transposed: bool,
    compiled: bool,
) -> Tensor:
    """bias + left @ right + the sum of inputs @ weight, or of inputs @ weight^T."""
    if compiled:
        weights = [_unpack(one, *weight, compiled) for one, weight in zip(inputs, frozen, strict=True)]
        return add_products(  # type: ignore[no-any-return]
            [left, *inputs], [right, *(one.t() if transposed else one for one in weights)], bias
        )
    out = _multiply(left, right, bias)
    for one, packed in zip(inputs, frozen, strict=True):
        weight = _unpack(one, *packed, compiled)
        out.addmm_(one, weight.t() if transposed else weight)
        del weight
    return out


def _unpack(reader: Tensor, tensors: tuple[Tensor, ...], storage: Storage | None, compiled: bool) -> Tensor:
    if storage is None:
        return tensors[0]
    if compiled:
        return dequantize_after(reader, list(tensors), *storage)  # type: ignore[no-any-return]
    return dequantize(tensors, storage, reader.dtype)


@dataclass
class Shared:
    """Between layers that read the same input: what the first one has computed for those that are called after it."""

    inputs: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)


class _Fused:
    """The forward of peft's layer while it trains. Evaluation, and adapters that are merged or disabled, stay peft's.

    followers: the layers after it that it computes, too
    place:     of this layer among those that it is computed with
    shared:    by these
    compiled:  whether it is a part of a compiled layer
    """

    followers: tuple[Any, ...]
    place: int
    shared: Shared
    compiled: bool

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled() or self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        shared = self.shared
        if shared.inputs is not x or self.place not in shared.outputs:
            outputs = _compute((self, *self.followers), x, self.compiled)
            shared.inputs, shared.outputs = x, {self.place + index: one for index, one in enumerate(outputs)}
        out: Tensor = shared.outputs.pop(self.place)
        if not shared.outputs:
            shared.inputs = None
        return out


class FusedLinear(_Fused, LoraLinear):
    """For dense weights."""


class FusedLinear4bit(_Fused, LoraLinear4bit):
    """For packed weights."""


def _compute(layers: tuple[Any, ...], x: Tensor, compiled: bool) -> list[Tensor]:
    """The outputs [..., outputs] of layers for x [..., inputs]; bitsandbytes' layers return their input's dtype."""
    is_autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if is_autocast else x.dtype
    names = [one.active_adapters[0] for one in layers]
    downs = [one.lora_A[name].weight for one, name in zip(layers, names, strict=True)]
    ups = [one.lora_B[name].weight for one, name in zip(layers, names, strict=True)]
    bases = [one.base_layer for one in layers]
    outputs = _Products.apply(  # type: ignore[no-untyped-call]
        x.to(dtype).reshape(-1, x.shape[-1]),
        tuple(list_packed(one) if isinstance(one, Linear4bit) else _view(one) for one in bases),
        tuple(None if one.bias is None else one.bias.to(dtype) for one in bases),
        tuple(one.scaling[name] for one, name in zip(layers, names, strict=True)),
        compiled,
        *downs,
        *ups,
    )
    shaped = [one.view(*x.shape[:-1], -1) for one in outputs]
    return [one.to(x.dtype) if isinstance(base, Linear4bit) else one for one, base in zip(shaped, bases, strict=True)]


def _view(base: nn.Linear | Conv1D) -> Weight:
    """A dense weight; Conv1D has it the other way around."""
    return (base.weight.t() if isinstance(base, Conv1D) else base.weight,), None


def fuse_adapters(base: nn.Module, strategy: Strategy) -> None:
    """Give every LoRA layer in `base` the forward above; those with what it does not compute (dropout, a variant of
    LoRA such as DoRA) stay as they are."""
    for parent in base.modules():
        children = {name: one for name, one in parent.named_children() if _is_fusible(one, strategy)}
        for names in TOGETHER:
            _fuse([children.pop(name) for name in names if name in children], strategy)
        for child in children.values():
            _fuse([child], strategy)


def _fuse(layers: Sequence[Any], strategy: Strategy) -> None:
    shared = Shared()
    for place, layer in enumerate(layers):
        layer.__class__ = FusedLinear4bit if type(layer) is LoraLinear4bit else FusedLinear
        vars(layer).update(
            followers=tuple(layers[1:]) if place == 0 else (), place=place, shared=shared, compiled=strategy.compile
        )


def _is_fusible(layer: Any, strategy: Strategy) -> bool:
    """Whether a layer is peft's plain one, with one adapter, on a frozen weight in the dtype that is computed in."""
    if type(layer) not in (LoraLinear, LoraLinear4bit) or len(layer.active_adapters) != 1:
        return False
    (name,), base = layer.active_adapters, layer.base_layer
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return False
    if not isinstance(layer.lora_dropout[name], nn.Identity) or any(one.requires_grad for one in base.parameters()):
        return False
    if type(base) in (Linear4bit, PackedLinear4bit):
        return True
    return type(base) in (nn.Linear, Conv1D) and base.weight.dtype == TORCH_DTYPES[strategy.compute_dtype]
