"""What is allocated outside of forward and backward: weights as they are made, clipping, the optimizer's states."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ...planner.arithmetic import NF4_BLOCK, NF4_NESTED_BLOCK, PAGED_MIN_ELEMENTS, STATE8_BLOCK, STATE8_MIN_ELEMENTS
from ...planner.strategy import DTYPE_BYTES, Strategy
from ..training.optimizers import CHUNK_ELEMENTS
from .model import RehearsalModel, TensorSpec
from .replay import Replay

SCALAR_BYTES = 4
CODE_BYTES = 256 * 4
"""bitsandbytes' table of 256 fp32 values for 8-bit quantisation."""
NF4_CODE_BYTES = 16 * 4
FOREACH_CHUNK_ELEMENTS = 65536
"""torch's foreach kernels reduce each tensor in chunks of this many elements (ForeachReduceOp.cu)."""


def replay_weights(replay: Replay, model: RehearsalModel, strategy: Strategy) -> None:
    """The base model's tensors one after the other, then the cache emptied, as after loading.

    NF4 weights are quantised one at a time from a 16-bit one; a tied LM head is made and dropped.
    """
    if strategy.double_quantization:
        replay.allocate("table", CODE_BYTES, "weights")
    for number, spec in enumerate(model.weights):
        if spec.quantized:
            _replay_quantization(replay, ("weights", number), spec, strategy)
        elif strategy.method == "qlora" and spec.dimensions:
            _replay_scaled(replay, ("weights", number), spec)
        else:
            replay.allocate(("weights", number), spec.elements * spec.width, "weights")
    if model.tied is not None:
        _replay_scaled(replay, "tied head", model.tied)
        replay.free("tied head")
    replay.allocator.empty_cache()


def _replay_scaled(replay: Replay, key: Hashable, spec: TensorSpec) -> None:
    """A tensor that is read and converted: twice there for a moment."""
    size = spec.elements * spec.width
    replay.allocate("read", size, "temporary")
    replay.allocate(key, size, "weights")
    replay.free("read")


def _replay_quantization(replay: Replay, key: tuple[str, int], spec: TensorSpec, strategy: Strategy) -> None:
    """bitsandbytes.functional.quantize_4bit: packed weight, block constants, and those again in 8 bits."""
    full = spec.elements * DTYPE_BYTES[strategy.compute_dtype]
    blocks = -(-spec.elements // NF4_BLOCK)
    replay.allocate("read", full, "temporary")
    replay.allocate("full", full, "temporary")
    replay.free("read")
    replay.allocate((*key, "absmax"), 4 * blocks, "weights")
    replay.allocate((*key, "packed"), -(-spec.elements // 2), "weights")
    replay.allocate((*key, "code"), NF4_CODE_BYTES, "weights")
    if strategy.double_quantization:
        replay.allocate((*key, "offset"), SCALAR_BYTES, "weights")
        replay.allocate("centred", 4 * blocks, "temporary")
        replay.allocate((*key, "absmax2"), 4 * -(-blocks // NF4_NESTED_BLOCK), "weights")
        replay.allocate((*key, "absmax8"), blocks, "weights")
        replay.allocate((*key, "code2"), CODE_BYTES, "weights")
        replay.free("centred")
        replay.free((*key, "absmax"))
    replay.free("full")


def replay_adapters(replay: Replay, model: RehearsalModel) -> None:
    """peft makes an adapter's matrices in the weights' 16 bits; those wanted in fp32 are copied afterwards."""
    for number, spec in enumerate(model.adapters):
        replay.allocate(("made", number), 2 * spec.elements, "adapters")
    for number, spec in enumerate(model.adapters):
        if spec.width == 2:
            continue
        replay.allocate(("adapters", number), spec.width * spec.elements, "adapters")
        replay.free(("made", number))


def replay_float8(replay: Replay, model: RehearsalModel) -> None:
    """runtime.model.linear_float8.use_float8: one weight after the other by way of fp32, then the cache emptied."""
    for number, spec in enumerate(model.weights):
        if not spec.float8:
            continue
        replay.temporary(spec.elements * spec.width)
        replay.allocate(("weights", number, "scale"), SCALAR_BYTES, "weights")
        for part in ("wide", "scaled"):
            replay.allocate(part, 4 * spec.elements, "temporary")
        replay.free("wide")
        replay.allocate(("weights", number, "float8"), spec.elements, "weights")
        replay.free("scaled")
        replay.free(("weights", number))
    replay.allocator.empty_cache()


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
        elif stochastic and spec.width == 2:
            part = min(spec.elements, CHUNK_ELEMENTS)
            replay.temporary((16 + 4) * part)


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
