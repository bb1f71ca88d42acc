"""Loss heads: hidden states to a loss. Each equals the model's own loss, logit scaling and soft-capping included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ...recipes.errors import RunError
from ..model.attention import known_packing, list_document_inputs
from ..model.parts import find_decoder

CHUNK_ROWS = 1024
"""Tokens whose logits exist at one time under the chunked and the fused head."""
IGNORED = -100
"""The label of a token that is not trained."""


def compute_loss(
    model: nn.Module,
    base: Any,
    input_ids: Tensor,
    labels: Tensor,
    *,
    loss_head: str,
    tokens: int,
    position_ids: Tensor | None = None,
    document_starts: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """The summed cross-entropy of the trained tokens divided by `tokens`, a scalar.

    model:     what is trained, with its adapters
    base:      the transformers model inside it
    input_ids: [micro_batch, sequence], right-padded; causal attention keeps padding out of every real token
    labels:    [micro_batch, sequence], IGNORED where a token is not trained; shifted here
    tokens:    trained tokens of the whole optimizer step, so that losses of micro-batches add up to its mean
    position_ids: [micro_batch, sequence] of packed rows; None otherwise
    document_starts: [documents + 1], int32: where each begins in the rows laid end to end, and their end; or None
    compiled:  whether the fused head's work on logits is compiled
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    inputs |= list_document_inputs(position_ids, document_starts)
    with known_packing(position_ids is not None):
        if loss_head == "full":
            return model(**inputs, labels=labels, num_items_in_batch=tokens).loss  # type: ignore[no-any-return]
        hidden = find_decoder(base)(**inputs).last_hidden_state
    head, transform = base.get_output_embeddings(), make_logit_transform(base.config.get_text_config())
    if loss_head == "fused" and torch.is_grad_enabled():
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        fused: Tensor = _FusedLoss.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, 1), head.weight, head.bias, targets.flatten(), transform, compiled
        )
        return fused / tokens
    hidden = hidden[:, :-1]
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), labels[:, 1:].reshape(-1)
    total: Tensor = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        total = total + checkpoint(_chunk_loss, head, transform, hidden[rows], targets[rows], use_reentrant=False)
    return total / tokens


def _chunk_loss(head: nn.Module, transform: LogitTransform, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of hidden [rows, hidden] against targets [rows], in float32."""
    return F.cross_entropy(transform(head(hidden)).float(), targets, reduction="sum", ignore_index=IGNORED)


class _FusedLoss(torch.autograd.Function):
    """Summed cross-entropy of hidden [rows, hidden] whose forward already computes all gradients, chunk by chunk.

    No logits are kept, and none are computed twice. Gradients are those of the sum, so that in fp16 they are as far
    from underflow as the labels' own; backward multiplies them by what flows in. Without gradients the chunked head
    does the same work.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        compiled: bool,
    ) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            differentiate = _differentiate_compiled if compiled else _differentiate_chunk
            return _accumulate(ctx, hidden, weight, bias, targets, partial(differentiate, transform), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *flowing: Tensor) -> Any:
        # Scaled in place, since nothing else reads them; autograd refuses a second backward, which would scale twice.
        gradients = [None if one is None else one.mul_(flowing[0]) for one in ctx.saved_tensors]
        return (*gradients, None, None, None)


def _accumulate(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    differentiate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    dtype: torch.dtype,
) -> Tensor:
    """The loss; saves the gradients of hidden, weight and bias, computed in `dtype`."""
    needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    to_hidden = torch.empty_like(hidden) if needs_hidden else None
    to_weight = torch.zeros_like(weight) if needs_weight else None
    to_bias = torch.zeros_like(bias) if needs_bias and bias is not None else None
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    total: Tensor = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        part = hidden[rows].to(dtype)
        loss, gradient = differentiate(F.linear(part, weight, bias), targets[rows])
        total = total + loss
        trained = (targets[rows] != IGNORED).to(dtype).unsqueeze(1)
        if to_hidden is not None:
            torch.mul(gradient @ weight, trained, out=to_hidden[rows])
        if to_weight is not None:
            _add_product(to_weight, gradient.t(), part * trained)
        if to_bias is not None:
            to_bias += (trained.t() @ gradient).squeeze(0)
        del gradient  # it would be there beside the next chunk's logits
    ctx.save_for_backward(to_hidden, to_weight, to_bias)
    return total


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a matrix beside it where the dtypes are one."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _differentiate_chunk(transform: LogitTransform, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, its gradient by logits [rows, vocabulary] in their dtype): softmax - one-hot.

    Rows without a label count nothing in the loss; the caller leaves out their gradients, which are fewer by then.
    """
    trained = targets != IGNORED
    index = targets.clamp(min=0).unsqueeze(1)
    treated = transform(logits)
    log_probabilities = F.log_softmax(treated.float(), dim=-1)
    if torch.compiler.is_compiling():  # for a gather or a scatter, Inductor writes all of them in float32
        chosen = torch.arange(logits.shape[1], device=logits.device) == index
        losses = -log_probabilities.where(chosen, 0).sum(1)
        gradient = log_probabilities.exp() - chosen.float()
    else:
        losses = -log_probabilities.gather(1, index).squeeze(1)
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))
    return losses.mul(trained).sum(), transform.pull_back(gradient, treated).to(logits.dtype)


@cache
def _compile_chunk() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_differentiate_chunk)


def _differentiate_compiled(transform: LogitTransform, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same in few kernels, which write nothing in float32."""
    return _compile_chunk()(transform, logits, targets)


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a model does to its logits after the LM head: cap * tanh(factor * x / cap).

    factor: logits are multiplied with it
    cap:    of soft-capping, None without
    """

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def pull_back(self, gradient: Tensor, treated: Tensor) -> Tensor:
        """From the gradient by treated logits to that by the LM head's, in place: factor * (1 - (treated / cap)^2)."""
        if self.cap is not None:
            gradient *= 1 - (treated.float() / self.cap) ** 2
        if self.factor != 1.0:
            gradient *= self.factor
        return gradient


def make_logit_transform(config: Any) -> LogitTransform:
    """What the model does to its logits, as its modeling code in transformers does it.

    Gemma soft-caps, Granite divides by logits_scaling (HyperCLOVA X multiplies), Cohere multiplies by logit_scale,
    Falcon-H1 by lm_head_multiplier.
    """
    factor = 1.0
    for key in ("logit_scale", "lm_head_multiplier"):
        value = getattr(config, key, None)
        if isinstance(value, int | float):
            factor *= value
    scaling = getattr(config, "logits_scaling", None)
    if isinstance(scaling, int | float):
        factor = factor * scaling if config.model_type.startswith("hyperclovax") else factor / scaling
    return LogitTransform(factor=factor, cap=getattr(config, "final_logit_softcapping", None))


def check_loss_head(model: nn.Module, base: Any, *, loss_head: str, device: torch.device) -> None:
    """Compare a loss head with the model's own loss on a few tokens; RunError where they differ.

    A guard for architectures whose logits get a treatment that make_logit_transform does not know.
    """
    if loss_head == "full":
        return
    head = base.get_output_embeddings()
    if loss_head == "fused" and type(head) is not nn.Linear:
        raise RunError(
            f"the fused loss head multiplies with the LM head itself, and that of {type(base).__name__} is a "
            f'{type(head).__name__}: set train.loss_head = "chunked"'
        )
    vocabulary = base.config.get_text_config().vocab_size
    ids = torch.arange(3, 19, device=device).remainder(vocabulary).unsqueeze(0)
    training = model.training
    model.eval()
    with torch.no_grad():
        own, ours = (compute_loss(model, base, ids, ids, loss_head=head, tokens=15) for head in ("full", loss_head))
    model.train(training)
    if not torch.allclose(own.float(), ours.float(), rtol=0.02):
        raise RunError(
            f"the {loss_head} loss head gives {ours.item():.4f}, {type(base).__name__} itself {own.item():.4f}: "
            'this architecture treats its logits in a way fitune does not know; set train.loss_head = "full"'
        )
