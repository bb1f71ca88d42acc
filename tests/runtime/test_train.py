from __future__ import annotations

import gc
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_models import save_small_model
from small_runs import plan_recipe, read_lines, read_losses, run_recipe_file, write_recipe

from fitune.planner.speed import Speed
from fitune.recipes.errors import DataError, ModelError, RunError
from fitune.runtime.planning import Job
from fitune.runtime.running import RunOptions, find_run_path
from fitune.runtime.training.live import LiveLine
from fitune.runtime.training.loop import TrainingLoop
from fitune.runtime.training.train import run_job

DOCUMENTS = {"run.json", "plan.json", "recipe.toml", "metrics.jsonl", "samples.jsonl"}
FITUNE = [sys.executable, "-m", "fitune.runtime.cli"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("llama"))


def list_names(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir()}


@pytest.mark.parametrize(
    ("method", "dtype", "optimizer"),
    [
        ("full", "fp32", "adamw"),
        ("full", "bf16", "adamw"),
        ("full", "bf16", "adafactor"),
        ("lora", "fp32", "adamw"),
        ("lora", "bf16", "adamw_8bit"),
        ("qlora", "bf16", "adamw"),
    ],
)
@pytest.mark.parametrize("loss_head", ["full", "chunked"])
def test_a_run_trains_and_leaves_its_documents(
    llama: Path, tmp_path: Path, method: str, dtype: str, optimizer: str, loss_head: str
) -> None:
    recipe = write_recipe(
        tmp_path,
        llama,
        model={"dtype": dtype},
        method={"kind": method},
        train={"learning_rate": 2e-2 if method != "full" else 5e-3, "optimizer": optimizer, "loss_head": loss_head},
    )
    run, report = run_recipe_file(recipe, compute_dtype=dtype)
    weights = "model" if method == "full" else "adapter"
    assert list_names(run) == {*DOCUMENTS, "report.json", weights}
    assert report.status == "finished" and report.output == {weights: weights}
    assert report.loss.before is not None and report.loss.after is not None
    assert report.loss.after < 0.97 * report.loss.before
    losses = read_losses(run)
    assert len(losses) == 6 and (losses[0], losses[-1]) == (report.loss.first, report.loss.last)
    assert json.loads((run / "plan.json").read_text())["strategy"]["method"] == method
    assert json.loads((run / "report.json").read_text()) == report.model_dump(mode="json")
    assert (run / "recipe.toml").read_text() == recipe.read_text()
    phases = {one.name for one in report.measured.phases}
    assert phases == {"load", "evaluate", "forward", "backward", "clip", "optimizer", "save"}
    assert {one["phase"] for one in read_lines(run / "samples.jsonl") if "phase" in one} <= phases


def test_metrics_hold_every_step_and_both_held_out_losses(llama: Path, tmp_path: Path) -> None:
    run, report = run_recipe_file(write_recipe(tmp_path, llama, train={"schedule": "constant", "warmup": 0.5}))
    lines = read_lines(run / "metrics.jsonl")
    steps = [one for one in lines if "loss" in one]
    assert [one["step"] for one in steps] == [1, 2, 3, 4, 5, 6]
    assert [one["learning_rate"] for one in steps] == pytest.approx([0, 5e-3 / 3, 1e-2 / 3, 5e-3, 5e-3, 5e-3])
    assert all(one["gradient_norm"] > 0 and one["tokens_per_second"] > 0 for one in steps)
    held_out = [(one["step"], one["eval_loss"]) for one in lines if "eval_loss" in one]
    assert held_out == [(0, report.loss.before), (6, report.loss.after)]


def test_the_report_says_what_was_done(llama: Path, tmp_path: Path) -> None:
    job, plan = plan_recipe(write_recipe(tmp_path, llama, rows=10, train={"max_steps": None, "epochs": 2}))
    report = run_job(job, plan, tmp_path / "run", Console(file=io.StringIO()))
    assert report.speed.steps == 6
    assert report.speed.tokens == 2 * job.data.train.total_tokens
    assert 0 < report.speed.train_seconds < report.speed.total_seconds
    assert report.measured.peak_allocated_bytes is None
    assert report.measured.peak_device_bytes == report.measured.peak_host_bytes
    weights = [one for one in (tmp_path / "run").rglob("*") if one.is_file() and one.name != "report.json"]
    assert report.measured.disk_bytes == pytest.approx(sum(one.stat().st_size for one in weights), rel=0.01)
    assert report.sample is not None and report.sample.question == "And what is feta?"
    assert report.recipe_sha256 == plan.recipe_sha256


def test_a_run_without_held_out_rows_has_no_held_out_loss(llama: Path, tmp_path: Path) -> None:
    run, report = run_recipe_file(write_recipe(tmp_path, llama, data={"eval": None}, train={"max_steps": 2}))
    assert (report.loss.before, report.loss.after, report.sample) == (None, None, None)
    assert len(read_losses(run)) == 2


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_same_seed_gives_the_same_losses_to_the_last_bit(llama: Path, tmp_path: Path, method: str) -> None:
    def train(name: str, seed: int) -> list[float]:
        tables: dict[str, Any] = {
            "method": {"kind": method, "dropout": 0.1},
            "model": {"dtype": "bf16"},
            "train": {"seed": seed, "max_steps": 4},
        }
        run, _ = run_recipe_file(write_recipe(tmp_path / name, llama, **tables), compute_dtype="bf16")
        return read_losses(run)

    first = train("first", 1)
    torch.rand(7)
    assert train("second", 1) == first
    assert train("third", 2) != first


def test_held_out_rows_are_measured_and_weights_saved_when_the_recipe_says_so(llama: Path, tmp_path: Path) -> None:
    run, _ = run_recipe_file(write_recipe(tmp_path, llama, train={"eval_every": 2}, output={"save_every": 3}))
    lines = read_lines(run / "metrics.jsonl")
    assert [one["step"] for one in lines if "eval_loss" in one] == [0, 2, 4, 6]
    assert list_names(run / "checkpoints") == {"step-000003"}
    early = load_file(run / "checkpoints" / "step-000003" / "model.safetensors")
    last = load_file(run / "model" / "model.safetensors")
    assert early.keys() == last.keys()
    assert not all(torch.equal(early[name], last[name]) for name in early)


def test_an_evaluation_in_between_does_not_change_the_training(llama: Path, tmp_path: Path) -> None:
    method = {"kind": "qlora"}
    plain, _ = run_recipe_file(write_recipe(tmp_path / "plain", llama, method=method))
    often, _ = run_recipe_file(write_recipe(tmp_path / "often", llama, method=method, train={"eval_every": 1}))
    assert read_losses(often) == read_losses(plain)


def test_accumulation_and_checkpointing_change_no_loss(llama: Path, tmp_path: Path) -> None:
    whole, _ = run_recipe_file(write_recipe(tmp_path / "whole", llama, train={"micro_batch_size": 4}))
    train = {"micro_batch_size": 1, "gradient_checkpointing": True}
    split, _ = run_recipe_file(write_recipe(tmp_path / "split", llama, train=train))
    assert read_losses(split) == pytest.approx(read_losses(whole), rel=1e-4)


def test_a_run_without_an_output_dir_goes_below_runs_with_its_recipe_and_time(llama: Path, tmp_path: Path) -> None:
    job = Job(str(write_recipe(tmp_path, llama, output={"dir": None})))
    path = find_run_path(job, time.mktime((2026, 3, 1, 14, 5, 9, 0, 0, -1)), RunOptions())
    assert path == (Path("runs/recipe-20260301-140509"), False)
    elsewhere = Job(str(write_recipe(tmp_path, llama, output={"dir": "mine"})))
    assert find_run_path(elsewhere, time.time(), RunOptions()) == (tmp_path / "mine", False)


def test_an_existing_adapter_is_trained_further(llama: Path, tmp_path: Path) -> None:
    lora, train = {"kind": "lora"}, {"learning_rate": 2e-2}
    first, before = run_recipe_file(write_recipe(tmp_path / "first", llama, method=lora, train=train))
    again = {"kind": "lora", "adapter": str(first / "adapter")}
    _, after = run_recipe_file(write_recipe(tmp_path / "again", llama, method=again, train=train))
    assert after.loss.before == pytest.approx(before.loss.after, rel=1e-5)
    assert after.loss.after is not None and after.loss.before is not None
    assert after.loss.after < after.loss.before


def test_an_adapter_that_the_plan_was_not_made_for_is_refused(llama: Path, tmp_path: Path) -> None:
    small = {"kind": "lora", "rank": 2, "targets": ["q_proj"]}
    first, _ = run_recipe_file(write_recipe(tmp_path / "first", llama, method=small, train={"max_steps": 1}))
    again = {"kind": "lora", "adapter": str(first / "adapter")}
    with pytest.raises(RunError, match=r'set method\.rank = 2 and method\.targets = \["q_proj"\]'):
        run_recipe_file(write_recipe(tmp_path / "again", llama, method=again))
    assert not (tmp_path / "again" / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"step 1: loss nan.*lower train\.learning_rate"):
        run_recipe_file(write_recipe(tmp_path, model, data={"eval": None}))
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match=r"held-out loss is nan after 0 steps"):
        run_recipe_file(write_recipe(tmp_path, model))
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_keeps_its_metrics_and_no_weights(llama: Path, tmp_path: Path) -> None:
    train = {"learning_rate": 1.0, "max_grad_norm": 1e30, "warmup": 0.0, "max_steps": 40}
    job, plan = plan_recipe(write_recipe(tmp_path, llama, train=train))
    plan = plan.model_copy(update={"strategy": plan.strategy.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(RunError, match=r"without saving its weights"):
        run_job(job, plan, tmp_path / "run", Console(file=io.StringIO()))
    assert list_names(tmp_path / "run") == DOCUMENTS
    assert read_losses(tmp_path / "run")


def test_a_run_out_of_time_stops_and_saves(llama: Path, tmp_path: Path) -> None:
    """The plan expects less: one that is too slow for the hours does not run at all."""
    recipe = write_recipe(tmp_path, llama, train={"max_steps": 100_000})
    _, plan = plan_recipe(recipe)
    hurried = Job(str(recipe), ["budget.max_hours=1e-4"])
    report = run_job(hurried, plan, tmp_path / "run", Console(file=io.StringIO()))
    assert report.status == "out_of_time"
    assert 1 <= report.speed.steps < 1000
    assert report.loss.after is not None
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_fp16_steps_that_overflow_are_skipped_counted_and_written_as_json(llama: Path, tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model", initializer_range=1.0)
    run, report = run_recipe_file(write_recipe(tmp_path, model, data={"eval": None}), compute_dtype="fp16")
    lines = [one for one in read_lines(run / "metrics.jsonl") if "loss" in one]
    skipped = [one for one in lines if one["gradient_norm"] is None]
    assert report.skipped_steps == len(skipped) > 0
    for one, after in itertools.pairwise(lines):
        if one["gradient_norm"] is None:
            assert after["learning_rate"] == one["learning_rate"], "a skipped step does not move the schedule"


def test_a_model_without_weights_is_refused_before_anything_is_written(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "model" / name).write_bytes((llama / name).read_bytes())
    with pytest.raises(ModelError, match=r"model\.id: .*model: there are no weights"):
        run_recipe_file(write_recipe(tmp_path, tmp_path / "model"))
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, model)
    (model / "model.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(ModelError, match="cannot load"):
        run_recipe_file(recipe)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(ModelError, match="cannot load"):
        run_recipe_file(recipe)
    assert list_names(tmp_path / "run") == set()


def test_a_directory_with_a_finished_run_is_refused_and_left_as_it_is(llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, llama, train={"max_steps": 1})
    run, _ = run_recipe_file(recipe)
    before = {one: one.stat().st_mtime_ns for one in run.rglob("*")}
    with pytest.raises(RunError, match="holds a finished run"):
        run_recipe_file(recipe)
    assert {one: one.stat().st_mtime_ns for one in run.rglob("*")} == before


def test_a_dataset_without_a_usable_row_is_refused_before_anything_is_written(llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    (tmp_path / "train.jsonl").write_text('{"instruction": "What is feta?"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:1"):
        run_recipe_file(recipe)
    assert not (tmp_path / "run").exists()


class Interrupting(Console):
    """A terminal whose user presses Ctrl-C when a text is shown."""

    def __init__(self, when: str) -> None:
        super().__init__(file=io.StringIO())
        self.when = when

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        if self.when in " ".join(str(one) for one in objects):
            raise KeyboardInterrupt


def test_ctrl_c_between_steps_saves_what_was_trained(llama: Path, tmp_path: Path) -> None:
    job, plan = plan_recipe(write_recipe(tmp_path, llama, train={"eval_every": 2}))
    report = run_job(job, plan, tmp_path / "run", Interrupting("step 4: held-out"))
    assert (report.status, report.speed.steps, report.loss.after) == ("interrupted", 4, None)
    assert report.sample is None
    start, saved = load_file(llama / "model.safetensors"), load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not torch.equal(start["model.norm.weight"], saved["model.norm.weight"])


def test_ctrl_c_while_loading_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    job, plan = plan_recipe(write_recipe(tmp_path, llama))
    with pytest.raises(KeyboardInterrupt):
        run_job(job, plan, tmp_path / "run", Interrupting("loading the model"))
    assert not (tmp_path / "run").exists()


def run_fitune(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A command without a network: a question to a hub or an index would fail at once. One thread: two commands may run
    at once, and threads that wait for each other on too few cores take minutes."""
    nowhere = "http://127.0.0.1:9"
    return subprocess.Popen(
        [*FITUNE, *arguments],
        cwd=folder,
        env=os.environ
        | {"https_proxy": nowhere, "http_proxy": nowhere, "HF_ENDPOINT": nowhere, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_steps(path: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while not path.is_file() or path.read_text().count('"loss"') < count:
        assert time.monotonic() < deadline, "the run has not come so far"
        time.sleep(0.02)


def test_ctrl_c_on_the_command_line_saves_and_exits_130(llama: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, llama, train={"max_steps": 100_000})
    with run_fitune(tmp_path, "run", "recipe.toml") as process:
        wait_for_steps(tmp_path / "run" / "metrics.jsonl", 3)
        other = run_fitune(tmp_path, "run", "recipe.toml")
        said, _ = other.communicate(timeout=300)
        assert other.returncode == 1
        assert f"run is held by a run that is still going (process {process.pid})" in said.replace("\n", " ")
        assert "Traceback" not in said and "Plan for" not in said, "nothing is planned for it"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "Traceback" not in output and "interrupted: saving" in output
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_the_command_line_runs_a_recipe_offline_and_says_what_comes_next(llama: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, llama, train={"max_steps": 2})
    with run_fitune(tmp_path, "run", "recipe.toml") as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "next: fitune chat" in output and "fitune report" in output
    assert "Warning" not in output and "kernels" not in output
    with run_fitune(tmp_path, "run", "recipe.toml") as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "holds a finished run" in output.replace("\n", " ") and "Traceback" not in output


def test_the_live_line_shows_every_step_on_a_terminal_and_ten_elsewhere() -> None:
    def show(*, terminal: bool) -> str:
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=200)
        with LiveLine(console, steps=100, predicted_bytes=2**30, budget_bytes=2**31) as line:
            for step in range(1, 101):
                line.update(step, loss=1.5, tokens_per_second=1234.0, memory_bytes=2**29, seconds_left=100 - step)
        return file.getvalue()

    lines = show(terminal=False).splitlines()
    assert len(lines) == 11 and lines[0].startswith(
        "step   1/100  loss  1.500  1,234 tokens/s  memory 0.5 now, 1.0 predicted"
    )
    assert all(f"step {step:>3}/100" in show(terminal=True) for step in (1, 37, 100))


PLANNED = Speed(
    tokens_per_second=2000.0,
    step_seconds=1.0,
    startup_seconds=0.0,
    model_flops_utilization=0.4,
    joules_per_1000_tokens=61.2,
    limit="device",
    phases=(),
)


@pytest.mark.parametrize("width", [80, 100, 120, 140])
def test_the_live_line_is_one_line_on_a_narrow_terminal_too(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    memory = {"predicted_bytes": 70 * 2**30, "budget_bytes": 78 * 2**30}
    with LiveLine(console, steps=1000, predicted=PLANNED, **memory) as line:
        line.update(
            1,
            loss=1.5,
            tokens_per_second=1500.0,
            memory_bytes=69 * 2**30,
            seconds_left=6e3,
            joules_per_1000_tokens=58.9,
        )
        shown = file.getvalue()
    assert "\n" not in shown
    assert all(part in shown for part in ("step    1/1000", "1,500 tokens/s", "memory 69.0", "1:40 h left"))


def test_the_live_line_sets_the_speed_beside_the_plans() -> None:
    def show(joules: float | None) -> str:
        file = io.StringIO()
        console = Console(file=file, width=200)
        with LiveLine(console, steps=1, predicted_bytes=2**30, budget_bytes=2**31, predicted=PLANNED) as line:
            line.update(
                1,
                loss=1.5,
                tokens_per_second=1500.0,
                memory_bytes=2**29,
                seconds_left=0,
                joules_per_1000_tokens=joules,
            )
        return file.getvalue()

    assert "1,500 tokens/s of 2,000 planned, MFU 30% of 40%, 58.9 J of 61.2 per 1,000 tokens  memory" in show(58.88)
    assert "MFU 30% of 40%  memory" in show(None)


def test_while_a_model_trains_garbage_collections_leave_out_what_was_there_before(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[int] = []
    step = TrainingLoop.step

    def count_frozen(loop: TrainingLoop, *args: Any) -> None:
        frozen.append(gc.get_freeze_count())
        step(loop, *args)

    monkeypatch.setattr(TrainingLoop, "step", count_frozen)
    run_recipe_file(write_recipe(tmp_path, llama, train={"max_steps": 2}))
    assert len(frozen) == 2 and min(frozen) > 100_000
    assert gc.get_freeze_count() == 0, "what a merge frees has to go"
