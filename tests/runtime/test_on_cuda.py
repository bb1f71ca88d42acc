"""fitune's code for a GPU, on a stand-in of one: every tensor says `cuda:0`, and one that does not is refused.

The stand-in (cuda_in_ram.py) lives in a process of its own, which all tests here share.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cuda_in_ram
import pytest
import torch
from rich.console import Console
from small_models import save_small_model
from small_runs import execute_until, plan_recipe, read_lines, read_losses, write_recipe
from torch import Tensor

from fitune.recipes.errors import OutOfMemoryError
from fitune.runtime.model.attention import _attend_at_once, _attend_one_by_one
from fitune.runtime.planning import Job
from fitune.runtime.report import RunReport, load_report
from fitune.runtime.training.optimizers import make_optimizer
from fitune.runtime.training.step import step_if_finite
from fitune.runtime.training.train import run_job

OnGpu = Callable[..., Any]


@pytest.fixture(scope="module")
def on_gpu(nvml_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnGpu]:
    """Calls a function of this module, with arguments, on a machine with the stand-in."""
    folder = tmp_path_factory.mktemp("cuda")
    built = cuda_in_ram.build(folder)
    if built is None or torch.version.cuda is not None:
        pytest.skip("the stand-in is for a CPU build of torch, and needs a C++ compiler")
    (folder / "state").touch()
    added = {"LD_LIBRARY_PATH": str(nvml_library), "FAKE_NVML_STATE": str(folder / "state")}
    kept = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), cuda_in_ram.install, (built,)) as pool:
            yield lambda call, *arguments: pool.submit(call, *arguments).result(300)
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model_type in ("llama", "gemma2", "gpt2"):
        save_small_model(folder / model_type, model_type)
    return folder


def run_here(recipe: Path, *, resume: bool = False, budget_bytes: int | None = None, **strategy: Any) -> RunReport:
    """Run a recipe on this machine's device, with its strategy changed."""
    job = Job(str(recipe))
    plan = job.make_plan(quick=True)
    assert plan.device.kind == ("cuda" if torch.cuda.is_available() else "cpu")
    memory = plan.memory if budget_bytes is None else plan.memory.model_copy(update={"budget_bytes": budget_bytes})
    changed = plan.model_copy(
        update={"strategy": plan.strategy.model_copy(update={"compile": False} | strategy), "memory": memory}
    )
    return run_job(job, changed, recipe.parent / "run", Console(file=io.StringIO()), resume=resume)


def run_with(recipe: Path, strategy: dict[str, Any]) -> dict[str, Any]:
    report = run_here(recipe, **strategy)
    return {"status": report.status, "losses": read_losses(recipe.parent / "run"), "kinds": _list_event_kinds(report)}


def _list_event_kinds(report: RunReport) -> list[str]:
    return [event["kind"] for event in report.events]


BF16: dict[str, Any] = {"model": {"dtype": "bf16"}, "budget": {"memory": "8GiB"}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "full fine-tuning": ("llama", {"method": {"kind": "full"}}, {"loss_head": "fused"}),
    "fp16 with a gradient scaler": (
        "llama",
        {"model": {"dtype": "fp32"}, "method": {"kind": "full"}},
        {"compute_dtype": "fp16"},
    ),
    "LoRA, packed, checkpointed": (
        "llama",
        {"method": {"kind": "lora"}, "data": {"packing": True}, "train": {"gradient_checkpointing": True}},
        {"loss_head": "chunked", "attention": "varlen"},
    ),
    "QLoRA, offloaded": (
        "llama",
        {"method": {"kind": "qlora"}, "train": {"activation_offload": True}},
        {"loss_head": "fused"},
    ),
    "Gemma with eager attention, packed": (
        "gemma2",
        {"method": {"kind": "lora"}, "data": {"packing": True}},
        {},
    ),
    "GPT-2 with dropout of adapters": ("gpt2", {"method": {"kind": "lora", "dropout": 0.1}}, {}),
    "Adafactor": ("llama", {"method": {"kind": "full"}, "train": {"optimizer": "adafactor"}}, {}),
}


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


def find_first_sample(recipe: Path) -> int:
    """Samples that the monitor has written when CUDA's context is made."""
    limit, seen = torch.cuda.set_per_process_memory_fraction, []

    def look(*arguments: Any) -> None:
        seen.append(len(read_lines(recipe.parent / "run/samples.jsonl")))
        limit(*arguments)

    torch.cuda.set_per_process_memory_fraction = look
    try:
        run_here(recipe)
    finally:
        torch.cuda.set_per_process_memory_fraction = limit
    return seen[0]


def test_the_monitor_looks_before_cuda_takes_memory(on_gpu: OnGpu, models: Path, tmp_path: Path) -> None:
    """In a container the driver lists no process by its own pid: what is there at first counts as held by others."""
    assert on_gpu(find_first_sample, write_recipe(tmp_path, models / "llama", train={"max_steps": 1})) > 0


def run_out_of_memory(recipe: Path) -> str:
    try:
        run_here(recipe, budget_bytes=784 * 2**20)
    except OutOfMemoryError as error:
        return str(error)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    raise AssertionError("the run had enough memory")


def test_a_run_keeps_within_its_budget_and_says_what_it_lacked(on_gpu: OnGpu, models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        models / "llama",
        model={"dtype": "fp32", "attention": "eager"},
        data={"max_length": 512, "max_truncated": 1.0},
        train={"global_batch_size": 64, "micro_batch_size": 64, "max_steps": 1},
    )
    message = on_gpu(run_out_of_memory, recipe)
    assert message.startswith("out of memory in phase ")
    assert "the plan has " in message and "free on NVIDIA Fake 80GB" in message


def stop_and_go_on(recipe: Path) -> list[int]:
    execute_until(recipe, 5)
    return list(run_as_planned(recipe, resume=True).resumed_from)


def run_as_planned(recipe: Path, *, resume: bool = False) -> RunReport:
    job, plan = plan_recipe(recipe)
    return run_job(job, plan, recipe.parent / "run", Console(file=io.StringIO()), resume=resume)


def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(on_gpu: OnGpu, models: Path, tmp_path: Path) -> None:
    tables: dict[str, Any] = {"method": {"kind": "lora", "dropout": 0.1}, "output": {"dir": "run", "save_every": 2}}
    recipes = [write_recipe(tmp_path / name, models / "llama", **tables) for name in ("stopped", "whole")]
    assert on_gpu(stop_and_go_on, recipes[0]) == [4]
    on_gpu(run_as_planned, recipes[1])
    losses = [read_losses(recipe.parent / "run") for recipe in recipes]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert load_report(recipes[0].parent / "run")[1].status == "finished"


def update_with_bad_gradients() -> tuple[bool, bool]:
    """Whether the weights and moments stay as they are with a gradient norm that is not finite."""
    model = torch.nn.Linear(8, 8).to("cuda")
    optimizer = make_optimizer("adamw", model, learning_rate=0.1, weight_decay=0.1, rounding="nearest")
    results = []
    for value in (float("nan"), 1.0):
        before = model.weight.detach().clone()
        for one in model.parameters():
            one.grad = torch.full_like(one, value)
        step_if_finite(optimizer, torch.tensor(value, device="cuda"))
        results.append(bool(torch.equal(before, model.weight)))
    return results[0], results[1]


def test_an_update_that_is_not_finite_is_left_out_on_the_device(on_gpu: OnGpu) -> None:
    assert on_gpu(update_with_bad_gradients) == (True, False)


def attend_documents_of_rows(window: int | None) -> float:
    """Largest difference between documents attended at once and one by one, output and gradients."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 24, 16).bfloat16() for heads in (4, 2, 2)]
    starts = torch.tensor([0, 5, 24, 40, 48, 48, 48], dtype=torch.int32)
    results: list[list[Tensor]] = []
    for device, attend in (("cpu", _attend_one_by_one), ("cuda", _attend_at_once)):
        moved = [one.detach().clone().to(device).requires_grad_() for one in inputs]
        output = attend(*moved, starts.to(device), None, window)
        output.float().square().sum().backward()
        results.append([output.detach(), *(one.grad for one in moved if one.grad is not None)])
    return max(float((one.cpu() - other).abs().max()) for one, other in zip(results[1], results[0], strict=True))


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
