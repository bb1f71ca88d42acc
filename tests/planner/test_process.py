"""What a CPU's process holds beside its tensors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import CPU, find_shape, make_gpu, make_strategy

from fitune.planner.arithmetic import estimate_optimizer_bytes
from fitune.planner.estimate import estimate_memory, estimate_weight_files
from fitune.planner.host import lay_host
from fitune.planner.memory import Memory
from fitune.planner.process import (
    AMX_BYTES,
    ATTENTION_PRODUCTS,
    CACHED_PRIMITIVES,
    KERNEL_BYTES,
    PRIMITIVE_BYTES,
    count_product_shapes,
    estimate_heap_bytes,
    estimate_product_bytes,
)
from fitune.planner.strategy import DataFacts, Device, Strategy
from fitune.planner.widths import WIDTH_MULTIPLE, EvaluatedWidths, count_evaluated_widths, estimate_distinct_widths

MODEL = "smollm2-135m-instruct"
lengths = st.lists(st.integers(1, 500), min_size=1, max_size=128).map(lambda one: tuple(sorted(one)))


def measure(
    strategy: Strategy, device: Device = CPU, *, widths: float = 1, length: int = 256, stored_bytes: int | None = None
) -> Memory:
    shape = find_shape(MODEL)
    return lay_host(
        estimate_memory(shape, strategy, device, sequence_length=length, merge=False),
        shape,
        strategy,
        device,
        sequence_length=length,
        weights=estimate_weight_files(shape, strategy, merge=False),
        stored_bytes=stored_bytes,
        widths=widths,
    )


def hosts_of(memory: Memory) -> dict[str, int]:
    return {phase.name: phase.host_bytes or 0 for phase in memory.phases}


def facts_of(row_tokens: tuple[int, ...] | None, longest: int = 512) -> DataFacts:
    return DataFacts(rows=100, longest_row_tokens=longest, row_tokens=row_tokens, source="tokenised")


def test_a_step_has_one_product_for_each_size_of_a_layer_in_each_direction() -> None:
    """Llama's layers have four sizes, the head a fifth; adapters five more, which alone are trained with LoRA."""
    shape = find_shape(MODEL)
    assert count_product_shapes(shape, make_strategy("full")) == 5 * 3
    assert count_product_shapes(shape, make_strategy("lora")) == 5 * 2 + 5 * 3


def test_fused_adapters_have_products_of_parts_of_joint_results() -> None:
    """Counted by oneDNN itself in a run of a model of the same kind: 13 forward, 12 and 8 backward."""
    fused = make_strategy("lora", fused_adapters=True)
    assert count_product_shapes(find_shape(MODEL), fused) == 13 + 12 + 8


def test_every_width_leaves_kernels_of_its_products_and_the_cache_is_bounded() -> None:
    shape, strategy = find_shape(MODEL), make_strategy("lora")
    one, two = (estimate_product_bytes(shape, strategy, CPU, widths=widths) for widths in (1, 2))
    assert two == pytest.approx(2 * one)
    assert one == pytest.approx((25 + ATTENTION_PRODUCTS) * 0.55 * 2**20, rel=0.02)
    many = CACHED_PRIMITIVES
    more = estimate_product_bytes(shape, strategy, CPU, widths=many + 1) - estimate_product_bytes(
        shape, strategy, CPU, widths=many
    )
    assert more == pytest.approx((25 + ATTENTION_PRODUCTS) * KERNEL_BYTES, abs=1)


def test_a_product_leaves_more_on_a_processor_with_amx() -> None:
    sizes = [
        estimate_product_bytes(find_shape(MODEL), make_strategy("lora"), device, widths=1)
        for device in (CPU, CPU.model_copy(update={"has_amx": True}))
    ]
    assert sizes[1] - sizes[0] == (25 + ATTENTION_PRODUCTS) * AMX_BYTES


def test_computing_in_fp32_leaves_no_kernels() -> None:
    strategy = make_strategy("lora", weights_dtype="fp32", compute_dtype="fp32")
    assert estimate_product_bytes(find_shape(MODEL), strategy, CPU, widths=10) == 0


def test_more_widths_raise_every_phase_but_loading() -> None:
    few, many = (hosts_of(measure(make_strategy("lora"), widths=widths)) for widths in (1, 12))
    assert few["load"] == many["load"]
    rises = {many[name] - few[name] for name in few if name not in ("load", "merge")}
    assert rises == {
        estimate_product_bytes(find_shape(MODEL), make_strategy("lora"), CPU, widths=12)
        - estimate_product_bytes(find_shape(MODEL), make_strategy("lora"), CPU, widths=1)
    }


@given(lengths, st.integers(1, 1000), st.integers(1, 1000))
def test_longer_runs_meet_more_widths_but_never_more_than_the_rows_have(
    row_tokens: tuple[int, ...], one: int, other: int
) -> None:
    data, strategy = facts_of(row_tokens), make_strategy("lora")
    few, many = (estimate_distinct_widths(data, strategy, steps=steps) for steps in sorted((one, other)))
    everything = estimate_distinct_widths(data, strategy, steps=None)
    assert everything == len({-(-tokens // WIDTH_MULTIPLE) for tokens in row_tokens})
    assert 1 - 1e-9 <= few <= many + 1e-9 <= everything + 2e-9


def test_packed_rows_have_one_width_and_unknown_ones_many() -> None:
    packed = make_strategy("lora", packing=True)
    assert estimate_distinct_widths(facts_of(None), packed, steps=None) == 1
    assert estimate_distinct_widths(facts_of(None), make_strategy("lora"), steps=None) == 512 / WIDTH_MULTIPLE / 2


def test_evaluations_meet_widths_of_their_own_where_training_rows_are_packed() -> None:
    held_out = {"eval_row_tokens": (20, 40, 41, 90), "has_question": True}
    packed = facts_of((512,)).model_copy(update=held_out)
    one, two = (make_strategy("lora", packing=True, micro_batch_size=rows) for rows in (1, 2))
    assert count_evaluated_widths(packed, one) == EvaluatedWidths(alone=len({24, 40, 48, 96}) + 2, trained=0)
    assert count_evaluated_widths(packed, two) == EvaluatedWidths(alone=len({96, 40}) + 2, trained=0)
    plain = facts_of((20, 40, 96, 512)).model_copy(update=held_out)
    assert count_evaluated_widths(plain, one) == EvaluatedWidths(alone=len({48}) + 2, trained=len({24, 40, 96}))
    assert count_evaluated_widths(facts_of(None), one) == EvaluatedWidths(alone=0, trained=0)


@pytest.mark.parametrize(("fused", "alone", "trained"), [(False, 5 + 5, 0), (True, 5 + 5, 4 + 2)])
def test_evaluations_run_the_forward_without_fused_adapters(fused: bool, alone: int, trained: int) -> None:
    """At a width that training has met, too, that is the four sizes of layers that adapters are then not added to, and
    what two sizes of adapters read, which is not cut out of a joint result."""
    shape, strategy = find_shape(MODEL), make_strategy("lora", fused_adapters=fused)
    none, of_its_own, met = (
        estimate_product_bytes(shape, strategy, CPU, widths=1, evaluated=EvaluatedWidths(alone=alone, trained=trained))
        for alone, trained in ((0, 0), (1, 0), (0, 1))
    )
    each = KERNEL_BYTES + PRIMITIVE_BYTES
    assert (of_its_own - none, met - none) == (alone * each, trained * each)


def test_the_pages_of_a_file_that_is_converted_are_resident_but_not_required() -> None:
    """The kernel takes them back where memory is short."""
    small, large = (measure(make_strategy("qlora"), stored_bytes=size) for size in (2**28, 2**34))
    assert hosts_of(large)["load"] - hosts_of(small)["load"] == 2**34 - 2**28
    assert large.peak_device_bytes == hosts_of(large)["load"]
    assert (large.required_bytes, large.host_bytes) == (small.required_bytes, small.host_bytes)


def test_the_heap_stays_as_it_was_for_the_longest_rows_whose_blocks_it_holds() -> None:
    shape, strategy = find_shape(MODEL), make_strategy("lora")
    heaps = [estimate_heap_bytes(shape, strategy, sequence_length=length) for length in (64, 1024, 2**15, 2**16)]
    assert heaps[0] < heaps[1] < heaps[2]
    assert heaps[2] == pytest.approx(heaps[3], rel=0.01)


def test_a_step_takes_more_than_what_is_between_steps_and_an_evaluation_less() -> None:
    hosts = hosts_of(measure(make_strategy("lora")))
    assert hosts["save"] < hosts["clip"] <= hosts["optimizer"] <= hosts["backward"]


def test_8_bit_states_break_up_the_heap_for_all_later_steps() -> None:
    """30 steps of full fine-tuning with them needed 14 % more than planned while only the update counted it."""
    strategy = make_strategy("full", optimizer="adamw_8bit")
    memory = measure(strategy)
    live, hosts = {one.name: one.peak_allocated_bytes for one in memory.phases}, hosts_of(memory)
    beside = hosts["save"] - live["save"]
    (states, _) = estimate_optimizer_bytes(find_shape(MODEL), strategy)
    for phase in ("forward", "backward", "clip"):
        assert hosts[phase] >= live[phase] + beside + states, phase
    assert hosts["evaluate"] == live["evaluate"] + beside, "the heap was given back"


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_32bit"])
def test_bitsandbytes_updates_take_copies_on_a_cpu_and_none_on_a_gpu(optimizer: str) -> None:
    strategy = make_strategy("full", weights_dtype="fp32", compute_dtype="fp32", optimizer=optimizer)
    on_cpu, on_gpu = (
        {one.name: one.peak_allocated_bytes for one in measure(strategy, device).phases}
        for device in (CPU, make_gpu("H100 80GB"))
    )
    assert on_gpu["optimizer"] == on_gpu["clip"]
    assert on_cpu["optimizer"] > on_cpu["clip"]
