"""The choice: the first preferred method that fits, at its fastest, with a reason for everything that does not."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import CPU, FP32_CPU, GiB, find_shape, make_gpu, make_inputs, plan_for

from fitune.planner.candidates import is_rounded, list_strategies
from fitune.planner.catalog import list_gpus, list_models
from fitune.planner.clock import make_closed_form_clock
from fitune.planner.estimate import estimate_memory
from fitune.planner.kept import make_closed_form_measure
from fitune.planner.memory import PHASES, Components
from fitune.planner.plan import Plan, list_budgets, make_plan
from fitune.planner.search import TIE_SHARE
from fitune.planner.strategy import Device, Strategy
from fitune.recipes.errors import FituneError, PlanError
from fitune.recipes.shipped import list_shipped

H100, T4 = make_gpu("H100 80GB"), make_gpu("T4")
LLAMA_8B = {"model": {"id": "llama-3.1-8b"}}


def with_budget(device: Device, size: float) -> Device:
    return device.model_copy(update={"budget_bytes": int(size * GiB), "budget_source": "budget.memory"})


@pytest.mark.parametrize(("budget", "method"), [(150, "full"), (70, "full"), (30, "lora"), (15, "qlora")])
def test_a_smaller_budget_takes_a_later_method(budget: int, method: str) -> None:
    plan = plan_for(LLAMA_8B, with_budget(make_gpu("B200"), budget))
    assert plan.fits
    assert plan.strategy.method == method
    assert plan.memory.required_bytes <= plan.memory.budget_bytes == budget * GiB
    assert {one.strategy.method for one in plan.rejected} <= {"full", "lora", "qlora"}


def test_the_recipes_order_wins_over_the_default_one() -> None:
    plan = plan_for(LLAMA_8B | {"method": {"prefer": ["qlora", "lora", "full"]}}, H100)
    assert plan.strategy.method == "qlora"
    assert {one.strategy.method for one in plan.rejected} <= {"qlora"}


def test_nothing_that_was_preferred_and_fits_is_passed_over() -> None:
    inputs = make_inputs(LLAMA_8B, with_budget(H100, 40))
    plan, rejected = make_plan(inputs), set()
    for one in plan.rejected:
        assert one.needed_bytes > one.budget_bytes
        rejected.add(one.strategy)
    full = set(list_strategies(inputs.recipe_file.recipe, inputs.device, "full", inputs.shape))
    assert plan.strategy.method == "lora"
    assert full <= rejected
    assert plan.strategy not in rejected


def test_the_chosen_strategy_is_the_first_that_fits_in_the_documented_order() -> None:
    plan = plan_for(LLAMA_8B | {"method": {"kind": "qlora"}}, make_gpu("RTX 4090"))
    assert plan.fits
    assert not plan.strategy.checkpointed_layers or all(
        one.strategy.checkpointed_layers or one.needed_bytes > one.budget_bytes for one in plan.rejected
    )
    inputs = make_inputs(LLAMA_8B | {"method": {"kind": "qlora"}}, make_gpu("RTX 4090"))
    assert make_plan(inputs) == plan, "the same inputs make the same plan"


@pytest.mark.parametrize("budget", [9, 14, 18, 24, 33, 48, 60, 80])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_search_finds_what_trying_everything_finds(method: str, budget: int) -> None:
    """Every number of checkpointed layers with every other choice, by the same measure and the same clock: the plan is
    as fast as the fastest, within what counts as equally fast on both sides of a step in the order."""
    inputs = make_inputs(LLAMA_8B | {"method": {"kind": method}}, with_budget(H100, budget))
    shape, device, length = inputs.shape, inputs.device, inputs.data.longest_row_tokens
    measure = make_closed_form_measure(shape, device, length, merge=False)
    fitting = [
        one
        for strategy in list_strategies(inputs.recipe_file.recipe, device, method, shape)  # type: ignore[arg-type]
        for layers in range(shape.layers + 1)
        for one in [strategy.model_copy(update={"checkpointed_layers": layers})]
        if measure(one).required_bytes <= device.budget_bytes
    ]
    plan = make_plan(inputs)
    assert plan.fits == bool(fitting)
    if fitting:
        clock = make_closed_form_clock(shape, device, length)
        rounded = all(is_rounded(one) for one in fitting)
        fastest = min(clock(one).seconds for one in fitting if is_rounded(one) == rounded)
        assert is_rounded(plan.strategy) == rounded
        assert clock(plan.strategy).seconds <= fastest * (1 + TIE_SHARE) ** 2


@given(st.sampled_from([1, 2, 6, 16, 36, 97]), st.floats(1, 100), st.sampled_from(["auto", "full", "lora", "qlora"]))
@settings(max_examples=60)
def test_the_global_batch_is_never_changed(whole: int, budget: float, kind: str) -> None:
    tables = {"train": {"global_batch_size": whole}, "method": {"kind": kind}}
    strategy = plan_for(tables, with_budget(H100, budget)).strategy
    assert strategy.micro_batch_size * strategy.gradient_accumulation_steps == whole


@given(st.floats(1, 200), st.floats(1, 200))
@settings(max_examples=60)
def test_a_larger_budget_never_takes_a_later_method(one: float, other: float) -> None:
    small, large = (plan_for(LLAMA_8B, with_budget(H100, budget)) for budget in sorted((one, other)))
    order = ["full", "lora", "qlora"]
    assert large.fits or not small.fits
    if small.fits:
        assert order.index(large.strategy.method) <= order.index(small.strategy.method)


@pytest.mark.parametrize(
    ("limit", "component", "words"),
    [
        ({"host_memory_bytes": 2 * GiB}, "host", "of RAM free: the process beside the device"),
        ({"disk_bytes": 1 * GiB // 4}, "disk", "of disk free: the files that it writes"),
    ],
)
def test_ram_and_disk_bind_too(limit: dict[str, int], component: str, words: str) -> None:
    plan = plan_for(LLAMA_8B | {"output": {"merge": True}}, H100.model_copy(update=limit))
    assert not plan.fits
    broken = [one for one in plan.rejected if one.component == component]
    assert broken
    assert all(words in one.reason and one.needed_bytes > one.budget_bytes for one in broken)
    assert any(text.startswith(("RAM: ", "disk: ")) for text in plan.advice)
    assert not any("max_length" in text or "budget.gpu" in text for text in plan.advice), "neither would help"


def test_disk_alone_can_rule_full_fine_tuning_out() -> None:
    plan = plan_for({}, H100.model_copy(update={"disk_bytes": GiB}))
    assert plan.fits
    assert plan.strategy.method == "lora"
    assert "disk" in {one.component for one in plan.rejected if one.strategy.method == "full"}
    assert "disk" not in {one.component for one in plan.rejected if one.strategy.method == "lora"}


@pytest.mark.parametrize("name", ["T4", "V100 16GB", "RTX 2080 Ti"])
def test_a_card_without_bf16_gets_a_plan_in_fp16(name: str) -> None:
    plan = plan_for({"method": {"adapter_dtype": "bf16"}}, make_gpu(name))
    assert plan.fits
    assert plan.strategy.compute_dtype == "fp16"
    assert plan.strategy.attention == "efficient", "there is no FlashAttention before compute capability 8.0"
    assert (plan.strategy.adapter_dtype or plan.strategy.weights_dtype) == "fp32", "what is trained is fp32"


def test_a_cpu_without_bf16_computes_in_fp32_and_the_plan_says_so() -> None:
    plan = plan_for({"model": {"id": "smollm2-135m-instruct"}}, FP32_CPU)
    assert plan.strategy.compute_dtype == "fp32"
    assert "this CPU has no bf16 instructions: the run computes in fp32" in plan.warnings
    assert not any("fp32" in text for text in plan_for({"model": {"id": "smollm2-135m-instruct"}}, CPU).warnings)


def test_bf16_weights_that_are_trained_are_rounded_stochastically_and_the_plan_says_so() -> None:
    plan = plan_for({"model": {"id": "llama-3.1-8b", "dtype": "bf16"}, "method": {"kind": "full"}}, H100)
    assert plan.strategy.rounding == "stochastic"
    assert any("stochastic rounding" in text for text in plan.warnings)


@pytest.mark.parametrize(
    ("tables", "device", "words"),
    [
        ({"budget": {"gpus": 2}}, H100, "budget.gpus = 2: this version trains on one card"),
        ({"budget": {"max_hours": 1.0}}, CPU, "budget.max_hours: how fast CPU, 2 cores is is not known"),
        ({"train": {"optimizer": "paged_adamw"}}, CPU, "paged optimizers run unpaged on a CPU"),
        ({"train": {"activation_offload": True}}, CPU, "train.activation_offload = true: it has no effect on a CPU"),
        ({"train": {"expandable_segments": True}}, CPU, "train.expandable_segments = true: it has no effect on a CPU"),
        ({"model": {"id": "llama-3.2-1b", "dtype": "bf16"}}, T4, "computes bf16 in software"),
        ({"method": {"kind": "lora", "adapter_dtype": "bf16"}}, T4, "the run computes in fp16, so the adapters are"),
        ({}, H100.model_copy(update={"budget_bytes": 200 * GiB}), "this plan is for a larger one"),
        (
            {"model": {"id": "gemma-2-2b"}, "data": {"train": "x", "max_length": 10_000}},
            H100,
            "rows of 10,000 tokens are longer than the 8,192 that the model was made for",
        ),
    ],
)
def test_what_a_person_might_not_expect_is_a_warning(tables: dict[str, Any], device: Device, words: str) -> None:
    assert any(words in text for text in plan_for(tables, device).warnings)


def test_offload_and_expandable_segments_are_no_surprise_on_a_gpu() -> None:
    plan = plan_for({"train": {"activation_offload": True, "expandable_segments": True}}, H100)
    assert plan.strategy.activation_offload and plan.strategy.expandable_segments
    assert not any("no effect" in text for text in plan.warnings)


def test_offloaded_activations_that_ram_cannot_hold_are_named() -> None:
    tables = {"model": {"id": "llama-3.1-8b"}, "method": {"kind": "lora"}, "data": {"train": "x", "max_length": 8192}}
    train = {"activation_offload": True, "gradient_checkpointing": False, "micro_batch_size": 4}
    device = H100.model_copy(update={"host_memory_bytes": 32 * GiB})
    plan = plan_for(tables | {"train": train}, device)
    assert not plan.fits
    assert {one.component for one in plan.rejected} == {"host"}
    assert all(
        one.reason.endswith(": the process beside the device and the offloaded activations") for one in plan.rejected
    )


def test_rows_that_are_not_known_are_a_warning_and_leave_the_steps_open() -> None:
    plan = plan_for({}, H100, rows=None)
    assert plan.data.steps is None
    assert plan.data.source in plan.warnings


@pytest.mark.parametrize(
    ("train", "rows", "steps"),
    [
        ({"epochs": 3, "global_batch_size": 16}, 100, 21),
        ({"global_batch_size": 8}, 8, 1),
        ({"max_steps": 10}, None, 10),
        ({"max_steps": 10}, 5, 10),
    ],
)
def test_steps_are_counted_from_epochs_or_given(train: dict[str, int], rows: int | None, steps: int) -> None:
    assert plan_for({"train": train}, H100, rows=rows).data.steps == steps


def test_where_nothing_fits_the_plan_is_the_closest_candidate_and_says_by_how_much_it_misses() -> None:
    plan = plan_for(LLAMA_8B, with_budget(H100, 4))
    assert not plan.fits
    over = min(one.needed_bytes - one.budget_bytes for one in plan.rejected)
    assert plan.memory.required_bytes - plan.memory.budget_bytes == over > 0
    assert plan.strategy in {one.strategy for one in plan.rejected}
    assert plan.advice[0].startswith("the closest candidate (QLoRA) needs ")
    assert any("GiB in all, enough for it; the budget of 4.0 GiB is budget.memory" in text for text in plan.advice)


def test_a_length_that_is_advised_fits_and_64_more_tokens_do_not() -> None:
    tables = LLAMA_8B | {"method": {"kind": "lora"}}
    device = with_budget(make_gpu("RTX 4090"), 22)
    (text,) = [text for text in plan_for(tables, device).advice if "max_length" in text]
    length = int(text.split()[2])
    for change, fits in ((0, True), (64, False)):
        data = {"train": "x", "max_length": length + change}
        assert plan_for(tables | {"data": data}, device).fits is fits


def test_a_method_that_is_advised_fits() -> None:
    tables = LLAMA_8B | {"method": {"kind": "full"}}
    device = with_budget(make_gpu("RTX 4090"), 20)
    assert any(text.startswith('method.kind = "qlora" would fit: ') for text in plan_for(tables, device).advice)
    assert plan_for(LLAMA_8B | {"method": {"kind": "qlora"}}, device).fits
    assert not plan_for(LLAMA_8B | {"method": {"kind": "lora"}}, device).fits


def test_a_card_that_is_advised_fits_and_computes_in_the_same_dtype() -> None:
    tables = LLAMA_8B | {"method": {"kind": "full"}}
    (text,) = [text for text in plan_for(tables, make_gpu("RTX 4090")).advice if "budget.gpu" in text]
    card = make_gpu(text.split('"')[1])
    assert card.bf16
    assert plan_for(tables, card).fits


def test_keys_that_are_fixed_too_high_are_named() -> None:
    tables = LLAMA_8B | {"method": {"kind": "qlora"}, "train": {"micro_batch_size": 16, "loss_head": "full"}}
    plan = plan_for(tables, make_gpu("RTX 4090"))
    assert not plan.fits
    assert 'train.micro_batch_size and train.loss_head = "auto" would fit' in plan.advice


def test_a_plan_that_fits_has_no_advice() -> None:
    assert plan_for({}, H100).advice == ()


def test_every_rejected_candidate_has_its_figures_and_the_term_that_broke_it() -> None:
    plan = plan_for(LLAMA_8B, with_budget(H100, 12))
    assert len(plan.rejected) > 100
    for one in plan.rejected:
        assert one.needed_bytes > one.budget_bytes == 12 * GiB
        assert one.component in Components.model_fields
        assert one.reason.startswith("needs ")
        assert "12.0 GiB in the budget: " in one.reason
        assert "alone are" in one.reason


def test_the_term_that_broke_it_counts_the_states_that_are_paged() -> None:
    tables = LLAMA_8B | {"method": {"kind": "full"}, "train": {"optimizer": "paged_adamw"}}
    plan = plan_for(tables, make_gpu("RTX 4090"))
    reasons = {one.component: one.reason for one in plan.rejected}
    assert "paged AdamW's states of 8.0B parameters alone are 59.8 GiB" in reasons["optimizer"]
    assert "weights" not in reasons


def test_a_row_longer_than_the_learned_positions_is_refused() -> None:
    with pytest.raises(PlanError, match=r"data\.max_length: 2048 is more than the 1024 learned positions"):
        plan_for({"model": {"id": "gpt2-medium"}}, H100)


def test_a_recipe_that_no_method_can_follow_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"model\.dtype"):
        plan_for({"model": {"id": "llama-3.2-1b", "dtype": "fp16"}}, CPU)


def test_a_method_that_the_dtype_rules_out_is_left_to_the_others() -> None:
    plan = plan_for({"model": {"id": "llama-3.2-1b", "dtype": "fp16"}}, T4)
    assert plan.fits
    assert plan.strategy.method == "lora"


def test_the_measuring_function_decides_where_it_is_given() -> None:
    """As a rehearsal of the step will: here everything but QLoRA takes twice the card."""
    inputs = make_inputs({}, H100)

    def measure(strategy: Strategy) -> Any:
        memory = estimate_memory(inputs.shape, strategy, H100, sequence_length=128, merge=False)
        factor = 1 if strategy.method == "qlora" else 200
        return memory.model_copy(update={"required_bytes": factor * GiB})

    plan = make_plan(inputs, measure)
    assert plan.strategy.method == "qlora"
    assert {one.strategy.method for one in plan.rejected} == {"full", "lora"}


def test_a_plan_survives_json() -> None:
    for device in (H100, with_budget(H100, 3), CPU):
        plan = plan_for(LLAMA_8B, device)
        assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_the_digest_is_that_of_the_canonical_recipe() -> None:
    plan = plan_for({}, H100)
    canonical = json.dumps(plan.resolved_recipe, sort_keys=True, separators=(",", ":"))
    assert plan.recipe_sha256 == hashlib.sha256(canonical.encode()).hexdigest()


def test_phases_come_in_the_order_of_a_run() -> None:
    places = [PHASES.index(phase.name) for phase in plan_for({}, H100).memory.phases]
    assert all(first < second for first, second in pairwise(places))


@pytest.mark.parametrize("gpu", list_gpus(), ids=lambda gpu: gpu.name)
def test_every_card_of_the_catalog_can_be_planned_for(gpu: Any) -> None:
    plan = plan_for({"model": {"id": "smollm2-135m-instruct"}}, make_gpu(gpu.name))
    assert plan.fits
    assert plan.strategy.method == "full"


@pytest.mark.parametrize("shipped", list_shipped(), ids=lambda shipped: shipped.name)
def test_a_shipped_recipe_fits_what_it_names(shipped: Any) -> None:
    from fitune.recipes.load import load_recipe

    recipe_file = load_recipe(shipped.path)
    budget = recipe_file.recipe.budget
    device = CPU if budget.gpu is None else make_gpu(budget.gpu)
    if budget.memory_bytes is not None:
        device = device.model_copy(update={"budget_bytes": budget.memory_bytes})
    plan = plan_for(recipe_file.resolved, device)
    assert plan.fits, plan.advice
    if recipe_file.recipe.method.kind != "auto":
        assert plan.strategy.method == recipe_file.recipe.method.kind


def test_the_quick_starts_budget_makes_the_ladder_reject_something() -> None:
    from fitune.recipes.load import load_recipe

    recipe_file = load_recipe("quickstart")
    budget = recipe_file.recipe.budget.memory_bytes
    assert budget is not None
    plan = plan_for(recipe_file.resolved, CPU.model_copy(update={"budget_bytes": budget}))
    assert plan.strategy.method == "lora"
    assert {one.strategy.method for one in plan.rejected} >= {"full"}


def test_qlora_of_a_model_whose_layers_stay_as_they_are_says_so() -> None:
    """Falcon's linear layers are of a class of its own, which transformers does not replace."""
    inputs = make_inputs({"method": {"kind": "qlora"}}, make_gpu("RTX 4090"))
    (block,) = inputs.shape.blocks
    linears = tuple(replace(linear, is_packed=False) for linear in block.linears)
    shape = replace(inputs.shape, blocks=(replace(block, linears=linears),))
    said = "QLoRA stores none of llama's linear layers in 4 bits: it needs as much as LoRA"
    assert said in make_plan(replace(inputs, shape=shape)).warnings
    assert said not in make_plan(inputs).warnings


auto = st.just("auto")
recipes = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {
                "id": st.just("any"),
                "dtype": st.sampled_from(["auto", "bf16", "fp16", "fp32"]),
                "attention": st.sampled_from(["sdpa", "eager", "flash_attention_2"]),
            }
        ),
        "data": st.fixed_dictionaries({"train": st.just("x"), "max_length": st.integers(1, 2**31 - 1)}),
        "method": st.fixed_dictionaries(
            {
                "kind": st.sampled_from(["auto", "full", "lora", "qlora"]),
                "prefer": st.permutations(["full", "lora", "qlora"]),
                "rank": st.integers(1, 2**31 - 1),
                "dropout": st.floats(0, 0.99),
                "targets": st.sampled_from(["all-linear", ["q_proj"], ["c_attn", "c_fc"], ["lm_head"]]),
                "adapter_dtype": st.sampled_from(["fp32", "bf16"]),
                "double_quantization": st.booleans(),
            }
        ),
        "train": st.fixed_dictionaries(
            {
                "global_batch_size": st.integers(1, 300),
                "optimizer": auto | st.sampled_from(["adamw", "adamw_32bit", "paged_adamw", "adafactor"]),
                "gradient_checkpointing": auto | st.booleans() | st.integers(1, 16),
                "loss_head": auto | st.sampled_from(["full", "chunked", "fused"]),
                "save_attention": auto | st.booleans(),
                "max_grad_norm": st.sampled_from(["off", 0.5]),
                "compile": auto | st.booleans(),
                "activation_offload": st.booleans(),
                "expandable_segments": st.booleans(),
                "learning_rate": auto | st.floats(1e-9, 1),
            }
        ),
        "output": st.fixed_dictionaries({"merge": st.booleans()}),
    }
)
sizes = st.fixed_dictionaries(
    {},
    optional={
        "hidden_size": st.integers(-1, 20_000),
        "n_embd": st.integers(0, 20_000),
        "num_hidden_layers": st.integers(-1, 200),
        "num_attention_heads": st.integers(0, 256),
        "num_key_value_heads": st.integers(0, 256),
        "head_dim": st.integers(0, 512),
        "intermediate_size": st.integers(0, 100_000),
        "vocab_size": st.integers(0, 10**6),
        "sliding_window": st.none() | st.integers(0, 10**5),
        "num_experts_per_tok": st.integers(0, 200),
        "tie_word_embeddings": st.booleans() | st.none(),
        "model_type": st.sampled_from(["llama", "gpt2", "gpt_neox", "mixtral", "no_such_model"]),
    },
)
devices = st.builds(
    lambda device, budget, host, disk: device.model_copy(
        update={"budget_bytes": budget, "host_memory_bytes": host, "disk_bytes": disk}
    ),
    st.sampled_from([H100, T4, CPU, FP32_CPU]),
    st.integers(1, 2**41),
    st.none() | st.integers(1, 2**40),
    st.none() | st.integers(1, 2**40),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(recipes, st.sampled_from(list_models()), sizes, devices)
def test_any_recipe_on_any_model_and_device_is_a_plan_or_a_clear_error(
    tables: dict[str, Any], model: Any, changed: dict[str, Any], device: Device
) -> None:
    try:
        plan = make_plan(make_inputs(tables, device, config={**model.config, **changed}))
    except FituneError as error:
        assert str(error)
        return
    budgets = list_budgets(plan.memory, device).values()
    assert plan.fits == all(needed <= budget for needed, budget in budgets)
    assert plan.memory.components.total == plan.memory.peak_allocated_bytes
    assert bool(plan.advice) != plan.fits
    assert plan.parameters.trainable > 0
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_a_candidate_that_breaks_two_budgets_is_measured_by_the_worse() -> None:
    device = H100.model_copy(update={"budget_bytes": 2 * GiB, "disk_bytes": GiB})
    plan = plan_for(LLAMA_8B | {"method": {"kind": "full"}}, device)
    assert {one.component for one in plan.rejected} - set(Components.model_fields) == set()
    assert find_shape("llama-3.1-8b").parameters == plan.parameters.total
    assert len(plan.advice) >= 2
    assert any(text.startswith("disk: ") for text in plan.advice)


def test_where_the_gradients_are_too_much_the_optimizer_in_backward_is_advised() -> None:
    device = H100.model_copy(update={"budget_bytes": 44 * GiB})
    tables = LLAMA_8B | {"method": {"kind": "full"}, "train": {"global_batch_size": 1, "optimizer": "adamw_8bit"}}
    plan = plan_for(tables, device)
    (text,) = [text for text in plan.advice if "optimizer_in_backward" in text]
    assert not plan.fits and text.startswith('without clipping (train.max_grad_norm = "off")')
    tables["train"] |= {"max_grad_norm": "off"}
    plan = plan_for(tables, device)
    assert plan.fits and plan.strategy.optimizer_in_backward
    tables["train"] |= {"optimizer_in_backward": True}
    assert plan_for(tables, H100.model_copy(update={"budget_bytes": 8 * GiB})).advice


@pytest.mark.parametrize("gib", [24, 28, 32, 40, 44, 60])
def test_smaller_optimizer_states_are_taken_where_the_room_that_they_leave_makes_the_plan_faster(gib: int) -> None:
    """The fastest wins; of equally fast ones, which are within 2 %, the more exact states. An 8-bit update takes the
    card longer than a fused one, so that few checkpointed layers less are not worth it."""
    device = H100.model_copy(update={"budget_bytes": gib * GiB})

    def plan_with(optimizer: str) -> Plan:
        train = {"optimizer": optimizer, "global_batch_size": 4, "max_steps": 1000}
        model = {"id": "llama-3.2-1b", "dtype": "fp32"}
        return plan_for({"model": model, "method": {"kind": "full"}, "train": train}, device)

    exact, narrow, auto = (plan_with(name) for name in ("adamw", "adamw_8bit", "auto"))
    seconds = [plan.speed.step_seconds for plan in (exact, narrow) if plan.fits and plan.speed is not None]
    assert narrow.strategy.checkpointed_layers <= exact.strategy.checkpointed_layers
    wins = exact.fits and seconds[0] <= 1.02 * min(seconds)
    assert auto.fits and auto.strategy == (exact if wins else narrow).strategy
    assert wins == (gib >= 28)
