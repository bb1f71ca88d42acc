"""The model of a run, built as its plan says and checked against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch

from ...planner.plan import Plan
from ...recipes.errors import RunError
from ..data.packing import check_packing
from ..planning import Job
from ..training.losses import check_loss_head
from ..training.step import autocast, uncompiled
from .build import BuiltModel, build_model
from .save import name_base_model


def build_for_run(job: Job, plan: Plan, base_folder: Path, device: torch.device) -> BuiltModel:
    """Weights and adapters; RunError where they are not those that the plan is for."""
    method, strategy = job.recipe_file.recipe.method, plan.strategy
    built = build_model(
        base_folder,
        strategy,
        device,
        alpha=method.alpha,
        adapter=None if method.adapter is None else job.recipe_file.resolve(method.adapter),
        trust_remote_code=job.recipe_file.recipe.model.trust_remote_code,
    )
    name_base_model(built.model, job.source.hub_id or str(base_folder.resolve()))
    if method.adapter is not None:
        _check_adapter(built, method.adapter, plan)
    with autocast(strategy, device), uncompiled(strategy):
        check_loss_head(built.model, built.base, loss_head=strategy.loss_head, device=device)
        if strategy.packing:
            check_packing(built.model, built.base, device=device)
    return built


def _check_adapter(built: BuiltModel, adapter: str, plan: Plan) -> None:
    """An adapter that is continued has a rank, targets and a form of its own: the plan must be for those."""
    config = cast(Any, built.model).peft_config["default"]
    found, planned = sum(parameter.numel() for parameter in built.trainable), plan.parameters.trainable
    more = {"dropout": config.lora_dropout, "DoRA": config.use_dora, "biases": config.lora_bias}
    if plan.strategy.fused_adapters and any(more.values()):
        raise RunError(
            f"method.adapter: {adapter} was made with {' and '.join(name for name, on in more.items() if on)}, which "
            "fused adapters do not compute: set method.fused_adapters = false"
        )
    if found != planned:
        raise RunError(
            f"method.adapter: {adapter} trains {found:,} parameters, the plan {planned:,}: set method.rank = "
            f"{config.r} and method.targets = {json.dumps(sorted(config.target_modules))}, as the adapter has them"
        )
