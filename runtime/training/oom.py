"""Out of memory: which phase, against which plan, who else is on the card, and what another plan may need."""

from __future__ import annotations

import errno
import re

import psutil
import torch

from ...planner.plan import Plan
from ...recipes.units import format_bytes, parse_bytes
from ..machine.devices import describe_use, probe_gpus
from ..machine.host import probe_host_memory
from ..resume.run_record import Failure
from .meter import Meter

MESSAGES = re.compile(
    r"can't allocate memory|not enough memory|Cannot allocate memory \(os error 12\)|CUDA.*out of memory"
    r"|CU(BLAS|DNN|SOLVER)_STATUS_ALLOC_FAILED"
)
"""What torch, CUDA's runtime and driver, its libraries, Triton and safetensors write where they raise another error."""
REQUEST = re.compile(r"Tried to allocate ([0-9.]+ ?[KMG]iB)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return MESSAGES.search(str(error)) is not None


def describe_out_of_memory(plan: Plan, meter: Meter, step: int) -> str:
    """A diagnosis in a few sentences: the run is over, and never tried again with another batch on its own."""
    planned = _find_planned(plan, meter.phase)
    lines = [f"out of memory in phase {meter.phase} after {step} steps"]
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
    else:
        host = probe_host_memory()
        own = int(psutil.Process().memory_info().rss)
        lines.append(
            f"this process holds {format_bytes(own)}, and {format_bytes(host.available_bytes)} of {host.limited_by} "
            "are left"
        )
    return "; ".join(lines)


def make_failure(plan: Plan, meter: Meter, error: BaseException) -> Failure:
    """What another plan may need at most.

    min(memory that can be had / max(1, needed / planned), what the failed plan requires - 1): where a phase needed
    more than was planned for it, another plan is taken to be as far off; it is never as large as the one that failed.
    needed = what was allocated + what was asked for.
    """
    memory = plan.memory
    planned, allocated = _find_planned(plan, meter.phase), meter.allocated_bytes.get(meter.phase)
    factor = 1.0
    if planned and allocated is not None:
        asked = REQUEST.search(str(error))
        factor = max(1.0, (allocated + (parse_bytes(asked[1]) if asked else 0)) / planned)
    budget = min(int(_find_available(plan) / factor), memory.required_bytes - 1)
    return Failure(phase=meter.phase, budget_bytes=max(budget, 1))


def _find_planned(plan: Plan, phase: str) -> int | None:
    return {one.name: one.peak_allocated_bytes for one in plan.memory.phases}.get(phase)


def _find_available(plan: Plan) -> int:
    """The budget, or what the machine has beside others where that is less."""
    if plan.device.kind == "cpu":
        own = int(psutil.Process().memory_info().rss)
        return min(plan.memory.budget_bytes, probe_host_memory().available_bytes + own)
    free, _ = torch.cuda.mem_get_info()
    beside_bytes = plan.memory.peak_device_bytes - (plan.memory.peak_reserved_bytes or 0)
    return min(plan.memory.budget_bytes, free + torch.cuda.memory_reserved() + beside_bytes)
