"""How weights come to the device: as transformers loads them for a run, and as the measured process did."""

from __future__ import annotations

from collections.abc import Hashable

from ...planner.arithmetic import NF4_BLOCK, NF4_NESTED_BLOCK
from ...planner.strategy import DTYPE_BYTES, Strategy
from .model import RehearsalModel, TensorSpec
from .replay import Replay
from .states import CODE_BYTES, NF4_CODE_BYTES, SCALAR_BYTES

EXPERT_DIMENSIONS = 3
"""Of the weights of all experts, [experts, outputs, inputs]; those of a convolution have one row."""
JOINED = 2
"""Gate and up projections, which are one weight."""


def replay_loading(replay: Replay, model: RehearsalModel, strategy: Strategy) -> None:
    """transformers 5.23's from_pretrained with a device map.

    caching_allocator_warmup first makes one segment as large as all weights, which those above 1 MiB are cut from; the
    cache is not emptied afterwards. Then weight after weight comes in the order of the names, converted on the host
    (threads read ahead, which changes the order of what stays). What is quantised comes one at a time, in 16 bits. A
    mixture's experts are read one by one and stacked. convert_and_load_state_dict_in_model in core_model_loading.py.
    """
    from transformers.core_model_loading import dot_natural_key

    replay.temporary(sum(map(_count_warm_bytes, model.weights.values())))
    if strategy.double_quantization:
        replay.allocate("table", CODE_BYTES, "weights")
    for path in sorted(model.weights, key=dot_natural_key):
        spec, key = model.weights[path], ("weights", path)
        if spec.quantized:
            _replay_quantized(replay, key, spec, strategy)
        elif spec.dimensions == EXPERT_DIMENSIONS and spec.rows > 1:
            _replay_experts(replay, key, spec, joined=JOINED if "gate_up" in path else 1)
        else:
            replay.allocate(key, spec.elements * spec.width, "weights")


def _count_warm_bytes(spec: TensorSpec) -> int:
    """What transformers counts for a weight: half a byte an element for one that it quantises."""
    return spec.elements // 2 if spec.quantized else spec.elements * spec.width


def _replay_quantized(replay: Replay, key: tuple[str, str], spec: TensorSpec, strategy: Strategy) -> None:
    """A weight in 16 bits, and as NF4; a transposed one is copied first."""
    size = spec.elements * DTYPE_BYTES[strategy.weights_dtype]
    if spec.transposed:
        replay.allocate("read", size, "temporary")
    replay.allocate("full", size, "temporary")
    _replay_quantization(replay, key, spec, strategy)
    replay.free("full")
    if spec.transposed:
        replay.free("read")


def _replay_experts(replay: Replay, key: Hashable, spec: TensorSpec, *, joined: int) -> None:
    """One tensor an expert, stacked; where two projections are one weight, both are read before, and joined after."""
    size = spec.elements * spec.width
    experts = spec.elements // (spec.rows * spec.columns)
    parts = [[("expert", half, expert) for expert in range(experts)] for half in range(joined)]
    for part in [one for half in parts for one in half]:
        replay.allocate(part, size // joined // experts, "temporary")
    for half in range(joined):
        replay.allocate(("stack", half) if joined > 1 else key, size // joined, "weights")
        for part in parts[half]:
            replay.free(part)
    if joined > 1:
        replay.allocate(key, size, "weights")
        for half in range(joined):
            replay.free(("stack", half))


def replay_measured_loading(replay: Replay, model: RehearsalModel, strategy: Strategy) -> None:
    """Loading as the measured process did it: the tensors in the model's order, then the cache emptied.

    NF4 weights are quantised one at a time from a second 16-bit copy; a tied LM head is made and dropped.
    """
    if strategy.double_quantization:
        replay.allocate("table", CODE_BYTES, "weights")
    for path, spec in model.weights.items():
        if spec.quantized:
            size = spec.elements * DTYPE_BYTES[strategy.compute_dtype]
            replay.allocate("read", size, "temporary")
            replay.allocate("full", size, "temporary")
            replay.free("read")
            _replay_quantization(replay, ("weights", path), spec, strategy)
            replay.free("full")
        elif strategy.method == "qlora" and spec.dimensions:
            _replay_scaled(replay, ("weights", path), spec)
        else:
            replay.allocate(("weights", path), spec.elements * spec.width, "weights")
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


def _replay_quantization(replay: Replay, key: tuple[str, str], spec: TensorSpec, strategy: Strategy) -> None:
    """bitsandbytes.functional.quantize_4bit: packed weight, block constants, those in 8 bits."""
    blocks = -(-spec.elements // NF4_BLOCK)
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
    for path, spec in model.weights.items():
        if not spec.float8:
            continue
        replay.temporary(spec.elements * spec.width)
        replay.allocate(("weights", path, "scale"), SCALAR_BYTES, "weights")
        for part in ("wide", "scaled"):
            replay.allocate(part, 4 * spec.elements, "temporary")
        replay.free("wide")
        replay.allocate(("weights", path, "float8"), spec.elements, "weights")
        replay.free("scaled")
        replay.free(("weights", path))
    replay.allocator.empty_cache()
