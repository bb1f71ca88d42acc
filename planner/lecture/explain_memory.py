"""The memory sections of `fitune explain`: full fine-tuning, LoRA and QLoRA, checkpoints."""

from __future__ import annotations

from math import sqrt

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...recipes.units import format_bytes
from ..show.reasons import METHOD_NAMES, OPTIMIZER_NAMES
from ..show.timeline import COMPONENT_COLORS
from .arithmetic import Explanation
from .explain_tables import format_gb, format_short_gb, make_note, make_table
from .memory import LORA_BYTES_PER_PARAMETER, AdapterAccount, FullCost, LargestBatch

BAR_WIDTH = 16


def render_full(explanation: Explanation) -> RenderableType:
    """The lecture's 20 + 20 + 80 = 120 GB, then other dtypes and optimizers."""
    table = make_table("GB", "weights", "gradients", "states", "total", "bytes each")
    table.add_column("")
    largest = max(cost.total_bytes for cost in explanation.full)
    for place, cost in enumerate(explanation.full):
        sizes = (cost.weights_bytes, cost.gradient_bytes, cost.optimizer_bytes, cost.total_bytes)
        name = f"{cost.weights_dtype}, {OPTIMIZER_NAMES[cost.optimizer]}"
        each = f"{cost.total_bytes / explanation.parameters:.2f}"
        table.add_row(name, *map(format_gb, sizes), each, _make_bar(cost, largest), style="bold" if place == 0 else "")
    first = explanation.full[0]
    terms = (first.weights_bytes, first.gradient_bytes, first.optimizer_bytes)
    total = f"{' + '.join(map(format_short_gb, terms))} = {format_short_gb(first.total_bytes)} GB"
    return Group(
        Text.assemble(
            f"{explanation.parameters:,} parameters x {first.total_bytes / explanation.parameters:g} bytes: ",
            (total, "bold"),
            f" ({format_bytes(first.total_bytes)}) before any activation.\n"
            "Weights and gradients in 16 bits, AdamW's two moments in fp32: the lecture's choice, the first row.\n",
        ),
        table,
        make_note("\n32-bit AdamW is bitsandbytes'; torch's AdamW keeps its moments in the weights' dtype."),
    )


def _make_bar(cost: FullCost, largest: int) -> Text:
    parts = {"weights": cost.weights_bytes, "gradients": cost.gradient_bytes, "optimizer": cost.optimizer_bytes}
    bar = Text()
    for name, size in parts.items():
        bar.append("█" * round(BAR_WIDTH * size / largest), style=COMPONENT_COLORS[name])
    return bar


def render_accounts(explanation: Explanation) -> RenderableType:
    """What LoRA and QLoRA hold, what is left of the lecture's figure, and on which batch that is activations."""
    lora = explanation.accounts[0]
    budget = format_short_gb(lora.budget_bytes)
    return Group(
        Text(_describe_reference(explanation) + "\n"),
        _render_fixed(explanation.accounts, budget),
        Text(
            f"\nThe rest is activations and logits. The most rows of a step within {budget} GB, and its peak in GB:\n"
        ),
        _render_batches(explanation.accounts),
        Text(),
        *(Text(_describe_fill(account)) for account in explanation.accounts),
        make_note("The CUDA context and the allocator's slack come on top; `fitune plan` counts them."),
    )


def _render_fixed(accounts: tuple[AdapterAccount, ...], budget: str) -> Table:
    table = make_table("GB", *(METHOD_NAMES[account.method] for account in accounts))
    first = accounts[0]
    for name, field in (
        ("weights", "weights_bytes"),
        (f"adapters, rank {first.rank} on every linear layer: {first.trainable:,} in bf16", "adapter_bytes"),
        ("their gradients, bf16", "gradient_bytes"),
        ("their two moments, fp32", "optimizer_bytes"),
        ("together", "fixed_bytes"),
        (f"left of {budget} GB", "rest_bytes"),
    ):
        style = "bold" if field in ("fixed_bytes", "rest_bytes") else ""
        table.add_row(name, *(format_gb(getattr(account, field)) for account in accounts), style=style)
    return table


def _describe_reference(explanation: Explanation) -> str:
    reference = explanation.reference
    rule = f"The lecture's ~40 GB for 10B is {LORA_BYTES_PER_PARAMETER} bytes a parameter."
    count = f"{reference.model} ({reference.parameters:,} parameters)"
    if reference.model == explanation.size:
        return f"{rule} Counted on {count}."
    if reference.near:
        return f"{rule} Counted on {count}, the catalog's nearest to {explanation.size}."
    return f"{rule} The catalog has no architecture near {explanation.size}: this is {count}, its nearest."


def _render_batches(accounts: tuple[AdapterAccount, ...]) -> Table:
    kinds = ("all kept", "checkpointed")
    table = make_table("tokens", *(f"{METHOD_NAMES[account.method]}, {kind}" for account in accounts for kind in kinds))
    for length in dict.fromkeys(batch.sequence_length for batch in accounts[0].batches):
        batches = [batch for account in accounts for batch in account.batches if batch.sequence_length == length]
        table.add_row(f"{length:,}", *map(_describe_batch, batches))
    return table


def _describe_batch(batch: LargestBatch) -> Text:
    if batch.micro_batch_size == 0:
        return Text(f"1 needs {format_gb(batch.peak_bytes)}", style="red")
    return Text(f"{batch.micro_batch_size:,} ({format_gb(batch.peak_bytes)})")


def _describe_fill(account: AdapterAccount) -> str:
    """How the batch that comes closest fills the budget; parts below a hundredth of the peak are left out."""
    name, budget = METHOD_NAMES[account.method], format_short_gb(account.budget_bytes)
    fitting = [batch for batch in account.batches if batch.micro_batch_size]
    if not fitting:
        return f"{name}: no step of one row stays within {budget} GB."
    batch = max(fitting, key=lambda one: one.peak_bytes)
    how = "checkpointed" if batch.gradient_checkpointing else "all kept"
    rows = f"{batch.micro_batch_size:,} x {batch.sequence_length:,} tokens, {how}"
    parts = {
        "activations": batch.activation_bytes,
        "logits": batch.loss_head_bytes,
        "short-lived buffers": batch.temporary_bytes,
    }
    split = ", ".join(f"{format_gb(size)} {part}" for part, size in parts.items() if 100 * size >= batch.peak_bytes)
    return f"{name} peaks at {format_gb(batch.peak_bytes)} GB on {rows}: {split}."


def render_checkpoints(explanation: Explanation) -> RenderableType:
    """No checkpoints, the lecture's rule, and one a layer, on one row of tokens."""
    rule, model = explanation.checkpoints, explanation.reference.model
    table = make_table("kept for backward", "checkpoints", "layers at a time", "GB")
    table.add_row("everything", "0", str(rule.layers), format_gb(rule.none_bytes))
    each_segment = f"the lecture: every sqrt({rule.layers}) = {rule.segment_layers} layers"
    table.add_row(each_segment, str(rule.checkpoints), str(rule.segment_layers), format_gb(rule.sqrt_bytes))
    table.add_row("fitune: every layer", str(rule.layers), "1", format_gb(rule.every_bytes), style="bold")
    ratio = rule.layer_bytes / rule.checkpoint_bytes
    best = sqrt(rule.layers / ratio)
    return Group(
        Text(f"{model}, {rule.layers} layers, one row of {rule.sequence_length:,} tokens under LoRA:\n"),
        table,
        Text(
            f"\nsqrt(n) is best where a layer keeps no more than its checkpoint. Here it keeps {ratio:.0f} times as "
            f"much, so the best spacing is sqrt({rule.layers} / {ratio:.0f}) = {best:.1f} layers. "
            "Either way one forward is recomputed."
        ),
    )
