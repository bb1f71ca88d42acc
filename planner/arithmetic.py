"""Closed forms for what a training step keeps: weights, adapters, gradients and optimizer states.

Every function takes counts of parameters and returns bytes. The lecture's 2 + 2 + 8 bytes a parameter is these
formulas with bf16 weights, bf16 gradients and two fp32 moments (`adamw_32bit`).
"""

from __future__ import annotations

from math import ceil, sqrt

from .shape import LinearShape, ModelShape
from .strategy import DTYPE_BYTES, Dtype, Optimizer, Strategy

NF4_BLOCK = 64
"""Weights that share one absmax constant in bitsandbytes' 4-bit format."""
NF4_NESTED_BLOCK = 256
"""Constants that share one second-level constant under double quantisation."""
STATE8_BLOCK = 256
"""Elements that share one absmax constant in bitsandbytes' 8-bit optimizer states."""
STATE8_MIN_ELEMENTS = 4096
"""Smaller tensors keep 32-bit states (bitsandbytes' min_8bit_size)."""
PAGED_MIN_ELEMENTS = 100_000
"""Smaller state tensors are never paged (bitsandbytes' get_state_buffer)."""
ROUNDED_ELEMENTS = {"cuda": 2**24, "cpu": 2**20}
"""Elements of a bf16 weight that are updated at one time in fp32, where nothing is compiled. A choice: 64 MiB a buffer
on a GPU. On a CPU buffers of 4 MiB stay in the heap: an embedding of 28 million takes 13 ns an element with AdamW and 6
with 32-bit states, instead of 26 and 16."""
ROUNDING_BYTES = 23
"""Of each of these elements while it is rounded: weight and two moments in fp32, 4 bytes of noise, and 7 for whether
they are finite (torch.isfinite: the magnitude, and three truth values)."""


def estimate_nf4_bytes(elements: int, *, double_quantization: bool) -> int:
    """Bytes of one weight in NF4.

    elements/2 + 4*elements/64 plain: 0.5625 bytes a parameter. Double quantisation keeps the constants in 8 bits:
    elements/2 + elements/64 + 4*elements/(64*256): 0.5159. Both carry tables: 16 and 256 fp32 values, and a mean.
    Source: bitsandbytes.functional.quantize_4bit.
    """
    packed, blocks = ceil(elements / 2), ceil(elements / NF4_BLOCK)
    code = 16 * 4
    if not double_quantization:
        return packed + 4 * blocks + code
    return packed + blocks + 4 * ceil(blocks / NF4_NESTED_BLOCK) + code + 256 * 4 + 4


def estimate_weight_bytes(shape: ModelShape, strategy: Strategy) -> int:
    """Bytes of the base model's weights as they lie in memory.

    full, lora: parameters * dtype. qlora: every linear layer but the LM head in NF4, the rest at weights_dtype; float8:
    the same layers in a byte a parameter.
    """
    width = DTYPE_BYTES[strategy.weights_dtype]
    if strategy.float8:
        return shape.quantized_parameters + (shape.parameters - shape.quantized_parameters) * width
    if strategy.method != "qlora":
        return shape.parameters * width
    quantized = sum(
        count * estimate_nf4_bytes(linear.weight_parameters, double_quantization=strategy.double_quantization)
        for linear, count in shape.linears
        if linear.is_packed
    )
    return quantized + (shape.parameters - shape.quantized_parameters) * width


def count_trainable(shape: ModelShape, strategy: Strategy) -> int:
    """Trainable parameters: all of them for full, the adapters' r * (inputs + outputs) for lora and qlora."""
    if strategy.method == "full":
        return shape.parameters
    assert strategy.adapter_rank is not None and strategy.adapter_targets is not None, (
        "adapters have a rank and targets"
    )
    return shape.lora_parameters(strategy.adapter_rank, strategy.adapter_targets)


def trainable_dtype(strategy: Strategy) -> Dtype:
    """The dtype of what is trained, and so of its gradients: the weights' for full, the adapters' otherwise."""
    return strategy.weights_dtype if strategy.adapter_dtype is None else strategy.adapter_dtype


def estimate_adapter_bytes(shape: ModelShape, strategy: Strategy) -> int:
    """adapters * dtype; 0 for full."""
    if strategy.method == "full":
        return 0
    return count_trainable(shape, strategy) * DTYPE_BYTES[trainable_dtype(strategy)]


def estimate_gradient_bytes(shape: ModelShape, strategy: Strategy) -> int:
    """trainable parameters * dtype of the trainable weights: autograd's gradients have their parameter's dtype."""
    return count_trainable(shape, strategy) * DTYPE_BYTES[trainable_dtype(strategy)]


def list_trainable_tensors(shape: ModelShape, strategy: Strategy) -> tuple[tuple[int, int], ...]:
    """(elements, how many) of every trainable tensor; optimizer states depend on each tensor's size."""
    if strategy.method != "full":
        rank, targets = strategy.adapter_rank, strategy.adapter_targets
        assert rank is not None and targets is not None, "adapters have a rank and targets"
        pairs = shape.lora_linears(targets)
        return tuple((rank * size, count) for linear, count in pairs for size in (linear.inputs, linear.outputs))
    head = [(shape.head.weight_parameters, 0 if shape.tied else 1), (shape.head.outputs, int(shape.head.bias))]
    linears = [(linear.weight_parameters, count) for linear, count in shape.linears]
    biases = [(linear.outputs, count) for linear, count in shape.linears if linear.bias]
    rest = [(block.norm_parameters, block.repeats) for block in shape.blocks]
    experts = [(block.expert_parameters, block.repeats) for block in shape.blocks]
    tensors = [(shape.embedding_parameters, 1), (shape.other_parameters, 1), *head, *linears, *biases, *rest, *experts]
    return tuple((elements, count) for elements, count in tensors if elements and count)


def estimate_state_bytes(elements: int, optimizer: Optimizer, dtype: Dtype) -> int:
    """Optimizer state of one tensor of `elements`, by the optimizer's own rules.

    adamw:        2 moments in the parameter's dtype (torch.optim.AdamW uses zeros_like)
    adamw_32bit, paged_adamw: 2 moments in fp32
    adamw_8bit, paged_adamw_8bit: 2 * (1 + 4/256) bytes from 4,096 elements up, else as 32-bit
    adafactor:    a row and a column of fp32 for a matrix: about 2 * sqrt(elements) values
    """
    if optimizer == "adafactor":
        return 2 * 4 * ceil(sqrt(elements))
    if optimizer == "adamw":
        return 2 * DTYPE_BYTES[dtype] * elements
    if optimizer in ("adamw_8bit", "paged_adamw_8bit") and elements >= STATE8_MIN_ELEMENTS:
        return 2 * (elements + 4 * ceil(elements / STATE8_BLOCK))
    return 2 * 4 * elements


def estimate_optimizer_bytes(shape: ModelShape, strategy: Strategy) -> tuple[int, int]:
    """(bytes the allocator holds, bytes of managed memory) of all optimizer states.

    Managed memory is what paged optimizers keep for tensors of 100,000 elements and more: NVML counts it while it is
    on the card, PyTorch's allocator never does.
    """
    allocated = managed = 0
    dtype = trainable_dtype(strategy)
    for elements, repeats in list_trainable_tensors(shape, strategy):
        state = repeats * estimate_state_bytes(elements, strategy.optimizer, dtype)
        if strategy.optimizer.startswith("paged_") and elements >= PAGED_MIN_ELEMENTS:
            managed += state
        else:
            allocated += state
    return allocated, managed


def largest_linear(shape: ModelShape) -> LinearShape:
    """The largest weight that NF4 stores: what a dequantised copy of it costs is the largest temporary of QLoRA."""
    return max((linear for linear, _ in shape.linears), key=lambda linear: linear.weight_parameters)
