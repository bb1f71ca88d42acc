"""Memory of a run by phase and component, from closed forms: the planner's quick estimate.

A peak is a maximum over instants, not a sum of maxima: each instant below is one moment of the run with what is live
in it, a phase's peak is its highest instant, and the run's is the highest of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import activations as act
from .arithmetic import (
    NF4_BLOCK,
    ROUNDED_ELEMENTS,
    ROUNDING_BYTES,
    count_trainable,
    estimate_adapter_bytes,
    estimate_gradient_bytes,
    estimate_optimizer_bytes,
    estimate_weight_bytes,
    largest_linear,
    list_trainable_tensors,
    trainable_dtype,
)
from .files import RunFiles, WeightFiles, estimate_beside_weights
from .memory import Components, Memory, Phase
from .process import estimate_heap_bytes, estimate_used_bytes
from .shape import ModelShape
from .strategy import DTYPE_BYTES, Device, Strategy

MiB = 2**20

CUDA_CONTEXT_BYTES = 767 * MiB
"""Device memory beside the allocator's: context, workspaces, kernels. 751 to 767 MiB measured on one H100 stack."""
CUDA_WORKSPACE_BYTES = 32 * MiB
"""cuBLAS's workspace on Hopper, held by the allocator; other cards take 8 MiB."""
CUDA_HOST_BYTES = 4 * 2**30
"""RAM of a process with a CUDA context: libraries, pinned buffers and the page tables of the driver."""
FRAGMENTATION = 0.08
"""Share by which the caching allocator's reserved memory exceeds the allocated peak: the median of 191 measured steps,
whose range is 0.005 to 0.67. The closed forms cannot tell one from another; the margin covers the rest.
With expandable segments the same is taken: 0.27 in the one step measured, 0.006 to 0.28 with a median of 0.065 where
the allocator's model replays 95."""
MARGIN = {"cuda": 0.15, "cpu": 0.15}
"""Share of the device peak that is added to a closed-form estimate before it is compared with the budget."""
MARGIN_BYTES = {"cuda": 512 * MiB, "cpu": 0}
"""Added beside the share: a small run's segments are few and coarse. With both, none of 95 steps measured on one H100
(tests/data) needs more than is required here; at the median 17 % are to spare."""
GUESS_FACTOR = 2
"""So many times as wide is the margin for a family without closed forms of its own. A guess, too: none was measured."""
COMPILED_MARGIN = 0.05
"""Share that is added to closed forms for compiled layers: Inductor's fusions are beyond them. A guess; the eight
measured pairs are met without it."""
CPU_UPDATE_BYTES = {"adamw_8bit": 20, "paged_adamw_8bit": 20, "adamw_32bit": 12, "paged_adamw": 12}
"""Of an element, that bitsandbytes' optimizers take on a CPU in fp32 while they update: the gradient, its divisor and a
step towards that; with 8 bits the two states, too (backends/cpu/ops.py, 0.50). A tensor at a time, or ROUNDED_ELEMENTS
where they are rounded stochastically, with the weight and the gradient in fp32 beside them."""


@dataclass(frozen=True, kw_only=True)
class Instant:
    """One moment of a run: the phase it belongs to and what is live, in bytes."""

    phase: str
    live: Components


def estimate_memory(
    shape: ModelShape, strategy: Strategy, device: Device, *, sequence_length: int, merge: bool
) -> Memory:
    """The memory of a run of `strategy` on rows of `sequence_length` tokens.

    merge: whether the adapters are merged into a full model at the end
    """
    instants = list(_list_instants(shape, strategy, device, sequence_length, merge=merge))
    phases = {
        name: max((i for i in instants if i.phase == name), key=lambda i: i.live.total) for name in _order(instants)
    }
    peak = max(phases.values(), key=lambda instant: instant.live.total)
    allocated = peak.live.total
    managed = estimate_optimizer_bytes(shape, strategy)[1] if device.kind == "cuda" else 0
    reserved = int(allocated * (1 + FRAGMENTATION)) if device.kind == "cuda" else None
    if reserved is not None:
        device_bytes = reserved + managed + estimate_context_bytes(device)
    else:
        _, free = estimate_heap_bytes(shape, strategy, sequence_length=sequence_length)
        live = max(one.live.total + (free if name in ("forward", "backward") else 0) for name, one in phases.items())
        device_bytes = live + estimate_used_bytes(shape, strategy, device, widths=1)
    margin_share, margin_bytes = find_margin(shape, strategy, device)
    files = estimate_disk_bytes(shape, strategy, merge=merge)
    return Memory(
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        managed_bytes=managed,
        peak_device_bytes=device_bytes,
        required_bytes=int(device_bytes * (1 + margin_share)) + margin_bytes,
        budget_bytes=device.budget_bytes,
        host_bytes=_estimate_host_bytes(shape, strategy, device, device_bytes, sequence_length, merge=merge),
        disk_bytes=files,
        peak_phase=peak.phase,
        components=peak.live,
        phases=tuple(Phase(name=name, peak_allocated_bytes=one.live.total) for name, one in phases.items()),
    )


def find_margin(shape: ModelShape, strategy: Strategy, device: Device) -> tuple[float, int]:
    """The share of the device peak, and the bytes, that are added to a closed-form estimate."""
    factor = GUESS_FACTOR if shape.is_guess else 1
    compiled = COMPILED_MARGIN if strategy.compile else 0.0
    return factor * MARGIN[device.kind] + compiled, factor * MARGIN_BYTES[device.kind]


def estimate_context_bytes(device: Device) -> int:
    """Memory of a CUDA device beside the allocator's: as calibrated, else the general constant."""
    return CUDA_CONTEXT_BYTES if device.beside is None else device.beside.bytes


def _order(instants: list[Instant]) -> list[str]:
    return list(dict.fromkeys(instant.phase for instant in instants))


def _list_instants(
    shape: ModelShape, strategy: Strategy, device: Device, sequence_length: int, *, merge: bool
) -> Iterator[Instant]:
    """The moments that can be the peak, in the order of a run; the optimizer's states exist from the first step on."""
    weights, adapters = estimate_weight_bytes(shape, strategy), estimate_adapter_bytes(shape, strategy)
    gradients = estimate_gradient_bytes(shape, strategy)
    states, managed = estimate_optimizer_bytes(shape, strategy)
    if device.kind == "cpu":
        states += managed
    workspace = CUDA_WORKSPACE_BYTES if device.kind == "cuda" else 0

    def at(phase: str, **live: int) -> Instant:
        temporary = live.pop("temporary", 0) + workspace
        return Instant(phase=phase, live=Components(weights=weights, adapters=adapters, temporary=temporary, **live))

    yield at("load", temporary=_load_temporary(shape, strategy))
    step = act.StepShape(shape, strategy, sequence_length)
    update = _optimizer_temporary(shape, strategy, device)
    for phase, live in _list_step_instants(step, gradients, update=update, offloads=_offloads(strategy, device)):
        yield at(phase, optimizer=states, **live)
    if not strategy.optimizer_in_backward:
        yield at("clip", optimizer=states, gradients=gradients)
        yield at("optimizer", optimizer=states, gradients=gradients, temporary=update)
    for live in _list_evaluation_instants(step):
        yield at("evaluate", optimizer=states, **live)
    yield at("save", optimizer=states)
    # The trained model is gone by then, and the base to merge into is in RAM.
    merged = _estimate_merged_bytes(shape, strategy) if merge and device.kind == "cpu" else 0
    yield Instant(phase="merge", live=Components(weights=merged, adapters=adapters if merged else 0))


def _list_evaluation_instants(step: act.StepShape) -> Iterator[dict[str, int]]:
    """A forward without gradients, in its widest layer and at the loss head. Nothing is kept, but for the copies in
    the compute dtype that autocast caches of trainable weights."""
    cached = act.estimate_cast_bytes(step) if step.trains_base else 0
    for block in step.shape.blocks:
        yield {"temporary": cached + 2 * act.estimate_backward_temporary(step, block)}
    yield {"temporary": cached + act.estimate_final_bytes(step), "loss_head": act.estimate_head_bytes(step)[0]}


def _offloads(strategy: Strategy, device: Device) -> bool:
    """Whether activations leave the device; a CPU's memory is the host's already."""
    return strategy.activation_offload and device.kind == "cuda"


def _list_step_instants(
    step: act.StepShape, gradients: int, *, update: int, offloads: bool
) -> Iterator[tuple[str, dict[str, int]]]:
    """Forward and backward of a micro-batch. Gradients grow while activations shrink, both by layers, so the highest
    moment is at the loss head, in the last layer or in the first one. With accumulation the gradients of the
    micro-batches before are live all along. With offload one layer's activations are on the device at a time.

    update: what the optimizer takes for a moment
    """
    shape, strategy = step.shape, step.strategy
    final, checkpoint = act.estimate_final_bytes(step), act.estimate_checkpoint_bytes(step)
    saved = act.estimate_saved_attention_bytes(step)
    kept = final if offloads else act.estimate_kept_bytes(step)
    # Autocast's copies of trained weights live until the forward ends; without checkpointing backward keeps them too.
    checkpointed = step.checkpointed_layers
    cast_layers = (shape.layers if offloads else checkpointed) if step.trains_base else 0
    cached = act.estimate_cast_bytes(step) * cast_layers // shape.layers
    head_forward, head_backward = act.estimate_head_bytes(step)
    head_gradient = step.weight_bytes * shape.head.weight_parameters if step.trains_base else 0
    before = gradients if strategy.gradient_accumulation_steps > 1 else 0
    at_head = max(before, head_gradient)

    def gradients_after(layers: int) -> int:
        """What is left of them when so many layers, the last ones first, have theirs."""
        if strategy.optimizer_in_backward:
            return head_gradient if shape.tied else 0
        return at_head + (gradients - at_head) * layers // shape.layers

    yield "forward", {"gradients": before, "activations": kept + cached, "loss_head": head_forward}
    yield "backward", {"gradients": at_head, "activations": kept, "loss_head": head_backward}
    for block in shape.blocks:
        size, flowing = act.estimate_layer_bytes(step, block), act.estimate_backward_temporary(step, block)
        first = checkpoint + size if checkpointed else size
        if offloads:
            yield "forward", {"gradients": before, "activations": cached + first}
        if checkpointed < shape.layers:
            own = size if offloads else 0
            left = gradients_after(0)
            yield "backward", {"gradients": left, "activations": kept - final + own, "temporary": flowing}
        if checkpointed:
            extra, recast = act.estimate_recast_bytes(step, block)
            own = extra + (first if offloads else checkpointed * (checkpoint + saved) - saved + size)
            left = gradients_after(shape.layers - checkpointed)
            yield "backward", {"gradients": left, "activations": own, "temporary": max(flowing, recast)}
        yield "backward", {"gradients": gradients_after(shape.layers), "activations": first, "temporary": flowing}
    if step.trains_base and shape.tied:
        # The embedding's own gradient is as large as its weight, and is added to the head's at the very end.
        dense = step.weight_bytes * shape.embedding_parameters
        left = gradients_after(shape.layers)
        yield "backward", {"gradients": left, "activations": checkpoint, "temporary": dense}
    if strategy.optimizer_in_backward:
        for live in _list_update_instants(step, kept - final, update):
            yield "backward", live


def _list_update_instants(step: act.StepShape, kept: int, update: int) -> Iterator[dict[str, int]]:
    """Updates in backward: of the head, of the last layer, whose activations are gone by then, and of the embedding.

    kept: activations when the last layer begins; the gradient of the residual stream is beside the rest
    update: what the optimizer takes for a moment
    """
    shape, temporary = step.shape, update + act.estimate_checkpoint_bytes(step)
    head = step.weight_bytes * shape.head.weight_parameters
    yield {"gradients": head, "activations": kept, "temporary": temporary}
    held = head if shape.tied else 0
    for block in shape.blocks:
        checkpointed = step.checkpointed_layers == shape.layers
        own = act.estimate_checkpoint_bytes(step) if checkpointed else act.estimate_layer_bytes(step, block)
        gradients = held + step.weight_bytes * block.parameters
        yield {"gradients": gradients, "activations": max(kept - own, 0), "temporary": temporary}
    yield {"gradients": step.weight_bytes * shape.embedding_parameters, "temporary": temporary}


def _load_temporary(shape: ModelShape, strategy: Strategy) -> int:
    """What reading weights takes for a moment: nothing for one that is read as it is.

    A mixture's experts lie one by one in the file: a layer's gate and up projections are stacked, then joined, and are
    there twice. For qlora also the weight that is being quantised, in full, with fp32 constants where those are
    quantised again. transformers 5.23 quantises one weight after the other (convert_and_load_state_dict_in_model).
    """
    width = DTYPE_BYTES[strategy.weights_dtype]
    experts = max(block.expert_parameters for block in shape.blocks)
    joined = width * experts * 2 // 3 if shape.gated_mlp else 0
    if strategy.float8:  # all of it in 16 bits, then one weight after the other by way of two fp32 copies
        return (width - 1) * shape.quantized_parameters + 2 * 4 * largest_linear(shape).weight_parameters
    if strategy.method != "qlora":
        return joined
    elements = largest_linear(shape).weight_parameters
    constants = 2 * 4 * (elements // NF4_BLOCK) if strategy.double_quantization else 0
    return max(joined, width * elements + constants)


def _optimizer_temporary(shape: ModelShape, strategy: Strategy, device: Device) -> int:
    """Fused AdamW and bitsandbytes update in place, but for the latter on a CPU. Stochastic rounding works on
    ROUNDED_ELEMENTS at a time, but in AdamW's compiled update; Adafactor needs the update and its square of the largest
    tensor in fp32, and two fp32 copies where it rounds stochastically.
    """
    largest = max(elements for elements, _ in list_trainable_tensors(shape, strategy))
    is_stochastic, part = strategy.rounding == "stochastic", min(ROUNDED_ELEMENTS[device.kind], largest)
    if strategy.optimizer == "adafactor":
        return (16 if is_stochastic else 8) * largest
    if device.kind == "cpu" and strategy.optimizer in CPU_UPDATE_BYTES:
        each = CPU_UPDATE_BYTES[strategy.optimizer]
        return (each + 8) * part if is_stochastic else each * largest
    if not is_stochastic or strategy.compiles_update:
        return 0
    return ROUNDING_BYTES * part


def _estimate_merged_bytes(shape: ModelShape, strategy: Strategy) -> int:
    """The base that adapters are merged into: bf16 for qlora, else the weights' dtype; 0 for full."""
    if strategy.method == "full":
        return 0
    return shape.parameters * (2 if strategy.method == "qlora" else DTYPE_BYTES[strategy.weights_dtype])


def estimate_weight_files(shape: ModelShape, strategy: Strategy, *, merge: bool) -> WeightFiles:
    """The weights that a run writes: the model or the adapter, and the merged model if asked for; without headers.

    A checkpoint holds the optimizer's states too, those in managed memory as well.
    """
    trained_bytes = count_trainable(shape, strategy) * DTYPE_BYTES[trainable_dtype(strategy)]
    merged_bytes = _estimate_merged_bytes(shape, strategy) if merge else 0
    states_bytes = sum(estimate_optimizer_bytes(shape, strategy))
    return WeightFiles(
        trained_bytes=trained_bytes, merged_bytes=merged_bytes, checkpoint_bytes=trained_bytes + states_bytes
    )


def estimate_disk_bytes(shape: ModelShape, strategy: Strategy, *, merge: bool) -> int:
    """Files of a run without checkpoints."""
    weights = estimate_weight_files(shape, strategy, merge=merge)
    return RunFiles(weights=weights, beside_bytes=estimate_beside_weights(shape.vocab_size, None)).total_bytes


def _estimate_host_bytes(
    shape: ModelShape, strategy: Strategy, device: Device, device_bytes: int, sequence_length: int, *, merge: bool
) -> int:
    """RAM: on a CPU the process itself; beside a GPU its libraries, offloaded activations, and the base that adapters
    are merged into."""
    if device.kind == "cpu":
        return device_bytes
    weights = estimate_weight_files(shape, strategy, merge=merge)
    offloaded = estimate_offloaded_bytes(shape, strategy, device, sequence_length)
    return CUDA_HOST_BYTES + max(weights.trained_bytes, weights.merged_bytes) + offloaded


def estimate_offloaded_bytes(shape: ModelShape, strategy: Strategy, device: Device, sequence_length: int) -> int:
    """Pinned RAM for offloaded activations, which stays with the process when they are gone."""
    if not _offloads(strategy, device):
        return 0
    return act.estimate_offload_bytes(act.StepShape(shape, strategy, sequence_length))
