"""What a person should know beside the plan: warnings, and what would fit where nothing does."""

from __future__ import annotations

from ..recipes.schema import Recipe
from ..recipes.units import format_bytes
from .candidates import list_methods
from .catalog import list_gpus
from .estimate import estimate_memory
from .memory import Memory
from .reasons import METHOD_NAMES
from .shape import ModelShape
from .strategy import DataFacts, Device, Strategy

SHORTEST_USEFUL_TOKENS = 64


def list_warnings(
    recipe: Recipe, device: Device, strategy: Strategy, data: DataFacts, shape: ModelShape
) -> tuple[str, ...]:
    """Everything that the plan decided or assumed and that a person might not expect."""
    texts = []
    if data.rows is None:
        texts.append(data.source)
    if device.budget_bytes > device.memory_bytes:
        has = f"{device.name} has {format_bytes(device.memory_bytes)}"
        texts.append(f"budget.memory is {format_bytes(device.budget_bytes)}, and {has}: this plan is for a larger one")
    if device.kind == "cpu" and strategy.compute_dtype == "fp32" and not device.bf16:
        texts.append("this CPU has no bf16 instructions: the run computes in fp32")
    if strategy.compute_dtype == "bf16" and not device.bf16:
        texts.append(
            f'model.dtype = "bf16", but {device.name} computes bf16 in software: expect it to be many times slower'
        )
    if strategy.rounding == "stochastic" and strategy.method == "full":
        texts.append("bf16 weights are trained with stochastic rounding: plain rounding would lose most updates")
    if strategy.adapter_dtype == "fp32" and recipe.method.adapter_dtype == "bf16":
        texts.append('method.adapter_dtype = "bf16": where the run computes in fp32 the adapters are fp32 too')
    if device.kind == "cpu" and strategy.optimizer.startswith("paged_"):
        texts.append(f"train.optimizer = {strategy.optimizer!r}: paged optimizers run unpaged on a CPU")
    if strategy.attention != recipe.model.attention:
        texts.append(f'model.attention = "{recipe.model.attention}": {shape.model_type} runs with eager attention only')
    if recipe.budget.gpus > 1:
        texts.append(f"budget.gpus = {recipe.budget.gpus}: this version trains on one card; the plan is for one")
    if recipe.budget.max_hours is not None:
        texts.append("budget.max_hours: the plan predicts no time yet; the run stops itself when the hours are over")
    longest = shape.max_positions
    if longest is not None and data.longest_row_tokens > longest:
        texts.append(
            f"rows of {data.longest_row_tokens:,} tokens are longer than the {longest:,} that the model was made for"
        )
    if strategy.compile:
        texts.append("train.compile: memory is planned as for the eager step; compiled layers need about as much")
    return tuple(texts)


def list_advice(
    recipe: Recipe, device: Device, shape: ModelShape, strategy: Strategy, memory: Memory, data: DataFacts
) -> tuple[str, ...]:
    """Where nothing fits: by how much the closest candidate misses, and what would fit."""
    over = memory.required_bytes - memory.budget_bytes
    texts = []
    if over > 0:
        texts.append(
            f"the smallest candidate ({METHOD_NAMES[strategy.method]}) needs {format_bytes(memory.required_bytes)}: "
            f"{format_bytes(over)} more than the budget of {format_bytes(memory.budget_bytes)}"
        )
    else:
        texts.append(
            f"the device is large enough, RAM or disk is not: {format_bytes(memory.host_bytes)} of RAM and "
            f"{format_bytes(memory.disk_bytes)} of disk are needed"
        )
    length = _find_longest_length(shape, strategy, device, data.longest_row_tokens)
    if length is not None:
        texts.append(f"data.max_length = {length} would fit")
    if "qlora" not in list_methods(recipe):
        texts.append('method.kind = "qlora" or "auto" would need less')
    if device.kind == "cuda":
        card = min(
            (gpu for gpu in list_gpus() if gpu.memory_bytes >= memory.required_bytes),
            key=lambda gpu: gpu.memory_bytes,
            default=None,
        )
        if card is not None:
            texts.append(f'a card with {format_bytes(memory.required_bytes)} would fit it: budget.gpu = "{card.name}"')
    return tuple(texts)


def _find_longest_length(shape: ModelShape, strategy: Strategy, device: Device, length: int) -> int | None:
    """The largest multiple of 64 tokens below `length` at which the strategy fits the device, None without one."""
    low, high = 0, length // SHORTEST_USEFUL_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        tried = estimate_memory(shape, strategy, device, sequence_length=middle * SHORTEST_USEFUL_TOKENS, merge=False)
        if tried.required_bytes <= tried.budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low * SHORTEST_USEFUL_TOKENS or None
