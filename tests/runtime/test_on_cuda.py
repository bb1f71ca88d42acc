"""fitune's code for a GPU, on a stand-in of one: every tensor says `cuda:0`, and one that does not is refused.

The stand-in (cuda_in_ram.py) lives in a process of its own, which all tests of a module share.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_in_ram import OnGpu
from gpu_work import (
    BF16,
    CASES,
    attend_documents_of_rows,
    find_first_sample,
    list_waits,
    measure_rounded_update,
    run_as_planned,
    run_out_of_memory,
    run_with,
    show_speed,
    stop_and_go_on,
    update_with_bad_gradients,
    write_large_step,
)
from small_models import save_small_model
from small_runs import read_losses, write_recipe

from fitune.planner.arithmetic import ROUNDING_BYTES
from fitune.runtime.report import load_report


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model_type in ("llama", "gemma2", "gpt2"):
        save_small_model(folder / model_type, model_type)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_run_on_a_gpu_trains_as_one_on_a_cpu(case: str, on_gpu: OnGpu, models: Path, tmp_path: Path) -> None:
    """Autocast differs in which operations it runs in float32, so the losses do in bf16's precision."""
    model_type, tables, strategy = CASES[case]
    recipes = [write_recipe(tmp_path / where, models / model_type, **{**BF16, **tables}) for where in ("gpu", "cpu")]
    strategy = {"compute_dtype": "bf16", "rounding": "nearest"} | strategy
    found, expected = on_gpu(run_with, recipes[0], strategy), run_with(recipes[1], strategy)
    assert (found["status"], found["kinds"]) == ("finished", [])
    assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=0.01)
    if "dropout" not in case and "fp16" not in case:
        assert found["losses"] == pytest.approx(expected["losses"], rel=0.05)
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.parametrize("case", [case for case in CASES if "fp16" not in case and case != "Adafactor"])
def test_the_host_waits_for_a_gpu_once_a_step(case: str, on_gpu: OnGpu, models: Path, tmp_path: Path) -> None:
    """For loss and norm together, when all of the step's work is queued."""
    model_type, tables, strategy = CASES[case]
    recipe = write_recipe(tmp_path, models / model_type, **{**BF16, **tables})
    steps = on_gpu(list_waits, recipe, {"compute_dtype": "bf16", "rounding": "nearest"} | strategy)
    assert len(steps) == 6
    assert steps[1:] == [["_to_copy"]] * 5, "the first step may do more"


def test_speed_use_of_the_card_and_energy_stand_beside_the_plans_during_and_after_a_run(
    on_gpu: OnGpu, models: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, models / "llama", method={"kind": "lora"}, model={"dtype": "bf16"})
    shown = on_gpu(show_speed, recipe)
    live = r"[\d,]+ tokens/s of [\d,]+ planned, MFU \d+% of \d+%, [\d.e+-]+ J of [\d.e+-]+ per 1,000 tokens"
    assert re.search(live, shown), shown
    for name in ("tokens a second", "model FLOPs utilization", "J for 1,000 tokens"):
        assert re.search(rf"{name} +[\d,.e+%-]+ +[\d,.e+%-]+ +[+-][\d,.]+ %", shown), name


def test_the_monitor_looks_before_cuda_takes_memory(on_gpu: OnGpu, models: Path, tmp_path: Path) -> None:
    """In a container the driver lists no process by its own pid: what is there at first counts as held by others."""
    assert on_gpu(find_first_sample, write_recipe(tmp_path, models / "llama", train={"max_steps": 1})) > 0


def test_a_run_keeps_within_its_budget_and_says_what_it_lacked(on_gpu: OnGpu, models: Path, tmp_path: Path) -> None:
    recipe = write_large_step(tmp_path, models / "llama")
    message = on_gpu(run_out_of_memory, recipe)
    assert message.startswith("out of memory in phase ")
    assert "the plan has " in message and "free on NVIDIA Fake 80GB" in message


def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(on_gpu: OnGpu, models: Path, tmp_path: Path) -> None:
    tables: dict[str, Any] = {"method": {"kind": "lora", "dropout": 0.1}, "output": {"dir": "run", "save_every": 2}}
    recipes = [write_recipe(tmp_path / name, models / "llama", **tables) for name in ("stopped", "whole")]
    assert on_gpu(stop_and_go_on, recipes[0]) == [4]
    on_gpu(run_as_planned, recipes[1])
    losses = [read_losses(recipe.parent / "run") for recipe in recipes]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert load_report(recipes[0].parent / "run")[1].status == "finished"


def test_an_update_that_is_not_finite_is_left_out_on_the_device(on_gpu: OnGpu) -> None:
    assert on_gpu(update_with_bad_gradients) == (True, False)


def test_a_rounded_update_takes_what_its_plan_says_for_one_weight_at_a_time(on_gpu: OnGpu) -> None:
    assert on_gpu(measure_rounded_update, 2**18) == pytest.approx(ROUNDING_BYTES, rel=0.01)


@pytest.mark.parametrize("window", [None, 4])
def test_documents_are_attended_at_once_as_one_by_one(window: int | None, on_gpu: OnGpu) -> None:
    assert on_gpu(attend_documents_of_rows, window) < 0.1


def mix_devices() -> str:
    try:
        torch.ones(4, device="cuda") + torch.ones(4)
    except RuntimeError as error:
        return str(error)
    return ""


def test_the_stand_in_refuses_two_devices_in_one_operation(on_gpu: OnGpu) -> None:
    assert "same device" in on_gpu(mix_devices)
