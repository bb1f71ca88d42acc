"""Closed forms for what a forward keeps for backward: a layer's activations, checkpoints and the loss head.

T is the tokens of a micro-batch (rows * sequence), H the hidden size, I the MLP's width, V the vocabulary, `a` the
bytes of the compute dtype, `w` those of the weights' dtype, in which the residual stream flows. The terms follow the
modeling code of transformers 5 under autocast on CUDA; they are checked against measured steps in tests/planner. What
they leave out (short-lived intermediates, allocator rounding) is what the margin is for.
"""

from __future__ import annotations

from .shape import BlockShape, LinearShape, ModelShape
from .strategy import DTYPE_BYTES, Strategy

CHUNK_ROWS = 1024
"""Tokens whose logits exist at one time under the chunked and the fused loss head."""
OFFLOAD_BLOCK_BYTES = 2**20
"""Offloaded activations lie in the host's memory in blocks of this size."""
TENSORS_PER_LAYER = 64
"""At least what a layer without checkpointing offloads (28 to 50 tensors in seven rehearsed models)."""
TENSORS_BESIDE = 8
"""The same outside of the layers: the positions' sines and cosines, a mask, the final norm's input and output."""
FP32 = 4
MLP_ENDS = ("down_proj", "dense_4h_to_h", "c_proj", "fc2")
"""Names of the linear layers that end an MLP, whose input a forward keeps anyway."""


class StepShape:
    """One micro-batch of one strategy: the symbols that the formulas share."""

    def __init__(
        self, shape: ModelShape, strategy: Strategy, sequence_length: int, *, document_tokens: float | None = None
    ) -> None:
        """document_tokens: of the document that a token is in, on average; None: each row is one"""
        self.shape, self.strategy = shape, strategy
        self.sequence = sequence_length
        self.document_tokens = document_tokens if strategy.attention == "varlen" else None
        self.tokens = strategy.micro_batch_size * sequence_length
        self.compute_bytes = DTYPE_BYTES[strategy.compute_dtype]
        self.weight_bytes = DTYPE_BYTES[strategy.weights_dtype]
        self.trains_base = strategy.method == "full"
        self.casts = self.compute_bytes != self.weight_bytes
        self.checkpointed_layers = min(strategy.checkpointed_layers, shape.layers)
        # bitsandbytes' Linear4bit returns its input's dtype, and autocast's LayerNorm hands it fp32: so the MLP, and
        # with it the residual stream, is fp32 there.
        widens = strategy.method == "qlora" and shape.norm == "layernorm"
        self.mlp_bytes = FP32 if widens else self.compute_bytes
        self.residual_bytes = FP32 if widens else self.weight_bytes

    def needs_input(self, linear: LinearShape) -> bool:
        """Whether a linear layer's input is kept: for its own gradient or for its adapter's."""
        if self.trains_base:
            return True
        targets = self.strategy.adapter_targets
        assert targets is not None, "adapters have targets"
        if targets == "all-linear":
            return linear.is_adapted
        return any(linear.is_target(name) for name in _names(targets))


def _names(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else targets


def estimate_layer_bytes(step: StepShape, block: BlockShape) -> int:
    """What one decoder layer keeps for backward without checkpointing: norms + linear inputs + attention + MLP."""
    return (
        _norm_bytes(step)
        + sum(_linear_bytes(step, linear) for linear in block.linears)
        + _shared_input_bytes(step, block)
        + _attention_bytes(step, block)
        + estimate_mlp_bytes(step, block)
        + _dropout_bytes(step)
    )


def _norm_bytes(step: StepShape) -> int:
    """Each norm keeps its input in fp32 (4TH), and where its own weight is trained the normalised copy in the input's
    dtype (wTH; aT a feature of queries and keys). Norms that read the same fp32 residual share it. Fused ones keep
    their input in its own dtype alone and compute the rest again."""
    shape = step.shape
    trains_copy = step.trains_base and shape.norm == "rmsnorm" and not step.strategy.fuses
    each = (step.residual_bytes if step.strategy.fuses else FP32) + (step.weight_bytes if trains_copy else 0)
    shares = shape.parallel_residual and step.residual_bytes == FP32
    hidden = (1 if shares else shape.norms_per_block) * each * step.tokens * shape.hidden_size
    if not shape.qk_norm:
        return hidden
    query_key = (step.compute_bytes if step.strategy.fuses else FP32) + (step.compute_bytes if trains_copy else 0)
    return hidden + query_key * step.tokens * (shape.heads + shape.kv_heads) * shape.head_dim


def _linear_bytes(step: StepShape, linear: LinearShape) -> int:
    """What a linear layer keeps beside its input.

    The adapter's inner activation [T, rank], dropout's copy and mask; and the copy in the compute dtype that autocast
    makes of an fp32 weight, which the gradient of the input needs.
    """
    strategy = step.strategy
    cast = step.compute_bytes * linear.weight_parameters if step.casts and strategy.method != "qlora" else 0
    if step.trains_base or not step.needs_input(linear):
        return cast
    assert strategy.adapter_rank is not None, "adapters have a rank"
    inner = step.compute_bytes * step.tokens * strategy.adapter_rank
    copied = 0 if strategy.fused_adapters else strategy.adapter_rank * (linear.inputs + linear.outputs)
    weights = step.compute_bytes * copied
    dropped = (step.compute_bytes + 1) * step.tokens * linear.inputs if strategy.adapter_dropout else 0
    return cast + inner + weights + dropped


def _shared_input_bytes(step: StepShape, block: BlockShape) -> int:
    """Inputs of the linear layers that read a norm's output: one for those that share it (aTH), but one each where
    autocast casts an fp32 one (fp32 weights, or LayerNorm, which autocast runs in fp32). With adapter dropout each
    adapter keeps its own copy instead."""
    readers = [linear for linear in block.linears if linear.inputs == step.shape.hidden_size and _reads_norm(linear)]
    kept = [linear for linear in readers if step.needs_input(linear)]
    if not kept or step.strategy.adapter_dropout:
        return 0
    separate = step.casts or step.shape.norm == "layernorm"
    copies = len(kept) if separate else min(len(kept), 2)
    return copies * step.compute_bytes * step.tokens * step.shape.hidden_size


def _reads_norm(linear: LinearShape) -> bool:
    """Whether a linear layer reads a norm's output: all but the ones that end attention and MLP."""
    ends = ("o_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "out_proj")
    return linear.name not in ends


def _attention_bytes(step: StepShape, block: BlockShape) -> int:
    """SDPA and flash attention keep q, k, v, the output and the log-sum-exp (fp32, one a head and token).

    With an explicit mask (packed rows, a window shorter than the sequence), or without FlashAttention, SDPA expands k
    and v to all heads.
    Eager keeps k and v expanded to all heads and the scores: softmax in fp32, B * heads * S * S * 4, its copy in 16
    bits and that of soft-capping, another a each.
    """
    shape, a = step.shape, step.compute_bytes
    queries = step.tokens * shape.heads * shape.head_dim
    keys = step.tokens * shape.kv_heads * shape.head_dim
    if step.strategy.attention != "eager":
        window = block.sliding_window
        is_masked = step.strategy.packing or (window is not None and step.sequence > window)
        is_expanded = step.strategy.attention == "efficient" or (is_masked and step.strategy.attention == "sdpa")
        keys = queries if is_expanded else keys
        fused = a * (queries + keys) if _keeps_fused_projection(step, block) else 0
        return a * (2 * queries + 2 * keys) + FP32 * step.tokens * shape.heads + fused
    scores = step.tokens * step.sequence * shape.heads
    capped = a * scores if shape.attention_softcap else 0
    copied = a * scores if a < FP32 else 0
    return a * 4 * queries + FP32 * scores + copied + capped


def _keeps_fused_projection(step: StepShape, block: BlockShape) -> bool:
    """Whether one projection makes q, k and v, and rotary positions copy q and k: v is then a view that keeps all of
    the projection's output alive. Learned positions copy nothing: q, k and v are its three views."""
    fused = any(linear.name in ("qkv_proj", "query_key_value") for linear in block.linears)
    return fused and not step.shape.has_learned_positions and step.mlp_bytes == step.compute_bytes


def estimate_mlp_bytes(step: StepShape, block: BlockShape) -> int:
    """Gated: gate, activation(gate), up, and their product as the input of the last linear layer: 4aTI. Under adapter
    dropout the product is not kept: the adapter keeps its own copy. Fused, activation(gate) is computed again.

    Otherwise the activation's input (in fp32 where the MLP is) and output. GPT-2's gelu_new is written out in Python:
    16 bytes an element in fp32, 14 under autocast, whose pow and tanh run in fp32. Experts see each token
    experts_per_token times and also keep the gathered rows and their outputs.
    """
    shape, a = step.shape, step.compute_bytes
    last_kept = not step.strategy.adapter_dropout and any(
        step.needs_input(linear) and not _reads_norm(linear) for linear in block.linears
    )
    if shape.experts and shape.experts_per_token:
        visits = step.tokens * shape.experts_per_token
        if not step.trains_base:
            return a * visits * (3 * shape.intermediate_size + shape.hidden_size)
        return a * visits * (4 * shape.intermediate_size + 3 * shape.hidden_size)
    elements = step.tokens * shape.intermediate_size
    if shape.gated_mlp:
        return (3 + last_kept - step.strategy.fuses) * a * elements
    if shape.activation == "gelu_new":
        return (14 if step.mlp_bytes < FP32 else 16) * elements + last_kept * a * elements
    kept_twice = last_kept and (shape.activation != "relu" or step.mlp_bytes != a)
    return step.mlp_bytes * elements + (a * elements if kept_twice else 0)


def _dropout_bytes(step: StepShape) -> int:
    """One byte an element for each residual dropout's mask, two a layer."""
    return 2 * step.tokens * step.shape.hidden_size if step.shape.residual_dropout else 0


def estimate_checkpoint_bytes(step: StepShape) -> int:
    """A checkpointed layer keeps its input: wTH, 4TH where the residual stream is fp32."""
    return step.residual_bytes * step.tokens * step.shape.hidden_size


def estimate_saved_attention_bytes(step: StepShape) -> int:
    """What a checkpointed layer keeps beside its input: attention's output, aT heads head_dim, and the log-sum-exp, 4T
    heads; 0 unless asked for."""
    shape = step.shape
    return step.tokens * shape.heads * (step.compute_bytes * shape.head_dim + FP32) * step.strategy.save_attention


def estimate_kept_bytes(step: StepShape) -> int:
    """What a forward keeps for backward, from the embedding to the final norm: each layer, or its checkpoint.

    Where some layers are checkpointed and the blocks differ, each block is taken to have its share of them.
    """
    shape, checkpointed = step.shape, step.checkpointed_layers
    layers = sum(block.repeats * estimate_layer_bytes(step, block) for block in shape.blocks)
    kept = layers * (shape.layers - checkpointed) // shape.layers
    each = estimate_checkpoint_bytes(step) + estimate_saved_attention_bytes(step)
    return checkpointed * each + kept + estimate_final_bytes(step)


def estimate_offload_bytes(step: StepShape) -> int:
    """Host memory of offloaded activations: what is kept, and the rest of each tensor's last block."""
    kept_layers = step.shape.layers - step.checkpointed_layers
    tensors = step.checkpointed_layers + kept_layers * TENSORS_PER_LAYER + TENSORS_BESIDE
    return estimate_kept_bytes(step) + tensors * OFFLOAD_BLOCK_BYTES


def estimate_recast_bytes(step: StepShape, block: BlockShape) -> tuple[int, int]:
    """(kept, short-lived) bytes that a layer takes beyond its forward's where backward computes it again.

    Nothing, but for the measured steps: they kept peft from casting adapter inputs to the adapters' dtype in their
    forward only. In the recomputation each fp32 adapter casts its input: to fp32 for as long as it computes, and
    autocast back, which is kept: aT inputs.
    """
    strategy = step.strategy
    if not strategy.recasts_adapter_inputs or strategy.adapter_dtype != "fp32" or step.compute_bytes == FP32:
        return 0, 0
    inputs = [linear.inputs for linear in block.linears if step.needs_input(linear)]
    if strategy.adapter_dropout:  # its output is a second fp32 copy; the cast one is kept in any case
        return 0, (2 * FP32 + step.compute_bytes) * step.tokens * max(inputs, default=0)
    ends = sum(linear.inputs for linear in block.linears if step.needs_input(linear) and linear.name in MLP_ENDS)
    own = step.compute_bytes * step.tokens * (sum(inputs) - ends)
    kept = max(0, own - _shared_input_bytes(step, block))
    return kept, (FP32 + step.compute_bytes) * step.tokens * max(inputs, default=0)


def estimate_backward_temporary(step: StepShape, block: BlockShape) -> int:
    """Gradients that flow inside one layer: the residual stream's, and beside it two of the MLP's width or, in a norm,
    two fp32 ones of the hidden size; for qlora the largest dequantised weight beside them, in float8 a transposed one
    and the gradient's fp32 copies."""
    shape = step.shape
    in_mlp = 2 * step.compute_bytes * step.tokens * (shape.experts_per_token or 1) * shape.intermediate_size
    in_norm = 2 * FP32 * step.tokens * shape.hidden_size
    flowing = max(in_mlp, in_norm) + step.residual_bytes * step.tokens * shape.hidden_size
    if step.strategy.attention == "eager":
        flowing = max(flowing, 2 * FP32 * step.tokens * step.sequence * shape.heads)
    if step.strategy.float8:
        widest = max(linear.outputs for linear in block.linears)
        copies = (1 if step.strategy.compile else 2 * FP32) * step.tokens * widest
        return flowing + copies + max(linear.weight_parameters for linear in block.linears)
    if step.strategy.method != "qlora":
        return flowing
    return flowing + step.compute_bytes * max(linear.weight_parameters for linear in block.linears)


def estimate_head_bytes(step: StepShape) -> tuple[int, int]:
    """(forward peak, backward peak) of LM head and loss in bytes.

    full: logits a, their fp32 copy 4 and the log-softmax 4 a token and vocabulary entry in forward; log-softmax and
    two fp32 gradients in backward: (a + 8)TV and 12TV. Soft-capping keeps tanh's output, aTV more in both. chunked:
    the same for at most 1,024 tokens at a time. fused: the forward's for 1,024 tokens, and the gradients of hidden
    states (aTH) and, where it is trained, of the head; backward has the former only. An fp32 head's copy in the
    compute dtype is beside all.
    """
    shape, head = step.shape, step.strategy.loss_head
    cast = step.compute_bytes * shape.head.weight_parameters if step.casts else 0
    rows = step.tokens if head == "full" else min(step.tokens, CHUNK_ROWS)
    capped = step.compute_bytes if shape.logit_softcap else 0
    forward = cast + (step.compute_bytes + 2 * FP32 + capped) * rows * shape.vocab_size
    if head == "fused":
        gradient = step.compute_bytes * step.tokens * shape.hidden_size
        trained = step.weight_bytes * shape.head.weight_parameters if step.trains_base else 0
        return forward + gradient + trained, gradient
    return forward, cast + (3 * FP32 + capped) * rows * shape.vocab_size


def estimate_cast_bytes(step: StepShape) -> int:
    """Copies in the compute dtype that autocast makes of the layers' fp32 weights; the head's are the head's."""
    return step.compute_bytes * step.shape.quantized_parameters if step.casts else 0


def estimate_final_bytes(step: StepShape) -> int:
    """After the layers: the final norm's fp32 input and output, and the embedding's output: (4 + a + w)TH."""
    return (FP32 + step.compute_bytes + step.weight_bytes) * step.tokens * step.shape.hidden_size
