"""fitune's loop against transformers' Trainer on the same model, rows and order: the losses must be the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import save_small_model
from small_runs import plan_recipe, read_lines, run_recipe_file, write_recipe
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments, set_seed

from fitune.runtime.data.batches import iterate_batches
from fitune.runtime.model.build import build_model

STEPS = 8
TRAIN = {
    "max_steps": STEPS,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 2e-3,
    "schedule": "linear",
    "warmup": 0.25,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "optimizer": "adamw",
    "seed": 3,
}


class OrderedTrainer(Trainer):
    """transformers' Trainer, with the rows in the order that they have."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded at the right with token 0, and with the attention mask that fitune goes without."""
    width = max(len(row["input_ids"]) for row in rows)

    def pad(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([[*row[key], *[filler] * (width - len(row[key]))] for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": mask}


def list_rows_in_order(recipe: Path) -> list[dict[str, Any]]:
    """The rows as fitune's loop meets them, micro-batch by micro-batch."""
    job, plan = plan_recipe(recipe)
    tokenized = job.data.train
    known = {tuple(row.input_ids): row for row in tokenized.rows}
    found = []
    for batch in iterate_batches(
        tokenized,
        global_batch_size=plan.strategy.micro_batch_size * plan.strategy.gradient_accumulation_steps,
        micro_batch_size=plan.strategy.micro_batch_size,
        seed=TRAIN["seed"],
        max_steps=STEPS,
    ):
        for micro_batch in batch.micro_batches:
            for padded in micro_batch.input_ids.tolist():
                row = next(known[tuple(padded[:n])] for n in range(len(padded), 0, -1) if tuple(padded[:n]) in known)
                found.append({"input_ids": list(row.input_ids), "labels": list(row.labels)})
    return found


def train_with_transformers(recipe: Path, folder: Path) -> list[dict[str, float]]:
    job, plan = plan_recipe(recipe)
    assert job.source.folder is not None
    set_seed(TRAIN["seed"])
    built = build_model(job.source.folder, plan.strategy, torch.device("cpu"))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=TRAIN["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=STEPS // 4,
        weight_decay=TRAIN["weight_decay"],
        max_grad_norm=TRAIN["max_grad_norm"],
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = OrderedTrainer(built.model, arguments, train_dataset=list_rows_in_order(recipe), data_collator=collate)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("loss_head", ["full", "chunked", "fused"])
def test_losses_are_those_of_transformers_trainer_step_for_step(tmp_path: Path, method: str, loss_head: str) -> None:
    model = save_small_model(tmp_path / "model")
    recipe = write_recipe(
        tmp_path, model, rows=16, method={"kind": method}, train=TRAIN | {"loss_head": loss_head}, data={"eval": None}
    )
    expected = train_with_transformers(recipe, tmp_path / "trainer")
    run, _ = run_recipe_file(recipe)
    found = [one for one in read_lines(run / "metrics.jsonl") if "loss" in one]
    assert len(found) == len(expected) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-4)
        assert ours["learning_rate"] == pytest.approx(theirs["learning_rate"])
    assert found[-1]["loss"] < found[0]["loss"] - 0.05
