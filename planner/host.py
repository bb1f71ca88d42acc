"""RAM of the process in each phase of a run: what psutil and the kernel's VmHWM show of it.

On a CPU that is everything, tensors too; beside a GPU the libraries, weights on their way, and offloaded activations.
"""

from __future__ import annotations

from collections.abc import Mapping

from .arithmetic import estimate_adapter_bytes, estimate_optimizer_bytes, estimate_weight_bytes, largest_linear
from .estimate import CUDA_HOST_BYTES, estimate_offloaded_bytes, find_margin
from .files import WeightFiles
from .memory import STEP_PHASES, Memory
from .process import FIRST_USE_BYTES, estimate_heap_bytes, estimate_own_bytes, estimate_used_bytes
from .shape import ModelShape
from .strategy import Device, Strategy
from .widths import NONE_EVALUATED, EvaluatedWidths

QUANTIZATION_BYTES = 4 * 4
"""Bytes an element that bitsandbytes takes on a CPU while it quantises a weight: four fp32 copies (0.50)."""
HOMELESS_SHARE = 0.75
"""Of the gradients, those that find no room where backward has freed activations: 0.3 to 1 in five full runs of two
models."""
OPTIMIZERS_8BIT = ("adamw_8bit", "paged_adamw_8bit")
AFTER_LOADING = (*STEP_PHASES, "evaluate", "save")


def lay_host(
    memory: Memory,
    shape: ModelShape,
    strategy: Strategy,
    device: Device,
    *,
    sequence_length: int,
    weights: WeightFiles,
    stored_bytes: int | None,
    widths: float = 1,
    evaluated: EvaluatedWidths = NONE_EVALUATED,
) -> Memory:
    """The memory with the RAM of each phase; on a CPU its highest is the device's peak.

    weights:      that the run writes
    stored_bytes: size of the model's weight files, None where they are not here: then 16 bits a parameter are taken
    widths, evaluated: as in estimate_used_bytes
    """
    stored = 2 * shape.parameters if stored_bytes is None else stored_bytes
    if device.kind == "cuda":
        offloaded = estimate_offloaded_bytes(shape, strategy, device, sequence_length)
        hosts = _estimate_beside_gpu(weights, stored, offloaded)
        return _lay_phases(memory, hosts)
    used = estimate_used_bytes(shape, strategy, device, widths=widths, evaluated=evaluated)
    heap = estimate_heap_bytes(shape, strategy, sequence_length=sequence_length)
    states = sum(estimate_optimizer_bytes(shape, strategy)) if strategy.optimizer in OPTIMIZERS_8BIT else 0
    hosts = _estimate_in_steps(memory, used, *heap, states_8bit_bytes=states)
    adapters, own = estimate_adapter_bytes(shape, strategy), estimate_own_bytes(device)
    files = {"load": _estimate_read_file(shape, strategy, stored)}
    hosts["load"] = own + adapters + _estimate_reading(shape, strategy, stored) + files["load"]
    if weights.merged_bytes:
        files["merge"] = 0 if _is_stored_in(weights.merged_bytes, stored) else stored
        hosts["merge"] = used + adapters + weights.merged_bytes + files["merge"]
    needed = max(size - files.get(name, 0) for name, size in hosts.items())
    margin_share, margin_bytes = find_margin(shape, strategy, device)
    peaks = {
        "peak_device_bytes": max(hosts.values()),
        "host_bytes": needed,
        "required_bytes": int(needed * (1 + margin_share)) + margin_bytes,
    }
    return _lay_phases(memory.model_copy(update=peaks), hosts)


def _lay_phases(memory: Memory, hosts: Mapping[str, int]) -> Memory:
    phases = tuple(one.model_copy(update={"host_bytes": hosts.get(one.name)}) for one in memory.phases)
    return memory.model_copy(update={"phases": phases})


def _estimate_beside_gpu(weights: WeightFiles, stored_bytes: int, offloaded_bytes: int) -> dict[str, int]:
    """Weights are read through a mapping of their file, and saved from copies in RAM."""
    hosts = dict.fromkeys(AFTER_LOADING, CUDA_HOST_BYTES + offloaded_bytes)
    hosts["load"] = CUDA_HOST_BYTES + stored_bytes
    hosts["save"] += weights.trained_bytes
    if weights.merged_bytes:
        hosts["merge"] = CUDA_HOST_BYTES + offloaded_bytes + weights.merged_bytes
    return hosts


def _estimate_in_steps(
    memory: Memory, used_bytes: int, kept_bytes: int, free_bytes: int, *, states_8bit_bytes: int
) -> dict[str, int]:
    """The process and the live tensors; while steps go on also what the heap keeps of a step's activations, which goes
    back to the system before anything is evaluated or saved.

    kept_bytes, free_bytes: activations in the heap at the end of a forward, and what is free between them
    states_8bit_bytes: each of these was made between fp32 copies of another's update, and breaks up as much room for
                       all later steps: without it 30 steps of full fine-tuning needed 14 % more than planned
    """
    live = {one.name: one.peak_allocated_bytes for one in memory.phases if one.name in AFTER_LOADING}
    hosts = {name: used_bytes + size for name, size in live.items()}
    for name in live.keys() & {"forward", "backward"}:
        hosts[name] += free_bytes + states_8bit_bytes
    if "clip" in live:
        homeless = int(HOMELESS_SHARE * (live["clip"] - live["save"])) + states_8bit_bytes
        hosts["clip"] = free_bytes + max(hosts["clip"], hosts["save"] + kept_bytes + homeless)
        hosts["optimizer"] = hosts["clip"] + live["optimizer"] - live["clip"]
        hosts["backward"] = max(hosts["backward"], hosts["clip"])
    return hosts


def _estimate_reading(shape: ModelShape, strategy: Strategy, stored_bytes: int) -> int:
    """Memory of weights that are not stored as they are trained; others stay in the file until they are used, which is
    before the first step where packed rows, or a loss head that works chunk by chunk, are tried."""
    weights = estimate_weight_bytes(shape, strategy)
    if strategy.method == "qlora":
        return weights + QUANTIZATION_BYTES * largest_linear(shape).weight_parameters
    if not _is_stored_in(weights, stored_bytes):
        return weights
    return weights + FIRST_USE_BYTES if strategy.packing or strategy.loss_head != "full" else 0


def _estimate_read_file(shape: ModelShape, strategy: Strategy, stored_bytes: int) -> int:
    """Pages of the weights' file: by the end of a conversion all of it was read. The kernel takes them back where
    memory is short."""
    converts = strategy.method == "qlora" or not _is_stored_in(estimate_weight_bytes(shape, strategy), stored_bytes)
    return stored_bytes if converts else 0


def _is_stored_in(weight_bytes: int, stored_bytes: int) -> bool:
    """Whether the files hold the weights in the dtype that they are wanted in: their headers are some thousandths."""
    return abs(weight_bytes - stored_bytes) < weight_bytes // 4
