"""Loss heads: hidden states to a loss. Each equals the model's own loss, logit scaling and soft-capping included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..recipes.errors import RunError

CHUNK_ROWS = 1024
"""Tokens whose logits exist at one time under the chunked head."""
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
) -> Tensor:
    """The summed cross-entropy of the trained tokens divided by `tokens`, a scalar.

    model:     what is trained, with its adapters
    base:      the transformers model inside it
    input_ids: [micro_batch, sequence], right-padded; causal attention keeps padding out of every real token
    labels:    [micro_batch, sequence], IGNORED where a token is not trained; shifted here
    tokens:    trained tokens of the whole optimizer step, so that losses of micro-batches add up to its mean
    position_ids: [micro_batch, sequence] of packed rows; None otherwise
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    if loss_head == "full":
        return model(**inputs, labels=labels, num_items_in_batch=tokens).loss  # type: ignore[no-any-return]
    hidden = base.base_model(**inputs).last_hidden_state[:, :-1]
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), labels[:, 1:].reshape(-1)
    head, transform = base.get_output_embeddings(), make_logit_transform(base.config.get_text_config())
    total: Tensor = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        total = total + checkpoint(_chunk_loss, head, transform, hidden[rows], targets[rows], use_reentrant=False)
    return total / tokens


def _chunk_loss(head: nn.Module, transform: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of hidden [rows, hidden] against targets [rows], in float32."""
    return F.cross_entropy(transform(head(hidden)).float(), targets, reduction="sum", ignore_index=IGNORED)


def make_logit_transform(config: Any) -> Callable[[Tensor], Tensor]:
    """What the model does to its logits after the LM head, as its modeling code in transformers does it.

    Gemma soft-caps (c * tanh(x / c)), Granite divides by logits_scaling (HyperCLOVA X multiplies), Cohere multiplies
    by logit_scale, Falcon-H1 by lm_head_multiplier.
    """
    cap = getattr(config, "final_logit_softcapping", None)
    factor = 1.0
    for key in ("logit_scale", "lm_head_multiplier"):
        value = getattr(config, key, None)
        if isinstance(value, int | float):
            factor *= value
    scaling = getattr(config, "logits_scaling", None)
    if isinstance(scaling, int | float):
        factor = factor * scaling if config.model_type.startswith("hyperclovax") else factor / scaling

    def transform(logits: Tensor) -> Tensor:
        if factor != 1.0:
            logits = logits * factor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform


def check_loss_head(model: nn.Module, base: Any, *, loss_head: str, device: torch.device) -> None:
    """Compare a loss head with the model's own loss on a few tokens; RunError where they differ.

    A guard for architectures whose logits get a treatment that make_logit_transform does not know.
    """
    if loss_head == "full":
        return
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
