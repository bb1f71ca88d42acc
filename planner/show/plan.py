"""A Plan as a table that a person reads: what was chosen, what it needs and where, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ...recipes.units import format_bytes, format_count, format_seconds
from ..memory import Memory
from ..plan import Plan, Rejected
from ..strategy import Device, Strategy
from .reasons import METHOD_NAMES, describe_energy, describe_optimizer, describe_parts, describe_speed
from .timeline import COMPONENT_COLORS, COMPONENT_WORDS, render_timeline

METHOD_WORDS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
BAR_WIDTH = 28


def render_plan(plan: Plan, console: Console, *, next_command: str | None = None) -> None:
    """Print a plan; `next_command` is what to type now."""
    title = Text.assemble("Plan for ", (plan.recipe, "bold"))
    console.print(Panel(_render_head(plan), title=title, title_align="left", expand=False))
    console.print(_render_memory(plan, console))
    if plan.rejected:
        console.print(_render_rejected(plan.rejected))
    for warning in plan.warnings:
        console.print(Text.assemble(("note: ", "yellow"), warning))
    for line in plan.advice:
        console.print(Text.assemble(("advice: ", "cyan"), line))
    console.print(_render_verdict(plan))
    if next_command is not None:
        # One line whatever its length, so that it can be copied.
        console.print(Text.assemble("next: ", (next_command, "bold")), soft_wrap=True)


def _render_head(plan: Plan) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bright_black")
    table.add_column(overflow="fold")
    for name, text in describe_facts(plan):
        table.add_row(name, Text(text))
    return table


def describe_facts(plan: Plan) -> list[tuple[str, str]]:
    """What would run, on what, with which rows: (name, text)."""
    strategy, parameters = plan.strategy, plan.parameters
    share = 100 * parameters.trainable / parameters.total
    rows, length = plan.data.rows, f"rows of at most {plan.data.sequence_length:,} tokens"
    data = length if rows is None else f"{rows:,} {length} ({plan.data.source})"
    steps = "" if plan.data.steps is None else f", {plan.data.steps:,} optimizer steps"
    batch = strategy.micro_batch_size * strategy.gradient_accumulation_steps
    return [
        ("model", f"{plan.model.id} ({plan.model.model_type}, {format_count(parameters.total)} parameters)"),
        ("device", _describe_device(plan.device)),
        ("method", f"{METHOD_NAMES[strategy.method]}, {format_count(parameters.trainable)} trainable ({share:.2f} %)"),
        ("weights", _describe_weights(plan)),
        (
            "batch",
            f"{batch} rows a step = {strategy.micro_batch_size} at a time x {strategy.gradient_accumulation_steps}",
        ),
        ("memory", _describe_savings(plan)),
        ("optimizer", f"{describe_optimizer(strategy)}, learning rate {strategy.learning_rate:g}"),
        ("data", f"{data}{steps}"),
        *describe_pace(plan),
    ]


def describe_pace(plan: Plan) -> list[tuple[str, str]]:
    """How fast it goes, and what energy and money it takes, where that is known."""
    if plan.speed is None:
        return []
    lines = [
        ("speed", describe_speed(plan.speed)),
        ("time", describe_parts(plan.speed)),
        ("energy", describe_energy(plan.speed)),
    ]
    return [(name, text) for name, text in lines if text is not None]


def _describe_device(device: Device) -> str:
    source = f" ({device.budget_source})" if device.budget_source else ""
    return f"{device.name}; {format_bytes(device.budget_bytes)} of {format_bytes(device.memory_bytes)} to use{source}"


def _describe_weights(plan: Plan) -> str:
    strategy = plan.strategy
    stored: str = strategy.weights_dtype
    if strategy.method == "qlora":
        stored = "NF4" + (" with double quantisation" if strategy.double_quantization else "") + f", the rest {stored}"
    if strategy.float8:
        stored = f"linear layers in float8, the rest {stored}"
    rounding = ", rounded stochastically" if strategy.rounding == "stochastic" else ""
    fused = "fused " if strategy.fused_adapters else ""
    adapters = f", {fused}adapters of rank {strategy.adapter_rank} in {strategy.adapter_dtype}"
    adapters = "" if strategy.adapter_dtype is None else adapters
    return f"{stored}{adapters}{rounding}; computes in {strategy.compute_dtype}"


def _describe_savings(plan: Plan) -> str:
    strategy = plan.strategy
    layers, checkpointed = plan.model.layers, strategy.checkpointed_layers
    checkpointing = "every layer checkpointed" if checkpointed >= layers else "no checkpointing"
    if 0 < checkpointed < layers:
        checkpointing = f"the first {checkpointed} of {layers} layers checkpointed"
    checkpointing += " but for attention" if strategy.save_attention else ""
    offloaded = ", activations in RAM" if strategy.activation_offload else ""
    compiled = ", compiled layers" if strategy.compile else ""
    kernels = ", Liger's kernels" if strategy.kernels == "liger" else ""
    expandable = ", expandable segments" if strategy.expandable_segments else ""
    head, attention = f"{strategy.loss_head} loss head", f"{strategy.attention} attention"
    return f"{checkpointing}{offloaded}, {head}{compiled}{kernels}, {attention}{expandable}"


def _render_memory(plan: Plan, console: Console) -> RenderableType:
    """Components at the peak with bars, then the way from the allocated peak to what is required, and the timeline.

    The timeline's highest point is the peak of live tensors, and its components add up to it.
    """
    memory, bar = plan.memory, "#" if console.options.ascii_only else "█"
    table = Table(
        title=f"Memory at its peak: {memory.peak_phase}", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column("")
    table.add_column("GiB", justify="right")
    table.add_column("")
    total = max(memory.peak_allocated_bytes, 1)
    for name, size in memory.components:
        if size:
            share = Text(bar * min(BAR_WIDTH, round(BAR_WIDTH * size / total)), style=COMPONENT_COLORS[name])
            table.add_row(COMPONENT_WORDS[name], _gib(size), share)
    table.add_section()
    for name, size, note in list_figures(plan):
        table.add_row(name, _gib(size), note)
    timeline = [] if memory.timeline is None else [render_timeline(memory, memory.timeline, console)]
    return Group(table, *timeline, _render_phases(memory, bar), Text())


def list_figures(plan: Plan) -> list[tuple[str, int, str]]:
    """The way from the peak of live tensors to the budget: (name, bytes, where it comes from)."""
    memory, reserved = plan.memory, plan.memory.peak_reserved_bytes
    held_bytes = memory.host_bytes if plan.device.kind == "cpu" else memory.peak_device_bytes
    return [
        ("peak of live tensors", memory.peak_allocated_bytes, ""),
        *([] if reserved is None else [("reserved by the allocator", reserved, "")]),
        (_describe_device_bytes(plan), held_bytes, _describe_constant(plan.device)),
        ("with the estimate's margin", memory.required_bytes, ""),
        ("budget", memory.budget_bytes, ""),
    ]


def _describe_device_bytes(plan: Plan) -> str:
    if plan.device.kind == "cpu":
        return "with Python's libraries"
    return "with context, paged states" if plan.strategy.optimizer.startswith("paged_") else "with the CUDA context"


def _describe_constant(device: Device) -> str:
    """Where the memory beside the tensors comes from, where it was learnt on this machine."""
    return "" if device.beside is None else f"{format_bytes(device.beside.bytes)} beside: {device.beside.source}"


def _render_phases(memory: Memory, bar: str) -> RenderableType:
    """Each phase's own peak, with a bar where there is no timeline, and what the run needs beside the device."""
    shown = [phase for phase in memory.phases if phase.peak_allocated_bytes]
    words = [f"{phase.name:<9} {_gib(phase.peak_allocated_bytes):>6}" for phase in shown]
    phases: RenderableType = Columns(words, padding=(0, 2))
    if memory.timeline is None:
        most = max([phase.peak_allocated_bytes for phase in shown], default=1)
        widths = [round(BAR_WIDTH * phase.peak_allocated_bytes / most) for phase in shown]
        phases = Group(*(Text(f"{text}  {bar * width}") for text, width in zip(words, widths, strict=True)))
    beside = f"RAM {format_bytes(memory.host_bytes)}, disk {format_bytes(memory.disk_bytes)}"
    title = Text("Live tensors by phase, GiB", style="italic")
    return Group(Text(), title, phases, Text(), Text(beside), *_describe_beside(memory))


def _describe_beside(memory: Memory) -> Iterator[Text]:
    """RAM and files phase by phase, those of the step together; nothing where they are not estimated."""
    hosts: dict[str, int] = {}
    for phase in memory.phases:
        if phase.host_bytes:
            name = phase.name if phase.name in ("load", "evaluate", "save", "merge") else "step"
            hosts[name] = max(hosts.get(name, 0), phase.host_bytes)
    files = {phase.name: phase.disk_bytes for phase in memory.phases if phase.disk_bytes}
    if memory.checkpoints:
        yield Text(f"checkpoints: {memory.checkpoints} of {format_bytes(memory.checkpoint_bytes)} stay")
    for what, sizes in (("RAM", hosts), ("files", files)):
        if sizes:
            yield Text(f"{what} by phase: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items()))
    if hosts.get("load", 0) > memory.host_bytes:
        yield Text(
            "the load's counts the mapped weight file, whose pages the kernel takes back where RAM is short: "
            f"the run needs {format_bytes(memory.host_bytes)}"
        )


def _render_rejected(rejected: Sequence[Rejected]) -> RenderableType:
    """Of the many rejected candidates, which differ in little, the one of each kind that came closest."""
    closest = closest_of_each_kind(rejected)
    many = "1 candidate" if len(rejected) == 1 else f"{len(rejected)} candidates"
    title = f"Rejected: {many}" + ("" if len(closest) == len(rejected) else "; of each kind the closest")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("GiB", justify="right")
    table.add_column("of", justify="right")
    table.add_column("largest term", overflow="fold")
    for kind, one in closest.items():
        term = one.reason.partition(": ")[2]
        table.add_row(kind, *describe_need(one), Text(term))
    return Group(table, Text())


def closest_of_each_kind(rejected: Sequence[Rejected]) -> dict[str, Rejected]:
    """Method, weights and checkpointing, to the candidate that misses by the least."""
    closest: dict[str, Rejected] = {}
    for one in rejected:
        kind = _describe_kind(one.strategy)
        if kind not in closest or one.needed_bytes - one.budget_bytes < (
            closest[kind].needed_bytes - closest[kind].budget_bytes
        ):
            closest[kind] = one
    return closest


def describe_need(one: Rejected) -> tuple[str, str]:
    """What a rejected candidate needs and what there is: GiB, or time where that is what it lacks."""
    if one.needed_seconds is not None and one.budget_seconds is not None:
        return format_seconds(one.needed_seconds), format_seconds(one.budget_seconds)
    return _gib(one.needed_bytes), _gib(one.budget_bytes)


def _describe_kind(strategy: Strategy) -> str:
    weights = "" if strategy.method == "qlora" else f" {strategy.weights_dtype}"
    checkpointing = ", checkpointed" if strategy.checkpointed_layers else ""
    return f"{METHOD_WORDS[strategy.method]}{weights}{checkpointing}"


def describe_candidate(strategy: Strategy) -> str:
    """What tells a candidate from the others, in a line."""
    rows, head = strategy.micro_batch_size, strategy.loss_head
    return f"{_describe_kind(strategy)}, {rows} at a time, {head} head, {describe_optimizer(strategy)}"


def describe_verdict(plan: Plan) -> tuple[str, str]:
    """(whether it fits, by how much)."""
    memory = plan.memory
    needs = f"{_gib(memory.required_bytes)} of {_gib(memory.budget_bytes)} GiB"
    total = None if plan.speed is None else plan.speed.total_seconds
    takes = "" if total is None else f", {format_seconds(total)}"
    if plan.fits:
        return "fits", f"{needs}, {_gib(memory.budget_bytes - memory.required_bytes)} GiB to spare{takes}"
    closest = next((one for one in plan.rejected if one.strategy == plan.strategy), None)
    if closest is not None and closest.component in ("host", "disk", "time"):
        return "nothing fits", f"the closest candidate {closest.reason}"
    return "nothing fits", f"the closest candidate needs {needs}{takes}"


def _render_verdict(plan: Plan) -> Text:
    verdict, needs = describe_verdict(plan)
    return Text.assemble((f"{verdict}: ", "bold green" if plan.fits else "bold red"), needs)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
