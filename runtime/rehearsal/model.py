"""The model of a rehearsal: built on meta by transformers and peft, cut to few layers, then made of fakes."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...planner.strategy import Strategy
from ...recipes.errors import ModelError
from ..model.build import (
    add_adapters,
    keep_cpu_weights_trainable,
    make_quantization,
    name_attention,
    prepare_training,
)
from ..model.linear_float8 import find_convertible
from ..model.parts import find_layers
from ..quiet import quiet_libraries
from ..training.step import TORCH_DTYPES
from .cut import Cut, plan_cut

UNQUANTIZED = ["lm_head", "embed_out"]
"""Names of LM heads, which NF4 leaves alone."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A parameter or buffer as it lies in memory.

    elements:  how many
    dimensions: of its shape
    rows, columns: of the last two dimensions; columns is elements for a vector
    width:     bytes of an element
    quantized: whether it is stored in NF4 (elements are those of the unpacked weight)
    float8:    whether it is stored in float8 after it was read in `width` bytes
    transposed: whether its file has it the other way around, as GPT-2's
    trainable: whether the optimizer updates it
    """

    elements: int
    dimensions: int
    rows: int
    columns: int
    width: int
    quantized: bool = False
    float8: bool = False
    transposed: bool = False
    trainable: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelTensors:
    """(path, spec) of every parameter of a model in order: before its layers, of each layer, and after them."""

    before: Sequence[tuple[str, TensorSpec]]
    layers: Sequence[Sequence[tuple[str, TensorSpec]]]
    after: Sequence[tuple[str, TensorSpec]]

    def repeat(self, sources: Sequence[int]) -> Iterator[tuple[str, TensorSpec]]:
        """Those of a model whose layers are like these."""
        yield from self.before
        for source in sources:
            yield from self.layers[source]
        yield from self.after


@dataclass(frozen=True, kw_only=True)
class RehearsalModel:
    """A cut model of fake tensors, and what the whole one consists of.

    model, base: as in runtime.build.BuiltModel
    layers:      the traced decoder layers
    kinds:       what tells one of the whole model's layers from another
    cut:         how the traced ones stand for the whole model
    sketch:      what of the cut the trace depends on
    tensors:     the parameters of the cut model
    weights:     every parameter and buffer of the whole base model by its path, in the order in which they are made
    tied:        whether the LM head shares the embeddings' weight
    """

    model: nn.Module
    base: Any
    layers: Sequence[nn.Module]
    kinds: Sequence[Hashable]
    cut: Cut
    sketch: Hashable
    tensors: ModelTensors
    weights: Mapping[str, TensorSpec]
    tied: TensorSpec | None

    @property
    def traced_kinds(self) -> list[Hashable]:
        """Those of the traced layers."""
        return [self.kinds[index] for index in self.cut.picked]

    @cached_property
    def adapters(self) -> tuple[TensorSpec, ...]:
        """Every adapter matrix of the whole model, in order."""
        return tuple(spec for name, spec in self.tensors.repeat(self.cut.sources) if ".lora_" in name)

    @cached_property
    def trainable(self) -> tuple[TensorSpec, ...]:
        """What the optimizer updates in the whole model, in its order."""
        return tuple(spec for _, spec in self.tensors.repeat(self.cut.sources) if spec.trainable)

    def find_like(self, strategy: Strategy) -> RehearsalModel | None:
        """This model for a strategy with another number of checkpointed layers; None where other ones are traced."""
        cut = plan_cut(self.kinds, strategy)
        checkpointed = strategy.checkpointed_layers
        same = cut.sketch(self.kinds, checkpointed) == self.sketch
        return replace(self, cut=cut) if same else None


def build_rehearsal_model(
    config: dict[str, Any], strategy: Strategy, *, plan: Callable[[Sequence[Hashable], Strategy], Cut] = plan_cut
) -> RehearsalModel:
    """The model on meta with its adapters, its layers cut as `plan` says; make_fakes() or make_reals() comes next."""
    base = _build_base(config, strategy)
    weights, tied = _list_weights(base, strategy), _find_tied(base)
    kinds = _kinds(base)
    cut = plan(kinds, strategy)
    _cut_layers(base, cut)
    with torch.device("meta"):
        model = base if strategy.method == "full" else add_adapters(base, strategy, alpha=None, adapter=None)
    checkpointed = sum(index < strategy.checkpointed_layers for index in cut.picked)
    prepare_training(base, strategy.model_copy(update={"checkpointed_layers": checkpointed}))
    model.train()
    return RehearsalModel(
        model=model,
        base=base,
        layers=tuple(find_layers(base)),
        kinds=kinds,
        cut=cut,
        sketch=cut.sketch(kinds, strategy.checkpointed_layers),
        tensors=_list_tensors(model, base),
        weights=weights,
        tied=tied,
    )


def _build_base(config: dict[str, Any], strategy: Strategy) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    attention = "sdpa" if strategy.attention == "flash_attention_2" else name_attention(strategy)
    try:
        with quiet_libraries():
            settings = AutoConfig.for_model(values.pop("model_type"), **values)
            settings.use_cache = False
            with torch.device("meta"):
                base = AutoModelForCausalLM.from_config(
                    settings, dtype=TORCH_DTYPES[strategy.weights_dtype], attn_implementation=attention
                )
            if strategy.method == "qlora":
                _quantize(base, strategy)
            base.tie_weights()
    except Exception as error:  # each architecture checks its config in its own way
        raise ModelError(f"config.json: transformers cannot build it: {error}") from error
    return base


def _quantize(base: Any, strategy: Strategy) -> None:
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    settings = make_quantization(strategy)
    replace_with_bnb_linear(base, modules_to_not_convert=UNQUANTIZED, quantization_config=settings)
    for module in base.modules():
        if is_nf4(module, "weight") and module.bias is not None:
            bias = module.bias.to(TORCH_DTYPES[strategy.weights_dtype])
            module.bias = nn.Parameter(bias, requires_grad=False)
    keep_cpu_weights_trainable(base)
    base.is_quantized = base.is_loaded_in_4bit = True
    base.quantization_method, base.config.quantization_config = settings.quant_method, settings


def is_nf4(module: nn.Module, name: str) -> bool:
    """Whether a module's tensor is a weight that bitsandbytes packs to 4 bits."""
    return name == "weight" and type(module).__name__ in ("Linear4bit", "PackedLinear4bit")


def replace_tensors(model: nn.Module, make: Callable[[Any, str, Tensor], Tensor]) -> None:
    """Put make(module, name, tensor) in the place of every parameter and buffer; shared ones stay shared, and
    parameters remain parameters."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = make(module, name, tensor)
                    if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = made[id(new)] = new
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _make_spec(module: nn.Module, name: str, tensor: Tensor) -> TensorSpec:
    from transformers.pytorch_utils import Conv1D

    if not is_nf4(module, name):
        return make_tensor_spec(tensor)
    shape = torch.Size((module.out_features, module.in_features))  # type: ignore[arg-type]
    transposed = issubclass(cast(Any, module).source_cls, Conv1D)
    return replace(make_tensor_spec(tensor, shape), quantized=True, transposed=transposed)


def make_tensor_spec(tensor: Tensor, shape: torch.Size | None = None) -> TensorSpec:
    """A tensor's; shape: where it is stored in another one."""
    shape = tensor.shape if shape is None else shape
    return TensorSpec(
        elements=shape.numel(),
        dimensions=len(shape),
        rows=shape[-2] if len(shape) > 1 else 1,
        columns=shape[-1] if len(shape) else 1,
        width=tensor.element_size(),
        trainable=isinstance(tensor, nn.Parameter) and tensor.requires_grad,
    )


def _tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(path, module, name, tensor) of every parameter and buffer, shared ones once, in the order of the modules."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{name}", module, name, tensor


def _list_weights(base: Any, strategy: Strategy) -> dict[str, TensorSpec]:
    """The tensors as they are read, and which of them are stored in float8 once adapters have frozen them."""
    in_float8 = {id(one.weight) for one in find_convertible(base.requires_grad_(False))} if strategy.float8 else set()
    return {
        path: replace(_make_spec(module, name, tensor), float8=id(tensor) in in_float8)
        for path, module, name, tensor in _tensors(base)
    }


def _find_tied(base: Any) -> TensorSpec | None:
    """The LM head's weight where it is the embeddings': it is made, and dropped when they are tied."""
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or embeddings is None or head.weight is not embeddings.weight:
        return None
    return _make_spec(head, "weight", head.weight)


def _kinds(base: Any) -> list[tuple[Any, ...]]:
    """What tells one decoder layer from another: shapes, and plain attributes but its number."""
    types = getattr(base.config.get_text_config(), "layer_types", None)
    kinds: list[tuple[Any, ...]] = []
    for index, layer in enumerate(find_layers(base)):
        shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
        plain = tuple(
            (path, key, value)
            for path, module in layer.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and key != "layer_idx"
        )
        kinds.append((shapes, plain, types[index] if types and index < len(types) else None))
    return kinds


def _cut_layers(base: Any, cut: Cut) -> None:
    """Leave only the picked layers in the model and in its config."""
    if len(cut.picked) == len(cut.sources):
        return
    layers, config = find_layers(base), base.config.get_text_config()
    kept = [layers[index] for index in cut.picked]
    while len(layers):
        del layers[-1]
    layers.extend(kept)
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == len(cut.sources):
            setattr(config, key, type(value)(value[index] for index in cut.picked))
    config.num_hidden_layers = len(kept)


def _list_tensors(model: nn.Module, base: Any) -> ModelTensors:
    layers = find_layers(base)
    inside = next(path for path, module in model.named_modules() if module is layers)
    pattern = re.compile(rf"{re.escape(inside)}\.(\d+)\.")
    before: list[tuple[str, TensorSpec]] = []
    after: list[tuple[str, TensorSpec]] = []
    by_layer: list[list[tuple[str, TensorSpec]]] = [[] for _ in layers]
    for path, module, name, tensor in _tensors(model):
        if not isinstance(tensor, nn.Parameter):
            continue
        found, entry = pattern.match(path), (path, _make_spec(module, name, tensor))
        if found:
            by_layer[int(found[1])].append(entry)
        else:
            (after if by_layer[0] else before).append(entry)
    return ModelTensors(before=before, layers=by_layer, after=after)
