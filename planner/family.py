"""The words in which a model family is described; `families.py` is the table written in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from .config_fields import ConfigFields

Width = Literal["hidden", "query", "key_value", "query_key_value", "intermediate", "gate_and_up"]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One nn.Linear of a block, with its widths in words.

    name:     the module's leaf name
    inputs:   width of what comes in; `query` is heads x head_dim, `key_value` key-value heads x head_dim
    outputs:  width of what goes out; `query_key_value` and `gate_and_up` are the fused ones
    bias:     true, false, or the config's key that says which
    """

    name: str
    inputs: Width
    outputs: Width
    bias: bool | str = False


@dataclass(frozen=True, kw_only=True)
class QkNorm:
    """Norms on queries and keys.

    size:  `head`: one weight of head_dim each, shared by all heads; `width`: one weight for every feature
    key:   the config's key that turns them on, None where they are always there
    bias:  whether they have biases
    """

    size: Literal["head", "width"]
    key: str | None = None
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the MLP: fused 3-D parameters and a router, neither an nn.Linear.

    intermediate:  the config's key of one expert's width
    shared:        whether an expert that sees every token stands beside them, with a gate of one output
    dense_layers:  whether `mlp_only_layers` and `decoder_sparse_step` leave some layers dense
    """

    intermediate: str = "intermediate_size"
    shared: bool = False
    dense_layers: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model_type is built.

    defaults:           values of missing keys
    kv_heads, head_dim: whether the family reads `num_key_value_heads` and `head_dim`; else they follow from the heads
    attention:          the attention's linear layers, in the module `attention_parent` of a block
    mlp:                the MLP's linear layers, in the module `mlp_parent` of a block, None where they are its own
    keys:               own names of keys: {"hidden_size": "n_embd"}
    conv1d:             the linear layers are GPT-2's Conv1D
    norm, norm_bias:    kind of the norms, and whether they have biases
    norms_per_block:    hidden-sized norms in a block
    parallel_residual:  attention and MLP read the same input: always, never, or the config's key that says which
    parallel_norms:     norms_per_block where the residual is parallel, None where that changes nothing
    qk_norm:            norms on queries and keys, None without
    experts:            mixture of experts, None for a dense family
    position_offset:    rows of the learned position table beyond max_position_embeddings, None without such a table
    head_bias:          the LM head has a bias
    activation:         the config's key of the activation function
    embedding_dropout, attention_dropout, residual_dropout: the config's keys, None where there is none
    logit_scale, logit_divisor: the config's key of what logits are multiplied with, or divided by
    sliding:            (fields, layer) -> whether this layer attends within `sliding_window`, None where none does
    same_layers:        `layer_types` is not read: all layers are alike
    embedding_width:    the config's key of the embeddings' width, where it can differ from hidden_size
    required:           the only value that is supported of a rarely used key
    """

    defaults: Mapping[str, object]
    attention: tuple[Projection, ...]
    mlp: tuple[Projection, ...]
    kv_heads: bool = True
    head_dim: bool = True
    attention_parent: str = "self_attn"
    mlp_parent: str | None = "mlp"
    keys: Mapping[str, str] = field(default_factory=dict)
    conv1d: bool = False
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_bias: bool = False
    norms_per_block: int = 2
    parallel_residual: bool | str = False
    parallel_norms: int | None = None
    qk_norm: QkNorm | None = None
    experts: Experts | None = None
    position_offset: int | None = None
    head_bias: bool = False
    activation: str = "hidden_act"
    embedding_dropout: str | None = None
    attention_dropout: str | None = "attention_dropout"
    residual_dropout: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    sliding: Callable[[ConfigFields, int], bool] | None = None
    same_layers: bool = False
    embedding_width: str | None = None
    required: Mapping[str, object] = field(default_factory=dict)


def is_any_layer(fields: ConfigFields, layer: int) -> bool:
    return True


def is_between_each_nth(fields: ConfigFields, layer: int) -> bool:
    """Each n-th layer attends to everything, the others within the window; n is `sliding_window_pattern`."""
    return (layer + 1) % fields.integer("sliding_window_pattern") != 0


def is_from_max_window_layer(fields: ConfigFields, layer: int) -> bool:
    return layer >= fields.integer("max_window_layers", minimum=0)


def is_even_below_max_window_layer(fields: ConfigFields, layer: int) -> bool:
    return layer % 2 == 0 and layer < fields.integer("max_window_layers", minimum=0)


def is_layer_without_rope(fields: ConfigFields, layer: int) -> bool:
    with_rope = fields.integers("no_rope_layers")
    if with_rope:
        return layer < len(with_rope) and not with_rope[layer]
    return (layer + 1) % fields.integer("no_rope_layer_interval") == 0


def make_attention(
    bias: bool | str = False, *, output: str = "o_proj", output_bias: bool | str | None = None
) -> tuple[Projection, ...]:
    """Separate query, key, value and output projections; the output's bias is that of the others unless given."""
    return (
        Projection(name="q_proj", inputs="hidden", outputs="query", bias=bias),
        Projection(name="k_proj", inputs="hidden", outputs="key_value", bias=bias),
        Projection(name="v_proj", inputs="hidden", outputs="key_value", bias=bias),
        Projection(name=output, inputs="query", outputs="hidden", bias=bias if output_bias is None else output_bias),
    )


def make_fused_attention(name: str, *, output: str, bias: bool | str = False) -> tuple[Projection, ...]:
    return (
        Projection(name=name, inputs="hidden", outputs="query_key_value", bias=bias),
        Projection(name=output, inputs="query", outputs="hidden", bias=bias),
    )


def make_gated_mlp(bias: bool | str = False) -> tuple[Projection, ...]:
    return (
        Projection(name="gate_proj", inputs="hidden", outputs="intermediate", bias=bias),
        Projection(name="up_proj", inputs="hidden", outputs="intermediate", bias=bias),
        Projection(name="down_proj", inputs="intermediate", outputs="hidden", bias=bias),
    )


def make_plain_mlp(up: str, down: str, *, bias: bool | str = True) -> tuple[Projection, ...]:
    return (
        Projection(name=up, inputs="hidden", outputs="intermediate", bias=bias),
        Projection(name=down, inputs="intermediate", outputs="hidden", bias=bias),
    )


def make_defaults(
    sizes: tuple[int, int, int | None, int, int, int | None],
    *,
    tied: bool = False,
    activation: str = "silu",
    positions: int,
    **others: object,
) -> dict[str, object]:
    """`sizes`: vocabulary, hidden, intermediate (None: 4 x hidden), layers, heads, key-value heads (None: as heads)."""
    vocab_size, hidden_size, intermediate_size, layers, heads, kv_heads = sizes
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "hidden_act": activation,
        "max_position_embeddings": positions,
        "attention_dropout": 0.0,
        **others,
    }
