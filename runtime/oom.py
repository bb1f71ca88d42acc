"""Out of memory: which phase, against which plan, who else is on the card, and what to do."""

from __future__ import annotations

import torch

from ..planner.plan import Plan
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
    half = max(1, plan.strategy.micro_batch_size // 2)
    lines.append(f"try `fitune plan {plan.recipe} --set train.micro_batch_size={half}`, or a smaller budget.memory")
    return "; ".join(lines)
