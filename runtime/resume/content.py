"""What a checkpoint holds: weights that peft and transformers can load, the training state, and how far the run is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError

from ...planner.strategy import Value
from ...recipes.errors import CheckpointError, RunError
from ..model.build import BuiltModel
from ..model.files import list_state
from ..quiet import quiet_libraries
from ..rundir import write_whole
from ..training.loop import Progress, TrainingLoop
from .checkpoints import FOLDER_NAME, Checkpoint
from .tensor_file import read_into, write_tensors
from .training_state import ScalarState, capture_scalars, capture_tensors, restore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE_NAME = "training_state.json"
TENSORS_NAME = "training_state.safetensors"


@dataclass(kw_only=True)
class Best:
    """The best held-out loss so far, and after how many steps it was."""

    step: int
    loss: float


@dataclass(kw_only=True)
class History:
    """What a run has seen, beside its progress.

    before:          held-out loss before the training, None without held-out rows
    answer_before:   answer to the held-out question before it
    forgetting_before: loss of the rows of another task before it, None without any
    best:            the best held-out loss, None before the first one
    worse_in_a_row:  evaluations since then
    evaluated_step:  the last step that was evaluated, None before the first one
    seconds:         that the run has taken, all sessions together
    """

    before: float | None = None
    answer_before: str | None = None
    forgetting_before: float | None = None
    best: Best | None = None
    worse_in_a_row: int = 0
    evaluated_step: int | None = None
    seconds: float = 0.0

    def add(self, loss: float, step: int) -> bool:
        """Take down a held-out loss; whether it is the best so far."""
        self.evaluated_step = step
        if self.best is None or loss < self.best.loss:
            self.best, self.worse_in_a_row = Best(step=step, loss=loss), 0
            return True
        self.worse_in_a_row += 1
        return False


class RunState(Value):
    """training_state.json: everything of a run's state that is no tensor."""

    format_version: Literal[1] = 1
    progress: Progress
    history: History
    scalars: ScalarState


def write_content(
    folder: Path,
    built: BuiltModel,
    loop: TrainingLoop,
    history: History,
    *,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
) -> dict[str, str]:
    """Write the files of a checkpoint; SHA-256 of the large ones by their names. RunError where a weight is not finite:
    such a checkpoint would not be good."""
    check_finite(built)
    weights_name, weights = list_weights(built)
    digests = {weights_name: write_tensors(folder / weights_name, weights)}
    with quiet_libraries():
        _write_configs(folder, built)
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    digests[TENSORS_NAME] = write_tensors(folder / TENSORS_NAME, capture_tensors(built.model, loop.optimizer))
    state = RunState(
        progress=loop.progress,
        history=history,
        scalars=capture_scalars(built.model, loop.optimizer, loop.scheduler, loop.scaler),
    )
    write_whole(folder / STATE_NAME, state.model_dump_json(indent=2) + "\n")
    return digests


def _write_configs(folder: Path, built: BuiltModel) -> None:
    """What the libraries need beside the weights."""
    adapters = getattr(built.model, "peft_config", None)
    if adapters is not None:
        adapters["default"].save_pretrained(str(folder))
        return
    built.base.config.save_pretrained(folder)
    if built.base.can_generate():
        built.base.generation_config.save_pretrained(folder)


def list_weights(built: BuiltModel) -> tuple[str, dict[str, torch.Tensor]]:
    """(file name, tensors) of what is trained: the adapter as peft names it, or the model as it lies in memory."""
    if built.model is built.base:
        return "model.safetensors", list_state(built.base)
    from peft import get_peft_model_state_dict

    model: Any = built.model
    return "adapter_model.safetensors", get_peft_model_state_dict(model, save_embedding_layers=False)


def check_finite(built: BuiltModel) -> None:
    """RunError where something that is trained is NaN or infinite."""
    for name, parameter in built.model.named_parameters():
        # isfinite would copy the largest tensor twice; NaN is both least and greatest here
        if parameter.requires_grad and not all(bool(torch.isfinite(end)) for end in torch.aminmax(parameter.detach())):
            raise RunError(
                f"{name} is no longer finite: these weights are not saved; lower train.learning_rate, or go on from "
                "the last checkpoint"
            )


def load_state(checkpoint: Checkpoint) -> RunState:
    """The state of a verified checkpoint; CheckpointError where this version cannot read it."""
    where = f"{FOLDER_NAME}/{checkpoint.folder.name}/{STATE_NAME}"
    try:
        state = RunState.model_validate_json((checkpoint.folder / STATE_NAME).read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{where}: not a state of this version of fitune: {str(error).splitlines()[0]}"
        ) from error
    if state.progress.step != checkpoint.step:
        raise CheckpointError(f"{where}: is of step {state.progress.step}")
    return state


def restore_weights(checkpoint: Checkpoint, built: BuiltModel) -> None:
    """Put the weights of a checkpoint into the model."""
    name, weights = list_weights(built)
    read_into(checkpoint.folder / name, weights)


def restore_training(checkpoint: Checkpoint, state: RunState, built: BuiltModel, loop: TrainingLoop) -> None:
    """Put optimizer, schedule, scaler and random generators into the state of a checkpoint."""
    restore(
        checkpoint.folder / TENSORS_NAME,
        state.scalars,
        model=built.model,
        optimizer=loop.optimizer,
        scheduler=loop.scheduler,
        scaler=loop.scaler,
        strategy=loop.strategy,
    )
