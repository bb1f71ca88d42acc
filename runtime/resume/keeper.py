"""When a checkpoint is due, which ones stay, and when training no longer helps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...planner.files import count_kept
from ...planner.plan import Plan
from ...planner.run_time import CHECKPOINT_SECONDS
from ...recipes.errors import CheckpointError, DiskError
from ...recipes.schema import Recipe
from ..model.build import BuiltModel
from ..training.loop import TrainingLoop
from .checkpoints import CheckpointStore
from .content import History, restore_weights, write_content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO_SHARE = 0.05
"""The most time that writing checkpoints may take then; where it would, they come less often. A choice."""


class Keeper:
    """Writes the checkpoints of a run and keeps those that the recipe wants.

    say: shows a line to the user
    """

    def __init__(self, store: CheckpointStore, plan: Plan, recipe: Recipe, say: Callable[[str], None]) -> None:
        self.store, self._say, self._output, self._train = store, say, recipe.output, recipe.train
        self._kept = count_kept(recipe.output, plan.memory.checkpoints)
        self._needed_bytes = plan.memory.checkpoint_bytes
        self._last_seconds, self._write_seconds = time.monotonic(), 0.0
        self.written_step: int | None = None
        self._is_failing = False

    @property
    def is_on(self) -> bool:
        """Whether checkpoints are written at all."""
        return self._output.save_every != "never" and self._kept > 0

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint follows this step."""
        if not self.is_on:
            return False
        every = self._output.save_every
        if isinstance(every, int):
            return step % every == 0
        return time.monotonic() - self._last_seconds >= max(CHECKPOINT_SECONDS, self._write_seconds / AUTO_SHARE)

    def is_worth_keeping(self, history: History, step: int) -> bool:
        """Whether the weights of this step are the best so far, and the recipe wants those."""
        return self._output.keep_best and history.best is not None and history.best.step == step

    def should_stop(self, history: History) -> bool:
        """Whether the held-out loss has not become better for as long as the recipe waits."""
        patience = self._train.early_stopping_patience
        return patience is not None and history.worse_in_a_row >= patience

    def write(
        self,
        built: BuiltModel,
        loop: TrainingLoop,
        history: History,
        *,
        tokenizer: PreTrainedTokenizerBase,
        card: str,
    ) -> bool:
        """Write the checkpoint of the last step, once, then remove those that it replaces. False where the disk does
        not take it: the run goes on, and the checkpoints before it stay."""
        step = loop.progress.step
        if not self.is_on or self.written_step == step:
            return self.written_step == step
        start = time.monotonic()

        def fill(folder: Path) -> dict[str, str]:
            return write_content(folder, built, loop, history, tokenizer=tokenizer, card=card)

        try:
            self.store.write(step, fill, needed_bytes=self._needed_bytes)
        except DiskError as error:
            if not self._is_failing:
                self._say(f"no checkpoint of step {step}: {error}; the run goes on, and the last checkpoint stays")
            self._is_failing = True
            return False
        finally:
            self._last_seconds = time.monotonic()
            self._write_seconds = self._last_seconds - start
        self.written_step, self._is_failing = step, False
        best = history.best.step if self._output.keep_best and history.best is not None else None
        self.store.rotate(self._kept, best)
        return True

    def restore_best(self, built: BuiltModel, history: History, step: int) -> bool:
        """Put the weights of the best held-out loss into the model, where the recipe wants them and they are not those
        of `step`; whether that was done."""
        best = history.best
        if not self._output.keep_best or best is None or best.step == step:
            return False
        try:
            restore_weights(self.store.find(best.step), built)
        except CheckpointError as error:
            self._say(f"the last weights are saved, not the best: {error}")
            return False
        self._say(f"the weights of step {best.step} are saved: their held-out loss of {best.loss:.3f} is the best")
        return True

    def finish(self) -> None:
        """The run has its result: checkpoints that only served to survive are no longer needed."""
        if self._output.save_every == "auto" and not self._output.keep_best:
            self.store.remove_all()
