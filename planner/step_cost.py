"""Closed forms of what a step computes and moves: the planner's quick time estimate.

T is the tokens of a micro-batch, H the hidden size, I the MLP's width, V the vocabulary. Matrix products and attention
are counted from the model's shape. Bytes and operations of all else are those that a rehearsal of Llama shows, per
feature and layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from .activations import CHUNK_ROWS, StepShape, estimate_kept_bytes
from .arithmetic import (
    ROUNDED_ELEMENTS,
    count_trainable,
    estimate_nf4_bytes,
    list_trainable_tensors,
    trainable_dtype,
)
from .model_shape import BlockShape, LinearShape, ModelShape
from .rates import CACHED_ROW_BYTES, CLIP_CALLS, COMPILED_UPDATE_CALLS, UPDATE_CALLS
from .speed import ATTENTION_BACKWARD_FACTOR, Work
from .strategy import DTYPE_BYTES, Dtype, Kernels, LossHead, Optimizer, Strategy

BACKWARD_FACTOR = 2.0
"""Bytes that are moved in backward for one in forward."""
NORM_BYTES: dict[Kernels, tuple[float, float]] = {"torch": (36, 36 * BACKWARD_FACTOR), "liger": (4, 6)}
"""(forward, backward) bytes a feature that an RMSNorm moves. torch: to fp32, square, mean, scale, back, times its
weight. Liger's kernel reads and writes it once; in backward it reads it and its gradient."""
ROTARY_BYTES: dict[Kernels, tuple[float, float]] = {"torch": (18, 18 * BACKWARD_FACTOR), "liger": (4, 4)}
"""The same of rotary positions: two products, a rotated copy, a sum; Liger's kernel works in place."""
MLP_BYTES: dict[Kernels, tuple[float, float]] = {"torch": (10, 10 * BACKWARD_FACTOR), "liger": (6, 10)}
"""The same of a gated MLP's activation and product; Liger's kernel reads gate and up, in backward the product's
gradient too, and overwrites both."""
RESIDUAL_BYTES = (6, 6 * BACKWARD_FACTOR)
ADAPTER_BYTES = 10
"""The same of scaling an adapter's output and adding it."""
DROPOUT_BYTES = 5
FP32_BYTES = 4
FUSED_SHARE = 0.3
"""Of these bytes that are left where layers are compiled: each chain of operations reads and writes once."""
QUANTIZING_BYTES = 25
"""Bytes an element that quantising to float8 moves: magnitude, maximum, to fp32, scaled, to float8."""
QUANTIZING_CALLS = 12
SCORE_BYTES = 24
"""Bytes a score that eager attention moves in forward: scale, mask, softmax in fp32 and back."""
LOGIT_BYTES: dict[LossHead, tuple[float, float]] = {"full": (14, 22), "chunked": (14, 36), "fused": (28, 0)}
"""(forward, backward) bytes a logit that the loss moves: to fp32, log-softmax; in backward zeros, gradients, back."""
LONG_ROW_BYTES: dict[LossHead, tuple[float, float]] = {"full": (8, 4), "chunked": (8, 12), "fused": (8, 0)}
"""The same of what a softmax reads again where a row of logits is longer than CACHED_ROW_BYTES."""
FUSED_LOGIT_BYTES = (6, 0)
"""Of a fused head whose work on logits is compiled: read for the sum, read for the gradient, written."""
HEAD_CALLS = 14
"""Host work of the loss on a chunk of tokens in forward; as all below in the units of `rates.HOST_PRICES`, as a
rehearsal of Llama counts it."""
EMBEDDING_CALLS = 25
"""Of embedding, positions and final norm."""
FORWARD_CALLS: dict[Kernels, float] = {"torch": 97, "liger": 100}
"""Of a decoder layer in forward."""
BACKWARD_CALLS: dict[Kernels, float] = {"torch": 111, "liger": 110}
ADAPTER_CALLS: dict[bool, tuple[float, float]] = {False: (21, 9), True: (14, 14.5)}
"""(forward, backward) of a linear layer's adapter, by whether it is fused, beside what any linear layer takes; fused
ones are autograd functions in Python."""
PACKED_CALLS: dict[bool, tuple[float, float]] = {False: (13.5, 15), True: (3, 3)}
"""The same of its weight in 4 bits."""
CHECKPOINT_CALLS = 60
"""Of a checkpointed layer in forward, beside its own: hooks on the tensors that it would keep."""
RECOMPUTE_CALLS = 140
"""Beyond the forward's, of computing a checkpointed layer again."""
SELECTIVE_CALLS = 1.2
"""Of each operation of a layer, in forward and again in backward, under eager selective checkpointing, whose Python
looks at each: 9.2 microseconds more, measured on the CPU where an operation takes 7.5."""
SEEN_OPERATIONS: dict[Kernels, int] = {"torch": 80, "liger": 64}
"""Operations of a layer's forward that it looks at, and of an adapter's beside it."""
SEEN_ADAPTER_OPERATIONS = 12
COMPILED_CALLS = 0.3
"""Of this work that compiled layers are left with."""
MOVED_BYTES: dict[Optimizer, float] = {
    "adamw_32bit": 16,
    "paged_adamw": 16,
    "adamw_8bit": 4,
    "paged_adamw_8bit": 4,
}
"""Bytes of state that an update reads and writes for an element, beside weight and gradient."""
UPDATE_INSTRUCTIONS: dict[Optimizer, float] = {"adamw_8bit": 470, "paged_adamw_8bit": 470}
"""Instructions of an update for an element. The 8-bit kernel waits for these, not for its traffic: each thread has one
element, finds the largest of 256 by shuffles, and looks two values up by binary search among 256 in shared memory.
Counted in the machine code of bitsandbytes 0.50.2 for compute capability 9.0 (kOptimizerStatic8bit2StateBlockwise):
526, of which 56 are issued by one warp in eight alone."""
COMPILED_UPDATE_INSTRUCTIONS = 164
"""The same of AdamW's compiled update, which draws a random number for each element. Counted in the machine code that
Triton 3.9 makes for compute capability 9.0 of a kernel like Inductor's: 1,312 for the 8 elements of a thread."""
SMALL_KERNELS = 2
"""Beside that update's own kernel, for each tensor: the seed's and the step counter's."""
STOCHASTIC_BYTES = 48
"""Bytes that rounding one fp32 tensor stochastically moves for an element."""
GROUP_CALLS = 10
"""Of clipping, and of updates in backward for each group, whatever their tensors."""
GROUPS_BESIDE = 3
"""Groups of parameters that are updated in backward beside the layers': the head's, the final norm's, the embedding's.
"""


def estimate_micro_batch_work(
    shape: ModelShape, strategy: Strategy, sequence_length: int, *, document_tokens: float | None = None
) -> dict[str, tuple[Work, ...]]:
    """Forward and backward of one micro-batch, whatever the optimizer; document_tokens: as in StepShape."""
    step = StepShape(shape, strategy, sequence_length, document_tokens=document_tokens)
    forward = [work for block in shape.blocks for work in (*_list_layer(step, block), *_list_selection(step, block))]
    forward.append(Work(kind="none", calls=_scale_calls(strategy, CHECKPOINT_CALLS * step.checkpointed_layers)))
    backward = [work for block in shape.blocks for work in _list_layer_backward(step, block)]
    moved = estimate_kept_bytes(step) if strategy.activation_offload else 0
    transfer = [Work(kind="transfer", bytes=moved)] if moved else []
    return {
        "forward": (*forward, *_list_head(step, forward=True), *transfer),
        "backward": (*_list_head(step, forward=False), *backward, *transfer),
    }


def estimate_model_flops(shape: ModelShape, strategy: Strategy, sequence_length: float) -> float:
    """Floating point operations a token that training needs, recomputation excepted.

    sequence_length: of a row, or of the document that a token of a packed row is in

    4 N for forward and the gradients of inputs, 2 for each trainable parameter, N the parameters that a token meets but
    the embeddings; and causal attention, 12 * heads * head_dim * sequence / 2 a layer. For full fine-tuning the usual 6
    N.
    """
    met = sum(linear.weight_parameters * count for linear, count in shape.linears) + shape.head.weight_parameters
    if shape.experts and shape.experts_per_token:
        share = shape.experts_per_token / shape.experts
        met += int(share * sum(block.repeats * block.expert_parameters for block in shape.blocks))
    trained = met if strategy.method == "full" else count_trainable(shape, strategy)
    attended = sum(block.repeats * _attended(block, sequence_length) for block in shape.blocks)
    adapters = 0 if strategy.method == "full" else 4 * trained
    return 4 * met + 2 * trained + adapters + 12 * shape.heads * shape.head_dim * attended


def _attended(block: BlockShape, sequence: float) -> float:
    """Keys that a query sees on average: half of the row, or of its window and what is before."""
    window = min(block.sliding_window or sequence, sequence)
    return window - window * window / (2 * sequence)


def _list_layer(
    step: StepShape, block: BlockShape, *, share: float = 1.0, with_attention: bool = True
) -> Iterator[Work]:
    """One forward of all layers like `block`, or of a share of them."""
    repeats = share * block.repeats
    for linear in block.linears:
        yield from _list_product(step, linear, repeats, quantized=linear.inputs)
        yield from _list_adapter(step, linear, repeats, gradients=False)
    yield from _list_experts(step, block, repeats, factor=1)
    if with_attention:
        yield from _list_attention(step, block, repeats, backward=False)
    yield _make_traffic(step, repeats, backward=False)
    yield from _list_packed(step, block, repeats, backward=False)


def _list_selection(step: StepShape, block: BlockShape) -> Iterator[Work]:
    """What eager checkpoints that keep attention's output take of the host, once through the layers."""
    strategy = step.strategy
    if strategy.save_attention and not strategy.compile:
        adapted = 0 if strategy.method == "full" else sum(step.needs_input(linear) for linear in block.linears)
        calls = SELECTIVE_CALLS * (SEEN_OPERATIONS[strategy.kernels] + SEEN_ADAPTER_OPERATIONS * adapted)
        yield Work(kind="none", calls=calls, times=step.checkpointed_layers / step.shape.layers * block.repeats)


def _list_layer_backward(step: StepShape, block: BlockShape) -> Iterator[Work]:
    """Gradients of inputs and of what is trained; checkpointed layers are computed again before."""
    strategy = step.strategy
    share = step.checkpointed_layers / step.shape.layers
    if share:
        yield from _list_layer(step, block, share=share, with_attention=not strategy.save_attention)
        yield from _list_selection(step, block)
        yield Work(kind="none", calls=_scale_calls(strategy, RECOMPUTE_CALLS), times=share * block.repeats)
    for linear in block.linears:
        for _ in range(1 + step.trains_base):
            yield from _list_product(step, linear, block.repeats, quantized=linear.outputs)
        yield from _list_adapter(step, linear, block.repeats, gradients=True)
    yield from _list_experts(step, block, block.repeats, factor=2 if step.trains_base else 1)
    yield from _list_attention(step, block, block.repeats, backward=True)
    yield _make_traffic(step, block.repeats, backward=True)
    yield from _list_packed(step, block, block.repeats, backward=True)


def _list_packed(step: StepShape, block: BlockShape, repeats: float, *, backward: bool) -> Iterator[Work]:
    """Host work of 4-bit layers, beside what any take."""
    if step.strategy.method == "qlora":
        calls = PACKED_CALLS[step.strategy.fused_adapters][backward]
        yield Work(kind="none", calls=_scale_calls(step.strategy, calls * len(block.linears)), times=repeats)


def _list_product(step: StepShape, linear: LinearShape, repeats: float, *, quantized: int) -> Iterator[Work]:
    """[T, inputs] times [inputs, outputs], in float8 after [T, quantized] is quantised. NF4 weights are read packed, or
    fp32 ones, and written in the compute dtype first (fp32 ones in forward only: backward finds the copy, and casts
    the gradient back)."""
    a, elements, strategy = step.compute_bytes, linear.weight_parameters, step.strategy
    width = 1 if strategy.float8 else a
    moved = a * step.tokens * (linear.inputs + linear.outputs) + width * elements
    yield Work(kind="matrix", flops=2.0 * step.tokens * elements, bytes=moved, width=width, calls=0, times=repeats)
    if strategy.float8:
        cast = QUANTIZING_BYTES * (FUSED_SHARE if strategy.compile else 1.0) * step.tokens * quantized
        calls = _scale_calls(strategy, QUANTIZING_CALLS)
        yield Work(kind="memory", bytes=cast, calls=calls, times=repeats)
    if step.strategy.method == "qlora":
        packed = estimate_nf4_bytes(elements, double_quantization=step.strategy.double_quantization)
        yield Work(kind="memory", bytes=packed + a * elements, calls=0, times=repeats)
    elif step.casts:
        yield Work(kind="memory", bytes=(FP32_BYTES + a) * elements, calls=0, times=repeats)


def _list_adapter(step: StepShape, linear: LinearShape, repeats: float, *, gradients: bool) -> Iterator[Work]:
    """The two products of an adapter, twice as many in backward, and the traffic of its output unless it is fused."""
    strategy, a = step.strategy, step.compute_bytes
    if strategy.method == "full" or not step.needs_input(linear):
        return
    rank = strategy.adapter_rank or 0
    for size in (linear.inputs, linear.outputs):
        yield Work(
            kind="matrix",
            flops=2.0 * step.tokens * rank * size,
            bytes=a * (step.tokens * (size + rank) + rank * size),
            width=a,
            calls=0,
            times=repeats * (2 if gradients else 1),
        )
    factor = BACKWARD_FACTOR if gradients else 1.0
    dropped = DROPOUT_BYTES * linear.inputs if strategy.adapter_dropout else 0
    calls = ADAPTER_CALLS[strategy.fused_adapters][gradients]
    moved = 0 if strategy.fused_adapters else step.tokens * factor * (ADAPTER_BYTES * linear.outputs + dropped)
    yield Work(
        kind="memory",
        bytes=moved * (FUSED_SHARE if strategy.compile else 1.0),
        calls=_scale_calls(strategy, calls),
        times=repeats,
    )


def _list_experts(step: StepShape, block: BlockShape, repeats: float, *, factor: int) -> Iterator[Work]:
    """The experts that each token visits."""
    shape, a = step.shape, step.compute_bytes
    if not (block.expert_parameters and shape.experts and shape.experts_per_token):
        return
    share = shape.experts_per_token / shape.experts
    yield Work(
        kind="matrix",
        flops=2.0 * factor * step.tokens * share * block.expert_parameters,
        bytes=a * block.expert_parameters,
        width=a,
        calls=_scale_calls(step.strategy, FORWARD_CALLS[step.strategy.kernels]),
        times=repeats,
    )


def _list_attention(step: StepShape, block: BlockShape, repeats: float, *, backward: bool) -> Iterator[Work]:
    """Causal attention: 4 * T * keys seen * heads * head_dim in forward, 2.5 times that in backward; under a mask all
    keys are computed, and eager attention writes its scores out."""
    shape, a = step.shape, step.compute_bytes
    width = shape.heads * shape.head_dim
    if step.strategy.attention == "eager":
        scores = step.tokens * step.sequence * shape.heads
        factor = 2 if backward else 1
        flops = 4.0 * factor * step.tokens * step.sequence * width
        yield Work(kind="matrix", flops=flops, width=a, calls=0, times=repeats)
        yield Work(kind="memory", bytes=factor * SCORE_BYTES * scores, calls=0, times=repeats)
        return
    is_masked = step.strategy.packing and step.strategy.attention in ("sdpa", "efficient")
    sequence = step.document_tokens or step.sequence
    flops = 4.0 * step.tokens * (sequence if is_masked else _attended(block, sequence)) * width
    yield Work(
        kind="attention",
        flops=flops * (ATTENTION_BACKWARD_FACTOR if backward else 1.0),
        bytes=a * step.tokens * (4 * width if backward else 2 * width),
        head_dim=shape.head_dim,
        sequence=sequence,
        is_packed=step.document_tokens is not None,
        is_masked=is_masked,
        backward=backward,
        calls=0,
        times=repeats,
    )


def _make_traffic(step: StepShape, repeats: float, *, backward: bool) -> Work:
    """Norms, positions, activation and residuals of a layer, and the operations that it starts."""
    shape, strategy = step.shape, step.strategy
    visits, kernels = shape.experts_per_token or 1, strategy.kernels
    moved = (
        NORM_BYTES[kernels][backward] * shape.norms_per_block * shape.hidden_size
        + ROTARY_BYTES[kernels][backward] * (shape.heads + shape.kv_heads) * shape.head_dim
        + MLP_BYTES[kernels][backward] * visits * shape.intermediate_size
        + 2 * RESIDUAL_BYTES[backward] * shape.hidden_size
    )
    calls = (BACKWARD_CALLS if backward else FORWARD_CALLS)[kernels]
    return Work(
        kind="memory",
        bytes=step.tokens * moved * (FUSED_SHARE if strategy.compile else 1.0),
        calls=_scale_calls(strategy, calls),
        times=repeats,
    )


def _scale_calls(strategy: Strategy, calls: float) -> float:
    return calls * (COMPILED_CALLS if strategy.compile else 1.0)


def _list_head(step: StepShape, *, forward: bool) -> Iterator[Work]:
    """LM head and loss. The chunked head computes its logits again in backward; the fused one has computed all
    gradients by then, and scales them."""
    shape, head, a = step.shape, step.strategy.loss_head, step.compute_bytes
    forwards, backwards = 1, 1 + int(step.trains_base)
    passes = {"full": (1, 1), "chunked": (1, 2), "fused": (2, 0)}[head]
    products = {"full": (forwards, backwards), "chunked": (forwards, forwards + backwards), "fused": (1 + backwards, 0)}
    chunks = 1 if head == "full" else -(-step.tokens // CHUNK_ROWS)
    side = 0 if forward else 1
    elements = shape.head.weight_parameters
    moved = a * (step.tokens * (shape.hidden_size + shape.vocab_size) + elements * chunks)
    is_compiled = head == "fused" and step.strategy.compile
    a_logit = (FUSED_LOGIT_BYTES if is_compiled else LOGIT_BYTES[head])[side]
    if not is_compiled and FP32_BYTES * shape.vocab_size > CACHED_ROW_BYTES:
        a_logit += LONG_ROW_BYTES[head][side]
    logits = a_logit * step.tokens * shape.vocab_size
    yield Work(kind="matrix", flops=2.0 * step.tokens * elements, bytes=moved, width=a, times=products[head][side])
    yield Work(kind="memory", bytes=logits, calls=HEAD_CALLS * chunks * passes[side])
    yield Work(kind="memory", bytes=3 * a * step.tokens * shape.hidden_size, calls=EMBEDDING_CALLS)


def estimate_shape_update_work(shape: ModelShape, strategy: Strategy) -> dict[str, tuple[Work, ...]]:
    """Clipping and the update of all that a strategy trains."""
    tensors, dtype = list_trainable_tensors(shape, strategy), trainable_dtype(strategy)
    return estimate_update_work(tensors, strategy, dtype, groups=shape.layers + GROUPS_BESIDE)


def estimate_update_work(
    tensors: tuple[tuple[int, int], ...], strategy: Strategy, dtype: Dtype, *, groups: int
) -> dict[str, tuple[Work, ...]]:
    """Clipping and the optimizer's update of (elements, how many) tensors.

    Clipping reads the gradients for their norm and scales them: 3 w bytes an element, of which the norm is one. An
    update reads weight and gradient and writes the weight, 3 w, and reads and writes its states. A weight that is
    rounded stochastically is updated in fp32, part by part, unless the update is compiled. What paged states travel is
    `clock.add_paging`'s.

    groups: of parameters that are updated together, if in backward; else all are one
    """
    width = DTYPE_BYTES[dtype]
    elements, number = sum(size * count for size, count in tensors), sum(count for _, count in tensors)
    parts = sum(count * -(-size // ROUNDED_ELEMENTS["cuda"]) for size, count in tensors)
    name, rounds = strategy.optimizer, strategy.rounding == "stochastic" and dtype == "bf16"
    calls, state = UPDATE_CALLS[name] * number, MOVED_BYTES.get(name)
    if name == "adamw":
        moved = 7.0 * 4 + 4 * 6 + 3 * STOCHASTIC_BYTES if rounds else 7.0 * width
        calls = 30.0 * parts if rounds else calls
    elif state is None:
        moved = 10.0 * 4 + (12 + STOCHASTIC_BYTES if rounds else 0)
    elif rounds:
        moved, calls = 12 + 12 + state + STOCHASTIC_BYTES, calls + 12 * parts
    else:
        moved = 3 * width + state
    read = (3 if strategy.clips_gradients else 1) * width
    group_calls = GROUP_CALLS * (groups if strategy.optimizer_in_backward else 1)
    update = Work(
        kind="memory",
        bytes=moved * elements,
        instructions=UPDATE_INSTRUCTIONS.get(name, 0.0) * elements,
        calls=calls,
        waits=host_waits(strategy),
        together=not host_waits(strategy),
    )
    clip = Work(kind="memory", bytes=read * elements, calls=group_calls + CLIP_CALLS * number, together=True)
    return {
        "clip": (clip,),
        "optimizer": _list_compiled_update(elements, number) if rounds and strategy.compiles_update else (update,),
    }


def _list_compiled_update(elements: int, tensors: int) -> tuple[Work, ...]:
    """AdamW's update of bf16 tensors as one kernel each: 7 * 2 bytes an element, and no fp32 copies."""
    update = Work(
        kind="memory",
        bytes=7 * DTYPE_BYTES["bf16"] * elements,
        instructions=COMPILED_UPDATE_INSTRUCTIONS * elements,
        calls=COMPILED_UPDATE_CALLS * tensors,
    )
    return update, Work(kind="memory", calls=0, times=SMALL_KERNELS * tensors)


def host_waits(strategy: Strategy) -> bool:
    """Whether the host waits for the device at each update: bitsandbytes synchronises after every tensor, Adafactor
    reads a norm of it, and before both it reads whether gradients are finite; AdamW leaves that to the device."""
    return strategy.optimizer != "adamw"
