"""The run: load, evaluate, train, evaluate, save, under the monitor, exactly as the plan says."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import set_seed

from ..planner.plan import Plan
from ..recipes.errors import OutOfMemoryError, RunError
from .allocation import limit_allocator, use_expandable_segments
from .build import BuiltModel, build_model
from .evaluate import answer, evaluate
from .host import WEIGHT_BLOCK_BYTES, keep_heap_tight
from .live import LiveLine
from .loop import Progress, TrainingLoop
from .losses import check_loss_head
from .meter import Meter
from .models import fetch_model
from .oom import describe_out_of_memory, is_out_of_memory
from .packing import check_packing
from .planning import Job
from .quiet import quiet_libraries
from .report import Loss, RunReport, Sample, Speed, Status
from .rows import Row
from .rundir import PLAN_NAME, REPORT_NAME, RunDirectory
from .save import count_file_bytes, free_memory, make_card, name_base_model, save_merged, save_trained
from .step import autocast
from .tokens import find_stop_token_ids
from .tracker import JsonLinesTracker
from .versions import find_versions


def choose_run_path(job: Job, now: float) -> Path:
    """`output.dir`, else `runs/<recipe>-<time>` in the current folder."""
    written = job.recipe_file.recipe.output.dir
    if written is not None:
        return job.recipe_file.resolve(written)
    return Path("runs") / f"{job.recipe_file.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}"


def run_job(job: Job, plan: Plan, path: Path, console: Console) -> RunReport:
    """Execute `plan` in a new run directory at `path`; nothing is left where it fails to start."""
    base_folder = fetch_model(job.source)
    with RunDirectory(path) as directory:
        run = None
        try:
            run = Run(job, plan, directory, base_folder, console)
            return run.execute()
        except BaseException:
            if run is None or run.progress.step == 0:
                directory.clear()
            raise


class Run:
    """One execution of a plan."""

    def __init__(self, job: Job, plan: Plan, directory: RunDirectory, base_folder: Path, console: Console) -> None:
        self.job, self.plan, self.directory, self.console = job, plan, directory, console
        self.recipe, self.strategy, self.base_folder = job.recipe_file.recipe, plan.strategy, base_folder
        if self.strategy.expandable_segments and plan.device.kind == "cuda":
            use_expandable_segments()
        self.accelerator = Accelerator(
            cpu=plan.device.kind == "cpu",
            mixed_precision="no",
            log_with=JsonLinesTracker(directory.path / "metrics.jsonl"),
        )
        self.device = self.accelerator.device
        if self.device.type == "cuda":
            memory = plan.memory
            limit_allocator(memory.budget_bytes, memory.peak_device_bytes - (memory.peak_reserved_bytes or 0))
        self.progress = Progress()
        self.started = time.time()
        self.tokenizer: Any = job.data.tokenizer

    def execute(self) -> RunReport:
        """All phases of the run; an out-of-memory error becomes a diagnosis."""
        self.directory.write_json(PLAN_NAME, self.plan.model_dump(mode="json"))
        self.directory.write_text("recipe.toml", self.job.recipe_file.path.read_text(encoding="utf-8-sig"))
        with Meter(self.directory.path / "samples.jsonl", self.plan, self.device, self.console) as meter:
            try:
                return self._execute(meter)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(describe_out_of_memory(self.plan, meter)) from error
            finally:
                self.accelerator.end_training()

    def _execute(self, meter: Meter) -> RunReport:
        set_seed(self.recipe.train.seed)
        self.accelerator.init_trackers("fitune")
        self.console.print("loading the model", style="bright_black")
        keep_heap_tight(WEIGHT_BLOCK_BYTES)
        built = self._build()
        keep_heap_tight()
        meter.enter("evaluate")
        before = self._evaluate(built, 0)
        question = self._find_question()
        answer_before = self._answer(built, question)
        status = self._train(built, meter)
        status, after, answer_after = self._look_back(built, meter, question, status)
        output = self._save(built, meter, before, after)
        del built
        output |= self._merge(meter, output)
        meter.stop()
        sample = None
        if question is not None and answer_before is not None and answer_after is not None:
            sample = Sample(question=_question_text(question), before=answer_before, after=answer_after)
        return self._write_report(meter, status, before, after, sample, output)

    def _build(self) -> BuiltModel:
        method = self.recipe.method
        built = build_model(
            self.base_folder,
            self.strategy,
            self.device,
            alpha=method.alpha,
            adapter=None if method.adapter is None else self.job.recipe_file.resolve(method.adapter),
            trust_remote_code=self.recipe.model.trust_remote_code,
        )
        name_base_model(built.model, self.job.source.hub_id or str(self.base_folder.resolve()))
        self._check_trainable(built)
        self.accelerator.prepare_model(built.model)
        with autocast(self.strategy, self.device):
            check_loss_head(built.model, built.base, loss_head=self.strategy.loss_head, device=self.device)
            if self.strategy.packing:
                check_packing(built.model, built.base, device=self.device)
        return built

    def _check_trainable(self, built: BuiltModel) -> None:
        """An adapter that is continued has a rank and targets of its own: the plan must be for those."""
        adapter, planned, model = self.recipe.method.adapter, self.plan.parameters.trainable, cast(Any, built.model)
        found = sum(parameter.numel() for parameter in built.trainable)
        if adapter is not None and found != planned:
            config = model.peft_config["default"]
            raise RunError(
                f"method.adapter: {adapter} trains {found:,} parameters, the plan {planned:,}: set method.rank = "
                f"{config.r} and method.targets = {json.dumps(sorted(config.target_modules))}, as the adapter has them"
            )

    def _train(self, built: BuiltModel, meter: Meter) -> Status:
        """The training loop; Ctrl-C ends it with what was trained so far."""
        loop = TrainingLoop(self.plan, self.job, built, self.accelerator, meter, self.progress)
        memory = self.plan.memory
        line = LiveLine(
            self.console, steps=loop.steps, predicted_bytes=memory.peak_device_bytes, budget_bytes=memory.budget_bytes
        )
        try:
            with line:
                for batch in loop.batches:
                    loop.step(batch, line)
                    if self._is_out_of_time():
                        return "out_of_time"
                    self._between_steps(built, meter, loop.steps)
        except KeyboardInterrupt:
            self.console.print("interrupted: saving what was trained so far", style="yellow")
            loop.optimizer.zero_grad(set_to_none=True)
            return "interrupted"
        return "finished"

    def _look_back(
        self, built: BuiltModel, meter: Meter, question: Row | None, status: Status
    ) -> tuple[Status, float | None, str | None]:
        """Held-out loss and answer after training; Ctrl-C skips what is left of them, and the weights are saved."""
        if status == "interrupted":
            return status, None, None
        meter.enter("evaluate")
        try:
            return status, self._evaluate(built, self.progress.step), self._answer(built, question)
        except KeyboardInterrupt:
            self.console.print("interrupted: saving what was trained", style="yellow")
            return "interrupted", None, None

    def _is_out_of_time(self) -> bool:
        hours = self.recipe.budget.max_hours
        return hours is not None and time.time() - self.started > hours * 3600

    def _between_steps(self, built: BuiltModel, meter: Meter, steps: int) -> None:
        """Evaluate and save where the recipe says so; the last step is followed by both anyway."""
        step = self.progress.step
        every, save_every = self.recipe.train.eval_every, self.recipe.output.save_every
        if step < steps and every is not None and step % every == 0:
            meter.enter("evaluate")
            loss = self._evaluate(built, step)
            self.console.print(f"step {step}: held-out loss {loss:.3f}" if loss is not None else "no held-out rows")
        if step < steps and save_every is not None and step % save_every == 0:
            meter.enter("save")
            name = f"checkpoints/step-{step:06d}"
            save_trained(self.directory, name, built.model, self.tokenizer, self._make_card(f"after step {step}"))

    def _evaluate(self, built: BuiltModel, step: int) -> float | None:
        held_out = self.job.data.eval
        if held_out is None:
            return None
        loss = evaluate(built, held_out, self.strategy, self.device)
        if not math.isfinite(loss):
            raise RunError(
                f"the held-out loss is {loss} after {step} steps: the run stopped without saving its weights; "
                "lower train.learning_rate, or look at the held-out rows"
            )
        self.accelerator.log({"eval_loss": loss}, step=step)
        return loss

    def _find_question(self) -> Row | None:
        return next((row for row in self.job.data.eval_rows if row.messages is not None), None)

    def _answer(self, built: BuiltModel, row: Row | None) -> str | None:
        """The model's answer to the held-out question; its own last turn is what it has to write."""
        if row is None or row.messages is None:
            return None
        with quiet_libraries():
            return answer(
                built.model,
                self.tokenizer,
                row.messages[:-1],
                strategy=self.strategy,
                device=self.device,
                stop_token_ids=find_stop_token_ids(self.tokenizer),
            )

    def _save(self, built: BuiltModel, meter: Meter, before: float | None, after: float | None) -> dict[str, str]:
        meter.enter("save")
        name = "model" if self.strategy.method == "full" else "adapter"
        loss = "no held-out loss"
        if before is not None and after is not None:
            loss = f"held-out loss {before:.3f} before, {after:.3f} after"
        card = self._make_card(loss)
        save_trained(self.directory, name, built.model, self.tokenizer, card)
        return {name: name}

    def _merge(self, meter: Meter, output: dict[str, str]) -> dict[str, str]:
        """Merge the saved adapter into a fresh base; the trained model is gone by then."""
        if not self.recipe.output.merge or "adapter" not in output:
            return {}
        self.accelerator.free_memory()
        free_memory(self.device)
        meter.enter("merge")
        keep_heap_tight(WEIGHT_BLOCK_BYTES)
        save_merged(
            self.directory,
            self.base_folder,
            self.directory.path / output["adapter"],
            dtype="bf16" if self.strategy.method == "qlora" else self.strategy.weights_dtype,
            tokenizer=self.tokenizer,
            card=self._make_card("merged from the adapter beside it"),
            trust_remote_code=self.recipe.model.trust_remote_code,
        )
        return {"merged": "merged"}

    def _make_card(self, loss: str) -> str:
        train = self.recipe.data.train
        data = train if isinstance(train, str) else ", ".join(source.path for source in train)
        return make_card(self.plan, self.job.recipe_file, self.job.source, data=data, loss=loss)

    def _write_report(
        self,
        meter: Meter,
        status: Status,
        before: float | None,
        after: float | None,
        sample: Sample | None,
        output: dict[str, str],
    ) -> RunReport:
        progress, summary = self.progress, meter.summary
        speed = progress.tokens / progress.train_seconds if progress.train_seconds else None
        report = RunReport(
            recipe=self.plan.recipe,
            recipe_sha256=self.plan.recipe_sha256,
            status=status,
            started_unix_time=self.started,
            loss=Loss(before=before, after=after, first=progress.first_loss, last=progress.last_loss),
            sample=sample,
            measured=meter.measure(disk_bytes=count_file_bytes(self.directory.path)),
            speed=Speed(
                steps=progress.step,
                tokens=progress.tokens,
                train_seconds=progress.train_seconds,
                total_seconds=time.time() - self.started,
                tokens_per_second=speed,
                energy_joules=summary.energy_joules,
            ),
            events=tuple(asdict(event) for event in summary.events),
            output=output,
            versions=find_versions(),
            skipped_steps=progress.skipped,
        )
        self.directory.write_json(REPORT_NAME, report.model_dump(mode="json"))
        return report


def _question_text(row: Row) -> str:
    assert row.messages is not None, "the question comes from a conversation"
    return next((one.content for one in reversed(row.messages) if one.role == "user"), "")
