"""Out of memory: which phase, against which plan, who else is on the card, and what to do."""

from __future__ import annotations

import torch

from ..planner.plan import Plan
from ..planner.strategy import Strategy
from ..recipes.units import format_bytes
from .devices import describe_use, probe_gpus
from .meter import Meter


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error) or "CUDA out of memory" in str(error)


def describe_out_of_memory(plan: Plan, meter: Meter) -> str:
    """A diagnosis in a few sentences: the run is over, and never tried again with another batch on its own."""
    planned = {phase.name: phase.peak_allocated_bytes for phase in plan.memory.phases}.get(meter.phase)
    lines = [f"out of memory in phase {meter.phase}"]
    if planned is not None:
        lines.append(
            f"the plan has {format_bytes(planned)} of live tensors there, mostly {plan.memory.components.largest}"
        )
    measured = meter.allocated_bytes.get(meter.phase)
    if measured is not None:
        lines.append(f"{format_bytes(measured)} were allocated before")
    if plan.device.kind == "cuda":
        gpus = probe_gpus().visible
        if gpus:
            lines.append(describe_use(gpus[0]))
    lines.append(f"try `fitune plan {plan.recipe} --set {suggest_change(plan.strategy)}`, or a smaller budget.memory")
    return "; ".join(lines)


def suggest_change(strategy: Strategy) -> str:
    """The key of the recipe that saves most of what is left to save: micro-batch, checkpointing, loss head, method."""
    micro = strategy.micro_batch_size
    whole = micro * strategy.gradient_accumulation_steps
    if micro > 1:
        return f"train.micro_batch_size={max(size for size in range(1, micro // 2 + 1) if whole % size == 0)}"
    if not strategy.checkpointed_layers:
        return "train.gradient_checkpointing=true"
    if strategy.loss_head == "full":
        return "train.loss_head=fused"
    return "data.max_length=512" if strategy.method == "qlora" else "method.kind=qlora"
