"""Sentences that say why: each choice carries its reason, with figures."""

from __future__ import annotations

from ...recipes.units import format_bytes, format_count, format_seconds
from ..arithmetic import count_trainable, estimate_optimizer_bytes
from ..memory import Memory
from ..shape import ModelShape
from ..speed import Speed
from ..strategy import Strategy

OPTIMIZER_NAMES = {
    "adamw": "AdamW",
    "adamw_8bit": "8-bit AdamW",
    "adamw_32bit": "32-bit AdamW",
    "paged_adamw_8bit": "paged 8-bit AdamW",
    "paged_adamw": "paged AdamW",
    "adafactor": "Adafactor",
}
METHOD_NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
DEVICE_WORDS = {"device": "in the budget", "host": "of RAM free", "disk": "of disk free"}


def describe_optimizer(strategy: Strategy) -> str:
    """Such as `8-bit AdamW in backward`."""
    return OPTIMIZER_NAMES[strategy.optimizer] + (" in backward" if strategy.optimizer_in_backward else "")


def describe_strategy(strategy: Strategy) -> str:
    """Such as `LoRA, bf16 weights, checkpointing, chunked head, AdamW, 4 x 4 rows`."""
    parts = [METHOD_NAMES[strategy.method]]
    parts.append("NF4 weights" if strategy.method == "qlora" else f"{strategy.weights_dtype} weights")
    checkpointed = strategy.checkpointed_layers
    parts.append(f"{checkpointed} layers checkpointed" if checkpointed else "no checkpointing")
    parts += ["attention kept"] if strategy.save_attention else []
    parts += ["offload"] if strategy.activation_offload else []
    parts.append(f"{strategy.loss_head} head")
    parts.append(describe_optimizer(strategy))
    parts.append(f"{strategy.micro_batch_size} x {strategy.gradient_accumulation_steps} rows")
    return ", ".join(parts)


def find_largest_term(strategy: Strategy, memory: Memory, shape: ModelShape) -> str:
    """The component that needs most; a paged optimizer's states count, wherever they lie."""
    sizes = {**dict(memory.components), "optimizer": _count_state_bytes(strategy, memory, shape)}
    return max(sizes, key=lambda name: sizes[name])


def _count_state_bytes(strategy: Strategy, memory: Memory, shape: ModelShape) -> int:
    """States at the peak, with the managed memory that no allocator counts; on a CPU there is none."""
    is_cpu = memory.peak_reserved_bytes is None
    return memory.components.optimizer + (0 if is_cpu else estimate_optimizer_bytes(shape, strategy)[1])


def describe_rejection(
    strategy: Strategy,
    memory: Memory,
    shape: ModelShape,
    *,
    broken: str,
    component: str,
    needed_bytes: int,
    budget_bytes: int,
    sequence_length: int,
) -> str:
    """Such as `needs 31.2 GiB, 22.8 GiB in the budget: the logits of 4 x 4,096 tokens alone are 7.8 GiB`."""
    head = f"needs {format_bytes(needed_bytes)}, {format_bytes(budget_bytes)} {DEVICE_WORDS[broken]}"
    if broken != "device":
        offloaded = " and the offloaded activations" if strategy.activation_offload else ""
        beside = f"the process beside the device{offloaded}"
        return f"{head}: " + (beside if broken == "host" else "the files that it writes")
    return f"{head}: {describe_component(strategy, memory, shape, component, sequence_length)}"


def describe_lateness(
    needed_seconds: float, budget_seconds: float, *, step_seconds: float, startup_seconds: float, steps: int
) -> str:
    """Such as `takes 31:12 h, 12:00 h in budget.max_hours: 36,000 steps of 3.1 s`."""
    startup = f" and {format_seconds(startup_seconds)} to start" if startup_seconds > 0.1 * needed_seconds else ""
    return (
        f"takes {format_seconds(needed_seconds)}, {format_seconds(budget_seconds)} in budget.max_hours: "
        f"{steps:,} steps of {format_seconds(step_seconds)}{startup}"
    )


def describe_speed(speed: Speed) -> str:
    """Such as `14,347 tokens/s, 0.57 s a step, 31:20 min in all; MFU 52 %`."""
    parts = [f"{speed.tokens_per_second:,.0f} tokens/s", f"{format_seconds(speed.step_seconds)} a step"]
    if speed.total_seconds is not None:
        parts.append(f"{format_seconds(speed.total_seconds)} in all")
    how = f"limited by the {speed.limit}"
    if speed.estimator == "measured":
        how = "measured on a few layers"
    if speed.estimator == "measured_beside_others":
        how = "measured on a few layers while other processes had the processor, too"
    return f"{', '.join(parts)}; MFU {speed.model_flops_utilization:.0%}, {how}"


def describe_parts(speed: Speed) -> str | None:
    """Such as `load 11 s, evaluate 40 s, train 31:20 min, save 3 s`; None where the number of steps is not known."""
    return ", ".join(f"{part.name} {format_seconds(part.seconds)}" for part in speed.parts) or None


def describe_energy(speed: Speed) -> str | None:
    """Such as `48 J for 1,000 tokens, 0.35 kWh, cost 4.20`; None where nothing of it is known."""
    parts = []
    if speed.joules_per_1000_tokens is not None:
        parts.append(f"{speed.joules_per_1000_tokens:.3g} J for 1,000 tokens")
    if speed.energy_kwh is not None:
        parts.append(f"{speed.energy_kwh:.2g} kWh")
    if speed.cost is not None:
        parts.append(f"cost {speed.cost:,.2f}")
    return ", ".join(parts) or None


def describe_component(
    strategy: Strategy, memory: Memory, shape: ModelShape, component: str, sequence_length: int
) -> str:
    """What a component is, in the terms of this strategy, with its bytes."""
    if memory.peak_phase == "merge":
        return f"the base that the adapters are merged into alone is {format_bytes(memory.components.weights)}"
    sizes = {**dict(memory.components), "optimizer": _count_state_bytes(strategy, memory, shape)}
    size = format_bytes(sizes[component])
    batch = f"{strategy.micro_batch_size} x {sequence_length:,} tokens"
    trainable = format_count(count_trainable(shape, strategy))
    width = "NF4" if strategy.method == "qlora" else strategy.weights_dtype
    return {
        "weights": f"the {format_count(shape.parameters)} weights in {width} alone are {size}",
        "adapters": f"the adapters' {trainable} parameters alone are {size}",
        "gradients": f"the gradients of {trainable} parameters alone are {size}",
        "optimizer": f"{OPTIMIZER_NAMES[strategy.optimizer]}'s states of {trainable} parameters alone are {size}",
        "activations": f"the activations of {batch} alone are {size}",
        "loss_head": f"the logits of {batch} alone are {size}",
        "temporary": f"short-lived buffers alone are {size}",
    }[component]
