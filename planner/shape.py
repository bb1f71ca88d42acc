"""Exact parameter counts and layer shapes from a config.json alone: no torch, no transformers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

from ..recipes.errors import ModelError
from .config_fields import ConfigFields
from .families import FAMILIES
from .family import Family, Projection, Width
from .model_shape import BlockShape, LinearShape, ModelShape
from .quantized import find_untrainable_quantization, is_stored_in_4bit

__all__ = ["BlockShape", "LinearShape", "ModelShape", "find_untrainable_quantization", "is_known_family", "make_shape"]

_MOST_LAYERS = 10_000


def make_shape(config: Mapping[str, object]) -> ModelShape:
    """The shape that transformers builds for this config.json; of a multimodal one, its text model's.

    Missing keys take the defaults of the family's config class. A model_type that is not supported, or a value that
    cannot be a shape, is a ModelError that names the field.
    """
    stored_in_4bit = is_stored_in_4bit(config)
    config = _find_text_config(config)
    family = _find_family(config)
    fields = ConfigFields(config, defaults=family.defaults, keys=family.keys)
    _check_required(family, fields)
    sizes = _read_sizes(family, fields)
    tied = fields.flag("tie_word_embeddings")
    expert_sizes = _read_experts(family, fields)
    divisor = _read_number(fields, family.logit_divisor)
    return ModelShape(
        model_type=str(config["model_type"]),
        hidden_size=sizes.hidden,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size=expert_sizes.intermediate if expert_sizes else sizes.intermediate,
        vocab_size=sizes.vocab,
        max_positions=fields.optional_integer("max_position_embeddings"),
        has_learned_positions=family.position_offset is not None,
        blocks=_make_blocks(family, fields, sizes, expert_sizes),
        embedding_parameters=sizes.vocab * sizes.hidden,
        other_parameters=_count_positions(family, fields, sizes) + _count_norm(family, sizes),
        head=LinearShape(name="lm_head", inputs=sizes.hidden, outputs=sizes.vocab, bias=family.head_bias),
        tied=tied,
        gated_mlp=any(projection.name in ("gate_proj", "gate_up_proj") for projection in family.mlp),
        activation=fields.text(family.activation),
        norm=family.norm,
        norms_per_block=_count_norms(family, fields),
        qk_norm=_has_qk_norm(family, fields),
        experts=expert_sizes.count if expert_sizes else None,
        experts_per_token=expert_sizes.per_token if expert_sizes else None,
        shared_expert_intermediate_size=expert_sizes.shared_intermediate if expert_sizes else None,
        parallel_residual=_is_parallel(family, fields),
        embedding_dropout=_read_dropout(fields, family.embedding_dropout),
        attention_dropout=_read_dropout(fields, family.attention_dropout),
        residual_dropout=_read_dropout(fields, family.residual_dropout),
        logit_softcap=fields.positive_number("final_logit_softcapping"),
        attention_softcap=fields.positive_number("attn_logit_softcapping"),
        logit_scale=1 / divisor if divisor else _read_number(fields, family.logit_scale),
        is_stored_in_4bit=stored_in_4bit,
    )


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """A config's sizes, checked: features, but layers, heads and kv_heads, which are numbers of them."""

    layers: int
    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def width(self, name: Width) -> int:
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        widths: dict[Width, int] = {
            "hidden": self.hidden,
            "query": query,
            "key_value": key_value,
            "query_key_value": query + 2 * key_value,
            "intermediate": self.intermediate,
            "gate_and_up": 2 * self.intermediate,
        }
        return widths[name]


@dataclass(frozen=True, kw_only=True)
class _ExpertSizes:
    """How many experts, how many a token visits, their width, and that of the one that every token visits, if any."""

    count: int
    per_token: int
    intermediate: int
    shared_intermediate: int | None


def _find_text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config and key not in text}
    return {**text, **tied}


def is_known_family(config: Mapping[str, object]) -> bool:
    """Whether there are closed forms for this config's architecture."""
    return _find_text_config(config).get("model_type") in FAMILIES


def _find_family(config: Mapping[str, object]) -> Family:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    nearest = get_close_matches(str(model_type), FAMILIES, n=1)
    hint = f' (did you mean "{nearest[0]}"?)' if nearest else ""
    written = (
        f'"{model_type}"' if isinstance(model_type, str) else "missing" if model_type is None else repr(model_type)
    )
    raise ModelError(f"config.json: model_type: {written}; supported are {', '.join(sorted(FAMILIES))}{hint}")


def _check_required(family: Family, fields: ConfigFields) -> None:
    for key, supported in family.required.items():
        if fields.value(key) not in (None, supported):
            raise fields.error(key, f"supported; only {json.dumps(supported)} is")


def _read_sizes(family: Family, fields: ConfigFields) -> _Sizes:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.optional_integer("head_dim") if family.head_dim else None
    if head_dim is None and hidden % heads:
        raise fields.error("num_attention_heads", f"a divisor of {fields.name('hidden_size')} ({hidden})")
    kv_heads = (fields.optional_integer("num_key_value_heads") if family.kv_heads else None) or heads
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of {fields.name('num_attention_heads')} ({heads})")
    if family.embedding_width and (fields.optional_integer(family.embedding_width) or hidden) != hidden:
        raise fields.error(family.embedding_width, f"supported; only hidden_size ({hidden}) is")
    layers = fields.integer("num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise fields.error("num_hidden_layers", f"a number of layers up to {_MOST_LAYERS:,}")
    return _Sizes(
        layers=layers,
        vocab=fields.integer("vocab_size"),
        hidden=hidden,
        intermediate=fields.optional_integer("intermediate_size") or 4 * hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
    )


def _read_experts(family: Family, fields: ConfigFields) -> _ExpertSizes | None:
    if family.experts is None:
        return None
    count, per_token = fields.integer("num_experts"), fields.integer("num_experts_per_tok")
    if per_token > count:
        raise fields.error("num_experts_per_tok", f"at most {fields.name('num_experts')} ({count})")
    return _ExpertSizes(
        count=count,
        per_token=per_token,
        intermediate=fields.integer(family.experts.intermediate),
        shared_intermediate=fields.integer("shared_expert_intermediate_size") if family.experts.shared else None,
    )


def _make_blocks(
    family: Family, fields: ConfigFields, sizes: _Sizes, expert_sizes: _ExpertSizes | None
) -> tuple[BlockShape, ...]:
    """The decoder layers, those of equal shape as one block, in the order in which they first appear."""
    layers = sizes.layers
    windows = _find_windows(family, fields, layers)
    sparse = [expert_sizes is not None and _is_sparse(family, fields, layer) for layer in range(layers)]
    norms = _count_norms(family, fields) * _count_norm(family, sizes) + _count_qk_norm(family, fields, sizes)
    attention = tuple(_make_linear(family, fields, sizes, p, family.attention_parent) for p in family.attention)
    blocks = []
    for (window, is_sparse), repeats in Counter(zip(windows, sparse, strict=True)).items():
        if expert_sizes is not None and is_sparse:
            mlp = _make_shared_expert(family, fields, sizes, expert_sizes)
            experts = expert_sizes.count * (3 * expert_sizes.intermediate + 1) * sizes.hidden
        else:
            mlp = tuple(_make_linear(family, fields, sizes, p, family.mlp_parent) for p in family.mlp)
            experts = 0
        block = BlockShape(
            repeats=repeats,
            linears=attention + mlp,
            norm_parameters=norms,
            expert_parameters=experts,
            sliding_window=window,
        )
        blocks.append(block)
    return tuple(blocks)


def _make_shared_expert(
    family: Family, fields: ConfigFields, sizes: _Sizes, expert_sizes: _ExpertSizes
) -> tuple[LinearShape, ...]:
    if expert_sizes.shared_intermediate is None:
        return ()
    shared = replace(sizes, intermediate=expert_sizes.shared_intermediate)
    parent = f"{family.mlp_parent}.shared_expert"
    mlp = tuple(_make_linear(family, fields, shared, projection, parent) for projection in family.mlp)
    return (*mlp, LinearShape(name="shared_expert_gate", inputs=sizes.hidden, outputs=1, parent=family.mlp_parent))


def _make_linear(
    family: Family, fields: ConfigFields, sizes: _Sizes, projection: Projection, parent: str | None
) -> LinearShape:
    return LinearShape(
        name=projection.name,
        inputs=sizes.width(projection.inputs),
        outputs=sizes.width(projection.outputs),
        bias=fields.flag(projection.bias) if isinstance(projection.bias, str) else projection.bias,
        conv1d=family.conv1d,
        parent=parent,
    )


def _find_windows(family: Family, fields: ConfigFields, layers: int) -> list[int | None]:
    """Each layer's sliding window, None where it attends to everything."""
    window = fields.optional_integer("sliding_window", minimum=0)
    uses = fields.value("use_sliding_window") is None or fields.flag("use_sliding_window")
    if family.sliding is None or not window or not uses:
        return [None] * layers
    is_sliding = family.sliding
    kinds = None if family.same_layers else fields.texts("layer_types")
    if kinds is None:
        return [window if is_sliding(fields, layer) else None for layer in range(layers)]
    if len(kinds) < layers:
        raise fields.error("layer_types", f"a list of {layers} kinds, one a layer")
    return [window if kind == "sliding_attention" else None for kind in kinds[:layers]]


def _is_sparse(family: Family, fields: ConfigFields, layer: int) -> bool:
    if family.experts is None or not family.experts.dense_layers:
        return family.experts is not None
    is_listed_dense = layer in fields.integers("mlp_only_layers")
    return not is_listed_dense and (layer + 1) % fields.integer("decoder_sparse_step") == 0


def _is_parallel(family: Family, fields: ConfigFields) -> bool:
    parallel = family.parallel_residual
    return fields.flag(parallel) if isinstance(parallel, str) else parallel


def _has_qk_norm(family: Family, fields: ConfigFields) -> bool:
    return family.qk_norm is not None and (family.qk_norm.key is None or fields.flag(family.qk_norm.key))


def _count_norms(family: Family, fields: ConfigFields) -> int:
    if family.parallel_norms is not None and _is_parallel(family, fields):
        return family.parallel_norms
    return family.norms_per_block


def _count_norm(family: Family, sizes: _Sizes) -> int:
    return sizes.hidden * (2 if family.norm_bias else 1)


def _count_qk_norm(family: Family, fields: ConfigFields, sizes: _Sizes) -> int:
    if family.qk_norm is None or not _has_qk_norm(family, fields):
        return 0
    features = 2 * sizes.head_dim
    if family.qk_norm.size == "width":
        features = sizes.width("query") + sizes.width("key_value")
    return features * (2 if family.qk_norm.bias else 1)


def _count_positions(family: Family, fields: ConfigFields, sizes: _Sizes) -> int:
    if family.position_offset is None:
        return 0
    return (fields.integer("max_position_embeddings") + family.position_offset) * sizes.hidden


def _read_dropout(fields: ConfigFields, key: str | None) -> float:
    return fields.probability(key) if key else 0.0


def _read_number(fields: ConfigFields, key: str | None) -> float | None:
    return fields.positive_number(key) if key else None
