"""Small models with adapters that do something, and steps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_models import make_strategy
from torch import Tensor, nn

from fitune.planner.strategy import Strategy
from fitune.runtime.model.build import BuiltModel, build_model
from fitune.runtime.training.step import MicroBatch, make_scaler, training_step

CPU = torch.device("cpu")


def build_adapted(folder: Path, method: str = "lora", **changes: Any) -> BuiltModel:
    """The model in `folder`; adapters, if the method has any, are not zero as new ones are."""
    torch.manual_seed(0)
    built = build_model(folder, make_strategy(method, **changes), CPU)
    for name, parameter in built.model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.05)
    return built


def train_rows(built: BuiltModel, strategy: Strategy, steps: int, rows: Tensor) -> list[float]:
    """Losses of steps on two of the rows [rows, tokens] each, in turn."""
    optimizer = torch.optim.AdamW(built.trainable, lr=strategy.learning_rate)
    losses = []
    for step in range(steps):
        ids = rows[2 * step % len(rows) :][:2]
        result = training_step(
            built.model,
            built.base,
            [MicroBatch(input_ids=ids, labels=ids)],
            tokens=ids.numel() - len(ids),
            strategy=strategy,
            optimizer=optimizer,
            scaler=make_scaler(strategy, CPU),
            clip=lambda: nn.utils.clip_grad_norm_(built.trainable, 1.0),
        )
        losses.append(result.loss)
    return losses
