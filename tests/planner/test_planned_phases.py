from __future__ import annotations

from typing import Any

import pytest
from plans import CPU, find_shape, make_gpu, make_inputs, make_strategy, plan_for

from fitune.planner.estimate import CUDA_HOST_BYTES, estimate_memory, estimate_weight_files
from fitune.planner.host import lay_host
from fitune.planner.logs import CPU_SAMPLE_BYTES, DOCUMENT_BYTES, STEP_BYTES, estimate_log_bytes
from fitune.planner.memory import Memory, Phase
from fitune.planner.plan import Plan, make_plan
from fitune.planner.strategy import Device, Strategy

H100 = make_gpu("H100 80GB")
MODEL = "smollm2-135m-instruct"


def phases_of(plan: Plan) -> dict[str, Phase]:
    return {phase.name: phase for phase in plan.memory.phases}


def hosts_of(
    strategy: Strategy, device: Device, *, merge: bool = False, stored_bytes: int | None = None
) -> dict[str, int]:
    shape = find_shape(MODEL)
    memory: Memory = lay_host(
        estimate_memory(shape, strategy, device, sequence_length=256, merge=merge),
        shape,
        strategy,
        device,
        sequence_length=256,
        weights=estimate_weight_files(shape, strategy, merge=merge),
        stored_bytes=stored_bytes,
    )
    return {phase.name: phase.host_bytes or 0 for phase in memory.phases}


@pytest.mark.parametrize("device", [H100, CPU], ids=["gpu", "cpu"])
def test_every_phase_has_ram_and_files(device: Device) -> None:
    plan = plan_for({"method": {"kind": "lora"}, "output": {"merge": True}}, device)
    assert all(phase.host_bytes and phase.disk_bytes is not None for phase in plan.memory.phases)
    assert {name for name, phase in phases_of(plan).items() if phase.disk_bytes} == {"save", "merge"}


def test_files_of_the_phases_and_the_logs_are_all_of_the_disk() -> None:
    plan = plan_for({"method": {"kind": "qlora"}, "output": {"merge": True}}, H100)
    assert sum(phase.disk_bytes or 0 for phase in plan.memory.phases) + plan.memory.log_bytes == plan.memory.disk_bytes


def test_logs_grow_with_the_steps_and_with_the_time_and_are_thinned_after_ten_minutes() -> None:
    minute, ten, hour = (estimate_log_bytes(CPU, steps=10, seconds=seconds) for seconds in (60, 600, 3600))
    assert minute == DOCUMENT_BYTES + 10 * STEP_BYTES + 1200 * CPU_SAMPLE_BYTES
    assert ten - minute == 540 * 20 * CPU_SAMPLE_BYTES
    assert hour - ten == 3000 * CPU_SAMPLE_BYTES
    assert estimate_log_bytes(H100, steps=10, seconds=600) > ten
    assert estimate_log_bytes(CPU, steps=None, seconds=None) > hour


def test_a_run_of_a_few_steps_plans_for_small_logs() -> None:
    few, many = (plan_for({"train": {"max_steps": steps}}, H100).memory.log_bytes for steps in (10, 10_000))
    assert few < 2 * 2**20 < many


FULL: dict[str, Any] = {"method": {"kind": "full"}, "train": {"max_steps": 100, "optimizer": "adamw"}}


def plan_with_disk(disk_bytes: int, output: dict[str, Any]) -> Plan:
    return make_plan(make_inputs({**FULL, "output": output}, H100.model_copy(update={"disk_bytes": disk_bytes})))


def test_a_checkpoint_holds_what_is_trained_and_the_states_of_the_optimizer() -> None:
    none, often = (plan_for({**FULL, "output": {"save_every": every}}, H100) for every in ("never", 30))
    saved = phases_of(often)["save"].disk_bytes or 0
    assert saved - (phases_of(none)["save"].disk_bytes or 0) == 2 * often.memory.checkpoint_bytes
    weights = estimate_weight_files(find_shape("llama-3.2-1b"), often.strategy, merge=False)
    assert weights.checkpoint_bytes == 3 * weights.trained_bytes
    assert weights.checkpoint_bytes < often.memory.checkpoint_bytes < 1.1 * weights.checkpoint_bytes


def test_a_new_checkpoint_is_there_before_the_oldest_goes() -> None:
    plan = plan_for({**FULL, "output": {"save_every": 1}}, H100)
    assert plan.memory.disk_bytes == 3 * plan.memory.checkpoint_bytes + plan.memory.log_bytes


def test_a_disk_too_small_for_the_checkpoints_is_no_fit() -> None:
    assert not plan_with_disk(20 * 2**30, {"save_every": 1}).fits


def test_a_small_disk_gets_fewer_checkpoints_where_the_recipe_leaves_them_open() -> None:
    roomy, tight, none = (plan_with_disk(size * 2**30, {}) for size in (60, 30, 10))
    assert (roomy.memory.checkpoints, tight.memory.checkpoints, none.memory.checkpoints) == (2, 1, 0)
    assert roomy.fits and tight.fits and none.fits
    assert any("only the last 1 checkpoint stays" in text for text in tight.warnings)
    assert any("no checkpoints are written" in text for text in none.warnings)
    assert not any("checkpoint" in text for text in roomy.warnings)


def test_weights_that_are_stored_as_they_are_trained_take_no_ram_before_they_are_used() -> None:
    lora = hosts_of(make_strategy("lora"), CPU)
    assert (
        lora["load"]
        < lora["evaluate"] - estimate_weight_files(find_shape(MODEL), make_strategy("full"), merge=False).trained_bytes
    )


def test_converted_weights_are_in_ram_beside_their_file() -> None:
    shape = find_shape(MODEL)
    stored, converted = (
        hosts_of(make_strategy("full", weights_dtype="fp32", compute_dtype="fp32"), CPU, stored_bytes=size)["load"]
        for size in (4 * shape.parameters, 2 * shape.parameters)
    )
    assert converted - stored == 6 * shape.parameters


def test_beside_a_gpu_a_merge_holds_the_whole_base() -> None:
    hosts = hosts_of(make_strategy("qlora"), H100, merge=True)
    assert hosts["merge"] == CUDA_HOST_BYTES + 2 * find_shape(MODEL).parameters
    assert hosts["forward"] == CUDA_HOST_BYTES < hosts["save"] < hosts["merge"]


@pytest.mark.parametrize("device", [H100, CPU], ids=["gpu", "cpu"])
def test_a_merge_that_is_not_asked_for_takes_nothing(device: Device) -> None:
    merge = phases_of(plan_for({"method": {"kind": "lora"}}, device))["merge"]
    assert (merge.host_bytes, merge.disk_bytes) == (None, 0)
