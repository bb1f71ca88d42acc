from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import save_small_model
from small_runs import read_losses, write_recipe
from torch._inductor.exc import InductorError

from fitune.runtime.report import load_report
from fitune.runtime.training.failures import explain_failure
from fitune.runtime.training.oom import is_out_of_memory

RUN_WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from rich.console import Console
from fitune.recipes.errors import OutOfMemoryError
from fitune.runtime.planning import Job
from fitune.runtime.training.train import run_job

job = Job(sys.argv[1])
plan = job.make_plan(quick=False)
job.data
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1000 * 2**20,) * 2)
try:
    run_job(job, plan, Path(sys.argv[1]).parent / "run", Console(quiet=True))
except OutOfMemoryError as error:
    print("SHOWN", error)
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        check=False,
    )


def test_a_run_out_of_memory_says_why_and_goes_on_with_another_plan(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Eager attention over 64 rows of 512 tokens: 256 MiB of scores a layer, several times."""
    recipe = write_recipe(
        tmp_path,
        save_small_model(tmp_path / "model"),
        model={"attention": "eager", "dtype": "fp32"},
        data={"max_length": 512, "eval": None, "max_truncated": 1.0},
        budget={"memory": "64GiB", "disk": "64GiB"},
        train={"global_batch_size": 64, "micro_batch_size": 64, "max_steps": 1},
    )
    (tmp_path / "train.jsonl").write_text(64 * ('{"text": "' + 300 * "feta cheese " + '"}\n'))
    done = run_python("-c", RUN_WITH_LITTLE_MEMORY, str(recipe))
    assert "SHOWN out of memory in phase " in done.stdout, done.stdout + done.stderr
    assert "of live tensors there, mostly " in done.stdout and "of RAM under ulimit -v are left" in done.stdout
    assert "a plan at the same global batch of 64 needs " in done.stdout
    assert f"`fitune run {recipe} --replan` goes on with it" in done.stdout
    failed = json.loads((tmp_path / "run" / "plan.json").read_text())
    again = run_python("-m", "fitune.runtime.cli", "run", str(recipe), "--replan")
    assert again.returncode == 0, again.stdout + again.stderr
    plan, report = load_report(tmp_path / "run")
    assert report.status == "finished" and len(read_losses(tmp_path / "run")) == 1
    assert plan.memory.required_bytes < failed["memory"]["required_bytes"]
    assert plan.strategy.micro_batch_size * plan.strategy.gradient_accumulation_steps == 64
    assert plan.strategy.micro_batch_size < 64 and plan.strategy.method == "full"
    record_property("faults", 1)


def test_an_allocation_that_cannot_be_had_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**55)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be reported at some other call",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1024 bytes.",
    ],
)
def test_what_runs_out_of_memory_beside_the_allocator_is_known_by_its_message(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))


def test_another_error_is_not() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(refused.value)


def test_a_gpu_that_fails_and_a_compiler_that_fails_are_told_apart_from_bugs() -> None:
    def explain(error: BaseException, *, compiled: bool = True) -> str | None:
        return explain_failure(error, compiled=compiled, phase="forward", step=3)

    broken = explain(torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with `TORCH_USE`"))
    assert broken is not None
    assert broken.startswith("the GPU failed in phase forward after 3 steps: CUDA error: device-side assert triggered;")
    for error in (
        InductorError(ValueError("no kernel"), None),
        subprocess.CalledProcessError(1, ["gcc", "launcher.c"]),
    ):
        message = explain(error)
        assert message is not None and message.endswith("set train.compile = false")
        assert explain(error, compiled=False) is None
    assert explain(RuntimeError("shapes cannot be multiplied")) is None
