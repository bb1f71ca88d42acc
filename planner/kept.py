"""What closed forms say of one model on rows of one length, kept for all the devices that plans are made for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .estimate import estimate_memory
from .memory import Memory
from .shape import ModelShape
from .speed import Work
from .strategy import Device, DeviceConstant, Strategy

if TYPE_CHECKING:
    from .search import Measure

Works = dict[str, tuple[Work, ...]]
"""Operations by phase."""


@dataclass(frozen=True, kw_only=True)
class KeptForms:
    """Closed forms that were worked out: a view asks for the same strategies on many cards.

    memories: by the device's kind and constant, which they depend on, then by strategy; each has some device's budget
    works:    of a micro-batch by strategy
    updates:  clipping and the optimizer's by strategy
    """

    memories: dict[tuple[str, DeviceConstant | None], dict[Strategy, Memory]] = field(default_factory=dict)
    works: dict[Strategy, Works] = field(default_factory=dict)
    updates: dict[Strategy, Works] = field(default_factory=dict)


def make_closed_form_measure(
    shape: ModelShape, device: Device, sequence_length: int, *, merge: bool, kept: KeptForms | None = None
) -> Measure:
    """The planner's own estimate as a measuring function; kept: of this model and these rows."""
    known = (kept or KeptForms()).memories.setdefault((device.kind, device.beside), {})

    def measure(strategy: Strategy) -> Memory:
        if strategy not in known:
            known[strategy] = estimate_memory(shape, strategy, device, sequence_length=sequence_length, merge=merge)
        memory = known[strategy]
        if memory.budget_bytes == device.budget_bytes:
            return memory
        return memory.model_copy(update={"budget_bytes": device.budget_bytes})

    return measure
