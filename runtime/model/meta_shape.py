"""The shape of a model of any architecture that transformers builds, read off the model itself on the meta device.

For the families that the planner knows, `planner.shape.make_shape` says the same without transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...planner.families import FAMILIES
from ...planner.quantized import is_stored_in_4bit
from ...planner.shape import BlockShape, LinearShape, ModelShape
from ...recipes.errors import ModelError
from ..quiet import quiet_libraries
from .build import is_adaptable, list_expert_names
from .parts import find_layers

REQUIRED = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "head_dim")
"""Keys that no model is without where its config has them."""
COUNTS = ("layer", "layers", "blocks", "depth", "heads", "head", "experts")
"""Endings of a config's keys that say how many modules, or entries of a list, a model is built of."""
MOST = 10_000
"""Modules of one kind."""
LARGEST = 2**31 - 1
"""Of every other number."""


def check_sizes(config: Mapping[str, Any]) -> None:
    """ModelError for a number that is no size of any model: transformers would build its layers for hours."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(value)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        limit = MOST if key.endswith(COUNTS) else LARGEST
        if value > limit:
            raise ModelError(f"config.json: {key}: {value} is not a whole number of at most {limit:,}")
        if value < 1 and key in REQUIRED:
            raise ModelError(f"config.json: {key}: {value} is not a whole number of 1 or more")


def build_meta_model(config: Mapping[str, Any]) -> Any:
    """The causal language model of a config, without memory; ModelError where transformers cannot build it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_sizes(config)
    values = dict(config)
    model_type = str(values.pop("model_type"))
    try:
        with quiet_libraries(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
            model.tie_weights()
    except Exception as error:  # each architecture checks its config in its own way
        raise ModelError(f"config.json: transformers cannot build a {model_type}: {error}") from error
    return model


def make_shape_of_model(config: Mapping[str, Any]) -> ModelShape:
    """The shape of whatever AutoModelForCausalLM builds for a config.

    Counts are exact; what a config does not name (an activation, dropouts) is taken as in a model without dropout.
    """
    model = build_meta_model(config)
    text = model.config.get_text_config()
    try:
        _check_causal(model, text)
        return _read_shape(model, text)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(
            f"config.json: {text.model_type} is no causal language model of decoder layers: {error}"
        ) from error


def _check_causal(model: Any, text: Any) -> None:
    """Refuse an encoder such as BERT, which transformers builds with a language model's head as well."""
    causal = {bool(one.is_causal) for one in find_layers(model)[0].modules() if hasattr(one, "is_causal")}
    if causal == {False}:
        raise ModelError(f"config.json: model_type: {text.model_type} is an encoder, not a causal language model")


def _read(text: Any, *names: str) -> Any:
    """The first of a config's values that is set; None without one, or where it differs from layer to layer."""
    for name in names:
        try:
            value = getattr(text, name, None)
        except Exception:  # per-layer values of some configs refuse to be read as one, with an error of their own
            continue
        if value is not None:
            return value
    return None


def _read_count(text: Any, *names: str) -> int | None:
    """The same for a number of 1 or more."""
    value = _read(text, *names)
    return value if isinstance(value, int) and value >= 1 else None


def _read_shape(model: Any, text: Any) -> ModelShape:
    layers = find_layers(model)
    taken = list_expert_names(model)
    blocks = Counter(_read_block(layer, taken) for layer in layers)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    inside = sum(block.parameters * count for block, count in blocks.items())
    counted = inside + embeddings.weight.numel() + (0 if tied else head.weight.numel())
    counted += 0 if head.bias is None else head.bias.numel()
    hidden = int(embeddings.weight.shape[1])
    heads = _read_count(text, "num_attention_heads") or 1
    names = [name for name, _ in layers[0].named_modules()]
    widens = any(isinstance(module, nn.LayerNorm) for module in layers[0].modules())
    return ModelShape(
        model_type=text.model_type,
        hidden_size=hidden,
        layers=len(layers),
        heads=heads,
        kv_heads=_read_count(text, "num_key_value_heads") or heads,
        head_dim=_read_count(text, "head_dim") or hidden // heads,
        intermediate_size=_read_count(text, "moe_intermediate_size", "intermediate_size") or 4 * hidden,
        vocab_size=embeddings.weight.shape[0],
        max_positions=_read_count(text, "max_position_embeddings"),
        has_learned_positions=False,
        blocks=tuple(_repeat(block, count) for block, count in blocks.items()),
        embedding_parameters=embeddings.weight.numel(),
        other_parameters=sum(one.numel() for one in model.parameters()) - counted,
        head=LinearShape(
            name="lm_head", inputs=head.weight.shape[1], outputs=head.weight.shape[0], bias=head.bias is not None
        ),
        tied=tied,
        gated_mlp=any("gate" in name for name in names),
        activation=str(_read(text, "hidden_act") or "silu"),
        norm="layernorm" if widens else "rmsnorm",
        norms_per_block=sum(1 for name in names if "norm" in name.rsplit(".", 1)[-1] and "." not in name) or 2,
        qk_norm=any(name.endswith(("q_norm", "k_norm")) for name in names),
        experts=_read_count(text, "num_local_experts", "num_experts"),
        experts_per_token=_read_count(text, "num_experts_per_tok"),
        shared_expert_intermediate_size=None,
        parallel_residual=False,
        embedding_dropout=0.0,
        attention_dropout=0.0,
        residual_dropout=0.0,
        logit_softcap=_read(text, "final_logit_softcapping"),
        attention_softcap=None if type(model)._supports_sdpa else 1.0,
        logit_scale=None,
        is_guess=text.model_type not in FAMILIES,
        is_stored_in_4bit=is_stored_in_4bit(model.config.to_dict()),
    )


def _read_block(layer: nn.Module, taken: frozenset[str]) -> BlockShape:
    """One decoder layer: its linear layers, 3-D expert weights, and the rest; taken: names that get no adapter."""
    linears, seen = [], set()
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and is_adaptable(module):
            parent, _, name = path.rpartition(".")
            inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
            linears.append(
                LinearShape(
                    name=name,
                    inputs=inputs,
                    outputs=outputs,
                    bias=module.bias is not None,
                    conv1d=isinstance(module, Conv1D),
                    parent=parent or None,
                    is_packed=type(module) is nn.Linear or isinstance(module, Conv1D),
                    is_adapted=name not in taken,
                )
            )
            seen |= {id(parameter) for parameter in module.parameters()}
    others = [parameter for parameter in layer.parameters() if id(parameter) not in seen]
    experts = sum(parameter.numel() for parameter in others if parameter.ndim >= 3)
    rest = sum(parameter.numel() for parameter in others) - experts
    return BlockShape(repeats=1, linears=tuple(linears), norm_parameters=rest, expert_parameters=experts)


def _repeat(block: BlockShape, count: int) -> BlockShape:
    return BlockShape(
        repeats=count,
        linears=block.linears,
        norm_parameters=block.norm_parameters,
        expert_parameters=block.expert_parameters,
    )
