"""A Plan as a table that a person reads: what was chosen, what it needs and where, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..recipes.units import format_bytes, format_count
from .memory import Memory
from .plan import Plan, Rejected
from .reasons import METHOD_NAMES, OPTIMIZER_NAMES, describe_strategy

COMPONENT_COLORS = {
    "weights": "blue",
    "adapters": "cyan",
    "gradients": "magenta",
    "optimizer": "yellow",
    "activations": "green",
    "loss_head": "red",
    "temporary": "bright_black",
}
COMPONENT_WORDS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "loss_head": "loss head",
    "temporary": "short-lived buffers",
}
SHOWN_REJECTIONS = 8
BAR_WIDTH = 40


def render_plan(plan: Plan, console: Console, *, next_command: str | None = None) -> None:
    """Print a plan; `next_command` is what to type now."""
    console.print(
        Panel(
            _render_head(plan), title=f"Plan for [bold]{escape(plan.recipe)}[/bold]", title_align="left", expand=False
        )
    )
    console.print(_render_memory(plan.memory, plan.device.kind))
    if plan.rejected:
        console.print(_render_rejected(plan.rejected))
    for warning in plan.warnings:
        console.print(Text.assemble(("note: ", "yellow"), warning))
    for line in plan.advice:
        console.print(Text.assemble(("advice: ", "cyan"), line))
    console.print(_render_verdict(plan))
    if next_command is not None:
        console.print(Text.assemble("next: ", (next_command, "bold")))


def _render_head(plan: Plan) -> RenderableType:
    strategy, parameters = plan.strategy, plan.parameters
    share = 100 * parameters.trainable / parameters.total
    rows = "an unknown number of" if plan.data.rows is None else f"{plan.data.rows:,}"
    steps = "" if plan.data.steps is None else f", {plan.data.steps:,} optimizer steps"
    batch = strategy.micro_batch_size * strategy.gradient_accumulation_steps
    lines = [
        ("model", f"{plan.model.id} ({plan.model.model_type}, {format_count(parameters.total)} parameters)"),
        (
            "device",
            f"{plan.device.name}, {format_bytes(plan.device.budget_bytes)} of {format_bytes(plan.device.memory_bytes)}",
        ),
        ("method", f"{METHOD_NAMES[strategy.method]}, {format_count(parameters.trainable)} trainable ({share:.2f} %)"),
        ("weights", _describe_weights(plan)),
        (
            "batch",
            f"{batch} rows a step = {strategy.micro_batch_size} at a time x {strategy.gradient_accumulation_steps}",
        ),
        ("memory", _describe_savings(plan)),
        ("optimizer", f"{OPTIMIZER_NAMES[strategy.optimizer]}, learning rate {strategy.learning_rate:g}"),
        ("data", f"{rows} rows of at most {plan.data.sequence_length:,} tokens ({plan.data.source}){steps}"),
    ]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bright_black")
    table.add_column(overflow="fold")
    for name, text in lines:
        table.add_row(name, text)
    return table


def _describe_weights(plan: Plan) -> str:
    strategy = plan.strategy
    stored: str = strategy.weights_dtype
    if strategy.method == "qlora":
        stored = "NF4" + (" with double quantisation" if strategy.double_quantization else "") + f", the rest {stored}"
    rounding = ", rounded stochastically" if strategy.rounding == "stochastic" else ""
    adapters = (
        "" if strategy.adapter_dtype is None else f", rank {strategy.adapter_rank} adapters in {strategy.adapter_dtype}"
    )
    return f"{stored}{adapters}{rounding}; computes in {strategy.compute_dtype}"


def _describe_savings(plan: Plan) -> str:
    strategy = plan.strategy
    checkpointing = "every layer checkpointed" if strategy.gradient_checkpointing else "no checkpointing"
    compiled = ", compiled layers" if strategy.compile else ""
    return f"{checkpointing}, {strategy.loss_head} loss head{compiled}, {strategy.attention} attention"


def _render_memory(memory: Memory, kind: str) -> RenderableType:
    """Components at the peak with bars, then the way from the allocated peak to what is required."""
    table = Table(title=f"Memory at its peak: {memory.peak_phase}", title_justify="left", box=None, padding=(0, 2))
    table.add_column("component")
    table.add_column("GiB", justify="right")
    table.add_column("")
    total = max(memory.peak_allocated_bytes, 1)
    for name, size in memory.components:
        if size:
            bar = Text("█" * max(1, round(BAR_WIDTH * size / total)), style=COMPONENT_COLORS[name])
            table.add_row(COMPONENT_WORDS[name], _gib(size), bar)
    table.add_section()
    table.add_row("peak of live tensors", _gib(memory.peak_allocated_bytes), "")
    if memory.peak_reserved_bytes is not None:
        table.add_row("reserved by the allocator", _gib(memory.peak_reserved_bytes), "")
    beside = "with context and workspaces (NVML)" if kind == "cuda" else "with Python and its libraries (resident)"
    table.add_row(beside, _gib(memory.peak_device_bytes), "")
    table.add_row("with the estimate's margin", _gib(memory.required_bytes), "")
    table.add_row("budget", _gib(memory.budget_bytes), "")
    return Group(table, _render_phases(memory))


def _render_phases(memory: Memory) -> RenderableType:
    phases = "  ".join(f"{phase.name} {_gib(phase.peak_allocated_bytes)}" for phase in memory.phases)
    beside = f"RAM {format_bytes(memory.host_bytes)}, disk {format_bytes(memory.disk_bytes)}"
    return Text.assemble(("live tensors by phase, GiB: ", "bright_black"), phases, ("; ", "bright_black"), beside, "\n")


def _render_rejected(rejected: Sequence[Rejected]) -> RenderableType:
    """The rejected candidates: of many that differ in little, the one of each kind that came closest."""
    shown = _closest_of_each_kind(rejected)[:SHOWN_REJECTIONS]
    table = Table(
        title=f"Rejected: {len(rejected)} candidates"
        + ("" if len(shown) == len(rejected) else ", the closest of each kind"),
        title_justify="left",
        box=None,
        padding=(0, 2),
    )
    table.add_column("candidate", overflow="fold")
    table.add_column("why", overflow="fold")
    for one in shown:
        table.add_row(describe_strategy(one.strategy), one.reason)
    return Group(table, Text())


def _closest_of_each_kind(rejected: Sequence[Rejected]) -> list[Rejected]:
    closest: dict[tuple[str, str, bool], Rejected] = {}
    for one in rejected:
        kind = (one.strategy.method, one.strategy.weights_dtype, one.strategy.gradient_checkpointing)
        if kind not in closest or one.needed_bytes < closest[kind].needed_bytes:
            closest[kind] = one
    return list(closest.values())


def _render_verdict(plan: Plan) -> Text:
    memory = plan.memory
    if plan.fits:
        free = format_bytes(memory.budget_bytes - memory.required_bytes)
        return Text.assemble(
            ("fits: ", "bold green"),
            f"{format_bytes(memory.required_bytes)} of {format_bytes(memory.budget_bytes)}, {free} to spare",
        )
    return Text.assemble(("nothing fits: ", "bold red"), f"the closest needs {format_bytes(memory.required_bytes)}")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
