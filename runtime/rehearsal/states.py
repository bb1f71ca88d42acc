"""What is allocated between backward and the next forward: clipping, the optimizer's states and its update."""

from __future__ import annotations

from collections.abc import Sequence

from ...planner.arithmetic import (
    PAGED_MIN_ELEMENTS,
    ROUNDED_ELEMENTS,
    ROUNDING_BYTES,
    STATE8_BLOCK,
    STATE8_MIN_ELEMENTS,
)
from ...planner.strategy import Strategy
from .model import TensorSpec
from .replay import Replay

SCALAR_BYTES = 4
CODE_BYTES = 256 * 4
"""bitsandbytes' table of 256 fp32 values for 8-bit quantisation."""
NF4_CODE_BYTES = 16 * 4
FOREACH_CHUNK_ELEMENTS = 65536
"""torch's foreach kernels reduce each tensor in chunks of this many elements (ForeachReduceOp.cu)."""


def replay_clip(replay: Replay, trainable: Sequence[TensorSpec]) -> None:
    """clip_grad_norm_: one norm a gradient, through a buffer of one value for each chunk of the largest one."""
    chunks = -(-max(spec.elements for spec in trainable) // FOREACH_CHUNK_ELEMENTS)
    replay.allocate("chunks", 4 * chunks * len(trainable), "temporary")
    for number in range(len(trainable)):
        replay.allocate(("norm", number), SCALAR_BYTES, "temporary")
    replay.free("chunks")
    replay.allocate("norms", 4 * len(trainable), "temporary")
    replay.allocate("norm", SCALAR_BYTES, "temporary")
    replay.free("norms")
    replay.free("norm")
    for number in range(len(trainable)):
        replay.free(("norm", number))


def replay_optimizer(
    replay: Replay, trainable: Sequence[TensorSpec], strategy: Strategy, *, first: bool, done: int = 0
) -> None:
    """An update; the first one makes the states, by each optimizer's own rules.

    done: tensors that were updated before in the same step
    """
    name, stochastic = strategy.optimizer, strategy.rounding == "stochastic"
    if first and not done and "8bit" in name:
        for table in ("signed", "unsigned"):
            replay.allocate(("state", table), CODE_BYTES, "optimizer")
    if first and name in ("adamw", "adafactor") and not stochastic:
        for number, spec in enumerate(trainable, start=done):
            _make_state(replay, number, spec, name)
    for number, spec in enumerate(trainable, start=done):
        if first and (stochastic or name not in ("adamw", "adafactor")):
            _make_state(replay, number, spec, name)
        if name == "adafactor":
            _replay_adafactor(replay, spec, stochastic=stochastic)
        elif stochastic and spec.width == 2 and not strategy.compiles_update:
            part = min(spec.elements, ROUNDED_ELEMENTS["cuda"])
            replay.temporary(ROUNDING_BYTES * part)


def _make_state(replay: Replay, number: int, spec: TensorSpec, name: str) -> None:
    """The states of one tensor: torch's AdamW keeps the parameter's dtype, Adafactor a row and a column,
    bitsandbytes fp32 or 8 bits with a constant for every 256 elements, in managed memory if paged and large."""

    def keep(part: str, size_bytes: int) -> None:
        replay.allocate(("state", number, part), size_bytes, "optimizer")

    elements = spec.elements
    if name == "adamw":
        for part, size in (("step", SCALAR_BYTES), ("mean", elements * spec.width), ("square", elements * spec.width)):
            keep(part, size)
        return
    if name == "adafactor":
        if spec.dimensions > 1:
            keep("row", elements // spec.columns * spec.width)
            keep("column", elements // spec.rows * spec.width)
        else:
            keep("square", elements * spec.width)
        return
    narrow = "8bit" in name and elements >= STATE8_MIN_ELEMENTS
    for part in ("mean", "square"):
        size = elements * (1 if narrow else 4)
        if name.startswith("paged_") and elements >= PAGED_MIN_ELEMENTS:
            replay.manage(size)
        else:
            keep(part, size)
    if narrow:
        for part in ("mean constants", "square constants"):
            keep(part, 4 * -(-elements // STATE8_BLOCK))


def _replay_adafactor(replay: Replay, spec: TensorSpec, *, stochastic: bool) -> None:
    """The update of one tensor, in its dtype, or in fp32 with fp32 copies of weight and gradient."""
    width = 4 if stochastic else spec.width
    if stochastic:
        for part in ("weight", "gradient"):
            replay.allocate(part, 4 * spec.elements, "temporary")
    replay.temporary(width * spec.elements)
    if stochastic:
        for part in ("weight", "gradient"):
            replay.free(part)
