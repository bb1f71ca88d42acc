"""The run: load, evaluate, train, evaluate, save, under the monitor, exactly as the plan says."""

from __future__ import annotations

import json
import signal
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.text import Text
from transformers import set_seed

from ...planner.plan import Plan
from ...recipes.errors import OutOfMemoryError, RunError
from ..machine.host import WEIGHT_BLOCK_BYTES, keep_heap_tight, trim_heap
from ..model.assemble import build_for_run
from ..model.attention import attention_kernels
from ..model.build import BuiltModel
from ..model.models import fetch_model
from ..model.results import Results
from ..model.save import count_file_bytes, free_memory
from ..planning import Job
from ..redaction import redact
from ..report import RunReport, Sample, Status
from ..resume.checkpoints import CheckpointStore
from ..resume.content import History, restore_training, restore_weights
from ..resume.keeper import Keeper
from ..resume.replanning import describe_new_plan
from ..resume.session import open_session, record_failure
from ..resume.signals import StopSignals, find_signal
from ..rundir import METRICS_NAME, REPORT_NAME, SAMPLES_NAME, RunDirectory
from ..versions import find_versions
from .allocation import limit_allocator, use_expandable_segments
from .failures import explain_failure
from .forgetting import make_forgetting
from .garbage import frozen_garbage
from .judge import Judge
from .live import LiveLine
from .loop import Progress, TrainingLoop
from .meter import Meter
from .oom import describe_out_of_memory, is_out_of_memory, make_failure
from .outcome import make_loss, make_sample, make_speed
from .tracker import JsonLinesTracker

STOPPED = ("interrupted", "terminated")
"""Statuses of a run that a signal ended: it saves what it has and does nothing more."""


def run_job(
    job: Job, plan: Plan, path: Path, console: Console, *, resume: bool = False, replanned: bool = False
) -> RunReport:
    """Execute `plan` in the run directory at `path`; nothing is left of a new run that fails to start.

    resume:    whether the unfinished run in the directory goes on
    replanned: whether `plan` is another one than it had
    """
    with StopSignals() as signals:
        base_folder = fetch_model(job.source)
        with RunDirectory(path, resume=resume) as directory:
            run = None
            try:
                run = Run(job, plan, directory, base_folder, console, signals, replanned=replanned)
                return run.execute()
            except BaseException as error:
                is_new = not resume and (run is None or run.progress.step == 0)
                if is_new and not isinstance(error, OutOfMemoryError):
                    directory.clear()
                raise


class Run:
    """One session of executing a plan."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        directory: RunDirectory,
        base_folder: Path,
        console: Console,
        signals: StopSignals,
        *,
        replanned: bool = False,
    ) -> None:
        self.job, self.plan, self.directory, self.console, self.signals = job, plan, directory, console, signals
        self.recipe, self.strategy, self.base_folder = job.recipe_file.recipe, plan.strategy, base_folder
        self.started = time.time()
        self.session = open_session(job, plan, directory, now=self.started, replanned=replanned, say=self._say)
        state = self.session.state
        self.progress = Progress() if state is None else state.progress
        self.history = History() if state is None else state.history
        self.earlier_seconds = self.history.seconds
        self.keeper = Keeper(CheckpointStore(directory), plan, self.recipe, self._say)
        self.tracker = JsonLinesTracker(directory.path / METRICS_NAME, self._say)
        self.accelerator = Accelerator(cpu=plan.device.kind == "cpu", mixed_precision="no", log_with=self.tracker)
        self.device = self.accelerator.device
        self.tokenizer: Any = job.data.tokenizer
        self.judge = Judge(job, self.strategy, self.device, self.accelerator.log, self.progress, self.history)
        self.results = Results(job, plan, directory, base_folder)
        self.forgetting_after: float | None = None

    def _say(self, text: str) -> None:
        self.console.print(Text.assemble(("note: ", "yellow"), text), soft_wrap=True)

    def _say_phase(self, text: str) -> None:
        self.console.print(text, style="bright_black")

    @property
    def total_seconds(self) -> float:
        """Of all sessions, so far."""
        return self.earlier_seconds + time.time() - self.started

    def execute(self) -> RunReport:
        """All phases of the run; an out-of-memory error becomes a diagnosis."""
        trim_heap()  # on a CPU planning has measured steps in this process
        with Meter(self.directory.path / SAMPLES_NAME, self.plan, self.device, self.console) as meter:
            try:
                self._prepare_gpu()
                with attention_kernels(self.strategy.attention):
                    return self._execute(meter)
            except Exception as error:
                if is_out_of_memory(error):
                    raise OutOfMemoryError(self._explain_out_of_memory(meter, error)) from error
                why = explain_failure(error, compiled=self.strategy.compile, phase=meter.phase, step=self.progress.step)
                if why is None:
                    raise
                raise RunError(why) from error
            finally:
                self.accelerator.end_training()

    def _prepare_gpu(self) -> None:
        """Make CUDA's context, under the monitor: in a container the driver does not tell whose memory it is."""
        if self.device.type != "cuda":
            return
        memory = self.plan.memory
        if self.strategy.expandable_segments:
            use_expandable_segments()
        limit_allocator(memory.budget_bytes, memory.peak_device_bytes - (memory.peak_reserved_bytes or 0))

    def _explain_out_of_memory(self, meter: Meter, error: BaseException) -> str:
        """The diagnosis, and a plan that needs less; both stay in the directory for `--replan`."""
        diagnosis = describe_out_of_memory(self.plan, meter, self.progress.step)
        failure = make_failure(self.plan, meter, error)
        record_failure(self.directory, self.session.record, failure)
        traceback.clear_frames(error.__traceback__)
        free_memory(self.device)
        return f"{diagnosis}; {describe_new_plan(self.job, self.plan, failure)}"

    def _execute(self, meter: Meter) -> RunReport:
        set_seed(self.recipe.train.seed)
        self.accelerator.init_trackers("fitune")
        self._say_phase("loading the model")
        keep_heap_tight(WEIGHT_BLOCK_BYTES)
        built = build_for_run(self.job, self.plan, self.base_folder, self.device)
        self.accelerator.prepare_model(built.model)
        keep_heap_tight()
        if self.session.checkpoint is None:
            self._say_phase("evaluating before the first step")
            meter.enter("evaluate")
            self.history.before = self.judge.measure(built)
            self.history.forgetting_before = self.judge.measure_forgetting(built)
            self.history.answer_before = self.judge.answer(built)
        loop = self._make_loop(built, meter)
        status = self._train(built, loop, meter)
        status, after, answer_after = self._look_back(built, loop, meter, status)
        del loop
        trim_heap()
        meter.enter("save")
        output = self.results.save(built, self.history.before, after)
        del built
        if self.recipe.output.merge and "adapter" in output and status not in STOPPED:
            self.accelerator.free_memory()
            free_memory(self.device)
            self._say_phase("merging the adapters into the model")
            meter.enter("merge")
            output |= self.results.merge(output["adapter"])
        meter.stop()
        self.tracker.flush()
        sample = make_sample(self.judge.question, self.history.answer_before, answer_after)
        report = self._make_report(meter, status, after, sample, output)
        text = json.dumps(report.model_dump(mode="json"), indent=2, allow_nan=False)
        self.directory.write_text(REPORT_NAME, redact(text) + "\n")
        if status == "finished":
            self.keeper.finish()
        return report

    def _make_loop(self, built: BuiltModel, meter: Meter) -> TrainingLoop:
        """The training loop, in the state of the checkpoint that the run goes on from."""
        loop = TrainingLoop(self.plan, self.job, built, self.accelerator, meter, self.progress)
        checkpoint, state = self.session.checkpoint, self.session.state
        if checkpoint is not None and state is not None:
            restore_weights(checkpoint, built)
            restore_training(checkpoint, state, built, loop)
            self._say_phase(f"going on after step {checkpoint.step} of {loop.steps}")
        return loop

    def _train(self, built: BuiltModel, loop: TrainingLoop, meter: Meter) -> Status:
        """The training loop; Ctrl-C and SIGTERM end it with what was trained so far."""
        memory = self.plan.memory
        line = LiveLine(
            self.console,
            steps=loop.steps,
            predicted_bytes=memory.peak_device_bytes,
            budget_bytes=memory.budget_bytes,
            predicted=self.plan.speed,
        )
        try:
            with line, frozen_garbage():
                if self.session.checkpoint is not None and self._between_steps(built, loop, meter):
                    return "finished"
                for batch in loop.batches:
                    with self.signals.deferred():
                        loop.step(batch, line)
                    if self._is_out_of_time():
                        self._write_checkpoint(built, loop, meter)
                        return "out_of_time"
                    if self._between_steps(built, loop, meter):
                        break
        except KeyboardInterrupt as interruption:
            return self._stop(built, loop, meter, interruption)
        return "finished"

    def _stop(self, built: BuiltModel, loop: TrainingLoop, meter: Meter, interruption: KeyboardInterrupt) -> Status:
        """Keep what was trained: a checkpoint first, since whoever sent the signal may not wait long."""
        self.console.print("interrupted: saving what was trained so far", style="yellow")
        loop.optimizer.zero_grad(set_to_none=True)
        self._write_checkpoint(built, loop, meter)
        return "terminated" if find_signal(interruption) == signal.SIGTERM else "interrupted"

    def _look_back(
        self, built: BuiltModel, loop: TrainingLoop, meter: Meter, status: Status
    ) -> tuple[Status, float | None, str | None]:
        """Held-out loss and answer after training; a signal skips what is left of them, and the weights are saved."""
        if status in STOPPED:
            return status, None, None
        self._say_phase("evaluating after the last step")
        trim_heap()
        meter.enter("evaluate")
        try:
            after = self.judge.measure(built)
            if self.keeper.restore_best(built, self.history, self.progress.step) and self.history.best is not None:
                after = self.history.best.loss
            self.forgetting_after = self.judge.measure_forgetting(built)
            return status, after, self.judge.answer(built)
        except KeyboardInterrupt as interruption:
            return self._stop(built, loop, meter, interruption), None, None

    def _is_out_of_time(self) -> bool:
        hours = self.recipe.budget.max_hours
        return hours is not None and self.total_seconds > hours * 3600

    def _between_steps(self, built: BuiltModel, loop: TrainingLoop, meter: Meter) -> bool:
        """Evaluate and write a checkpoint where the recipe says so; the last step is followed by an evaluation anyway.

        Returns whether training no longer helps.
        """
        step, every = self.progress.step, self.recipe.train.eval_every
        if step >= loop.steps:
            return False
        if every is not None and step % every == 0 and self.history.evaluated_step != step:
            trim_heap()
            meter.enter("evaluate")
            loss = self.judge.measure(built)
            self.console.print(f"step {step}: held-out loss {loss:.3f}" if loss is not None else "no held-out rows")
        if self.keeper.is_due(step) or self.keeper.is_worth_keeping(self.history, step):
            self._write_checkpoint(built, loop, meter)
        if self.keeper.should_stop(self.history):
            self._say(
                f"stopped after step {step}: the held-out loss has not become better since step {self._best_step}"
            )
            return True
        return False

    @property
    def _best_step(self) -> int:
        return 0 if self.history.best is None else self.history.best.step

    def _write_checkpoint(self, built: BuiltModel, loop: TrainingLoop, meter: Meter) -> None:
        """A checkpoint of this step, if the recipe wants any; the metrics up to it are on the disk before it."""
        step = self.progress.step
        if step == 0 or not self.keeper.is_on:
            return
        trim_heap()
        meter.enter("save")
        self.tracker.sync()
        self.history.seconds = self.total_seconds
        card = self.results.make_card(f"after step {step}")
        self.keeper.write(built, loop, self.history, tokenizer=self.tokenizer, card=card)

    def _make_report(
        self, meter: Meter, status: Status, after: float | None, sample: Sample | None, output: dict[str, str]
    ) -> RunReport:
        summary, resumed = meter.summary, self.session.resumed
        return RunReport(
            recipe=self.plan.recipe,
            recipe_sha256=self.plan.recipe_sha256,
            status=status,
            started_unix_time=self.session.record.sessions[0].started_unix_time,
            loss=make_loss(self.progress, self.history, after),
            sample=sample,
            measured=meter.measure(disk_bytes=count_file_bytes(self.directory.path)),
            speed=make_speed(self.progress, self.total_seconds, summary),
            events=tuple(asdict(event) for event in summary.events),
            output=output,
            versions=find_versions(),
            skipped_steps=self.progress.skipped,
            resumed_from=tuple(one.from_step for one in resumed),
            lost_steps=sum(one.lost_steps for one in resumed),
            best_step=None if self.history.best is None else self.history.best.step,
            checkpoints=len(self.keeper.store.list_steps()),
            forgetting=make_forgetting(
                self.job.data,
                self.history.forgetting_before,
                self.forgetting_after,
                allowed=self.recipe.data.max_forgotten,
            ),
            data=self.job.data_report_after,
        )
