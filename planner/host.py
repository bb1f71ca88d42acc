"""RAM of the process in each phase of a run: what psutil and the kernel's VmHWM show of it.

On a CPU that is everything, tensors too; beside a GPU the libraries, weights on their way, and offloaded activations.
"""

from __future__ import annotations

from .arithmetic import estimate_adapter_bytes, estimate_weight_bytes, largest_linear
from .estimate import CUDA_HOST_BYTES, estimate_beside_bytes, estimate_bitsandbytes_bytes, estimate_offloaded_bytes
from .files import WeightFiles
from .memory import STEP_PHASES, Memory
from .shape import ModelShape
from .strategy import Device, Strategy

CPU_FIRST_USE_BYTES = 160 * 2**20
"""Of a CPU process's own memory what comes with the first forward: kernels, and buffers of the matrix library."""
CPU_TRIMMED_BYTES = 30 * 2**20
"""What of it goes back to the system before a merge; 0 to 90 MiB in three runs of the embedded model."""
QUANTIZATION_BYTES = 4 * 4
"""Bytes an element that bitsandbytes takes on a CPU while it quantises a weight: four fp32 copies (0.50)."""
AFTER_LOADING = (*STEP_PHASES, "evaluate", "save")
AFTER_STEP = ("clip", "optimizer", "evaluate", "save")


def lay_host(
    memory: Memory,
    shape: ModelShape,
    strategy: Strategy,
    device: Device,
    *,
    sequence_length: int,
    weights: WeightFiles,
    stored_bytes: int | None,
) -> Memory:
    """The memory with the RAM of each phase.

    weights:      that the run writes
    stored_bytes: size of the model's weight files, None where they are not here: then 16 bits a parameter are taken
    """
    stored = 2 * shape.parameters if stored_bytes is None else stored_bytes
    if device.kind == "cuda":
        offloaded = estimate_offloaded_bytes(shape, strategy, device, sequence_length)
        hosts = _estimate_beside_gpu(weights, stored, offloaded)
    else:
        hosts = _estimate_on_cpu(memory, shape, strategy, device, weights, stored)
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


def _estimate_on_cpu(
    memory: Memory, shape: ModelShape, strategy: Strategy, device: Device, weights: WeightFiles, stored_bytes: int
) -> dict[str, int]:
    """The process's own memory and the live tensors; after a step also what the heap keeps of its activations."""
    own = estimate_beside_bytes(device, strategy)
    live = {one.name: one.peak_allocated_bytes for one in memory.phases}
    kept = memory.components.activations
    hosts = {name: own + live[name] + (kept if name in AFTER_STEP else 0) for name in AFTER_LOADING if name in live}
    adapters = estimate_adapter_bytes(shape, strategy)
    before_use = own - estimate_bitsandbytes_bytes(device, strategy) - CPU_FIRST_USE_BYTES
    hosts["load"] = before_use + adapters + _estimate_reading(shape, strategy, stored_bytes)
    if weights.merged_bytes:
        hosts["merge"] = own - CPU_TRIMMED_BYTES + adapters + _estimate_merging(weights.merged_bytes, stored_bytes)
    return hosts


def _estimate_reading(shape: ModelShape, strategy: Strategy, stored_bytes: int) -> int:
    """Weights that are stored as they are trained stay in the file until they are used; others are converted from it,
    and by the end all of the file was read."""
    weights = estimate_weight_bytes(shape, strategy)
    if strategy.method == "qlora":
        return stored_bytes + weights + QUANTIZATION_BYTES * largest_linear(shape).weight_parameters
    return 0 if _is_stored_in(weights, stored_bytes) else stored_bytes + weights


def _estimate_merging(merged_bytes: int, stored_bytes: int) -> int:
    """The base, converted from its file or part of it, and changed in place."""
    return merged_bytes if _is_stored_in(merged_bytes, stored_bytes) else merged_bytes + stored_bytes


def _is_stored_in(weight_bytes: int, stored_bytes: int) -> bool:
    """Whether the files hold the weights in the dtype that they are wanted in: their headers are some thousandths."""
    return abs(weight_bytes - stored_bytes) < weight_bytes // 4
