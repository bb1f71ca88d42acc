"""What a run leaves when it ends: the adapter or the model, and the merged model if asked for."""

from __future__ import annotations

from pathlib import Path

from ...planner.files import merged_dtype
from ...planner.plan import Plan
from ..machine.host import WEIGHT_BLOCK_BYTES, keep_heap_tight
from ..planning import Job
from ..redaction import redact
from ..resume.content import check_finite
from ..rundir import RunDirectory
from .build import BuiltModel
from .save import make_card, save_merged, save_trained


class Results:
    """The folders of a run's results."""

    def __init__(self, job: Job, plan: Plan, directory: RunDirectory, base_folder: Path) -> None:
        self._job, self._plan, self._directory, self._base_folder = job, plan, directory, base_folder
        self._recipe = job.recipe_file.recipe

    def save(self, built: BuiltModel, before: float | None, after: float | None) -> dict[str, str]:
        """Write what was trained; its name and folder. Weights that are not finite are refused.

        before, after: held-out loss, for the card
        """
        check_finite(built)
        name = "model" if self._plan.strategy.method == "full" else "adapter"
        loss = "no held-out loss"
        if before is not None and after is not None:
            loss = f"held-out loss {before:.3f} before, {after:.3f} after"
        save_trained(self._directory, name, built.model, self._job.data.tokenizer, self.make_card(loss))
        return {name: name}

    def merge(self, adapter: str) -> dict[str, str]:
        """Merge the saved adapter into a fresh base; the trained model is gone by then."""
        keep_heap_tight(WEIGHT_BLOCK_BYTES)
        save_merged(
            self._directory,
            self._base_folder,
            self._directory.path / adapter,
            dtype=merged_dtype(self._plan.strategy),
            tokenizer=self._job.data.tokenizer,
            card=self.make_card("merged from the adapter beside it"),
            trust_remote_code=self._recipe.model.trust_remote_code,
        )
        return {"merged": "merged"}

    def make_card(self, loss: str) -> str:
        """The model card, with what is known of the loss."""
        train = self._recipe.data.train
        data = train if isinstance(train, str) else ", ".join(source.path for source in train)
        return redact(make_card(self._plan, self._job.recipe_file, self._job.source, data=data, loss=loss))
