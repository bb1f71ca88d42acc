from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import make_strategy, save_small_model
from small_runs import write_recipe

from fitune.planner.strategy import Strategy
from fitune.recipes.errors import RecipeError
from fitune.recipes.load import load_recipe
from fitune.runtime.oom import is_out_of_memory, suggest_change

RUN_WITH_LITTLE_MEMORY = """
import io, resource, sys
from pathlib import Path
from rich.console import Console
from fitune.recipes.errors import OutOfMemoryError
from fitune.runtime.planning import Job
from fitune.runtime.train import run_job

job = Job(sys.argv[1])
plan = job.make_plan(quick=False)
job.data
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1000 * 2**20,) * 2)
try:
    run_job(job, plan, Path(sys.argv[1]).parent / "run", Console(file=io.StringIO()))
except OutOfMemoryError as error:
    print("SHOWN", error)
"""


def test_a_run_out_of_memory_ends_with_a_diagnosis_and_leaves_nothing(tmp_path: Path) -> None:
    """Eager attention over 64 rows of 512 tokens: 256 MiB of scores a layer, several times."""
    recipe = write_recipe(
        tmp_path,
        save_small_model(tmp_path / "model"),
        model={"attention": "eager", "dtype": "fp32"},
        data={"max_length": 512, "eval": None},
        budget={"memory": "64GiB", "disk": "64GiB"},
        train={"global_batch_size": 64, "micro_batch_size": 64},
    )
    (tmp_path / "train.jsonl").write_text(64 * ('{"text": "' + 300 * "feta cheese " + '"}\n'))
    done = subprocess.run(
        [sys.executable, "-c", RUN_WITH_LITTLE_MEMORY, str(recipe)], capture_output=True, text=True, timeout=120
    )
    assert "SHOWN out of memory in phase " in done.stdout, done.stdout + done.stderr
    assert "of live tensors there, mostly " in done.stdout
    assert f"try `fitune plan {recipe} --set train.micro_batch_size=32`" in done.stdout
    assert not (tmp_path / "run").exists()


def test_an_allocation_that_cannot_be_had_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**55)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))


def test_another_error_is_not() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(refused.value)


@given(micro=st.integers(1, 96), accumulation=st.integers(1, 8), checkpointing=st.booleans())
def test_what_is_suggested_is_a_valid_smaller_step(micro: int, accumulation: int, checkpointing: bool) -> None:
    strategy = make_strategy(
        micro_batch_size=micro, gradient_accumulation_steps=accumulation, checkpointed_layers=2 if checkpointing else 0
    )
    key, _, value = suggest_change(strategy).partition("=")
    if micro == 1:
        assert key == ("train.loss_head" if checkpointing else "train.gradient_checkpointing")
        return
    assert key == "train.micro_batch_size"
    assert 1 <= int(value) <= micro // 2 and micro * accumulation % int(value) == 0


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (make_strategy(micro_batch_size=1), "train.gradient_checkpointing=true"),
        (make_strategy(micro_batch_size=1, checkpointed_layers=2), "train.loss_head=fused"),
        (
            make_strategy("lora", micro_batch_size=1, checkpointed_layers=2, loss_head="chunked"),
            "method.kind=qlora",
        ),
        (
            make_strategy("qlora", micro_batch_size=1, checkpointed_layers=2, loss_head="chunked"),
            "data.max_length=512",
        ),
    ],
)
def test_where_the_micro_batch_is_one_row_something_else_is_suggested(
    strategy: Strategy, expected: str, tmp_path: Path
) -> None:
    assert suggest_change(strategy) == expected
    try:
        load_recipe(write_recipe(tmp_path, "smollm2-135m-instruct"), [expected])
    except RecipeError as error:
        pytest.fail(f"the suggestion is no valid override: {error}")
