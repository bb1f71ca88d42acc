from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from small_models import CHATML, save_small_model
from small_runs import plan_recipe, read_lines, read_losses, write_recipe
from transformers import AutoModelForCausalLM

from fitune.recipes.errors import RunError
from fitune.runtime.planning import Job
from fitune.runtime.report import RunReport
from fitune.runtime.report_view import render_report
from fitune.runtime.resume.checkpoints import CheckpointStore, verify
from fitune.runtime.resume.run_record import BLOCKS, make_record
from fitune.runtime.rundir import RunDirectory
from fitune.runtime.running import RunOptions, find_run_path
from fitune.runtime.training.loop import TrainingLoop
from fitune.runtime.training.step import training_step
from fitune.runtime.training.train import run_job

Break = Callable[[int], None]
Record = Callable[[str, object], None]


class Killed(BaseException):
    """Stands for the end of the process: nothing after it is executed but clean-up, which keeps nothing."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Makes the next run end as if killed when it would do a step."""

    def arrange(step: int) -> None:
        real = TrainingLoop.step

        def break_off(self: TrainingLoop, batch: Any, line: Any) -> None:
            if batch.step == step:
                monkeypatch.setattr(TrainingLoop, "step", real)
                raise Killed
            real(self, batch, line)

        monkeypatch.setattr(TrainingLoop, "step", break_off)

    return arrange


def execute(recipe: Path, *, resume: bool = False, **strategy: Any) -> RunReport:
    job, plan = plan_recipe(recipe, **strategy)
    return run_job(job, plan, recipe.parent / "run", Console(file=io.StringIO()), resume=resume)


def read_weights(run: Path) -> dict[str, bytes]:
    return {str(one.relative_to(run)): one.read_bytes() for one in run.rglob("*model.safetensors")}


def drop_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: line[key] for key in line if key not in ("unix_time", "tokens_per_second")} for line in lines]


KINDS: dict[str, dict[str, Any]] = {
    "full": {"method": {"kind": "full"}},
    "accumulation": {"train": {"micro_batch_size": 1, "gradient_checkpointing": True}},
    "packing": {"method": {"kind": "lora", "dropout": 0.2}, "data": {"packing": True, "max_length": 96}},
    "epochs": {"train": {"max_steps": None, "epochs": 3}},
    "stochastic": {"model": {"dtype": "bf16"}},
    "adafactor": {"model": {"dtype": "bf16"}, "train": {"optimizer": "adafactor"}},
    "in backward": {
        "train": {"micro_batch_size": 4, "max_grad_norm": "off", "optimizer_in_backward": True, "weight_decay": 0.1}
    },
    "8 bits": {"method": {"kind": "lora", "dropout": 0.1}, "train": {"optimizer": "adamw_8bit"}},
    "paged": {"model": {"dtype": "bf16"}, "train": {"optimizer": "paged_adamw"}},
    "qlora": {"method": {"kind": "qlora"}, "model": {"dtype": "bf16"}},
    "streaming": {"data": {"streaming": True}},
    "mixture": {"train": {"max_steps": None, "epochs": 3}},
    "fp16": {"method": {"kind": "lora"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_one_without_an_interruption(
    llama: Path, tmp_path: Path, kill_at: Break, kind: str, record_property: Record
) -> None:
    """Two kills; bit for bit the same losses, metrics and weights."""
    tables = dict(KINDS[kind])
    tables["train"] = {"max_steps": 9, "eval_every": 4} | tables.get("train", {})
    tables["output"] = {"dir": "run", "save_every": 2}
    strategy = {"compute_dtype": "fp16" if kind == "fp16" else tables.get("model", {}).get("dtype", "fp32")}
    whole, broken = (write_recipe(tmp_path / name, llama, rows=12, **tables) for name in ("whole", "broken"))
    if kind == "mixture":
        for recipe in (whole, broken):
            sources = '[{path="train.jsonl", weight=3.0}, {path="eval.jsonl", weight=1.0}]'
            change_file(recipe, 'train = "train.jsonl"', f"train = {sources}")
    expected = execute(whole, **strategy)
    kill_at(4)
    with pytest.raises(Killed):
        execute(broken, **strategy)
    torch.rand(3)
    kill_at(6)
    with pytest.raises(Killed):
        execute(broken, resume=True, **strategy)
    report = execute(broken, resume=True, **strategy)
    a, b = whole.parent / "run", broken.parent / "run"
    assert drop_times(read_lines(b / "metrics.jsonl")) == drop_times(read_lines(a / "metrics.jsonl"))
    assert read_weights(a) == read_weights(b) and len(read_weights(a)) > 1
    assert (report.resumed_from, report.lost_steps) == ((2, 4), 2)
    assert report.loss == expected.loss and report.sample == expected.sample
    if kind == "streaming":
        assert report.data is not None and report.data.stream is not None and report.data.stream.rows > 0
    assert (report.speed.steps, report.speed.tokens) == (expected.speed.steps, expected.speed.tokens)
    record_property("faults", 2)
    record_property("lost_steps", report.lost_steps)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_models_whose_files_name_tensors_otherwise_are_resumed_too(
    tmp_path: Path, kill_at: Break, model_type: str
) -> None:
    """gpt2 ties its head; mixtral's experts lie in memory as one tensor and in files as many."""
    model = save_small_model(tmp_path / "model", model_type)
    output = {"dir": "run", "save_every": 2}
    whole, broken = (write_recipe(tmp_path / name, model, output=output) for name in ("whole", "broken"))
    execute(whole)
    kill_at(4)
    with pytest.raises(Killed):
        execute(broken)
    execute(broken, resume=True)
    assert read_losses(broken.parent / "run") == read_losses(whole.parent / "run")
    assert (broken.parent / "run/model/model.safetensors").read_bytes() == (
        whole.parent / "run/model/model.safetensors"
    ).read_bytes()


def test_a_run_killed_before_its_first_checkpoint_starts_again(llama: Path, tmp_path: Path, kill_at: Break) -> None:
    recipe = write_recipe(tmp_path, llama, output={"dir": "run", "save_every": 4})
    kill_at(3)
    with pytest.raises(Killed):
        execute(recipe)
    report = execute(recipe, resume=True)
    assert (report.resumed_from, report.lost_steps, report.speed.steps) == ((0,), 2, 6)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6, 6]


@pytest.fixture
def broken(llama: Path, tmp_path: Path, kill_at: Break) -> Path:
    """A recipe whose run was killed after step 5, with checkpoints of steps 2 and 4."""
    recipe = write_recipe(tmp_path / "broken", llama, output={"dir": "run", "save_every": 2})
    kill_at(6)
    with pytest.raises(Killed):
        execute(recipe)
    assert CheckpointStore(RunDirectory(tmp_path / "broken" / "run")).list_steps() == [2, 4]
    return recipe


def change_file(recipe: Path, old: str, new: str) -> None:
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))


def test_another_recipe_is_refused_with_the_difference(broken: Path) -> None:
    change_file(broken, "learning_rate = 0.005", "learning_rate = 0.01\nseed = 3")
    before = {one: one.stat().st_mtime_ns for one in (broken.parent / "run").rglob("*.*")}
    with pytest.raises(RunError) as refused:
        execute(broken, resume=True)
    assert "train.learning_rate was 0.005, now 0.01" in str(refused.value)
    assert "train.seed was 0, now 3" in str(refused.value)
    assert {one: one.stat().st_mtime_ns for one in (broken.parent / "run").rglob("*.*")} == before


def test_another_dataset_is_refused_with_the_row_that_changed(broken: Path) -> None:
    rows = broken.parent / "train.jsonl"
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[:6], lines[6].replace("feta", "brie"), *lines[7:]]) + "\n")
    with pytest.raises(RunError, match=r"training rows: row 7 of 24, tokenised, changed"):
        execute(broken, resume=True)
    rows.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(RunError, match=r"training rows: there were 24 with [0-9,]+ tokens, now 23 with"):
        execute(broken, resume=True)


def test_another_template_is_refused_with_its_lines(llama: Path, tmp_path: Path, kill_at: Break) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    recipe = write_recipe(tmp_path, model, output={"dir": "run", "save_every": 2})
    kill_at(3)
    with pytest.raises(Killed):
        execute(recipe)
    assert "<|im_start|>" in CHATML
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("add_generation_prompt", "add_generation_prompt and true"))
    with pytest.raises(RunError, match=r"the chat template changed:\n  --- then\n  \+\+\+ now\n(.|\n)*and true"):
        execute(recipe, resume=True)


def test_more_hours_are_no_other_recipe(llama: Path, tmp_path: Path) -> None:
    tables: dict[str, Any] = {"train": {"max_steps": 30}, "output": {"dir": "run", "save_every": 100}}
    recipe = write_recipe(tmp_path, llama, **tables)
    job, plan = plan_recipe(recipe)
    hurried, console = Job(str(recipe), ["budget.max_hours=1e-9"]), Console(file=io.StringIO())
    assert run_job(hurried, plan, tmp_path / "run", console).status == "out_of_time"
    report = run_job(job, plan, tmp_path / "run", console, resume=True)
    assert (report.status, report.resumed_from, report.speed.steps) == ("finished", (1,), 30)


def damage_truncated(folder: Path) -> None:
    file = folder / "training_state.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def damage_bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text()[:-20])


def damage_missing(folder: Path) -> None:
    (folder / "training_state.json").unlink()


def damage_pickle(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"\x80\x04.")


def damage_link(folder: Path) -> None:
    file = folder / "config.json"
    file.rename(folder.parent.parent / "elsewhere.json")
    file.symlink_to(folder.parent.parent / "elsewhere.json")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_truncated, r"training_state\.safetensors has [0-9,]+ bytes, and [0-9,]+ were written"),
        (damage_bit, r"model\.safetensors is not as it was written: its SHA-256 is another"),
        (damage_manifest, r"manifest\.json is damaged: Invalid JSON.*"),
        (damage_missing, r"training_state\.json is missing"),
        (damage_pickle, r"optimizer\.pt is not in its manifest"),
        (damage_link, r"config\.json is a link"),
    ],
    ids=["cut", "a bit", "manifest", "missing file", "pickle", "link"],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(
    broken: Path, damage: Callable[[Path], None], reason: str, record_property: Record
) -> None:
    run = broken.parent / "run"
    damage(run / "checkpoints" / "step-000004")
    job, plan = plan_recipe(broken)
    console = Console(file=io.StringIO(), width=500)
    report = run_job(job, plan, run, console, resume=True)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(rf"checkpoints/step-000004: {reason}; the checkpoint before it is tried", said), said
    assert (report.resumed_from, report.lost_steps, report.status) == ((2,), 3, "finished")
    assert (run / "checkpoints" / "damaged-step-000004").is_dir()
    verify(run / "checkpoints" / "step-000004", 4)
    record_property("faults", 1)
    record_property("lost_steps", report.lost_steps)


def test_where_no_checkpoint_is_whole_the_run_starts_again(broken: Path, record_property: Record) -> None:
    run = broken.parent / "run"
    for folder in (run / "checkpoints").iterdir():
        damage_bit(folder)
    assert execute(broken, resume=True).resumed_from == (0,)
    assert [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    record_property("faults", 2)


def test_a_checkpoint_is_an_adapter_that_peft_loads(llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, llama, method={"kind": "lora"}, output={"dir": "run", "save_every": 3})
    execute(recipe)
    folder = tmp_path / "run" / "checkpoints" / "step-000003"
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(folder)).state_dict()
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(tensor, loaded[name.replace(".weight", ".default.weight")])


def test_the_last_checkpoints_stay_and_the_best_one(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([9.0, 5.0, 4.0, 6.0, 7.0, 8.0, 6.5, 6.6])
    monkeypatch.setattr("fitune.runtime.training.judge.evaluate", lambda *_: next(losses))
    recipe = write_recipe(
        tmp_path,
        llama,
        train={"max_steps": 6, "eval_every": 1},
        output={"dir": "run", "save_every": 1, "keep_checkpoints": 2, "keep_best": True},
    )
    report = execute(recipe)
    run = tmp_path / "run"
    assert {one.name for one in (run / "checkpoints").iterdir()} == {"step-000002", "step-000004", "step-000005"}
    assert (report.best_step, report.loss.after) == (2, 4.0)
    best = (run / "checkpoints" / "step-000002" / "model.safetensors").read_bytes()
    assert (run / "model" / "model.safetensors").read_bytes() == best


def test_training_ends_when_the_held_out_loss_is_no_longer_better(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([9.0, 5.0, 6.0, 4.0, 7.0, 8.0, 6.5])
    monkeypatch.setattr("fitune.runtime.training.judge.evaluate", lambda *_: next(losses))
    train = {"max_steps": 30, "eval_every": 2, "early_stopping_patience": 2}
    report = execute(write_recipe(tmp_path, llama, train=train))
    assert (report.status, report.speed.steps, report.best_step) == ("finished", 10, 6)


def test_checkpoints_by_the_clock_are_gone_when_the_run_has_finished(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: Break
) -> None:
    monkeypatch.setattr("fitune.runtime.resume.keeper.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("fitune.runtime.resume.keeper.AUTO_SHARE", 1e9)
    recipe = write_recipe(tmp_path, llama)
    kill_at(6)
    with pytest.raises(Killed):
        execute(recipe)
    assert {one.name for one in (tmp_path / "run/checkpoints").iterdir()} == {"step-000004", "step-000005"}
    assert execute(recipe, resume=True).resumed_from == (5,)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_checkpoint_has_the_size_that_was_planned(llama: Path, tmp_path: Path) -> None:
    """To the byte where tensors are concerned; tokenizer and configs are estimated."""
    recipe = write_recipe(tmp_path, llama, output={"dir": "run", "save_every": 2})
    job, plan = plan_recipe(recipe)
    report = run_job(job, plan, tmp_path / "run", Console(file=io.StringIO()))
    assert job.files_of is not None
    files = job.files_of(plan.strategy)
    assert files is not None
    folder = tmp_path / "run" / "checkpoints" / "step-000002"
    assert sum(one.stat().st_size for one in folder.glob("*.safetensors")) == files.checkpoint_bytes
    whole = sum(one.stat().st_size for one in folder.iterdir())
    assert whole == pytest.approx(plan.memory.checkpoint_bytes, rel=0.05)
    assert report.checkpoints == plan.memory.checkpoints == 2


def test_the_report_says_how_often_a_run_was_resumed(broken: Path) -> None:
    report = execute(broken, resume=True)
    console = Console(file=io.StringIO(), width=100)
    _, plan = plan_recipe(broken)
    render_report(plan, report, console)
    assert "once, after step 4; 1 steps were done again" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_dataset_of_many_rows_has_few_digests(llama: Path, tmp_path: Path) -> None:
    record = make_record(Job(str(write_recipe(tmp_path, llama, rows=600))))
    assert record.train.rows == 600 and len(record.train.blocks) == 200 <= BLOCKS


def test_a_step_that_is_not_finite_is_skipped_where_the_recipe_says_so(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """The gradients of step 3 are infinite: its weights stay as they were, and the run goes on."""

    def poison(model: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            hook = next(model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
            result = training_step(model, *arguments, **options)
            hook.remove()
            return result
        return training_step(model, *arguments, **options)

    calls: list[int] = []
    monkeypatch.setattr("fitune.runtime.training.loop.training_step", poison)
    with pytest.raises(RunError, match=r"step 3: loss .*without saving its weights"):
        execute(write_recipe(tmp_path / "stop", llama))
    calls.clear()
    report = execute(write_recipe(tmp_path / "skip", llama, train={"on_nonfinite": "skip"}))
    assert (report.status, report.skipped_steps, report.speed.steps) == ("finished", 1, 6)
    norms = [line["gradient_norm"] for line in read_lines(tmp_path / "skip/run/metrics.jsonl") if "loss" in line]
    assert [norm is None for norm in norms] == [False, False, True, False, False, False]
    record_property("faults", 2)


def test_weights_that_are_not_finite_are_never_a_checkpoint(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    real = TrainingLoop.step

    def poison(self: TrainingLoop, batch: Any, line: Any) -> None:
        real(self, batch, line)
        if batch.step == 4:
            self.built.trainable[0].data[0, 0] = float("nan")

    monkeypatch.setattr(TrainingLoop, "step", poison)
    recipe = write_recipe(tmp_path, llama, output={"dir": "run", "save_every": 2})
    with pytest.raises(RunError, match=r"is no longer finite: these weights are not saved"):
        execute(recipe)
    assert {one.name for one in (tmp_path / "run").iterdir() if one.is_dir()} == {"checkpoints"}
    assert {one.name for one in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-000002"}
    monkeypatch.setattr(TrainingLoop, "step", real)
    assert execute(recipe, resume=True).resumed_from == (2,)
    record_property("faults", 1)


def test_nothing_of_a_checkpoint_is_a_pickle(broken: Path) -> None:
    files = [one for one in (broken.parent / "run" / "checkpoints").rglob("*") if one.is_file()]
    assert {one.suffix for one in files} <= {".safetensors", ".json", ".jinja", ".md"}
    manifest = json.loads((broken.parent / "run/checkpoints/step-000004/manifest.json").read_text())
    assert set(manifest["files"]) >= {"model.safetensors", "training_state.safetensors", "training_state.json"}


def test_without_an_output_dir_the_last_unfinished_run_of_the_recipe_goes_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: Break
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, llama, output={"dir": None, "save_every": 2})
    job, plan = plan_recipe(recipe)
    first, _ = find_run_path(job, 1e9, RunOptions())
    with pytest.raises(RunError, match=r"runs/recipe-\*: none of these is an unfinished run"):
        find_run_path(job, 1e9, RunOptions(resume=True))
    for path in (first, Path("runs/other-20300101-000000")):
        kill_at(4)
        with pytest.raises(Killed):
            run_job(job, plan, path, Console(file=io.StringIO()))
    assert find_run_path(job, 2e9, RunOptions(resume=True)) == (first, True)
    assert find_run_path(job, 2e9, RunOptions())[1] is False
    assert run_job(job, plan, first, Console(file=io.StringIO()), resume=True).resumed_from == (2,)
    with pytest.raises(RunError, match="none of these is an unfinished run"):
        find_run_path(job, 2e9, RunOptions(replan=True))


def test_a_run_whose_last_loss_is_not_finite_has_a_report(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        result = training_step(*arguments, **options)
        return replace(result, loss=float("nan"), applied=False) if len(calls) in (1, 6) else result

    calls: list[int] = []
    monkeypatch.setattr("fitune.runtime.training.loop.training_step", poison)
    recipe = write_recipe(tmp_path, llama, train={"on_nonfinite": "skip"}, output={"dir": "run", "save_every": 1})
    report = execute(recipe)
    losses = read_losses(tmp_path / "run")
    assert (losses[0], losses[5]) == (None, None)
    assert (report.loss.first, report.loss.last, report.skipped_steps) == (losses[1], losses[4], 2)
