"""How good the model is at any time of a run: losses of rows that are not trained on, and one question answered."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch

from ...planner.strategy import Strategy
from ...recipes.errors import RunError
from ..data.rows import Row
from ..data.tokens import TokenizedRows, find_stop_token_ids
from ..model.build import BuiltModel
from ..planning import Job
from ..quiet import quiet_libraries
from ..resume.content import History
from .evaluate import answer, evaluate
from .loop import Progress


class Judge:
    """Measures the model of a run, after the steps that `progress` has; held-out losses go into `history`.

    log: writes values and the step into the metrics
    """

    def __init__(
        self,
        job: Job,
        strategy: Strategy,
        device: torch.device,
        log: Callable[..., None],
        progress: Progress,
        history: History,
    ) -> None:
        self._job, self._strategy, self._device, self._log = job, strategy, device, log
        self._progress, self._history = progress, history

    def measure(self, built: BuiltModel) -> float | None:
        """The held-out loss, None without held-out rows."""
        loss, step = self._measure(built, self._job.data.eval, "eval_loss", "held-out loss"), self._progress.step
        if loss is not None and step > 0:
            self._history.add(loss, step)
        return loss

    def measure_forgetting(self, built: BuiltModel) -> float | None:
        """The loss of the rows of another task, None without any."""
        return self._measure(built, self._job.data.forgetting, "forgetting_loss", "loss of data.forgetting")

    def _measure(self, built: BuiltModel, rows: TokenizedRows | None, name: str, what: str) -> float | None:
        """The loss of some rows, logged under a name; RunError where it is not finite."""
        if rows is None:
            return None
        step = self._progress.step
        loss = evaluate(built, rows, self._strategy, self._device)
        if not math.isfinite(loss):
            raise RunError(
                f"the {what} is {loss} after {step} steps: the run stopped without saving its weights; "
                "lower train.learning_rate, or look at those rows"
            )
        self._log({name: loss}, step=step)
        return loss

    @cached_property
    def question(self) -> Row | None:
        """The first held-out conversation."""
        return next((row for row in self._job.data.eval_rows if row.messages is not None), None)

    def answer(self, built: BuiltModel) -> str | None:
        """The model's answer to the held-out question; its own last turn is what it has to write."""
        row, tokenizer = self.question, self._job.data.tokenizer
        if row is None or row.messages is None:
            return None
        with quiet_libraries():
            return answer(
                built.model,
                tokenizer,
                row.messages[:-1],
                strategy=self._strategy,
                device=self._device,
                stop_token_ids=find_stop_token_ids(tokenizer),
            )
