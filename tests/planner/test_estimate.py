"""The memory of a run: what adds up, what grows with what, and which phases there are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plans import CPU, GiB, find_shape, make_gpu, make_strategy

from fitune.planner.activations import StepShape, estimate_kept_bytes
from fitune.planner.arithmetic import (
    estimate_gradient_bytes,
    estimate_optimizer_bytes,
    estimate_weight_bytes,
    list_trainable_tensors,
)
from fitune.planner.catalog import list_models
from fitune.planner.estimate import CUDA_CONTEXT_BYTES, FRAGMENTATION, MARGIN, MARGIN_BYTES, estimate_memory
from fitune.planner.memory import PHASES, Memory
from fitune.planner.strategy import Device, Strategy

H100 = make_gpu("H100 80GB")
DEVICES = {"cuda": H100, "cpu": CPU}
OPTIMIZERS = ["adamw", "adamw_8bit", "adamw_32bit", "paged_adamw_8bit", "paged_adamw", "adafactor"]


def estimate(name: str, strategy: Strategy, length: int = 512, device: Device = H100, merge: bool = False) -> Memory:
    return estimate_memory(find_shape(name), strategy, device, sequence_length=length, merge=merge)


def find_phase(memory: Memory, name: str) -> int:
    return next(phase.peak_allocated_bytes for phase in memory.phases if phase.name == name)


names = st.sampled_from([model.name for model in list_models()])
devices = st.sampled_from(list(DEVICES))


@st.composite
def strategies(draw: st.DrawFn) -> Strategy:
    method = draw(st.sampled_from(["full", "lora", "qlora"]))
    weights = draw(st.sampled_from(["bf16", "fp32"]))
    adapters: dict[str, Any] = {}
    if method != "full":
        adapters = {
            "adapter_rank": draw(st.integers(1, 512)),
            "adapter_dtype": draw(st.sampled_from(["bf16", "fp32"])),
            "adapter_dropout": draw(st.sampled_from([0.0, 0.05])),
        }
    return make_strategy(
        method,
        weights_dtype=weights,
        rounding=draw(st.sampled_from(["nearest", "stochastic"])),
        attention=draw(st.sampled_from(["sdpa", "eager"])),
        micro_batch_size=draw(st.integers(1, 16)),
        gradient_accumulation_steps=draw(st.sampled_from([1, 2, 16])),
        checkpointed_layers=draw(st.sampled_from([0, 3, 99])),
        loss_head=draw(st.sampled_from(["full", "chunked"])),
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        double_quantization=draw(st.booleans()),
        activation_offload=draw(st.booleans()),
        expandable_segments=draw(st.booleans()),
        **adapters,
    )


@settings(max_examples=150)
@given(names, strategies(), st.integers(1, 16384), devices, st.booleans())
def test_components_add_up_to_the_peak_and_the_peak_is_the_highest_phase(
    name: str, strategy: Strategy, length: int, kind: str, merge: bool
) -> None:
    memory = estimate(name, strategy, length, DEVICES[kind], merge)
    assert sum(dict(memory.components).values()) == memory.peak_allocated_bytes
    assert tuple(phase.name for phase in memory.phases) == PHASES
    assert memory.peak_allocated_bytes == max(phase.peak_allocated_bytes for phase in memory.phases)
    assert find_phase(memory, memory.peak_phase) == memory.peak_allocated_bytes
    assert memory.required_bytes > memory.peak_device_bytes > memory.peak_allocated_bytes > 0
    assert (memory.peak_reserved_bytes is None) == (kind == "cpu")


@settings(max_examples=60)
@given(names, strategies(), st.integers(1, 8192), st.integers(1, 8192), devices)
def test_longer_rows_never_need_less(name: str, strategy: Strategy, one: int, other: int, kind: str) -> None:
    short, long = (estimate(name, strategy, length, DEVICES[kind]) for length in sorted((one, other)))
    assert short.peak_allocated_bytes <= long.peak_allocated_bytes
    assert short.required_bytes <= long.required_bytes


@settings(max_examples=60)
@given(names, strategies(), st.integers(1, 32), st.integers(1, 2048), devices)
def test_more_rows_at_a_time_never_need_less(name: str, strategy: Strategy, rows: int, length: int, kind: str) -> None:
    few, many = (
        estimate(name, strategy.model_copy(update={"micro_batch_size": n}), length, DEVICES[kind])
        for n in (rows, rows + 1)
    )
    assert few.required_bytes <= many.required_bytes


@settings(max_examples=60)
@given(names, st.sampled_from(["lora", "qlora"]), st.integers(1, 1024), devices)
def test_a_higher_rank_needs_more(name: str, method: str, rank: int, kind: str) -> None:
    low, high = (estimate(name, make_strategy(method, adapter_rank=r), device=DEVICES[kind]) for r in (rank, rank + 1))
    assert low.required_bytes < high.required_bytes


@settings(max_examples=60)
@given(names, strategies(), st.integers(256, 4096), devices)
def test_checkpointing_never_needs_more(name: str, strategy: Strategy, length: int, kind: str) -> None:
    plain = strategy.model_copy(update={"activation_offload": False})  # with offload there is nothing left to spare
    without, checkpointed = (
        estimate(name, plain.model_copy(update={"checkpointed_layers": 99 * on}), length, DEVICES[kind])
        for on in (False, True)
    )
    one_checkpoint = 1.01  # where gradients and states are the peak, the first layer's input is still there
    assert checkpointed.required_bytes <= one_checkpoint * without.required_bytes


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt2-medium", "gemma-2-2b"])
def test_a_phase_that_only_holds_states_is_exactly_what_is_held(name: str, method: str) -> None:
    strategy, shape = make_strategy(method, optimizer="adamw_32bit"), find_shape(name)
    memory, on_cpu = estimate(name, strategy), estimate(name, strategy, device=CPU)
    held = estimate_weight_bytes(shape, strategy) + estimate_optimizer_bytes(shape, strategy)[0]
    adapters = 0 if method == "full" else estimate_gradient_bytes(shape, strategy)
    assert find_phase(on_cpu, "save") == held + adapters
    assert find_phase(on_cpu, "clip") == held + adapters + estimate_gradient_bytes(shape, strategy)
    assert find_phase(memory, "clip") > find_phase(on_cpu, "clip"), "a GPU holds cuBLAS's workspace too"


def test_gradients_of_earlier_micro_batches_are_live_in_the_forward() -> None:
    strategy = make_strategy("full")
    alone, accumulating = (
        find_phase(estimate("llama-3.2-1b", strategy.model_copy(update={"gradient_accumulation_steps": n})), "forward")
        for n in (1, 4)
    )
    assert accumulating - alone == estimate_gradient_bytes(find_shape("llama-3.2-1b"), strategy)


def test_paged_states_count_beside_the_allocator_on_a_gpu_and_in_ram_on_a_cpu() -> None:
    paged, plain = (make_strategy("full", optimizer=name) for name in ("paged_adamw", "adamw_32bit"))
    managed = estimate_optimizer_bytes(find_shape("llama-3.2-1b"), paged)[1]
    memory = estimate("llama-3.2-1b", paged)
    assert memory.peak_reserved_bytes == int(memory.peak_allocated_bytes * (1 + FRAGMENTATION))
    assert memory.peak_device_bytes == memory.peak_reserved_bytes + CUDA_CONTEXT_BYTES + managed
    on_cpu = [estimate("llama-3.2-1b", one, device=CPU) for one in (paged, plain)]
    assert on_cpu[0].peak_allocated_bytes == on_cpu[1].peak_allocated_bytes


@pytest.mark.parametrize("kind", DEVICES)
def test_the_margin_is_a_share_and_a_constant_over_the_device_peak(kind: str) -> None:
    memory = estimate("llama-3.1-8b", make_strategy(), device=DEVICES[kind])
    margin = MARGIN[DEVICES[kind].kind] * memory.peak_device_bytes + MARGIN_BYTES[DEVICES[kind].kind]
    assert memory.required_bytes - memory.peak_device_bytes == pytest.approx(margin, abs=1)
    assert memory.budget_bytes == DEVICES[kind].budget_bytes


def test_tied_embeddings_need_a_second_gradient_of_their_size() -> None:
    strategy = make_strategy("full", checkpointed_layers=99, loss_head="chunked")
    memory = estimate("llama-3.2-1b", strategy, length=64)
    embedding = 2 * find_shape("llama-3.2-1b").embedding_parameters
    assert memory.peak_phase == "backward"
    assert memory.components.temporary >= embedding


def test_an_adapter_on_disk_is_small_and_its_merged_model_is_not() -> None:
    adapter, merged = (estimate("llama-3.1-8b", make_strategy("qlora"), merge=merge) for merge in (False, True))
    assert adapter.disk_bytes < 0.3 * GiB
    weights = 2 * find_shape("llama-3.1-8b").parameters
    assert weights < merged.disk_bytes - adapter.disk_bytes < weights + 0.1 * GiB, "and its tokenizer once more"
    assert estimate("llama-3.1-8b", make_strategy("full")).disk_bytes > 2 * find_shape("llama-3.1-8b").parameters


def test_merging_needs_ram_for_the_16_bit_base_and_no_memory_of_the_gpu() -> None:
    strategy, base = make_strategy("qlora", checkpointed_layers=99), 2 * find_shape("llama-3.1-8b").parameters
    on_gpu = [estimate("llama-3.1-8b", strategy, merge=merge) for merge in (False, True)]
    assert on_gpu[0].required_bytes == on_gpu[1].required_bytes
    assert on_gpu[1].host_bytes > base > on_gpu[0].host_bytes
    on_cpu = estimate("llama-3.1-8b", strategy, device=CPU, merge=True)
    assert on_cpu.peak_phase == "merge"
    assert on_cpu.components.weights == base
    assert on_cpu.host_bytes == on_cpu.peak_device_bytes > base


def test_qlora_is_not_always_the_smallest() -> None:
    """Small models at long rows: what NF4 saves is less than what its dequantised weight and the states cost."""
    sizes = {
        method: estimate("smollm2-135m-instruct", make_strategy(method, adapter_rank=256), length=64).required_bytes
        for method in ("lora", "qlora")
    }
    ratio = {name: size / sizes["lora"] for name, size in sizes.items()}
    assert 0.9 < ratio["qlora"] < 1.1


def offload_both_ways(name: str, strategy: Strategy, length: int, device: Device = H100) -> list[Memory]:
    return [
        estimate(name, strategy.model_copy(update={"activation_offload": on}), length, device) for on in (False, True)
    ]


@settings(max_examples=60)
@given(names, strategies(), st.integers(256, 8192))
def test_offload_never_needs_more_of_the_device_nor_less_ram(name: str, strategy: Strategy, length: int) -> None:
    kept, offloaded = offload_both_ways(name, strategy, length)
    one_layer = 1.01  # where gradients and states are the peak, the first layer's activations are there either way
    assert offloaded.required_bytes <= one_layer * kept.required_bytes
    assert offloaded.host_bytes > kept.host_bytes


@settings(max_examples=60)
@given(names, strategies(), st.integers(1, 8192))
def test_offload_changes_nothing_on_a_cpu(name: str, strategy: Strategy, length: int) -> None:
    kept, offloaded = offload_both_ways(name, strategy, length, CPU)
    assert kept == offloaded


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_leaves_the_device_is_in_ram(checkpointing: bool) -> None:
    strategy = make_strategy(
        "qlora", checkpointed_layers=99 if checkpointing else 0, loss_head="chunked", micro_batch_size=4
    )
    kept, offloaded = offload_both_ways("llama-3.1-8b", strategy, 4096)
    left = kept.peak_allocated_bytes - offloaded.peak_allocated_bytes
    assert left > GiB
    assert left < offloaded.host_bytes - kept.host_bytes < 1.5 * left + 3 * GiB


def test_an_offloaded_layer_is_on_the_device_with_all_gradients() -> None:
    """Without offload activations shrink as gradients grow; with it both are there at the first layer."""
    strategy = make_strategy("full", loss_head="chunked", activation_offload=True)
    memory = estimate("llama-3.1-8b", strategy, 4096)
    assert memory.peak_phase == "backward"
    assert memory.components.gradients == estimate_gradient_bytes(find_shape("llama-3.1-8b"), strategy)
    assert memory.components.activations > 0.5 * GiB


@pytest.mark.parametrize(
    ("name", "length", "strategy", "forward_mib", "backward_mib", "host_mib"),
    [
        ("llama-3.2-1b", 8192, {"loss_head": "chunked"}, 3608, 4121, 13124),
        (
            "llama-3.1-8b",
            8192,
            {"method": "qlora", "checkpointed_layers": 99, "loss_head": "chunked"},
            7221,
            8166,
            2176,
        ),
        ("gpt2-medium", 1024, {"micro_batch_size": 8, "loss_head": "chunked"}, 1306, 1620, 16947),
        ("qwen3-1.7b", 4096, {"method": "full", "loss_head": "chunked"}, 11114, 13803, 12836),
    ],
)
def test_offload_is_as_a_rehearsal_of_the_step_has_it(
    name: str, length: int, strategy: dict[str, Any], forward_mib: int, backward_mib: int, host_mib: int
) -> None:
    """The rehearsed step keeps its activations by the runtime's own hooks; figures in MiB, the optimizer's excepted."""
    settings = {"method": "lora", **strategy}
    offloading = make_strategy(**settings, activation_offload=True)
    memory = estimate(name, offloading, length)
    assert find_phase(memory, "forward") == pytest.approx(forward_mib * 2**20, rel=0.15)
    assert find_phase(memory, "backward") == pytest.approx(backward_mib * 2**20, rel=0.03)
    step = StepShape(find_shape(name), offloading, length)
    assert estimate_kept_bytes(step) == pytest.approx(host_mib * 2**20, rel=0.06)


@pytest.mark.parametrize("kind", DEVICES)
def test_expandable_segments_change_nothing_in_the_closed_forms(kind: str) -> None:
    plain, expandable = (
        estimate("llama-3.1-8b", make_strategy(expandable_segments=on), device=DEVICES[kind]) for on in (False, True)
    )
    assert plain == expandable


@settings(max_examples=60)
@given(names, st.sampled_from(OPTIMIZERS), st.sampled_from([0, 3, 99]), st.integers(1, 4096), devices)
def test_updates_in_backward_never_need_more_and_leave_two_phases_out(
    name: str, optimizer: str, checkpointed: int, length: int, kind: str
) -> None:
    assume(kind == "cuda" or optimizer in ("adamw", "adafactor"))  # bitsandbytes' buffers on a CPU come early, too
    plain, early = (
        estimate(
            name,
            make_strategy(
                "full",
                optimizer=optimizer,
                checkpointed_layers=checkpointed,
                gradient_accumulation_steps=1,
                optimizer_in_backward=on,
            ),
            length,
            DEVICES[kind],
        )
        for on in (False, True)
    )
    # Adafactor's update and its square, in fp32, come while activations are there.
    largest = max(size for size, _ in list_trainable_tensors(find_shape(name), make_strategy("full")))
    buffers = 8 * largest if optimizer == "adafactor" else 0
    assert early.peak_allocated_bytes <= plain.peak_allocated_bytes + buffers
    assert [phase.name for phase in plain.phases if phase.name not in ("clip", "optimizer")] == [
        phase.name for phase in early.phases
    ]


@settings(max_examples=60)
@given(names, strategies(), st.integers(1, 16384), devices)
def test_kept_attention_is_output_and_log_sum_exp_of_each_checkpointed_layer(
    name: str, strategy: Strategy, length: int, kind: str
) -> None:
    shape = find_shape(name)
    changes = {"activation_offload": False, "attention": "sdpa"}
    plain, saving = (
        estimate(name, strategy.model_copy(update=changes | {"save_attention": on}), length, DEVICES[kind])
        for on in (False, True)
    )
    tokens, width = strategy.micro_batch_size * length, 2 if strategy.compute_dtype == "bf16" else 4
    most = min(strategy.checkpointed_layers, shape.layers) * tokens * shape.heads * (width * shape.head_dim + 4)
    assert 0 <= saving.peak_allocated_bytes - plain.peak_allocated_bytes <= most
    assert find_phase(saving, "forward") - find_phase(plain, "forward") == most
