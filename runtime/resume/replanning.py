"""Another plan for a run that goes on: the same method, optimizer and global batch, and less memory."""

from __future__ import annotations

import shlex
from dataclasses import replace

from ...planner.plan import Plan, make_plan
from ...recipes.units import format_bytes
from ..planning import Job
from ..rehearsing import Rehearsals
from .run_record import Failure


def make_new_plan(job: Job, old: Plan, failure: Failure | None) -> Plan:
    """The fastest plan that a run of `old` can go on with; within what its failure left, where it had one."""
    device = job.probe_device()
    if failure is not None and failure.budget_bytes < device.budget_bytes:
        source = f"what was left when the run was out of memory in phase {failure.phase}"
        device = device.model_copy(update={"budget_bytes": failure.budget_bytes, "budget_source": source})
    inputs = replace(job.find_inputs(quick=False, device=device), like=old.strategy)
    return make_plan(inputs, *Rehearsals().find(job.source.config, inputs))


def describe_new_plan(job: Job, old: Plan, failure: Failure) -> str:
    """What to do after a run was out of memory: the command, and the plan that it would go on with."""
    command = shlex.join(["fitune", "run", job.path, *[word for one in job.overrides for word in ("--set", one)]])
    try:
        new = make_new_plan(job, old, failure)
    # Planning is a favour here: whatever keeps it from coming to an end must not hide why the run ended.
    except Exception:
        return f"`{command} --replan` looks for a plan that needs less"
    if not new.fits:
        need = format_bytes(new.memory.required_bytes)
        return (
            f"no plan at the same global batch fits what is left: the smallest needs {need}; free memory on the device"
        )
    strategy, was = new.strategy, old.strategy
    changes = [f"{strategy.micro_batch_size} rows at a time instead of {was.micro_batch_size}"]
    if strategy.checkpointed_layers > was.checkpointed_layers:
        changes.append(f"{strategy.checkpointed_layers} layers computed again in backward")
    if strategy.loss_head != was.loss_head:
        changes.append(f"{strategy.loss_head} loss head")
    return (
        f"a plan at the same global batch of {was.micro_batch_size * was.gradient_accumulation_steps} needs "
        f"{format_bytes(new.memory.required_bytes)} of {format_bytes(failure.budget_bytes)}: {', '.join(changes)}; "
        f"`{command} --replan` goes on with it from the last checkpoint"
    )
