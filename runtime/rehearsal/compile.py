"""What compiled layers keep and allocate: AOTAutograd's own partition of each kind of layer, run on fake tensors.

torch.compile divides a layer's joint graph of forward and backward by a minimal cut: pointwise results are computed
again in backward rather than kept. The same tools divide it here. Inductor then fuses pointwise operations with each
other and with reductions, so only what a matrix product, an attention kernel or another graph reads is in memory.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy

from ..model.attention import choose_kept, keep_attention
from ..training import losses
from .attention import attend
from .fakes import Slot, list_slots
from .fusion import schedule
from .watch import StorageWatch

_aten = torch.ops.aten
_KERNELS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "convolution", "sort", "topk"})
"""Operations of aten that Inductor leaves to a library, beside attention."""
RNG_STATE_BYTES = 16
"""State of CUDA's random number generator."""
HANDED_ON = frozenset({"num_items_in_batch", "output_attentions", "output_hidden_states"})
"""Arguments of models that those hand on to their layers: for the loss, and what a training step never asks for."""
MAX_COMPILED = 64
"""Traced layers that are remembered: those of some ten strategies."""
_compiled: dict[Hashable, Callable[..., Any]] = {}
_watch: ContextVar[StorageWatch] = ContextVar("_watch")
"""Of the rehearsal that is under way; what is compiled outlives it."""


@contextlib.contextmanager
def compiled_layers(layers: Sequence[nn.Module], kinds: Sequence[Hashable], watch: StorageWatch) -> Iterator[None]:
    """Inside, each layer's forward is a compiled one, and so is the fused head's work on logits.

    A checkpointed layer's own checkpointing is replaced by the tags that it would leave in the graph.
    """
    token, differentiate = _watch.set(watch), losses._differentiate_compiled
    vars(losses)["_differentiate_compiled"] = _run_fused(losses._differentiate_chunk, watch)
    try:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.forward = _Layer(layer, kind)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
        _watch.reset(token)
        vars(losses)["_differentiate_compiled"] = differentiate


def _run_fused(function: Callable[..., tuple[Tensor, ...]], watch: StorageWatch) -> Callable[..., tuple[Tensor, ...]]:
    """A function of pointwise operations and reductions alone: its kernels write the results and nothing else.

    They read what they are given twice: a softmax needs its sum before it can write anything.
    """

    def run(*args: Any) -> tuple[Tensor, ...]:
        with watch.muted(True):
            results = function(*args)
        for one in results:
            watch.see(one)
        given = [one for one in args if isinstance(one, Tensor)]
        watch.ledger.note_kernel(function.__name__, reads=[*given, *given], writes=results)
        return results

    return run


class _Layer:
    """A layer's forward; the first of its kind is traced when it is first called, and serves later rehearsals too."""

    def __init__(self, layer: nn.Module, kind: Hashable) -> None:
        self.layer = layer
        self.forward = getattr(type(layer).forward, "__wrapped__", type(layer).forward)
        self.unread = HANDED_ON - inspect.signature(self.forward).parameters.keys()
        self.kind = kind, repr(layer), _is_checkpointed(layer), _saves_attention(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if name not in self.unread}
        slots = list_slots(self.layer)
        flat, layout = tree_flatten((args, kwargs))
        places = [index for index, one in enumerate(flat) if isinstance(one, Tensor)]
        inputs = [*(table[key] for table, key in slots), *(flat[index] for index in places)]
        computes = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        tensors = tuple((one.shape, one.stride(), one.dtype, one.requires_grad) for one in inputs)
        plain = tuple(one for one in flat if one is None or isinstance(one, bool | int | float | str))
        key = self.kind, computes, str(layout), plain, tensors
        if key not in _compiled:
            if len(_compiled) >= MAX_COMPILED:
                _compiled.clear()
            _compiled[key] = self._compile(slots, flat, layout, places, inputs)
        return _compiled[key](*inputs)

    def _compile(
        self, slots: Sequence[Slot], flat: Sequence[Any], layout: Any, places: Sequence[int], inputs: Sequence[Tensor]
    ) -> Callable[..., Any]:
        """The layer as a function of its tensors and inputs, traced on fakes of its own."""
        from torch._functorch.aot_autograd import aot_function
        from torch._inductor.decomposition import select_decomp_table

        others = [None if isinstance(one, Tensor) else one for one in flat]  # what is compiled holds none of them

        def run(*tensors: Tensor) -> Any:
            values = list(others)
            for place, tensor in zip(places, tensors[len(slots) :], strict=True):
                values[place] = tensor
            args, kwargs = tree_unflatten(values, layout)
            with _filled(slots, tensors[: len(slots)]):
                return self.forward(self.layer, *args, **kwargs)

        make_runner: Any = _make_runner
        function = aot_function(
            run,
            fw_compiler=make_runner,
            bw_compiler=make_runner,
            partition_fn=_make_partition(self.layer),
            decompositions=select_decomp_table(),
        )
        with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True), _KernelAttention():
            function(*(_copy_layout(one) for one in inputs))
        return function


def _make_runner(module: fx.GraphModule, _: Any) -> _Runner:
    return _Runner(module)


def _is_checkpointed(layer: nn.Module) -> bool:
    return bool(getattr(layer, "gradient_checkpointing", False))


def _saves_attention(layer: nn.Module) -> bool:
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    return isinstance(checkpoint, partial) and checkpoint.keywords.get("context_fn") is keep_attention


def _copy_layout(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return fake.requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def _filled(slots: Sequence[Slot], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the slots hold these tensors."""
    kept = [table[key] for table, key in slots]
    try:
        for (table, key), tensor in zip(slots, tensors, strict=True):
            table[key] = tensor
        yield
    finally:
        for (table, key), tensor in zip(slots, kept, strict=True):
            table[key] = tensor


class _KernelAttention(TorchFunctionMode):
    """Attention as the operation that CUDA would run, which the partitioner knows as one that is kept."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return attend(*args, **(kwargs or {}), flash=_attend_flash, other=_attend_otherwise)
        return func(*args, **(kwargs or {}))


def _attend_flash(
    query: Tensor, key: Tensor, value: Tensor, _: Any, dropout: float, is_causal: bool, scale: float | None, __: bool
) -> Tensor:
    return _aten._scaled_dot_product_flash_attention(query, key, value, dropout, is_causal, scale=scale)[0]  # type: ignore[no-any-return]


def _attend_otherwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    with torch._C.DisableTorchFunction():
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _make_partition(layer: nn.Module) -> Callable[..., Any]:
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        if _is_checkpointed(layer):
            _tag_forward(joint.graph, save_attention=_saves_attention(layer))
        return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **options)

    return partition


def _tag_forward(graph: fx.Graph, *, save_attention: bool) -> None:
    """What a checkpoint in a compiled region leaves: every node of the forward is to be computed again, or what its
    policy says."""
    backward: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if is_tangent or any(one in backward for one in node.all_input_nodes):
            backward.add(node)
        elif node.op == "call_function":
            source = node.args[0] if node.target is operator.getitem else node
            target = source.target if isinstance(source, fx.Node) else None
            policy = choose_kept(None, target) if save_attention else CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["recompute"] = policy
            node.meta["ac_graph_id"] = 0


class _Runner:
    """Runs a graph on fakes; the watch sees what would be in memory only.

    A pointwise result that is not there is computed where it is used, so that what it reads lives until then. What one
    kernel makes is there together, beside all that the kernel reads.
    """

    _boxed_call = True

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        nodes = list(module.graph.nodes)
        self.given = [node for node in nodes if node.op == "placeholder"]
        self.real = _find_materialised(nodes)
        self.kernels = schedule(nodes, self.real, is_view=_is_view, is_library=_is_kernel)

    def __call__(self, inputs: list[Any]) -> Any:
        values = dict(zip(self.given, inputs, strict=True))
        for node in [one for one in values if not one.users]:
            del values[node]
        inputs.clear()
        for kernel in self.kernels:
            for node in kernel.nodes:
                if node.op == "output":
                    return fx.node.map_arg(node.args[0], lambda one: values[one])
                if node in values:
                    continue
                if node.op == "get_attr":
                    values[node] = _copy_layout(getattr(self.module, str(node.target)))
                    continue
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: values[one])
                with _watch.get().muted(node not in self.real):
                    values[node] = _call(node.target, args, kwargs)
                del args, kwargs
            for node in kernel.dying:
                values.pop(node, None)
        raise AssertionError("a graph ends with its output")


def _call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A node's result; attention that is computed again is wrapped with the state of the random numbers."""
    if target is run_and_save_rng_state:
        return torch.empty(RNG_STATE_BYTES, dtype=torch.uint8), args[0](*args[1:], **kwargs)
    if target is run_with_rng_state:
        return args[1](*args[2:], **kwargs)
    return target(*args, **kwargs)


def _find_materialised(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Results of library kernels, and pointwise results and reductions that those or other graphs read."""
    real: set[fx.Node] = set()
    for node in nodes:
        if node.op == "output" or _is_kernel(node):
            real.add(node)
            for one in node.all_input_nodes:
                while _is_view(one):
                    one = one.all_input_nodes[0]
                real.add(one)
    return real


def _is_kernel(node: fx.Node) -> bool:
    target = node.target
    if target in (run_and_save_rng_state, run_with_rng_state):
        return True
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name.removeprefix("aten::")
    return target.namespace not in ("aten", "prims") or name in _KERNELS or "attention" in name


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem or node.target is _aten._unsafe_view.default:
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(one.alias_info for one in target._schema.returns)
