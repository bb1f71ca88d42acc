"""The process of a run on a CPU: what it holds beside its tensors.

Libraries, the code that oneDNN generates for products of 16 bits, and what the C library's heap keeps of freed blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import activations as act
from .model_shape import TOGETHER
from .shape import LinearShape, ModelShape
from .strategy import Device, Strategy
from .widths import NONE_EVALUATED, EvaluatedWidths

MiB = 2**20

PROCESS_BYTES = 460 * MiB
"""Resident memory of a process with a loaded model, beside its tensors: torch, transformers, peft, bitsandbytes, the
data; a quarter of it are pages of libraries."""
TRITON_BYTES = 72 * MiB
"""What of it is larger where Triton is installed, as extras have it: 412 instead of 340 MiB after importing
bitsandbytes, which then imports Triton and torch's compiler."""
FIRST_USE_BYTES = 25 * MiB
"""What comes with the first steps, beside products: buffers of the matrix library, other kernels."""
CODE_BYTES = 256 * 2**10
"""A buffer for generated code: MAX_CODE_SIZE in oneDNN's src/cpu/x64/jit_generator.hpp."""
KERNEL_BYTES = CODE_BYTES + 8 * 2**10
"""What oneDNN never gives back of a product: its kernel. Measured: 0.26 MiB, whatever the sizes."""
PRIMITIVE_BYTES = CODE_BYTES + 40 * 2**10
"""What goes when the product leaves oneDNN's cache: code that copies, and tables. Measured: 0.27 to 0.31 MiB."""
AMX_BYTES = 80 * 2**10
"""How much more a product leaves on a processor with AMX, for which oneDNN then generates other code. Measured: 0.65
MiB a product in all, and 0.58 on the same processor without AMX (ONEDNN_MAX_CPU_ISA)."""
ATTENTION_PRODUCTS = 6
"""Of a width's attention, in backward: gradients of queries, keys and values, for a whole block of queries and for the
last (cpu_flash_attention_backward of aten/src/ATen/native/cpu/FlashAttentionKernel.cpp); rows of more than 512 tokens
have up to twice as many, which is not counted. Eager attention has as many, scores and sums forward and backward."""
CACHED_PRIMITIVES = 1024
"""So many are cached: oneDNN's ONEDNN_PRIMITIVE_CACHE_CAPACITY unless it is set."""
HEAP_BLOCK_BYTES = 8 * MiB
"""The runtime has glibc map blocks of this size and more on their own, which go back to the system when they are
freed: 1 MiB halves the speed of training, 8 MiB leaves it."""
FRAGMENTED_SHARE = 0.5
"""Of the activations in smaller blocks, so much is free between blocks that are not, at the peak."""


def estimate_own_bytes(device: Device) -> int:
    """The process before its first step, beside its tensors: as calibrated, else the general constant."""
    if device.beside is not None:
        return device.beside.bytes
    return PROCESS_BYTES + (TRITON_BYTES if device.has_triton else 0)


def estimate_used_bytes(
    shape: ModelShape, strategy: Strategy, device: Device, *, widths: float, evaluated: EvaluatedWidths = NONE_EVALUATED
) -> int:
    """The process in its steps and after them, beside its tensors and its heap's free blocks.

    widths:    distinct widths of micro-batches in the run, 1 or more
    evaluated: distinct widths of evaluations
    """
    products = estimate_product_bytes(shape, strategy, device, widths=widths, evaluated=evaluated)
    return estimate_own_bytes(device) + FIRST_USE_BYTES + products


def estimate_product_bytes(
    shape: ModelShape, strategy: Strategy, device: Device, *, widths: float, evaluated: EvaluatedWidths = NONE_EVALUATED
) -> int:
    """What oneDNN keeps of products of 16 bits: of each width of a micro-batch, every shape of a product."""
    if strategy.compute_dtype != "bf16":  # others are MKL's, which generates nothing
        return 0
    attention = 0 if strategy.attention == "varlen" else ATTENTION_PRODUCTS
    products = widths * (count_product_shapes(shape, strategy) + attention)
    if evaluated != NONE_EVALUATED:
        evaluation = _list_evaluation_products(shape, strategy)
        unmet = evaluation - _list_forward_products(shape, strategy)
        products += evaluated.alone * len(evaluation) + evaluated.trained * len(unmet)
    kernel = KERNEL_BYTES + (AMX_BYTES if device.has_amx else 0)
    return int(products * kernel + min(products, CACHED_PRIMITIVES) * PRIMITIVE_BYTES)


def count_product_shapes(shape: ModelShape, strategy: Strategy) -> int:
    """Products of different shapes in a step, beside attention's: forward, gradient of the input, gradient of the
    weight if it is trained.

    A linear layer and an adapter's two matrices: [tokens, inputs] by [inputs, outputs] and back, and [outputs, tokens]
    by [tokens, inputs].
    """
    forward = _list_forward_products(shape, strategy)
    backward = {(one.inputs, one.outputs) for one in forward}
    return len(forward) + len(backward) + sum(one.is_trained for one in forward)


@dataclass(frozen=True)
class _Product:
    """One shape of a product, of which oneDNN generates code.

    is_trained:  whether its matrix gets a gradient
    is_added:    whether its result is added to what is there, as a frozen layer's is to its fused adapter's
    joint_width: columns of the matrix that its input is cut out of; None where it is not cut
    """

    inputs: int
    outputs: int
    is_trained: bool
    is_added: bool = False
    joint_width: int | None = None


def _list_forward_products(shape: ModelShape, strategy: Strategy) -> set[_Product]:
    """Of a step's forward. Fused adapters of layers that read the same input have their first matrices in one."""
    if not strategy.fused_adapters:
        return _list_evaluation_products(shape, strategy)
    adapted, rank = _list_adapted(shape, strategy)
    bases = {(one.inputs, one.outputs) for one in adapted}
    products = {
        _Product(one.inputs, one.outputs, is_trained=False, is_added=(one.inputs, one.outputs) in bases)
        for one in _list_linears(shape)
    }
    names = {one.name for one in adapted}
    for linear in adapted:
        joint = next((names & set(group) for group in TOGETHER if linear.name in group), {linear.name})
        columns = rank * len(joint)
        products.add(_Product(linear.inputs, columns, is_trained=True))
        cut = columns if len(joint) > 1 else None
        products.add(_Product(rank, linear.outputs, is_trained=True, joint_width=cut))
    return products


def _list_evaluation_products(shape: ModelShape, strategy: Strategy) -> set[_Product]:
    """Of a forward without fused adapters, as evaluations are."""
    is_full = strategy.method == "full"
    products = {_Product(one.inputs, one.outputs, is_trained=is_full) for one in _list_linears(shape)}
    if not is_full:
        adapted, rank = _list_adapted(shape, strategy)
        for linear in adapted:
            products.add(_Product(linear.inputs, rank, is_trained=True))
            products.add(_Product(rank, linear.outputs, is_trained=True))
    return products


def _list_linears(shape: ModelShape) -> list[LinearShape]:
    return [one for one, _ in (*shape.linears, (shape.head, 1))]


def _list_adapted(shape: ModelShape, strategy: Strategy) -> tuple[list[LinearShape], int]:
    """(layers with adapters, rank)"""
    rank, targets = strategy.adapter_rank, strategy.adapter_targets
    assert rank is not None and targets is not None, "adapters have a rank and targets"
    return [linear for linear, _ in shape.lora_linears(targets)], rank


def estimate_heap_bytes(shape: ModelShape, strategy: Strategy, *, sequence_length: int) -> tuple[int, int]:
    """(kept, free) bytes of the C library's heap at the end of a forward: activations in blocks below HEAP_BLOCK_BYTES,
    and what is free between them.

    An MLP's tensors are taken to be as large as its width, the others as the hidden states in fp32. Where those of the
    longest rows are larger, shorter rows have left the heap as it is when they are just not. Copies of weights in the
    compute dtype are in the heap, too, and leave nothing free.
    """
    step = act.StepShape(shape, strategy, sequence_length)
    layers = [(block.repeats, act.estimate_layer_bytes(step, block)) for block in shape.blocks]
    mlps = sum(block.repeats * act.estimate_mlp_bytes(step, block) for block in shape.blocks)
    mlp_share = mlps / sum(repeats * size for repeats, size in layers)
    copies = 0
    if strategy.method != "qlora":
        copies = act.estimate_cast_bytes(step) * (shape.layers - step.checkpointed_layers) // shape.layers
    recomputed = max(size for _, size in layers) if step.checkpointed_layers else 0
    activations = max(act.estimate_kept_bytes(step) + recomputed - copies, 0)
    in_mlps = _share_in_heap(step.compute_bytes * step.tokens * shape.intermediate_size)
    elsewhere = _share_in_heap(act.FP32 * step.tokens * shape.hidden_size)
    in_heap = activations * (mlp_share * in_mlps + (1 - mlp_share) * elsewhere)
    return int(in_heap) + copies, int(FRAGMENTED_SHARE * in_heap)


def _share_in_heap(block_bytes: int) -> float:
    """1 for blocks below HEAP_BLOCK_BYTES; else what rows need that are short enough for them."""
    return min(1.0, HEAP_BLOCK_BYTES / block_bytes)
