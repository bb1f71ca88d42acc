"""The memory of a run, by phase and by component: the `memory` part of a plan."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from .strategy import Value

Estimator = Literal["rehearsal", "closed_forms"]
STEP_PHASES = ("forward", "backward", "clip", "optimizer")
"""Phases that make up an optimizer step."""
PHASES = ("load", *STEP_PHASES, "evaluate", "save", "merge")


class Components(Value):
    """What is live at one instant, bytes. They add up to the total.

    weights:     the base model
    adapters:    LoRA matrices
    gradients:   of what is trained
    optimizer:   states that the allocator holds (managed memory of paged optimizers is beside it)
    activations: kept for backward, checkpoints included
    loss_head:   logits, their fp32 copies and gradients
    temporary:   short-lived buffers and workspaces
    """

    weights: int = Field(default=0, ge=0)
    adapters: int = Field(default=0, ge=0)
    gradients: int = Field(default=0, ge=0)
    optimizer: int = Field(default=0, ge=0)
    activations: int = Field(default=0, ge=0)
    loss_head: int = Field(default=0, ge=0)
    temporary: int = Field(default=0, ge=0)

    @property
    def total(self) -> int:
        """The sum of all components, bytes."""
        return (
            self.weights
            + self.adapters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.loss_head
            + self.temporary
        )

    @property
    def largest(self) -> str:
        """The name of the largest component."""
        return max(self, key=lambda pair: pair[1])[0]


class Phase(Value):
    """A phase of the run and the highest memory in it.

    name:       load, forward, backward, clip, optimizer, evaluate, save or merge
    peak_allocated_bytes: live tensors on the device, bytes, 0 or more
    host_bytes: resident RAM of the process at its highest, bytes; while weights are read their file counts too, of
                which the kernel takes back what it needs; None for a merge that is not asked for
    disk_bytes: what it adds to the files of the run, bytes, 0 or more; None where it is not estimated
    """

    name: str
    peak_allocated_bytes: int = Field(ge=0)
    host_bytes: int | None = Field(default=None, ge=0)
    disk_bytes: int | None = Field(default=None, ge=0)


Bytes = Annotated[int, Field(ge=0)]


class TimelinePoint(NamedTuple):
    """One instant of a step: the index of its phase in Timeline.phases, and the live bytes of each component."""

    phase: Bytes
    weights: Bytes
    adapters: Bytes
    gradients: Bytes
    optimizer: Bytes
    activations: Bytes
    loss_head: Bytes
    temporary: Bytes

    @property
    def live_bytes(self) -> tuple[int, ...]:
        """Live bytes by component, in the order of `Components`."""
        return self[1:]

    @property
    def total(self) -> int:
        """The sum of all components, bytes."""
        return sum(self.live_bytes)


class Timeline(Value):
    """Live tensors over one optimizer step: of each of about 240 equal parts of its allocations and frees the highest
    instant. The highest of all is the run's peak_allocated_bytes where that is in the step.

    phases:        names that the points refer to
    micro_batches: forward and backward passes of the step; the first one and the highest of the others are shown
    points:        in the order of the step
    """

    phases: tuple[str, ...]
    micro_batches: int = Field(ge=1)
    points: tuple[TimelinePoint, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_phases(self) -> Timeline:
        if any(point.phase >= len(self.phases) for point in self.points):
            raise ValueError(f"a point's phase is not one of the {len(self.phases)} phases")
        return self

    @property
    def peak(self) -> TimelinePoint:
        """The highest point; the first of several."""
        return max(self.points, key=lambda point: point.total)


class Memory(Value):
    """What a run needs, bytes.

    peak_allocated_bytes: highest sum of live tensors
    peak_reserved_bytes:  highest of the caching allocator, fragmentation included; None on a CPU
    managed_bytes:        states of paged optimizers, beside the allocator; 0 on a CPU
    peak_device_bytes:    what NVML will show: reserved + context + managed; on a CPU the process's resident peak
    required_bytes:       peak_device_bytes with its margin, on a CPU host_bytes with it: `fits` is decided on this
    budget_bytes:         what may be used of the device
    host_bytes:           RAM of the process, without pages of a weights' file that is read and converted
    disk_bytes:           files that the run writes, at their most
    checkpoints:          how many checkpoints stay among them, 0 or more
    checkpoint_bytes:     of each, 0 without any
    log_bytes:            of them what is neither weights nor a checkpoint: documents, metrics and samples, estimated
    peak_phase:           the phase of peak_allocated_bytes
    components:           what is live at the peak; they add up to peak_allocated_bytes
    phases:               each phase's own peak, in the order of a run
    estimator:            what these figures come from: a rehearsal of the step, or closed forms
    timeline:             live tensors over the step as rehearsed; None for closed forms
    """

    peak_allocated_bytes: int = Field(ge=0)
    peak_reserved_bytes: int | None = None
    managed_bytes: int = Field(default=0, ge=0)
    peak_device_bytes: int = Field(ge=0)
    required_bytes: int = Field(ge=0)
    budget_bytes: int = Field(gt=0)
    host_bytes: int = Field(ge=0)
    disk_bytes: int = Field(ge=0)
    checkpoints: int = Field(default=0, ge=0)
    checkpoint_bytes: int = Field(default=0, ge=0)
    log_bytes: int = Field(default=0, ge=0)
    peak_phase: str
    components: Components
    phases: tuple[Phase, ...]
    estimator: Estimator = "closed_forms"
    timeline: Timeline | None = None
