"""A causal language model's layers and sizes, and what can be counted from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Literal

from ..recipes.errors import ModelError

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers within one module that read the same input, in the order in which they are called."""


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """One weight matrix that acts on hidden states, as `nn.Linear` or GPT-2's `Conv1D`.

    name:     the module's leaf name, such as `q_proj`
    inputs:   features in
    outputs:  features out
    bias:     whether it has a bias of `outputs`
    conv1d:   GPT-2's transposed Linear: bitsandbytes converts it too, all-linear targets it too
    parent:   path of the module it sits in, inside its block, such as `self_attn`; None in the block or model itself
    is_packed:  whether NF4 packs it: transformers leaves classes of a model's own alone, such as Falcon's
    is_adapted: whether `all-linear` adapts it
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    conv1d: bool = False
    parent: str | None = None
    is_packed: bool = True
    is_adapted: bool = True

    @property
    def path(self) -> str:
        return f"{self.parent}.{self.name}" if self.parent else self.name

    @property
    def weight_parameters(self) -> int:
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weight_parameters + (self.outputs if self.bias else 0)

    def is_target(self, target: str) -> bool:
        """peft's rule: a target is a module's name or ends its path at a dot."""
        return self.path == target or self.path.endswith(f".{target}")


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """One decoder layer and how often it is repeated.

    repeats:            layers of this shape, 1 or more; not necessarily neighbours
    linears:            the nn.Linear or Conv1D modules, which LoRA's all-linear and NF4 reach
    norm_parameters:    everything else in the layer but the experts
    expert_parameters:  fused 3-D expert weights and the router, which neither all-linear nor NF4 reaches
    sliding_window:     tokens that attention looks back, None for all
    """

    repeats: int
    linears: tuple[LinearShape, ...]
    norm_parameters: int
    expert_parameters: int = 0
    sliding_window: int | None = None

    @property
    def parameters(self) -> int:
        """Of one of the layers."""
        linear_parameters = sum(linear.parameters for linear in self.linears)
        return linear_parameters + self.norm_parameters + self.expert_parameters


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A causal language model's layers and sizes.

    model_type:            the family's name in transformers, such as `llama`
    hidden_size:           features of the hidden states
    layers:                decoder layers, all blocks together
    heads, kv_heads:       attention heads, and those of keys and values (a divisor of heads)
    head_dim:              features of a head
    intermediate_size:     width of the MLP; of one expert in a mixture of experts
    vocab_size:            entries of the vocabulary
    max_positions:         longest sequence that the config promises, in tokens; None if it says nothing
    has_learned_positions: whether longer sequences are impossible, as positions are a table of max_positions rows
    blocks:                the decoder layers, equal ones counted together
    embedding_parameters:  token embeddings
    other_parameters:      learned positions and the final norm
    head:                  the LM head; its weight is the token embeddings' if tied
    tied:                  whether LM head and token embeddings are one weight
    gated_mlp:             whether the MLP has a gate beside its up projection
    activation:            the MLP's activation function, as the config names it
    norm:                  layernorm: PyTorch's, whose results are fp32 under autocast; rmsnorm: one in the model's own
                           code that returns its input's dtype, Cohere's too
    norms_per_block:       hidden-sized norms in a layer
    qk_norm:               whether queries and keys are normalised
    experts:               experts in a layer, None for a dense model
    experts_per_token:     of which a token visits so many
    shared_expert_intermediate_size: width of the expert that every token visits, None without
    parallel_residual:     whether attention and MLP read the same input
    embedding_dropout, attention_dropout, residual_dropout: probabilities in training, 0 to 1
    logit_softcap:         logits become softcap * tanh(logits / softcap); None without
    attention_softcap:     the same for attention scores
    logit_scale:           logits are multiplied with it; None without
    is_guess:              whether the closed forms take it for a plain decoder, as they lack its family
    is_stored_in_4bit:     whether its checkpoint holds 4-bit weights, which only QLoRA trains
    """

    model_type: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int | None
    has_learned_positions: bool
    blocks: tuple[BlockShape, ...]
    embedding_parameters: int
    other_parameters: int
    head: LinearShape
    tied: bool
    gated_mlp: bool
    activation: str
    norm: Literal["rmsnorm", "layernorm"]
    norms_per_block: int
    qk_norm: bool
    experts: int | None
    experts_per_token: int | None
    shared_expert_intermediate_size: int | None
    parallel_residual: bool
    embedding_dropout: float
    attention_dropout: float
    residual_dropout: float
    logit_softcap: float | None
    attention_softcap: float | None
    logit_scale: float | None
    is_guess: bool = False
    is_stored_in_4bit: bool = False

    @cached_property
    def linears(self) -> tuple[tuple[LinearShape, int], ...]:
        """Every linear layer outside the LM head with how often the model has it."""
        counts: dict[LinearShape, int] = {}
        for block in self.blocks:
            for linear in block.linears:
                counts[linear] = counts.get(linear, 0) + block.repeats
        return tuple(counts.items())

    @property
    def has_sdpa(self) -> bool:
        """Whether transformers 5 runs it with SDPA, which has no soft-capping of scores."""
        return self.attention_softcap is None

    @cached_property
    def parameters(self) -> int:
        """All parameters; tied weights once."""
        block_parameters = sum(block.repeats * block.parameters for block in self.blocks)
        head_parameters = self.head.parameters - (self.head.weight_parameters if self.tied else 0)
        return self.embedding_parameters + block_parameters + self.other_parameters + head_parameters

    @cached_property
    def quantized_parameters(self) -> int:
        """Weights that NF4 stores: those of the linear layers but the LM head; biases stay as they are."""
        return sum(count * linear.weight_parameters for linear, count in self.linears if linear.is_packed)

    def lora_parameters(self, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """rank * (inputs + outputs) for each linear layer that is a target, as peft makes the adapters A and B.

        `targets` is `all-linear` (every one but the LM head) or names such as `q_proj` or `self_attn.q_proj`. Experts
        and routers are no linear layers, so `all-linear` leaves them alone; see `lora_target_names`.
        """
        assert rank >= 1, "a LoRA rank is 1 or more"
        return sum(rank * count * (linear.inputs + linear.outputs) for linear, count in self.lora_linears(targets))

    def lora_linears(self, targets: str | Sequence[str] = "all-linear") -> tuple[tuple[LinearShape, int], ...]:
        """The linear layers that `targets` reaches, with their counts; a name that reaches none is an error."""
        if targets == "all-linear":
            return tuple(pair for pair in self.linears if pair[0].is_adapted)
        names = (targets,) if isinstance(targets, str) else tuple(targets)
        candidates = (*self.linears, (self.head, 1))
        for name in names:
            if not any(linear.is_target(name) for linear, _ in candidates):
                raise ModelError(_describe_missing_target(name, (linear for linear, _ in candidates)))
        return tuple(item for item in candidates if any(item[0].is_target(name) for name in names))

    def lora_target_names(self, targets: str | Sequence[str] = "all-linear") -> tuple[str, ...]:
        """The names to give to peft as `target_modules`, so that it adapts exactly what is counted here.

        peft 0.21's own "all-linear" also adapts the fused experts and the router of Mixtral, Qwen3-MoE and OLMoE, as
        parameters, and rebuilds every expert's weight in each forward (its utils/transformers_weight_conversion.py).
        """
        return tuple(sorted({linear.path for linear, _ in self.lora_linears(targets)}))


def _describe_missing_target(name: str, linears: Iterable[LinearShape]) -> str:
    known = list(dict.fromkeys(linear.name for linear in linears))
    nearest = get_close_matches(name, known, n=1)
    hint = f' (did you mean "{nearest[0]}"?)' if nearest else ""
    return f'method.targets: "{name}" is no linear layer of this model; it has {", ".join(known)}{hint}'
