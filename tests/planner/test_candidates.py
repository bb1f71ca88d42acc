"""Which strategies a recipe leaves open on a device, and in which order they are tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import CPU, FP32_CPU, find_shape, make_gpu, make_inputs

from fitune.planner.candidates import (
    LIGER_ACTIVATIONS,
    list_methods,
    list_settings,
    list_strategies,
)
from fitune.planner.catalog import find_gpu, list_models, make_catalog_device
from fitune.planner.shape import ModelShape, make_shape
from fitune.planner.strategy import Device, Strategy
from fitune.recipes.errors import PlanError
from fitune.recipes.schema import BudgetTable, Recipe

H100, T4, V100 = make_gpu("H100 80GB"), make_gpu("T4"), make_gpu("V100 16GB")
SHAPE = find_shape("llama-3.2-1b")
LAYERS = SHAPE.layers


def recipe_with(**tables: Any) -> Recipe:
    return make_inputs(tables, H100).recipe_file.recipe


def list_all(tables: Mapping[str, Any], device: Device, method: str) -> list[Strategy]:
    return list(list_strategies(recipe_with(**tables), device, method, SHAPE))  # type: ignore[arg-type]


def dtypes(tables: Mapping[str, Any], device: Device, method: str) -> set[tuple[str, str, str | None]]:
    return {(one.weights_dtype, one.compute_dtype, one.adapter_dtype) for one in list_all(tables, device, method)}


def test_methods_are_tried_in_the_recipes_order() -> None:
    assert list_methods(recipe_with()) == ("full", "lora", "qlora")
    assert list_methods(recipe_with(method={"prefer": ["qlora", "full"]})) == ("qlora", "full")
    assert list_methods(recipe_with(method={"kind": "lora"})) == ("lora",)


def test_an_adapter_to_continue_rules_full_fine_tuning_out() -> None:
    assert list_methods(recipe_with(method={"adapter": "old/adapter"})) == ("lora", "qlora")


@given(st.integers(1, 5000))
def test_micro_batches_divide_the_global_batch_which_never_changes(whole: int) -> None:
    found = list_all({"train": {"global_batch_size": whole}}, H100, "qlora")
    assert {one.micro_batch_size * one.gradient_accumulation_steps for one in found} == {whole}
    assert {one.micro_batch_size for one in found} == {n for n in range(1, whole + 1) if whole % n == 0}


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("micro_batch_size", 4, "micro_batch_size"),
        ("loss_head", "chunked", "loss_head"),
        ("loss_head", "full", "loss_head"),
        ("loss_head", "fused", "loss_head"),
        ("optimizer", "adafactor", "optimizer"),
        ("optimizer", "paged_adamw", "optimizer"),
        ("compile", True, "compile"),
        ("kernels", "torch", "kernels"),
        ("activation_offload", True, "activation_offload"),
        ("expandable_segments", True, "expandable_segments"),
        ("learning_rate", 3e-3, "learning_rate"),
    ],
)
@pytest.mark.parametrize("device", [H100, CPU], ids=["gpu", "cpu"])
def test_what_the_recipe_fixes_stays_fixed(key: str, value: object, field: str, device: Device) -> None:
    for method in ("full", "lora", "qlora"):
        found = list_all({"train": {key: value}}, device, method)
        assert {getattr(one, field) for one in found} == {value}


def test_what_the_recipe_leaves_open_is_all_tried() -> None:
    found = list_all({}, H100, "lora")
    assert {one.checkpointed_layers for one in found if not one.save_attention} == {0, LAYERS}
    assert {one.loss_head for one in found} == {"full", "fused"}
    assert {one.optimizer for one in found} == {"adamw", "adamw_8bit", "paged_adamw_8bit"}
    assert {one.compile for one in found} == {False, True}


def test_the_optimizer_may_be_in_backward_where_nothing_needs_all_gradients_at_once() -> None:
    found = list_all({"train": {"max_grad_norm": "off"}}, H100, "full")
    early = [one for one in found if one.optimizer_in_backward]
    assert {one.gradient_accumulation_steps for one in early} == {1}
    assert {one.optimizer for one in early} == {"adamw", "adamw_8bit", "paged_adamw_8bit"}
    assert not any(one.clips_gradients for one in found)
    for tables, device, method in (
        ({}, H100, "full"),
        ({"train": {"max_grad_norm": "off"}}, H100, "lora"),
        ({"train": {"max_grad_norm": "off"}}, T4, "full"),
        ({"train": {"max_grad_norm": "off", "optimizer_in_backward": False}}, H100, "full"),
    ):
        assert not any(one.optimizer_in_backward for one in list_all(tables, device, method))


def test_asked_for_the_optimizer_is_in_backward_or_the_plan_an_error() -> None:
    tables = {"train": {"max_grad_norm": "off", "optimizer_in_backward": True}}
    assert all(one.optimizer_in_backward for one in list_all(tables, H100, "full"))
    assert list_methods(recipe_with(**tables)) == ("full",)
    with pytest.raises(PlanError, match=r"train\.optimizer_in_backward: .* computes in fp16"):
        list_all(tables, T4, "full")


def test_attention_may_be_kept_where_rows_may_be_long_and_layers_are_checkpointed() -> None:
    def kept(tables: Mapping[str, Any], device: Device = H100) -> set[tuple[int, bool]]:
        return {(one.checkpointed_layers, one.save_attention) for one in list_all(tables, device, "lora")}

    def rows_of(length: int) -> dict[str, Any]:
        return {"data": {"train": "rows.jsonl", "max_length": length}}

    plain, saving = {(0, False), (LAYERS, False)}, {(LAYERS // 2, True), (LAYERS, True)}
    assert kept(rows_of(SHAPE.hidden_size - 1)) == plain
    assert kept(rows_of(SHAPE.hidden_size)) == plain | saving
    assert kept({"train": {"save_attention": True}}) == {(0, False)} | saving
    assert kept({"train": {"save_attention": True, "gradient_checkpointing": 5}}) == {(5, True)}
    for tables in ({"train": {"save_attention": False}}, {"train": {"activation_offload": True}}):
        assert kept(rows_of(8192) | tables) == plain
    eager = rows_of(8192) | {"model": {"id": "llama-3.2-1b", "attention": "eager"}}
    assert kept(eager) == plain
    with pytest.raises(PlanError, match=r"train\.save_attention: llama computes attention in several operations"):
        kept(eager | {"train": {"save_attention": True}})


def test_auto_compiles_dense_layers_of_known_families_on_a_gpu_that_can() -> None:
    mixture, unknown = find_shape("mixtral-8x7b"), replace(SHAPE, is_guess=True)
    found = {
        (device.name, shape.model_type): {one.compile for one in list_strategies(recipe_with(), device, "lora", shape)}
        for device, shape in (
            (CPU, SHAPE),
            (H100, mixture),
            (H100.model_copy(update={"name": "no compiler", "compiles": False}), SHAPE),
        )
    }
    assert set(map(frozenset, found.values())) == {frozenset({False})}
    assert {one.compile for one in list_strategies(recipe_with(), H100, "lora", unknown)} == {False}


def test_offload_and_expandable_segments_are_the_recipes_to_ask_for() -> None:
    found = [
        one for device in (H100, CPU) for method in ("full", "lora", "qlora") for one in list_all({}, device, method)
    ]
    assert {(one.activation_offload, one.expandable_segments) for one in found} == {(False, False)}


def test_no_paged_optimizer_is_offered_on_a_cpu() -> None:
    for method in ("full", "lora", "qlora"):
        assert not any(one.optimizer.startswith("paged") for one in list_all({}, CPU, method))


def test_the_learning_rate_follows_the_method() -> None:
    rates = {method: {one.learning_rate for one in list_all({}, H100, method)} for method in ("full", "lora", "qlora")}
    assert rates == {"full": {2e-5}, "lora": {2e-4}, "qlora": {2e-4}}


def test_adapter_keys_reach_the_strategy_of_adapters_only() -> None:
    tables = {"method": {"rank": 4, "dropout": 0.1, "targets": ["q_proj"], "double_quantization": False}}
    for one in list_all(tables, H100, "qlora"):
        assert (one.adapter_rank, one.adapter_dropout, one.adapter_targets) == (4, 0.1, ("q_proj",))
        assert not one.double_quantization
    for one in list_all(tables, H100, "full"):
        assert (one.adapter_rank, one.adapter_dropout, one.adapter_targets) == (None, 0.0, None)


def test_full_fine_tuning_keeps_fp32_weights_or_rounds_bf16_ones_stochastically() -> None:
    found = {(one.weights_dtype, one.rounding) for one in list_all({}, H100, "full")}
    assert found == {("fp32", "nearest"), ("bf16", "stochastic")}


def test_bf16_adapters_are_rounded_stochastically_too() -> None:
    assert {one.rounding for one in list_all({"method": {"adapter_dtype": "bf16"}}, H100, "lora")} == {"stochastic"}
    assert {one.rounding for one in list_all({}, H100, "lora")} == {"nearest"}


@pytest.mark.parametrize("card", [T4, V100], ids=["T4", "V100"])
def test_a_card_without_bf16_computes_in_fp16_and_trains_fp32_weights(card: Device) -> None:
    assert dtypes({}, card, "full") == {("fp32", "fp16", None)}
    for method in ("lora", "qlora"):
        assert dtypes({}, card, method) == {("fp16", "fp16", "fp32")}
        assert dtypes({"method": {"adapter_dtype": "bf16"}}, card, method) == {("fp16", "fp16", "fp32")}


def test_a_cpu_without_bf16_computes_in_fp32() -> None:
    for method, adapter in (("full", None), ("lora", "fp32"), ("qlora", "fp32")):
        assert dtypes({}, FP32_CPU, method) == {("fp32", "fp32", adapter)}


def test_a_cpu_with_bf16_computes_in_it() -> None:
    assert dtypes({}, CPU, "full") == {("fp32", "bf16", None), ("bf16", "bf16", None)}
    assert dtypes({}, CPU, "lora") == {("bf16", "bf16", "fp32")}


@pytest.mark.parametrize("asked", ["bf16", "fp32"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_recipes_dtype_is_the_weights(asked: str, method: str) -> None:
    model = {"id": "llama-3.2-1b", "dtype": asked}
    for device in (H100, CPU):
        assert {weights for weights, _, _ in dtypes({"model": model}, device, method)} == {asked}


def test_fp16_weights_are_refused_where_they_cannot_train() -> None:
    recipe = recipe_with(model={"id": "llama-3.2-1b", "dtype": "fp16"})
    with pytest.raises(PlanError, match=r'model\.dtype: "fp16" is for GPUs without bf16; on a CPU use'):
        list_settings(recipe, CPU, "lora")
    with pytest.raises(PlanError, match="fp16 weights cannot be trained"):
        list_settings(recipe, T4, "full")
    assert {(s.weights, s.compute) for s in list_settings(recipe, H100, "lora")} == {("fp16", "fp16")}


@pytest.mark.parametrize("device", [CPU, T4], ids=["cpu", "T4"])
def test_flash_attention_is_refused_where_it_has_no_kernels(device: Device) -> None:
    recipe = recipe_with(model={"id": "llama-3.2-1b", "attention": "flash_attention_2"})
    with pytest.raises(PlanError, match=r'model\.attention: "flash_attention_2" needs .* use "sdpa"'):
        list_settings(recipe, device, "lora")
    assert list_settings(recipe, H100, "lora")


def test_compiled_layers_are_refused_where_nothing_compiles_them() -> None:
    recipe, card = recipe_with(train={"compile": True}), H100.model_copy(update={"compiles": False})
    with pytest.raises(PlanError, match=r"train\.compile: .* needs? a GPU of compute capability 7\.0"):
        list_settings(recipe, card, "lora")


def test_a_family_without_sdpa_gets_eager_attention() -> None:
    capped = find_shape("gemma-2-2b")
    assert not capped.has_sdpa
    found = [{s.attention for s in list_strategies(recipe_with(), H100, "lora", one)} for one in (SHAPE, capped)]
    assert found == [{"sdpa"}, {"eager"}]


@pytest.mark.parametrize(("asked", "layers"), [(True, LAYERS), (False, 0), (1, 1), (5, 5), (LAYERS, LAYERS)])
def test_a_number_of_layers_is_checkpointed_all_or_none(asked: bool | int, layers: int) -> None:
    found = list_all({"train": {"gradient_checkpointing": asked}}, H100, "lora")
    assert {one.checkpointed_layers for one in found} == {layers}


def test_no_more_layers_are_checkpointed_than_there_are() -> None:
    with pytest.raises(PlanError, match=r"train\.gradient_checkpointing: 17 is more than the 16 layers"):
        list_all({"train": {"gradient_checkpointing": 17}}, H100, "lora")


def test_the_fused_head_is_not_for_an_lm_head_with_an_adapter() -> None:
    adapted = {"method": {"targets": ["q_proj", "lm_head"]}}
    assert {one.loss_head for one in list_all(adapted, H100, "lora")} == {"full", "chunked"}
    assert "fused" in {one.loss_head for one in list_all(adapted, H100, "full")}
    with pytest.raises(PlanError, match=r'train\.loss_head: "fused" computes without the adapter'):
        list_all({**adapted, "train": {"loss_head": "fused"}}, H100, "lora")


def pair_kernels(device: Device, shape: ModelShape = SHAPE, **train: Any) -> set[tuple[bool, str]]:
    recipe = recipe_with(train=train)
    return {(one.compile, one.kernels) for one in list_strategies(recipe, device, "lora", shape)}


def test_ligers_kernels_take_the_place_of_pytorchs_where_layers_are_not_compiled() -> None:
    with_liger = H100.model_copy(update={"has_liger": True})
    assert pair_kernels(H100) == {(True, "torch"), (False, "torch")}
    assert pair_kernels(with_liger) == {(True, "torch"), (False, "liger")}
    assert pair_kernels(with_liger, compile=False) == pair_kernels(with_liger, kernels="liger") == {(False, "liger")}
    assert pair_kernels(with_liger, kernels="torch") == pair_kernels(H100)


@pytest.mark.parametrize(
    ("device", "shape", "message"),
    [
        (H100, SHAPE, r'pip install "fitune\[liger\]"'),
        (CPU, SHAPE, "need a GPU"),
        (H100, find_shape("gpt2"), "tested with llama, .* this model is a gpt2"),
        (H100, replace(SHAPE, activation="gelu"), "has silu for llama, and this model computes gelu"),
        (H100.model_copy(update={"compiles": False}), SHAPE, "compute capability 7.0 or more"),
    ],
    ids=["not installed", "cpu", "other family", "other activation", "no triton"],
)
def test_ligers_kernels_are_refused_where_they_cannot_be_had(device: Device, shape: ModelShape, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        pair_kernels(device, shape, kernels="liger")
    assert {kernels for _, kernels in pair_kernels(device, shape)} == {"torch"}


def test_every_model_of_the_catalog_of_a_family_that_liger_knows_can_have_its_kernels() -> None:
    """But Gemma's first models, which compute the exact gelu."""
    with_liger = H100.model_copy(update={"has_liger": True})
    for model in list_models():
        shape = make_shape(model.config)
        kernels = {one for _, one in pair_kernels(with_liger, shape, compile=False)}
        is_able = shape.model_type in LIGER_ACTIVATIONS and not model.name.startswith(("gemma-2b", "gemma-7b"))
        assert kernels == {"liger" if is_able else "torch"}, model.name


@pytest.mark.parametrize("gpu", ["H100 80GB", "B200", "L4", "RTX 4090"])
def test_float8_is_for_adapters_of_cards_that_multiply_in_it(gpu: str) -> None:
    tables, device = {"train": {"float8": True}}, make_catalog_device(find_gpu(gpu), BudgetTable())
    assert {one.float8 for one in list_all(tables, device, "lora")} == {True}
    for method, why in (("full", "no frozen weights"), ("qlora", "in NF4 already")):
        with pytest.raises(PlanError, match=why):
            list_all(tables, device, method)
    with pytest.raises(PlanError, match=r'leave model.dtype = "fp32" out'):
        list_all({**tables, "model": {"id": "llama-3.2-1b", "dtype": "fp32"}}, device, "lora")
    with pytest.raises(PlanError, match="dense models of known families, and this one is a mixtral"):
        list(list_strategies(recipe_with(**tables), device, "lora", find_shape("mixtral-8x7b")))


@pytest.mark.parametrize(
    "device", [make_catalog_device(find_gpu("A100 80GB"), BudgetTable()), CPU], ids=["A100", "cpu"]
)
def test_float8_is_refused_where_there_are_no_such_products(device: Device) -> None:
    with pytest.raises(PlanError, match=r"train.float8: .* compute capability 8.9 or more"):
        list_all({"train": {"float8": True}}, device, "lora")


def test_adapters_are_fused_wherever_they_can_be() -> None:
    for device in (H100, T4, CPU, FP32_CPU):
        assert {one.fused_adapters for one in list_all({}, device, "full")} == {False}
        for method in ("lora", "qlora"):
            assert {one.fused_adapters for one in list_all({}, device, method)} == {True}
            for own in ({"dropout": 0.1}, {"fused_adapters": False}):
                assert {one.fused_adapters for one in list_all({"method": own}, device, method)} == {False}
    in_fp32 = {"model": {"id": "llama-3.2-1b", "dtype": "fp32"}}
    assert {one.fused_adapters for one in list_all(in_fp32, H100, "lora")} == {False}, "autocast copies the weights"
    assert {one.fused_adapters for one in list_all(in_fp32, H100, "qlora")} == {True}, "packed ones are made as needed"
    card = make_catalog_device(find_gpu("H100 80GB"), BudgetTable())
    assert {one.fused_adapters for one in list_all({"train": {"float8": True}}, card, "lora")} == {False}


@pytest.mark.parametrize(
    ("tables", "error"),
    [
        (
            {"model": {"id": "llama-3.2-1b", "dtype": "fp32"}},
            r"method\.fused_adapters: the weights are in fp32 and the products in bf16",
        ),
        ({"train": {"float8": True}}, r"method\.fused_adapters: products in float8 cannot be added to"),
    ],
)
def test_fused_adapters_that_cannot_be_had_are_an_error(tables: dict[str, Any], error: str) -> None:
    with pytest.raises(PlanError, match=error):
        list_all(
            tables | {"method": {"fused_adapters": True}},
            make_catalog_device(find_gpu("H100 80GB"), BudgetTable()),
            "lora",
        )


def test_float8_is_never_chosen_by_itself() -> None:
    assert not any(one.float8 for method in ("full", "lora", "qlora") for one in list_all({}, H100, method))
