"""The training loop: one optimizer step after the other, logged and shown."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.nn.utils import get_total_norm
from transformers import get_scheduler

from ...planner.memory import STEP_PHASES
from ...planner.plan import Plan
from ...recipes.errors import RunError
from ..data.batches import BatchesAhead, GlobalBatch, count_steps, iterate_batches
from ..machine.samples import MonitorSummary
from ..model.build import BuiltModel
from ..model.parts import find_layers
from .in_backward import UpdatesInBackward
from .live import LiveLine
from .meter import Meter
from .optimizers import make_optimizer
from .step import StepResult, make_scaler, training_step

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..planning import Job


MAX_NONFINITE_STEPS = 10
"""So many steps in a row that are not finite end a run that skips them: its weights are lost. A choice."""


@dataclass(kw_only=True)
class Progress:
    """What a run has done so far.

    step:          optimizer steps done
    tokens:        tokens computed, padding excepted
    train_seconds: in training steps
    first_steps, first_tokens, first_seconds: of them those of the first step of each session, which compiles, loads
                   kernels and fills caches
    first_loss, last_loss: of the first and the last training step whose loss was finite
    skipped:       steps without an update: fp16 gradients that overflowed, or on_nonfinite = "skip"
    """

    step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    first_steps: int = 0
    first_tokens: int = 0
    first_seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    skipped: int = 0

    @property
    def steady(self) -> tuple[int, int, float]:
        """(steps, tokens, seconds) without the first ones, unless there are no others."""
        steps = self.step - self.first_steps
        if steps <= 0:
            return self.step, self.tokens, self.train_seconds
        return steps, self.tokens - self.first_tokens, self.train_seconds - self.first_seconds

    def count_joules(self, summary: MonitorSummary) -> float | None:
        """Of the GPU for 1,000 tokens: the mean power of this session's steps times the time of as many tokens; None
        without a GPU that tells its power."""
        _, tokens, seconds = self.steady
        steps = [phase for phase in summary.phases if phase.name in STEP_PHASES]
        joules, measured = sum(one.energy_joules or 0.0 for one in steps), sum(one.seconds for one in steps)
        return 1000 * joules / measured * seconds / tokens if joules and measured and tokens else None

    def count(self, step: int, tokens: int, seconds: float, *, is_first: bool) -> None:
        """One more step; is_first: of this session."""
        self.step, self.tokens, self.train_seconds = step, self.tokens + tokens, self.train_seconds + seconds
        if is_first:
            self.first_steps += 1
            self.first_tokens += tokens
            self.first_seconds += seconds


class TrainingLoop:
    """Optimizer, schedule and batches of one run.

    steps:   optimizer steps of the whole run
    batches: the global batches, one for each step
    """

    def __init__(
        self,
        plan: Plan,
        job: Job,
        built: BuiltModel,
        accelerator: Accelerator,
        meter: Meter,
        progress: Progress,
    ) -> None:
        train, rows, strategy = job.recipe_file.recipe.train, job.data.train, plan.strategy
        self.strategy, self.built, self.accelerator = strategy, built, accelerator
        self.meter, self.progress, self.max_grad_norm = meter, progress, train.max_grad_norm
        self.nonfinite_in_a_row = 0
        self._is_first = True
        self.skips_nonfinite = train.on_nonfinite == "skip"
        size, epochs, max_steps = train.global_batch_size, train.epochs, train.max_steps
        self.steps = count_steps(rows.epoch_rows, global_batch_size=size, epochs=epochs, max_steps=max_steps)
        made = iterate_batches(
            job.data.stream or rows,
            global_batch_size=size,
            micro_batch_size=strategy.micro_batch_size,
            seed=train.seed,
            epochs=epochs,
            max_steps=max_steps,
            done_steps=progress.step,
        )
        self.batches = BatchesAhead(made, accelerator.device)
        self.optimizer = make_optimizer(
            strategy.optimizer,
            built.model,
            learning_rate=strategy.learning_rate,
            weight_decay=train.weight_decay,
            rounding=strategy.rounding,
            compiled=strategy.compile,
        )
        self.updates = None
        if strategy.optimizer_in_backward:
            self.updates = UpdatesInBackward(self.optimizer, built.model, list(find_layers(built.base)))
        self.scheduler = get_scheduler(
            "constant_with_warmup" if train.schedule == "constant" else train.schedule,
            self.optimizer,
            num_warmup_steps=math.ceil(train.warmup * self.steps),
            num_training_steps=self.steps,
        )
        self.scaler = make_scaler(strategy, accelerator.device)

    def step(self, batch: GlobalBatch, line: LiveLine) -> None:
        """One optimizer step; RunError where loss or gradients are not finite, unless such steps are to be skipped
        (fp16's overflows always are)."""
        start = time.perf_counter()
        learning_rate = self.scheduler.get_last_lr()[0]
        result = training_step(
            self.built.model,
            self.built.base,
            batch.micro_batches,
            tokens=batch.trained_tokens,
            strategy=self.strategy,
            optimizer=self.optimizer,
            scaler=self.scaler,
            clip=self._clip,
            updates=self.updates,
            enter_phase=self.meter.enter,
            meanwhile=self.batches.prepare,
        )
        if result.applied:
            self.scheduler.step()
            self.nonfinite_in_a_row = 0
        elif self.strategy.compute_dtype != "fp16" or not math.isfinite(result.loss):
            self._check_nonfinite(batch.step, result)
        seconds = time.perf_counter() - start
        self._count(batch, result, seconds)
        self._show(batch, result, seconds, learning_rate, line)

    def _check_nonfinite(self, step: int, result: StepResult) -> None:
        """RunError for a step that is not finite, or for the last of too many that are skipped."""
        what = f"step {step}: loss {result.loss}, gradient norm {result.gradient_norm}"
        advice = "lower train.learning_rate, or look at the rows of this step"
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1
        if not self.skips_nonfinite:
            raise RunError(f"{what}: the run stopped without saving its weights; {advice}")
        if self.nonfinite_in_a_row >= MAX_NONFINITE_STEPS:
            raise RunError(f"{what}, the last of {MAX_NONFINITE_STEPS} in a row: the run stopped; {advice}")

    def _clip(self) -> Any:
        if self.max_grad_norm == "off":
            return get_total_norm(one.grad for one in self.built.trainable if one.grad is not None)
        return self.accelerator.clip_grad_norm_(self.built.trainable, self.max_grad_norm)

    def _count(self, batch: GlobalBatch, result: StepResult, seconds: float) -> None:
        progress = self.progress
        progress.count(batch.step, batch.tokens, seconds, is_first=self._is_first)
        self._is_first = False
        if math.isfinite(result.loss):
            progress.first_loss = result.loss if progress.first_loss is None else progress.first_loss
            progress.last_loss = result.loss
        progress.skipped += not result.applied

    def _show(
        self, batch: GlobalBatch, result: StepResult, seconds: float, learning_rate: float, line: LiveLine
    ) -> None:
        """A line of metrics.jsonl, and the live one."""
        steady_steps, steady_tokens, steady_seconds = self.progress.steady
        self.accelerator.log(
            {
                "epoch": batch.epoch,
                "loss": result.loss,
                "gradient_norm": result.gradient_norm,
                "learning_rate": learning_rate,
                "tokens_per_second": batch.tokens / seconds,
            },
            step=batch.step,
        )
        line.update(
            batch.step,
            loss=result.loss,
            tokens_per_second=steady_tokens / steady_seconds,
            memory_bytes=self.meter.memory_now_bytes,
            seconds_left=steady_seconds / steady_steps * (self.steps - batch.step),
            joules_per_1000_tokens=self.progress.count_joules(self.meter.summary),
        )
