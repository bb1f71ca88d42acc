"""The lecture's memory arithmetic: full fine-tuning, LoRA and QLoRA of one size, and checkpoints every sqrt(n) layers.

Full fine-tuning needs only a count of parameters. What LoRA and QLoRA keep depends on the layers, so it is computed for
the catalog's model that is nearest in size, with the planner's own closed forms.
"""

from __future__ import annotations

from bisect import bisect_right
from math import ceil, sqrt
from typing import Literal

from pydantic import Field

from ..activations import StepShape, estimate_checkpoint_bytes, estimate_layer_bytes
from ..arithmetic import (
    count_trainable,
    estimate_adapter_bytes,
    estimate_gradient_bytes,
    estimate_optimizer_bytes,
    estimate_state_bytes,
    estimate_weight_bytes,
)
from ..catalog import CatalogModel, list_models
from ..estimate import estimate_memory
from ..memory import Memory
from ..shape import ModelShape, make_shape
from ..strategy import DTYPE_BYTES, Device, Dtype, Optimizer, Strategy, Value

LORA_BYTES_PER_PARAMETER = 4
"""The lecture's `10B => ~40GB` for LoRA."""
RANK = 16
SEQUENCE_LENGTHS = (512, 1024, 2048, 4096)
NEAR = 1.25
"""A reference architecture is near a size if neither is more than 1.25 times the other."""
FULL_RECIPES: tuple[tuple[Dtype, Optimizer], ...] = (
    ("bf16", "adamw_32bit"),
    ("bf16", "adamw"),
    ("bf16", "adamw_8bit"),
    ("fp32", "adamw"),
)
"""Dtype of weights and gradients, and optimizer; the lecture's first."""

AdapterMethod = Literal["lora", "qlora"]


class FullCost(Value):
    """What full fine-tuning holds before any activation, by a count of parameters alone; bytes.

    weights_dtype:   of weights and gradients
    optimizer:       one of the recipe's names
    total_bytes:     weights + gradients + optimizer states
    """

    weights_dtype: Dtype
    optimizer: Optimizer
    weights_bytes: int = Field(ge=1)
    gradient_bytes: int = Field(ge=1)
    optimizer_bytes: int = Field(ge=1)
    total_bytes: int = Field(ge=1)


class Reference(Value):
    """The real architecture that stands for a size.

    model:      its name in the catalog
    parameters: its exact count
    near:       whether it is within a factor of 1.25 of the size asked for
    """

    model: str
    parameters: int = Field(ge=1)
    near: bool


class LargestBatch(Value):
    """The most rows of one length whose step stays within the budget.

    sequence_length:       tokens in a row
    gradient_checkpointing: whether each layer keeps its input only
    micro_batch_size:      rows, 0 where not even one fits
    peak_bytes:            the step's highest sum of live tensors at that batch, at one row where none fits
    activation_bytes:      of it, what is kept for backward
    loss_head_bytes:       of it, logits with their fp32 copies and gradients
    temporary_bytes:       of it, short-lived buffers
    """

    sequence_length: int = Field(ge=1)
    gradient_checkpointing: bool
    micro_batch_size: int = Field(ge=0)
    peak_bytes: int = Field(ge=1)
    activation_bytes: int = Field(ge=0)
    loss_head_bytes: int = Field(ge=0)
    temporary_bytes: int = Field(ge=0)


class AdapterAccount(Value):
    """What LoRA or QLoRA holds on the reference architecture, and what the rest of the budget could be; bytes.

    rank:            of adapters on every linear layer but the LM head, in bf16 with bf16 gradients
    trainable:       adapter parameters
    optimizer_bytes: two fp32 moments
    fixed_bytes:     weights + adapters + gradients + optimizer states
    budget_bytes:    the lecture's 4 bytes a parameter
    rest_bytes:      budget - fixed: what would be activations, logits and buffers; negative where fixed does not fit
    batches:         how many rows of which length the rest is
    """

    method: AdapterMethod
    rank: int = Field(ge=1)
    trainable: int = Field(ge=1)
    weights_bytes: int = Field(ge=1)
    adapter_bytes: int = Field(ge=1)
    gradient_bytes: int = Field(ge=1)
    optimizer_bytes: int = Field(ge=1)
    fixed_bytes: int = Field(ge=1)
    budget_bytes: int = Field(ge=1)
    rest_bytes: int
    batches: tuple[LargestBatch, ...]


class Checkpoints(Value):
    """The lecture's rule, a checkpoint every sqrt(n) layers, beside none and one a layer; one row of the length, bytes.

    layers:            n
    segment_layers:    round(sqrt(n)), the layers between two checkpoints
    checkpoints:       ceil(n / segment)
    sequence_length:   tokens of the one row
    layer_bytes:       what a layer keeps for backward
    checkpoint_bytes:  what a checkpoint keeps: a layer's input
    none_bytes:        n * layer
    sqrt_bytes:        checkpoints * checkpoint + segment * layer: one segment is recomputed at a time
    every_bytes:       n * checkpoint + layer
    """

    layers: int = Field(ge=1)
    segment_layers: int = Field(ge=1)
    checkpoints: int = Field(ge=1)
    sequence_length: int = Field(ge=1)
    layer_bytes: int = Field(ge=1)
    checkpoint_bytes: int = Field(ge=1)
    none_bytes: int = Field(ge=1)
    sqrt_bytes: int = Field(ge=1)
    every_bytes: int = Field(ge=1)


def estimate_full_cost(parameters: int, weights_dtype: Dtype, optimizer: Optimizer) -> FullCost:
    """parameters * (weight + gradient) + optimizer states: 2 + 2 + 8 = 12 bytes a parameter for the lecture."""
    weights = gradients = parameters * DTYPE_BYTES[weights_dtype]
    states = estimate_state_bytes(parameters, optimizer, weights_dtype)
    return FullCost(
        weights_dtype=weights_dtype,
        optimizer=optimizer,
        weights_bytes=weights,
        gradient_bytes=gradients,
        optimizer_bytes=states,
        total_bytes=weights + gradients + states,
    )


def estimate_full_costs(parameters: int) -> tuple[FullCost, ...]:
    """The lecture's full fine-tuning first, then what other weights and optimizers make of it."""
    return tuple(estimate_full_cost(parameters, *recipe) for recipe in FULL_RECIPES)


def find_nearest_model(parameters: int) -> CatalogModel:
    """The dense model of the catalog whose count is nearest; of equals one that was not tuned to chat."""
    by_distance = sorted(list_models(), key=lambda model: (abs(model.parameters - parameters), model.instruct))
    return next(model for model in by_distance if make_shape(model.config).experts is None)


def make_reference(model: CatalogModel, parameters: int) -> Reference:
    near = max(model.parameters, parameters) <= NEAR * min(model.parameters, parameters)
    return Reference(model=model.name, parameters=model.parameters, near=near)


def make_account(shape: ModelShape, method: AdapterMethod, parameters: int) -> AdapterAccount:
    """Account for `parameters` * 4 bytes, the lecture's ~40 GB at 10B, on an architecture of about that size."""
    strategy = _make_strategy(method)
    weights, adapters = estimate_weight_bytes(shape, strategy), estimate_adapter_bytes(shape, strategy)
    gradients, states = estimate_gradient_bytes(shape, strategy), sum(estimate_optimizer_bytes(shape, strategy))
    fixed, budget = weights + adapters + gradients + states, LORA_BYTES_PER_PARAMETER * parameters
    return AdapterAccount(
        method=method,
        rank=RANK,
        trainable=count_trainable(shape, strategy),
        weights_bytes=weights,
        adapter_bytes=adapters,
        gradient_bytes=gradients,
        optimizer_bytes=states,
        fixed_bytes=fixed,
        budget_bytes=budget,
        rest_bytes=budget - fixed,
        batches=tuple(
            find_largest_batch(shape, method, length, checkpointing, budget)
            for length in list_lengths(shape)
            for checkpointing in (False, True)
        ),
    )


def list_lengths(shape: ModelShape) -> tuple[int, ...]:
    """The row lengths that the model can take, the shortest in any case."""
    longest = max(shape.max_positions or SEQUENCE_LENGTHS[-1], SEQUENCE_LENGTHS[0])
    return tuple(length for length in SEQUENCE_LENGTHS if length <= longest)


def find_largest_batch(
    shape: ModelShape, method: AdapterMethod, sequence_length: int, checkpointing: bool, budget_bytes: int
) -> LargestBatch:
    """The planner's estimate of a step's peak grows with its rows; a row keeps at least a byte a token."""

    def estimate(rows: int) -> Memory:
        return _estimate_step(shape, method, rows, sequence_length, checkpointing, budget_bytes)

    candidates = range(1, budget_bytes // sequence_length + 2)
    rows = bisect_right(candidates, budget_bytes, key=lambda rows: estimate(rows).peak_allocated_bytes)
    memory = estimate(max(rows, 1))
    return LargestBatch(
        sequence_length=sequence_length,
        gradient_checkpointing=checkpointing,
        micro_batch_size=rows,
        peak_bytes=memory.peak_allocated_bytes,
        activation_bytes=memory.components.activations,
        loss_head_bytes=memory.components.loss_head,
        temporary_bytes=memory.components.temporary,
    )


def make_checkpoints(shape: ModelShape, sequence_length: int) -> Checkpoints:
    """The live set of each rule, for LoRA with a batch of one row."""
    step = StepShape(shape, _make_strategy("lora"), sequence_length)
    sizes = [(block.repeats, estimate_layer_bytes(step, block)) for block in shape.blocks]
    layer, checkpoint = max(size for _, size in sizes), estimate_checkpoint_bytes(step)
    segment = max(1, round(sqrt(shape.layers)))
    checkpoints = ceil(shape.layers / segment)
    return Checkpoints(
        layers=shape.layers,
        segment_layers=segment,
        checkpoints=checkpoints,
        sequence_length=sequence_length,
        layer_bytes=layer,
        checkpoint_bytes=checkpoint,
        none_bytes=sum(repeats * size for repeats, size in sizes),
        sqrt_bytes=checkpoints * checkpoint + segment * layer,
        every_bytes=shape.layers * checkpoint + layer,
    )


def _estimate_step(
    shape: ModelShape, method: AdapterMethod, rows: int, sequence_length: int, checkpointing: bool, budget_bytes: int
) -> Memory:
    strategy = _make_strategy(method).model_copy(
        update={"micro_batch_size": rows, "checkpointed_layers": shape.layers if checkpointing else 0}
    )
    card = Device(
        name="the lecture's budget", kind="cuda", memory_bytes=budget_bytes, budget_bytes=budget_bytes, bf16=True
    )
    return estimate_memory(shape, strategy, card, sequence_length=sequence_length, merge=False)


def _make_strategy(method: AdapterMethod) -> Strategy:
    """The lecture's: 16-bit adapters, fp32 optimizer states, the plain loss."""
    return Strategy(
        method=method,
        weights_dtype="bf16",
        compute_dtype="bf16",
        adapter_dtype="bf16",
        adapter_rank=RANK,
        adapter_targets="all-linear",
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        checkpointed_layers=0,
        loss_head="full",
        optimizer="adamw_32bit",
        learning_rate=2e-4,
    )
