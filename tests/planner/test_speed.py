"""Step times from closed forms, what they mean for a run, and the order of candidates that follows."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import CPU, find_shape, make_gpu, make_inputs, make_strategy, plan_for

from fitune.planner.arithmetic import ROUNDING_BYTES
from fitune.planner.catalog import find_gpu, list_gpus
from fitune.planner.clock import estimate_widths, make_closed_form_clock
from fitune.planner.estimate import estimate_memory
from fitune.planner.plan import Plan, make_plan
from fitune.planner.rates import ATTENTION_SHARES, make_gpu_rates
from fitune.planner.speed import (
    PhaseTime,
    StepTime,
    Work,
    estimate_operation_seconds,
    estimate_phase_time,
    make_step_time,
    queue_phases,
)
from fitune.planner.step_cost import estimate_model_flops
from fitune.planner.strategy import Device

H100 = make_gpu("H100 80GB")
RATES = make_gpu_rates(find_gpu("H100 80GB"))
SHAPE = find_shape("llama-3.1-8b")
LAYERS = SHAPE.layers


def time_of(device: Device = H100, length: int = 4096, **changes: Any) -> StepTime:
    strategy = make_strategy(changes.pop("method", "lora"), **{"micro_batch_size": 2, **changes})
    return make_closed_form_clock(SHAPE, device, length)(strategy)


def test_an_operation_takes_the_longer_of_its_arithmetic_and_its_traffic() -> None:
    product = Work(kind="matrix", flops=RATES.half_flops, bytes=RATES.memory_bytes / 2)
    assert estimate_operation_seconds(product, RATES) == pytest.approx(1.0)
    skinny = Work(kind="matrix", flops=RATES.half_flops / 2, bytes=RATES.memory_bytes * 3)
    assert estimate_operation_seconds(skinny, RATES) == pytest.approx(3.0)
    assert estimate_operation_seconds(Work(kind="memory", bytes=1), RATES) == RATES.kernel_seconds


def test_an_fp32_product_is_slower_than_a_16_bit_one() -> None:
    half, full = (Work(kind="matrix", flops=1e12, width=width) for width in (2, 4))
    assert estimate_operation_seconds(full, RATES) > 10 * estimate_operation_seconds(half, RATES)


def test_a_float8_product_is_twice_as_fast_on_the_cards_that_have_them() -> None:
    half, float8 = (Work(kind="matrix", flops=1e12, width=width) for width in (2, 1))
    for gpu in ("H100 80GB", "B200", "L4"):
        rates = make_gpu_rates(find_gpu(gpu))
        assert estimate_operation_seconds(float8, rates) == pytest.approx(estimate_operation_seconds(half, rates) / 2)
    assert make_gpu_rates(find_gpu("A100 80GB")).float8_flops is None


def test_frozen_layers_in_float8_pay_where_what_quantises_is_compiled() -> None:
    assert time_of(compile=True, float8=True).seconds < 0.9 * time_of(compile=True).seconds
    assert time_of(kernels="liger", float8=True).seconds > time_of(kernels="liger").seconds


def test_attention_reaches_its_published_rate_on_long_rows_and_half_of_it_on_short_ones() -> None:
    def rate(sequence: int) -> float:
        work = Work(kind="attention", flops=1e15, head_dim=128, sequence=sequence)
        return 1e15 / estimate_operation_seconds(work, RATES)

    published = {512: 315e12, 2048: 484e12, 16384: 539e12}
    assert {length: rate(length) for length in published} == {
        length: pytest.approx(figure, rel=0.05) for length, figure in published.items()
    }


def test_a_phase_waits_for_the_slower_of_host_and_device() -> None:
    works = [Work(kind="memory", bytes=RATES.memory_bytes, calls=10)]
    busy = estimate_phase_time("forward", works, RATES)
    assert (busy.seconds, busy.host_seconds) == (pytest.approx(1.0), pytest.approx(10 * RATES.operation_seconds))
    waiting = estimate_phase_time("forward", [Work(kind="none", calls=100)], RATES)
    assert waiting.seconds == pytest.approx(100 * RATES.operation_seconds)
    alone = RATES.model_copy(update={"overlaps": False})
    serial = estimate_phase_time("forward", works, alone)
    assert serial.seconds == pytest.approx(serial.device_seconds + serial.host_seconds)


UPDATE = ("clip", "optimizer")


def queue(
    phases: dict[str, tuple[float, float]], *, waiting: str = "", together: bool = False, micro_batches: int = 1
) -> dict[str, float]:
    """Seconds by phase of a step in which the host runs ahead; phases: (device, host) seconds of a micro-batch;
    together: whether the host prepares clipping and update before the device begins with them."""
    made = {
        name: PhaseTime(
            name=name,
            device_seconds=device,
            host_seconds=host,
            seconds=device + host if name == waiting else max(device, host),
            waits=name == waiting,
            together=together and name in UPDATE and name != waiting,
        )
        for name, (device, host) in phases.items()
    }
    update = {name: made.pop(name) for name in UPDATE if name in made}
    time = make_step_time(made, update, micro_batches, tokens=1, flops=1.0, estimator="rehearsal")
    return {phase.name: phase.seconds for phase in queue_phases(time, micro_batches).phases}


def test_what_the_host_starts_while_the_device_is_busy_takes_no_time_of_its_own() -> None:
    step = {"forward": (10.0, 1.0), "backward": (20.0, 2.0), "clip": (0.5, 3.0), "optimizer": (0.25, 4.0)}
    assert queue(step) == {"forward": 10.0, "backward": 20.0, "clip": 0.5, "optimizer": 0.25}
    late = queue(step | {"optimizer": (0.25, 26.0)})
    assert late == {"forward": 10.0, "backward": 20.0, "clip": 0.5, "optimizer": 1.5}


def test_an_update_that_waits_for_the_device_hides_nothing() -> None:
    step = {"forward": (10.0, 1.0), "backward": (20.0, 2.0), "optimizer": (0.25, 4.0)}
    assert queue(step, waiting="optimizer")["optimizer"] == 4.25


phase_seconds = st.tuples(*[st.floats(0, 10)] * 2)


@given(st.tuples(*[phase_seconds] * 4), st.sampled_from(["", "optimizer"]), st.booleans(), st.integers(1, 12))
def test_a_host_that_runs_ahead_spares_time_and_no_work(
    phases: tuple[tuple[float, float], ...], waiting: str, together: bool, micro_batches: int
) -> None:
    step = dict(zip(("forward", "backward", "clip", "optimizer"), phases, strict=True))
    found = sum(queue(step, waiting=waiting, together=together, micro_batches=micro_batches).values())
    one_by_one = {waiting, *(UPDATE if together else ())}
    times = {name: micro_batches if name in ("forward", "backward") else 1 for name in step}
    device, host = (sum(times[name] * pair[which] for name, pair in step.items()) for which in (0, 1))
    alone = sum(times[name] * (sum(pair) if name in one_by_one else max(pair)) for name, pair in step.items())
    assert max(device, host) - 1e-6 <= found <= alone + 1e-6


@given(st.tuples(*[phase_seconds] * 2), st.integers(1, 12))
def test_many_micro_batches_are_counted_as_if_one_by_one(
    phases: tuple[tuple[float, float], ...], micro_batches: int
) -> None:
    host = device = 0.0
    for busy, starting in phases * micro_batches:
        host += starting
        device = max(device + busy, host)
    step = dict(zip(("forward", "backward"), phases, strict=True))
    assert sum(queue(step, micro_batches=micro_batches).values()) == pytest.approx(device, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"checkpointed_layers": LAYERS}, "computes the forward twice"),
        ({"loss_head": "chunked"}, "computes logits twice"),
        ({"activation_offload": True}, "activations cross the bus"),
        ({"attention": "eager"}, "writes its scores out"),
        ({"adapter_dropout": 0.1}, "draws masks"),
        ({"method": "qlora"}, "dequantises"),
    ],
)
def test_what_costs_time_is_slower(change: dict[str, Any], why: str) -> None:
    assert time_of(**change).seconds > 1.001 * time_of().seconds, why


def test_compiled_layers_are_faster() -> None:
    assert time_of(compile=True).seconds < 0.85 * time_of().seconds


def test_a_long_run_compiles_its_layers_and_one_that_would_not_earn_the_start_does_not() -> None:
    def plan_steps(steps: int, compile_layers: Any = "auto") -> Plan:
        train = {"max_steps": steps, "compile": compile_layers, "global_batch_size": 8}
        tables = {"model": {"id": "llama-3.1-8b"}, "method": {"kind": "lora"}, "train": train}
        return plan_for(tables, make_gpu("H100 80GB"))

    eager, compiled = (plan_steps(1, on).speed for on in (False, True))
    assert eager is not None and compiled is not None
    start, spared = compiled.startup_seconds - eager.startup_seconds, eager.step_seconds - compiled.step_seconds
    assert start > 0 and spared > 0
    few, many = int(0.8 * start / spared), int(1.5 * start / spared)
    assert not plan_steps(few).strategy.compile
    assert plan_steps(many).strategy.compile


def test_half_of_the_layers_checkpointed_cost_half_of_the_time() -> None:
    none, half, every = (time_of(checkpointed_layers=layers).seconds for layers in (0, LAYERS // 2, LAYERS))
    assert half - none == pytest.approx((every - none) / 2)


def test_attention_that_is_kept_pays_for_long_rows_and_not_for_short_ones_whose_layers_are_not_compiled() -> None:
    for length, compiled, faster in ((16384, True, True), (16384, False, True), (512, False, False)):
        again, kept = (
            time_of(length=length, compile=compiled, checkpointed_layers=LAYERS, save_attention=on).seconds
            for on in (False, True)
        )
        assert (kept < again) == faster


def test_with_offload_checkpointing_is_faster_on_a_gpu_and_slower_on_a_cpu() -> None:
    """All activations cross the bus without it, and with it each layer's input only; a CPU has no bus."""
    for offload, device, faster in ((True, H100, True), (False, H100, False), (True, CPU, False)):
        kept, checkpointed = (
            time_of(device, activation_offload=offload, checkpointed_layers=layers).seconds for layers in (0, LAYERS)
        )
        assert (checkpointed < kept) == faster


def test_a_small_micro_batch_waits_for_the_host() -> None:
    small, large = (time_of(length=512, micro_batch_size=rows) for rows in (1, 64))
    assert 64 * small.seconds > 2 * large.seconds


def test_an_8_bit_update_waits_for_instructions_and_not_for_its_traffic() -> None:
    def update_seconds(gpu: str, optimizer: str, **changes: Any) -> float:
        rates = make_gpu_rates(find_gpu(gpu)).model_copy(update=changes)
        time = time_of(make_gpu(gpu, rates=rates), method="full", optimizer=optimizer)
        return next(phase.device_seconds for phase in time.phases if phase.name == "optimizer")

    traffic = 10 * SHAPE.parameters / RATES.memory_bytes
    assert update_seconds("H100 80GB", "adamw_8bit") > 5 * traffic
    assert update_seconds("H100 80GB", "adamw_8bit", instructions=None) == pytest.approx(traffic)
    assert update_seconds("RTX 4090", "adamw_8bit") < 1.2 * update_seconds("H100 80GB", "adamw_8bit")
    assert update_seconds("RTX 4090", "adamw_32bit") > 2 * update_seconds("H100 80GB", "adamw_32bit")


def test_a_compiled_update_of_bf16_weights_takes_an_eighth_of_the_time_and_no_memory_of_its_own() -> None:
    changes = {"method": "full", "rounding": "stochastic", "optimizer": "adamw"}

    def update_seconds(**more: Any) -> float:
        return next(phase.device_seconds for phase in time_of(**changes, **more).phases if phase.name == "optimizer")

    def update_bytes(**more: Any) -> int:
        strategy = make_strategy(**changes, **more)
        memory = estimate_memory(SHAPE, strategy, H100, sequence_length=4096, merge=False)
        return next(phase.peak_allocated_bytes for phase in memory.phases if phase.name == "optimizer")

    assert 14 * SHAPE.parameters / RATES.memory_bytes < update_seconds(compile=True) < update_seconds() / 8
    assert update_bytes() - update_bytes(compile=True) == ROUNDING_BYTES * 2**24
    adafactor = {**changes, "optimizer": "adafactor"}
    assert time_of(**adafactor, compile=True).phases[-1] == time_of(**adafactor).phases[-1]


def test_paged_states_cross_the_bus_twice_a_step_where_they_do_not_all_fit_and_never_where_they_do() -> None:
    def optimizer_seconds(budget: str, optimizer: str) -> tuple[Plan, float]:
        tables = {"method": {"kind": "full"}, "train": {"optimizer": optimizer}, "model": {"id": "llama-3.2-1b"}}
        device = make_gpu("H100 80GB", budget_bytes=int(float(budget) * 2**30))
        plan = plan_for(tables, device)
        assert plan.speed is not None
        return plan, next(phase.seconds for phase in plan.speed.phases if phase.name == "optimizer")

    for budget, fits in (("79", True), ("8", False)):
        paged, seconds = optimizer_seconds(budget, "paged_adamw_8bit")
        _, unpaged = optimizer_seconds(budget, "adamw_8bit")
        assert paged.fits == fits and paged.memory.managed_bytes > 2 * 10**9
        moved = 0.0 if fits else 2 * paged.memory.managed_bytes / (RATES.host_bytes or 1.0)
        assert seconds == pytest.approx(unpaged + moved)


def test_accumulation_repeats_forward_and_backward_only() -> None:
    one, four = time_of(), time_of(gradient_accumulation_steps=4)
    first, fourth = ({phase.name: phase.seconds for phase in time.phases} for time in (one, four))
    assert fourth["backward"] == pytest.approx(4 * first["backward"])
    assert fourth["optimizer"] == first["optimizer"]


def test_full_fine_tuning_needs_six_operations_a_parameter_and_token() -> None:
    met = SHAPE.parameters - SHAPE.embedding_parameters
    full = estimate_model_flops(SHAPE, make_strategy("full"), 1)
    assert full == pytest.approx(6 * met, rel=0.001)
    assert estimate_model_flops(SHAPE, make_strategy("lora"), 1) == pytest.approx(4 * met, rel=0.02)


@given(st.sampled_from(["full", "lora", "qlora"]), st.integers(1, 64), st.integers(1, 10**4))
def test_no_step_is_faster_than_the_data_sheet_allows(method: str, rows: int, length: int) -> None:
    time = time_of(method=method, micro_batch_size=rows, length=length)
    assert 0 < time.flops / RATES.peak_flops < time.seconds


@pytest.mark.parametrize("gpu", list_gpus(), ids=lambda gpu: gpu.name)
def test_every_card_has_rates_that_a_step_can_be_timed_with(gpu: Any) -> None:
    rates = make_gpu_rates(gpu)
    assert (rates.attention, False) in ATTENTION_SHARES and (rates.attention, True) in ATTENTION_SHARES
    assert rates.half_flops < rates.peak_flops
    assert time_of(make_gpu(gpu.name)).seconds > 0


def test_a_plan_tells_how_fast_it_goes() -> None:
    tables = {"train": {"max_steps": 100}, "budget": {"price_per_hour": 3.0}}
    speed = plan_for(tables, make_gpu("H100 80GB")).speed
    assert speed is not None and speed.total_seconds is not None and speed.cost is not None
    parts = {part.name: part.seconds for part in speed.parts}
    assert speed.total_seconds == pytest.approx(sum(parts.values()))
    assert parts["train"] == pytest.approx(100 * speed.step_seconds)
    assert speed.startup_seconds == pytest.approx(parts["load"] + parts.get("compile", 0.0))
    assert speed.cost == pytest.approx(3.0 * speed.total_seconds / 3600)
    assert speed.joules_per_1000_tokens is not None and speed.energy_kwh is not None
    assert 105 * 100 * speed.step_seconds < speed.energy_kwh * 3.6e6 <= 701 * 100 * speed.step_seconds
    assert 0.2 < speed.model_flops_utilization < 0.76


def list_part_seconds(facts: dict[str, Any] | None = None, **tables: dict[str, Any]) -> dict[str, float]:
    device, tables = make_gpu("H100 80GB"), {"train": {"max_steps": 100}, "method": {"kind": "lora"}} | tables
    inputs = make_inputs(tables, device)
    inputs = replace(inputs, data=inputs.data.model_copy(update=facts or {}))
    speed = make_plan(inputs).speed
    assert speed is not None
    return {part.name: part.seconds for part in speed.parts}


def test_the_time_of_a_run_counts_evaluations_and_answers() -> None:
    none = list_part_seconds()
    assert "evaluate" not in none
    rows = {"eval_rows": 64, "forgetting_rows": 32}
    data = {"train": "x", "eval": "y", "max_length": 1024}
    few = list_part_seconds(rows, data=data)
    every = list_part_seconds(rows, data=data, train={"max_steps": 100, "eval_every": 20})
    assert few["train"] == every["train"]
    assert every["evaluate"] / few["evaluate"] == pytest.approx((6 * 64 + 2 * 32) / (2 * 64 + 2 * 32), rel=0.3)
    assert list_part_seconds({"has_question": True})["evaluate"] > 0.1


def test_held_out_rows_that_are_shorter_than_the_training_rows_take_less_time() -> None:
    def evaluate(**tokens: tuple[int, ...]) -> float:
        facts = {"eval_rows": 64, "forgetting_rows": 64} | tokens
        return list_part_seconds(facts, data={"train": "x", "eval": "y", "max_length": 1024})["evaluate"]

    assert evaluate(eval_row_tokens=(1024,)) == pytest.approx(evaluate())
    half, both = evaluate(eval_row_tokens=(500, 524)), evaluate(eval_row_tokens=(512,), forgetting_row_tokens=(512,))
    assert both == evaluate(eval_row_tokens=(1,), forgetting_row_tokens=(1,)), "the host starts as many operations"
    assert 0.75 * evaluate() < half < 0.9 * evaluate() and half - both == pytest.approx(evaluate() - half)


def test_the_time_of_a_run_counts_checkpoints_and_merging() -> None:
    def save_every(every: Any, *, merge: bool = False) -> dict[str, float]:
        return list_part_seconds(output={"save_every": every, "merge": merge})

    never, often, late = save_every("never"), save_every(10), save_every("auto")
    assert often["save"] > 2 * never["save"] and "merge" not in never
    assert late["save"] == never["save"], "checkpoints that there is disk for are not all written"
    merged = save_every("never", merge=True)
    assert merged["merge"] > merged["load"]


def test_without_rates_a_plan_has_no_speed_and_hours_do_not_bind() -> None:
    plan = plan_for({"budget": {"max_hours": 0.001}}, make_gpu("H100 80GB", rates=None))
    assert plan.fits and plan.speed is None
    assert any("budget.max_hours: how fast H100 80GB is is not known" in text for text in plan.warnings)


def test_hours_that_no_candidate_keeps_are_the_reason_and_the_advice() -> None:
    tables = {"budget": {"max_hours": 0.01}, "train": {"max_steps": 1000}, "method": {"kind": "lora"}}
    plan = plan_for(tables, make_gpu("H100 80GB"))
    assert not plan.fits
    late = [one for one in plan.rejected if one.component == "time"]
    assert late and late[0].needed_seconds is not None and late[0].needed_seconds > 36
    assert "36 s in budget.max_hours: 1,000 steps of" in late[0].reason
    assert any("train.max_steps = " in text and "would fit budget.max_hours" in text for text in plan.advice)


def test_a_method_that_is_too_slow_gives_way_to_the_next() -> None:
    device = make_gpu("H100 80GB")
    tables: dict[str, Any] = {"train": {"max_steps": 2000}, "model": {"id": "llama-3.1-8b"}}
    alone = {
        kind: make_plan(make_inputs({**tables, "method": {"kind": kind}}, device)).speed for kind in ("qlora", "lora")
    }
    qlora, lora = (speed.total_seconds for speed in alone.values() if speed is not None and speed.total_seconds)
    assert lora < qlora, "it does not dequantise"
    order = {"prefer": ["qlora", "lora"]}
    for seconds, method in ((2 * qlora, "qlora"), ((lora + qlora) / 2, "lora")):
        plan = make_plan(make_inputs({**tables, "method": order, "budget": {"max_hours": seconds / 3600}}, device))
        assert plan.fits and plan.strategy.method == method
    assert "time" in {one.component for one in plan.rejected if one.strategy.method == "qlora"}


def test_of_equally_fast_plans_the_one_with_the_less_lossy_optimizer_and_head_wins() -> None:
    tables = {"model": {"id": "mistral-7b-v0.3"}, "method": {"kind": "lora", "fused_adapters": False}}
    plan = plan_for(tables, make_gpu("H100 80GB"))
    assert (plan.strategy.optimizer, plan.strategy.loss_head) == ("adamw", "full")


def test_a_vocabulary_whose_rows_no_cache_holds_makes_each_logit_cost_more() -> None:
    """A softmax goes through such a row three times, and in backward twice."""

    def seconds(vocabulary: int, head: str) -> float:
        shape = replace(SHAPE, vocab_size=vocabulary)
        clock = make_closed_form_clock(shape, H100, 4096)
        forward, backward, *_ = clock(make_strategy("lora", micro_batch_size=2, loss_head=head)).phases
        return forward.device_seconds + backward.device_seconds

    for head, read_again in (("full", 8 + 4), ("chunked", 8 + 8 + 4), ("fused", 8)):
        cached, long = seconds(47_000, head), seconds(48_000, head)
        step = seconds(49_000, head) - long  # what a thousand more entries cost
        again = read_again * 8192 * 48_000 / RATES.memory_bytes
        assert long - cached - step == pytest.approx(again, rel=0.03), head


def test_clipping_and_an_update_of_all_tensors_at_once_begin_when_the_host_has_prepared_them() -> None:
    phases = {phase.name: phase for phase in time_of(method="full").phases}
    for name in ("clip", "optimizer"):
        assert phases[name].seconds == phases[name].device_seconds + phases[name].host_seconds
    waited = time_of(method="full", optimizer="adamw_8bit").phases[-1]
    assert waited.waits and not waited.together, "bitsandbytes starts one tensor after the other"
    busy = {"forward": (10.0, 1.0), "backward": (20.0, 2.0), "clip": (0.5, 3.0), "optimizer": (0.25, 4.0)}
    assert queue(busy, together=True) == {"forward": 10.0, "backward": 20.0, "clip": 0.5, "optimizer": 0.25}
    idle = busy | {"forward": (1.0, 10.0), "backward": (2.0, 20.0)}
    assert queue(idle, together=True) == {"forward": 10.0, "backward": 20.0, "clip": 3.5, "optimizer": 3.75}


def test_hours_without_the_number_of_steps_do_not_bind_and_the_plan_says_so() -> None:
    plan = plan_for({"budget": {"max_hours": 0.001}}, make_gpu("H100 80GB"), rows=None)
    assert plan.fits and plan.speed is not None and plan.speed.total_seconds is None
    assert any("without the rows the number of steps is not known" in text for text in plan.warnings)


def plan_rows(row_tokens: tuple[int, ...] | None, **changes: Any) -> Plan:
    tables = {
        "method": {"kind": "lora"},
        "data": {"train": "x", "max_length": 1024},
        "train": {"max_steps": 10, **changes},
    }
    inputs = make_inputs(tables, H100)
    return make_plan(replace(inputs, data=inputs.data.model_copy(update={"row_tokens": row_tokens})))


def test_shorter_rows_make_shorter_steps_and_their_padding_does_not_count() -> None:
    full, same, short = (plan_rows(rows).speed for rows in (None, (1024,), (128, 256)))
    assert full is not None and same is not None and short is not None
    assert same.step_seconds == pytest.approx(full.step_seconds)
    assert short.step_seconds < full.step_seconds
    assert short.phases[0].device_seconds < 0.3 * full.phases[0].device_seconds
    tokens = short.tokens_per_second * short.step_seconds
    assert tokens == pytest.approx(16 * 192, rel=0.01), "16 rows of 192 tokens on average"
    assert short.model_flops_utilization < full.model_flops_utilization


def test_where_lengths_differ_small_micro_batches_pad_less() -> None:
    rows = tuple(range(64, 1025, 64))
    for micro, widest in ((1, 560), (4, 700), (16, 1024)):
        strategy = make_strategy(micro_batch_size=micro, gradient_accumulation_steps=16 // micro)
        widths = estimate_widths(rows, strategy, longest=1024)
        assert len(widths) == 16 // micro
        assert widths == sorted(widths, reverse=True)
        assert sum(widths) / len(widths) <= widest


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 8))
def test_no_micro_batch_is_padded_beyond_the_longest_row(tokens: list[int], micro: int, count: int) -> None:
    strategy = make_strategy(micro_batch_size=micro, gradient_accumulation_steps=count)
    widths = estimate_widths(sorted(tokens), strategy, longest=max(tokens))
    assert widths == sorted(widths, reverse=True)
    assert all(0 < width <= max(tokens) for width in widths)


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=60), st.booleans())
def test_attention_of_packed_rows_takes_what_that_of_their_documents_takes(lengths: list[int], backward: bool) -> None:
    rates = make_gpu_rates(find_gpu("A100 80GB")).model_copy(update={"kernel_seconds": 0.0})

    def attend(tokens: int) -> Work:
        return Work(kind="attention", flops=256.0 * tokens * tokens, sequence=tokens, backward=backward)

    apart = sum(estimate_operation_seconds(attend(tokens), rates) for tokens in lengths)
    average = sum(tokens * tokens for tokens in lengths) / sum(lengths)
    packed = attend(sum(lengths)).divide(average)
    assert estimate_operation_seconds(packed, rates) == pytest.approx(apart)


def test_packed_rows_are_attended_by_flash_attention_whose_kernels_are_slower_than_cudnn_s_on_an_h100() -> None:
    whole = Work(kind="attention", flops=1e15, sequence=4096)
    packed = whole.divide(4096)
    assert estimate_operation_seconds(packed, RATES) > 1.4 * estimate_operation_seconds(whole, RATES)
    older = make_gpu_rates(find_gpu("A100 80GB"))
    assert estimate_operation_seconds(packed, older) == estimate_operation_seconds(whole, older)


def test_short_documents_of_packed_rows_spare_attention_where_no_mask_is_needed() -> None:
    def seconds(attention: str, document_tokens: float | None) -> float:
        strategy = make_strategy(packing=True, attention=attention)
        return make_closed_form_clock(SHAPE, H100, 16384, document_tokens=document_tokens)(strategy).seconds

    assert seconds("varlen", 128) < 0.85 * seconds("varlen", None)
    assert seconds("sdpa", 128) == seconds("sdpa", None), "a mask hides scores, it does not spare them"


def test_short_mixed_rows_are_planned_at_least_three_times_as_fast_packed_as_padded() -> None:
    """Lengths as of benchmarks.rows: half of them below 80 tokens, one in a hundred above 460."""
    draw = Random(0)
    rows = sorted(min(2048, round(80 * draw.lognormvariate(0, 0.75))) for _ in range(2000))
    documents = sum(tokens * tokens for tokens in rows) / sum(rows)
    standing = tuple(rows[len(rows) // 128 * number] for number in range(128))
    speeds = {}
    for name, batch, facts, settings in (
        ("padded", 16, {"row_tokens": standing, "longest_row_tokens": rows[-1]}, {"micro_batch_size": 16}),
        ("packed", 2, {"row_tokens": (2040, 2048), "document_tokens": documents}, {}),
    ):
        data = {"train": "x", "max_length": 2048, "packing": name == "packed"}
        tables = {"method": {"kind": "lora"}, "data": data, "train": {"global_batch_size": batch, **settings}}
        inputs = make_inputs(tables, H100)
        speed = make_plan(replace(inputs, data=inputs.data.model_copy(update=facts))).speed
        assert speed is not None
        speeds[name] = speed.tokens_per_second
    assert speeds["packed"] > 3 * speeds["padded"]


def test_a_plan_names_what_its_steps_wait_for() -> None:
    limits = {}
    for micro, length in ((1, 128), (16, 4096)):
        tables = {"method": {"kind": "lora"}, "data": {"train": "x", "max_length": length}}
        fixed = {"train": {"micro_batch_size": micro, "compile": False}}
        speed = plan_for({**tables, **fixed}, H100).speed
        assert speed is not None
        limits[length] = speed.limit
    assert limits == {128: "host", 4096: "device"}
