"""Held-out loss, and one held-out question answered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...planner.run_time import ANSWER_TOKENS
from ...planner.strategy import Strategy
from ..data.batches import iterate_eval_batches
from ..data.encoding import Encoder
from ..model.build import BuiltModel
from .losses import compute_loss
from .step import autocast, uncast_adapter_inputs, uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.rows import Message
    from ..data.tokens import TokenizedRows


def evaluate(built: BuiltModel, rows: TokenizedRows, strategy: Strategy, device: torch.device) -> float:
    """Mean cross-entropy of the held-out rows' trained tokens; leaves the model in training mode."""
    batches = iterate_eval_batches(rows, micro_batch_size=strategy.micro_batch_size)
    moved = ((batch.input_ids.to(device), batch.labels.to(device)) for batch in batches)
    built.model.eval()
    total = sum_losses(built.model, built.base, moved, strategy, device, tokens=rows.trained_tokens)
    built.model.train()
    return float(total)


def sum_losses(
    model: nn.Module,
    base: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    strategy: Strategy,
    device: torch.device,
    *,
    tokens: int,
) -> Tensor:
    """The losses of batches of (input_ids, labels), [rows, sequence] each, on the host, added up and divided by
    `tokens`."""
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad(), autocast(strategy, device), uncast_adapter_inputs(model), uncompiled(strategy):
        for input_ids, labels in batches:
            loss = compute_loss(model, base, input_ids, labels, loss_head=strategy.loss_head, tokens=tokens)
            total += loss.double().cpu()
    return total


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    *,
    strategy: Strategy,
    device: torch.device,
    stop_token_ids: tuple[int, ...],
) -> str:
    """The model's greedy answer to a conversation that ends with a question."""
    ids = torch.tensor([Encoder(tokenizer).encode_prompt(messages)], device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast(strategy, device), uncompiled(strategy):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(stop_token_ids),
            pad_token_id=stop_token_ids[0],
        )
    model.train(was_training)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()
