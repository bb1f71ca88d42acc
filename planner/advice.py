"""What a person should know beside the plan: warnings, and what would fit where nothing does."""

from __future__ import annotations

from collections.abc import Mapping

from ..recipes.errors import PlanError
from ..recipes.schema import Recipe
from ..recipes.units import format_bytes, format_seconds
from .candidates import list_methods, list_strategies
from .catalog import list_gpus
from .estimate import estimate_memory
from .memory import Memory
from .shape import ModelShape
from .show.reasons import METHOD_NAMES
from .speed import Speed
from .strategy import DataFacts, Device, Method, Strategy
from .versions import list_version_warnings

SHORTEST_USEFUL_TOKENS = 64
SAVING_KEYS = ("micro_batch_size", "gradient_checkpointing", "loss_head", "optimizer")
TIME_KEYS = ("max_hours", "price_per_hour")
GPU_KEYS = ("activation_offload", "expandable_segments")
ADAPTER_METHODS: tuple[Method, ...] = ("lora", "qlora")


def list_warnings(
    recipe: Recipe,
    device: Device,
    strategy: Strategy,
    data: DataFacts,
    shape: ModelShape,
    *,
    versions: Mapping[str, str],
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
        texts.append(
            f'method.adapter_dtype = "bf16": the run computes in {strategy.compute_dtype}, so the adapters are fp32'
        )
    if device.kind == "cpu" and strategy.optimizer.startswith("paged_"):
        texts.append(f"train.optimizer = {strategy.optimizer!r}: paged optimizers run unpaged on a CPU")
    if device.kind == "cpu":
        texts += [f"train.{key} = true: it has no effect on a CPU" for key in GPU_KEYS if getattr(strategy, key)]
    if strategy.attention == "eager" != recipe.model.attention:
        texts.append(f'model.attention = "{recipe.model.attention}": {shape.model_type} runs with eager attention only')
    if strategy.method == "qlora" and not shape.quantized_parameters:
        texts.append(f"QLoRA stores none of {shape.model_type}'s linear layers in 4 bits: it needs as much as LoRA")
    if recipe.budget.gpus > 1:
        texts.append(f"budget.gpus = {recipe.budget.gpus}: this version trains on one card; the plan is for one")
    texts += _warn_of_time(recipe, device, data)
    longest = shape.max_positions
    if longest is not None and data.longest_row_tokens > longest:
        texts.append(
            f"rows of {data.longest_row_tokens:,} tokens are longer than the {longest:,} that the model was made for"
        )
    return (*texts, *list_version_warnings(versions))


def _warn_of_time(recipe: Recipe, device: Device, data: DataFacts) -> list[str]:
    """What keys about time and money cannot be kept, and why."""
    asked = [f"budget.{key}" for key in TIME_KEYS if getattr(recipe.budget, key) is not None]
    if not asked:
        return []
    stops = "; the run stops itself when the hours are over" if recipe.budget.max_hours is not None else ""
    if device.rates is None:
        return [f"{' and '.join(asked)}: how fast {device.name} is is not known, so the plan has no time{stops}"]
    if recipe.train.max_steps is None and data.rows is None:
        return [f"{' and '.join(asked)}: without the rows the number of steps is not known{stops}"]
    return []


def list_advice(
    recipe: Recipe,
    device: Device,
    shape: ModelShape,
    strategy: Strategy,
    memory: Memory,
    data: DataFacts,
    speed: Speed | None,
) -> tuple[str, ...]:
    """Where nothing fits: by how much the closest candidate misses, and what would fit."""
    texts = []
    over = memory.required_bytes - memory.budget_bytes
    if over > 0:
        texts.append(
            f"the closest candidate ({METHOD_NAMES[strategy.method]}) needs {format_bytes(memory.required_bytes)}: "
            f"{format_bytes(over)} more than the budget of {format_bytes(memory.budget_bytes)}"
        )
        length = _find_longest_length(shape, strategy, device, data.longest_row_tokens, merge=recipe.output.merge)
        if length is not None:
            texts.append(f"data.max_length = {length} would fit")
        texts += _advise_keys(recipe, device, shape, data.longest_row_tokens)
        texts += _advise_backward(recipe, device, shape, data.longest_row_tokens)
        texts += _advise_method(recipe, device, shape, data.longest_row_tokens)
        texts += _advise_device(device, strategy, memory.required_bytes)
    texts += _advise_time(recipe, speed)
    host, disk = device.host_memory_bytes, device.disk_bytes
    if device.kind == "cuda" and host is not None and memory.host_bytes > host:
        texts.append(
            f"RAM: {format_bytes(memory.host_bytes)} needed beside the device, {format_bytes(host)} to be used"
        )
    if disk is not None and memory.disk_bytes > disk:
        texts.append(
            f"disk: {format_bytes(memory.disk_bytes)} needed, {format_bytes(disk)} to be used: "
            "free some, or set output.dir to a larger one"
        )
    return tuple(texts)


def _advise_time(recipe: Recipe, speed: Speed | None) -> list[str]:
    """As many steps as budget.max_hours has room for."""
    hours = recipe.budget.max_hours
    if hours is None or speed is None or speed.total_seconds is None or speed.total_seconds <= 3600 * hours:
        return []
    takes = f"the closest candidate takes {format_seconds(speed.total_seconds)}"
    beside = sum(part.seconds for part in speed.parts if part.name != "train")
    steps = int((3600 * hours - beside) / speed.step_seconds)
    return [takes + (f": train.max_steps = {steps} would fit budget.max_hours" if steps >= 1 else "")]


def _advise_keys(recipe: Recipe, device: Device, shape: ModelShape, length: int) -> list[str]:
    """The keys that the recipe fixes and that would let it fit if they were left to the planner."""
    fixed = [key for key in SAVING_KEYS if getattr(recipe.train, key) != "auto"]
    train = recipe.train.model_copy(update=dict.fromkeys(fixed, "auto"))
    freed = recipe.model_copy(update={"train": train})
    least = [_find_least_bytes(freed, device, shape, method, length) for method in list_methods(recipe)]
    if not fixed or not any(size is not None and size <= device.budget_bytes for size in least):
        return []
    return [f'{" and ".join(f"train.{key}" for key in fixed)} = "auto" would fit']


def _advise_backward(recipe: Recipe, device: Device, shape: ModelShape, length: int) -> list[str]:
    """The optimizer in backward, where full fine-tuning is wanted and would fit with it: clipping is in its way."""
    train = recipe.train
    if "full" not in recipe.method.tried or train.max_grad_norm == "off" or train.optimizer_in_backward is False:
        return []
    changes = {"max_grad_norm": "off", "optimizer_in_backward": True, "micro_batch_size": "auto"}
    freed = recipe.model_copy(update={"train": train.model_copy(update=changes)})
    least = _find_least_bytes(freed, device, shape, "full", length)
    if least is None or least > device.budget_bytes:
        return []
    return [
        'without clipping (train.max_grad_norm = "off") train.optimizer_in_backward = true would fit: it needs '
        f"{format_bytes(least)} or more"
    ]


def _advise_method(recipe: Recipe, device: Device, shape: ModelShape, length: int) -> list[str]:
    """The first adapter method that the recipe leaves out and that would fit, with what it needs."""
    for method in ADAPTER_METHODS:
        least = _find_least_bytes(recipe, device, shape, method, length)
        if method not in list_methods(recipe) and least is not None and least <= device.budget_bytes:
            return [f'method.kind = "{method}" would fit: it needs {format_bytes(least)} or more']
    return []


def _find_least_bytes(recipe: Recipe, device: Device, shape: ModelShape, method: Method, length: int) -> int | None:
    """What the smallest strategy of a method requires; None where the recipe rules the method out."""
    try:
        strategies = list(list_strategies(recipe, device, method, shape))
    except PlanError:
        return None
    measured = (
        estimate_memory(shape, one, device, sequence_length=length, merge=recipe.output.merge) for one in strategies
    )
    return min((memory.required_bytes for memory in measured), default=None)


def _advise_device(device: Device, strategy: Strategy, required_bytes: int) -> list[str]:
    """More of this device's memory where it has as much, or else the smallest card that has."""
    needed = format_bytes(required_bytes)
    if required_bytes <= device.memory_bytes:
        has, budget = format_bytes(device.memory_bytes), format_bytes(device.budget_bytes)
        return [f"{device.name} has {has} in all, enough for it; the budget of {budget} is {device.budget_source}"]
    if device.kind == "cpu":
        return []
    able = [gpu for gpu in list_gpus() if gpu.bf16 or strategy.compute_dtype != "bf16"]
    card = min(
        (gpu for gpu in able if gpu.usable_bytes >= required_bytes), key=lambda gpu: gpu.memory_bytes, default=None
    )
    return [] if card is None else [f'a card with {needed} would fit it: budget.gpu = "{card.name}"']


def _find_longest_length(
    shape: ModelShape, strategy: Strategy, device: Device, length: int, *, merge: bool
) -> int | None:
    """The largest multiple of 64 tokens below `length` at which the strategy fits the device, None without one."""
    low, high = 0, length // SHORTEST_USEFUL_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        tried = estimate_memory(shape, strategy, device, sequence_length=middle * SHORTEST_USEFUL_TOKENS, merge=merge)
        if tried.required_bytes <= tried.budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low * SHORTEST_USEFUL_TOKENS or None
