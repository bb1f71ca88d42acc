"""What tests do on a GPU: on a real one (test_gpu.py), or on a stand-in in a process of its own (test_on_cuda.py)."""

from __future__ import annotations

import io
import os
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from rich.console import Console
from small_runs import execute_until, plan_recipe, read_lines, read_losses, write_recipe
from torch import Tensor
from waits import WaitsForDevice

from fitune.planner.catalog import find_gpu
from fitune.planner.plan import make_plan
from fitune.planner.rates import make_gpu_rates
from fitune.recipes.errors import OutOfMemoryError
from fitune.runtime.model.attention import _attend_at_once, _attend_one_by_one
from fitune.runtime.planning import Job
from fitune.runtime.report import RunReport, load_report
from fitune.runtime.report_view import render_report
from fitune.runtime.training.loop import TrainingLoop
from fitune.runtime.training.optimizers import make_optimizer
from fitune.runtime.training.step import step_if_finite
from fitune.runtime.training.train import run_job

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
    "updates in backward": (
        "llama",
        {
            "method": {"kind": "full"},
            "train": {"optimizer_in_backward": True, "max_grad_norm": "off", "micro_batch_size": 4},
        },
        {},
    ),
    "attention kept by checkpoints, packed": (
        "llama",
        {
            "method": {"kind": "lora"},
            "data": {"packing": True},
            "train": {"gradient_checkpointing": True, "save_attention": True},
        },
        {"attention": "varlen"},
    ),
    "Adafactor": ("llama", {"method": {"kind": "full"}, "train": {"optimizer": "adafactor"}}, {}),
}


def write_large_step(folder: Path, model: Path) -> Path:
    """Eager attention over 64 rows of 512 tokens: 256 MiB of scores a layer, several times."""
    return write_recipe(
        folder,
        model,
        model={"dtype": "fp32", "attention": "eager"},
        data={"max_length": 512, "max_truncated": 1.0},
        train={"global_batch_size": 64, "micro_batch_size": 64, "max_steps": 1},
    )


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
    kinds = [event["kind"] for event in report.events]
    return {"status": report.status, "losses": read_losses(recipe.parent / "run"), "kinds": kinds}


def show_speed(recipe: Path) -> str:
    """What a run and its report print, planned with an H100's rates, while the stand-in's counter of energy goes on."""
    job, done, state = Job(str(recipe)), Event(), Path(os.environ["FAKE_NVML_STATE"])
    device = job.probe_device().model_copy(update={"rates": make_gpu_rates(find_gpu("H100 80GB"))})
    plan = make_plan(job.find_inputs(quick=True, device=device))
    console = Console(file=io.StringIO(), width=250)

    def consume() -> None:
        for millijoules in count(10**6, 10):
            state.with_suffix(".new").write_text(f"millijoules {millijoules}\n")
            state.with_suffix(".new").replace(state)
            if done.wait(0.002):
                break

    counter = Thread(target=consume)
    counter.start()
    try:
        changed = plan.model_copy(update={"strategy": plan.strategy.model_copy(update={"compile": False})})
        run_job(job, changed, recipe.parent / "run", console, resume=False)
    finally:
        done.set()
        counter.join()
        state.write_text("")
    render_report(*load_report(recipe.parent / "run"), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def list_waits(recipe: Path, strategy: dict[str, Any]) -> list[list[str]]:
    """What the host waits for in each training step, with all that the loop does between two."""
    waits, step = list[list[str]](), TrainingLoop.step

    def watch(loop: TrainingLoop, *args: Any) -> None:
        with WaitsForDevice() as seen:
            step(loop, *args)
        waits.append(seen.names)

    TrainingLoop.step = watch  # type: ignore[method-assign]
    try:
        run_here(recipe, **strategy)
    finally:
        TrainingLoop.step = step  # type: ignore[method-assign]
    return waits


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


def run_out_of_memory(recipe: Path) -> str:
    try:
        run_here(recipe, budget_bytes=784 * 2**20)
    except OutOfMemoryError as error:
        return str(error)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    raise AssertionError("the run had enough memory")


def stop_and_go_on(recipe: Path) -> list[int]:
    execute_until(recipe, 5)
    return list(run_as_planned(recipe, resume=True).resumed_from)


def run_as_planned(recipe: Path, *, resume: bool = False) -> RunReport:
    job, plan = plan_recipe(recipe)
    return run_job(job, plan, recipe.parent / "run", Console(file=io.StringIO()), resume=resume)


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


def measure_rounded_update(elements: int) -> float:
    """Bytes an element that AdamW takes beside weights and moments in bf16 to update two weights of `elements` each."""
    model = torch.nn.ParameterList(torch.randn(elements) for _ in range(2)).to("cuda", torch.bfloat16)
    optimizer = make_optimizer("adamw", model, learning_rate=0.1, weight_decay=0.1, rounding="stochastic")
    for one in model.parameters():
        one.grad = torch.randn_like(one)
    optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    return (torch.cuda.max_memory_allocated() - before) / elements


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
