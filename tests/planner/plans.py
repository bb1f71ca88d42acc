"""Plans for tests: a recipe as a dictionary, a device of the catalog or a CPU, and what make_plan says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fitune.planner.catalog import find_gpu, find_model
from fitune.planner.plan import Plan, PlanInputs, make_plan
from fitune.planner.rates import make_gpu_rates
from fitune.planner.shape import ModelShape, make_shape
from fitune.planner.strategy import DataFacts, Device, Strategy
from fitune.planner.views import Case
from fitune.recipes.load import recipe_from_resolved

GiB = 2**30

CPU = Device(name="CPU, 2 cores", kind="cpu", memory_bytes=24 * GiB, budget_bytes=20 * GiB, bf16=True)
FP32_CPU = CPU.model_copy(update={"bf16": False})


def make_gpu(name: str, **changes: Any) -> Device:
    """A card of the catalog with all of its memory as the budget."""
    gpu = find_gpu(name)
    device = Device(
        name=gpu.name,
        kind="cuda",
        memory_bytes=gpu.memory_bytes,
        budget_bytes=gpu.memory_bytes,
        bf16=gpu.bf16,
        rates=make_gpu_rates(gpu),
    )
    return device.model_copy(update=changes)


def find_shape(name: str) -> ModelShape:
    model = find_model(name)
    assert model is not None, f"{name} is in the catalog"
    return make_shape(model.config)


def make_inputs(
    tables: Mapping[str, Any], device: Device, *, rows: int | None = 1000, config: Mapping[str, Any] | None = None
) -> PlanInputs:
    """Inputs of a recipe; `model.id` is llama-3.2-1b where `tables` say nothing, rows are of data.max_length."""
    given = {"model": {"id": "llama-3.2-1b"}, "data": {"train": "rows.jsonl"}, **tables}
    recipe_file = recipe_from_resolved(given, Path("recipe.toml"))
    recipe = recipe_file.recipe
    return PlanInputs(
        recipe_file=recipe_file,
        recipe_path="recipe.toml",
        shape=find_shape(recipe.model.id) if config is None else make_shape(config),
        config_sha256="0" * 64,
        device=device,
        data=DataFacts(rows=rows, longest_row_tokens=recipe.data.max_length, source="the longest row, tokenised"),
        versions={},
    )


def make_case(tables: Mapping[str, Any], device: Device) -> Case:
    """A recipe for a model of the catalog as the one case of a view."""
    inputs = make_inputs(tables, device)
    model = find_model(inputs.recipe_file.recipe.model.id)
    assert model is not None, "the model is in the catalog"
    return Case(name="recipe.toml", inputs=inputs, config=model.config)


def plan_for(tables: Mapping[str, Any], device: Device, *, rows: int | None = 1000) -> Plan:
    return make_plan(make_inputs(tables, device, rows=rows))


def make_strategy(method: str = "lora", **changes: Any) -> Strategy:
    """A plain strategy of a method: bf16 weights, fp32 adapters of rank 16, one row of a forward."""
    has_adapter = method != "full"
    values = {
        "method": method,
        "weights_dtype": "bf16",
        "compute_dtype": "bf16",
        "adapter_dtype": "fp32" if has_adapter else None,
        "adapter_rank": 16 if has_adapter else None,
        "adapter_targets": "all-linear" if has_adapter else None,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "checkpointed_layers": 0,
        "loss_head": "full",
        "optimizer": "adamw",
        "learning_rate": 1e-4,
    }
    return Strategy.model_validate(values | changes)
