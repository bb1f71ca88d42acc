"""The training step, and nothing else: what the planner's figures are about.

forward under autocast -> loss -> backward, for each micro-batch; then clip, optimizer, gradients set to None. With the
optimizer in backward, that is all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...planner.strategy import Strategy
from .in_backward import UpdatesInBackward
from .losses import compute_loss
from .offload import offload_activations
from .optimizers import step_if_finite

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows of one forward.

    input_ids:    [micro_batch, sequence], int64, right-padded
    labels:       [micro_batch, sequence], int64, -100 where a token is not trained
    position_ids: [micro_batch, sequence], int64, from 0 in each packed document; None where nothing is packed
    document_starts: [documents + 1], int32, of the rows laid end to end, the end repeated; None where nothing is packed
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    document_starts: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same rows on `device`; beside a GPU by way of pinned memory, without waiting for the copy."""

        def move(tensor: Tensor) -> Tensor:
            if device.type != "cuda":
                return tensor.to(device)
            return tensor.pin_memory().to(device, non_blocking=True)

        return MicroBatch(
            input_ids=move(self.input_ids),
            labels=move(self.labels),
            position_ids=None if self.position_ids is None else move(self.position_ids),
            document_starts=None if self.document_starts is None else move(self.document_starts),
        )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did.

    loss:          mean cross-entropy of its trained tokens, before the update
    gradient_norm: before clipping
    applied:       False where fp16 overflowed and the scaler skipped the update
    """

    loss: float
    gradient_norm: float
    applied: bool


@contextlib.contextmanager
def uncast_adapter_inputs(model: nn.Module) -> Iterator[None]:
    """Keep peft from copying every adapter's input to the adapter's dtype: 20 to 24 % of the peak.

    Autocast casts where it computes anyway. https://github.com/AgileRL/AgileRL/pull/623
    """
    from peft import PeftModel
    from peft.helpers import disable_input_dtype_casting

    with disable_input_dtype_casting(model, active=isinstance(model, PeftModel)):
        yield


@contextlib.contextmanager
def recomputation(model: nn.Module, strategy: Strategy) -> Iterator[None]:
    """For backward: checkpointed layers are computed again as they were in the forward, without copies of inputs.

    Up to a tenth of the peak less than with them, which the measured steps had.
    """
    with contextlib.nullcontext() if strategy.recasts_adapter_inputs else uncast_adapter_inputs(model):
        yield


@contextlib.contextmanager
def autocast(strategy: Strategy, device: torch.device) -> Iterator[None]:
    """Autocast to the strategy's compute dtype; nothing where that is fp32."""
    enabled = strategy.compute_dtype != "fp32"
    with torch.autocast(device.type, TORCH_DTYPES[strategy.compute_dtype] if enabled else None, enabled=enabled):
        yield


@contextlib.contextmanager
def uncompiled(strategy: Strategy) -> Iterator[None]:
    """Inside, compiled layers run eagerly: for what runs seldom, and with shapes of its own."""
    with torch.compiler.set_stance("force_eager") if strategy.compile else contextlib.nullcontext():
        yield


def make_scaler(strategy: Strategy, device: torch.device) -> torch.amp.GradScaler:
    """A gradient scaler, enabled for fp16 only."""
    return torch.amp.GradScaler(device.type, enabled=strategy.compute_dtype == "fp16")


def training_step(
    model: nn.Module,
    base: Any,
    micro_batches: Sequence[MicroBatch],
    *,
    tokens: int,
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    clip: Callable[[], Tensor | float],
    updates: UpdatesInBackward | None = None,
    enter_phase: Callable[[str], None] = lambda _: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> StepResult:
    """One optimizer step over all its micro-batches. The host waits for the device once, at the end.

    tokens: trained tokens of all micro-batches together
    clip:   scales the gradients to the recipe's norm and returns the norm before
    updates: where the strategy has the optimizer in backward; nothing is clipped then
    meanwhile: host work to do while the device computes
    """
    device = micro_batches[0].input_ids.device
    loss_sum: Tensor | None = None
    for batch in micro_batches:
        enter_phase("forward")
        with autocast(strategy, device), uncast_adapter_inputs(model), offload_activations(base, strategy, device):
            loss = compute_loss(
                model,
                base,
                batch.input_ids,
                batch.labels,
                loss_head=strategy.loss_head,
                tokens=tokens,
                position_ids=batch.position_ids,
                document_starts=batch.document_starts if strategy.attention == "varlen" else None,
                compiled=strategy.compile,
            )
        enter_phase("backward")
        with recomputation(model, strategy):
            scaler.scale(loss).backward()
        loss_sum = loss.detach() if loss_sum is None else loss_sum + loss.detach()
        del loss
    assert loss_sum is not None, "a step has at least one micro-batch"
    norm = _update(optimizer, scaler, strategy, clip, enter_phase, device) if updates is None else updates.finish()
    figures = torch.stack([loss_sum.float(), norm])
    meanwhile()
    loss_value, norm_value = figures.tolist()
    return StepResult(loss=loss_value, gradient_norm=norm_value, applied=math.isfinite(norm_value))


def _update(
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    strategy: Strategy,
    clip: Callable[[], Tensor | float],
    enter_phase: Callable[[str], None],
    device: torch.device,
) -> Tensor:
    """Clip and update once all gradients are there; returns their norm [], in float32."""
    enter_phase("clip")
    scaler.unscale_(optimizer)
    norm = torch.as_tensor(clip(), dtype=torch.float32, device=device)
    enter_phase("optimizer")
    if strategy.compute_dtype == "fp16":
        scaler.step(optimizer)
        scaler.update()
    else:
        step_if_finite(optimizer, norm)
    optimizer.zero_grad(set_to_none=True)
    return norm
