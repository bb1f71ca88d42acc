"""Three comparisons on this machine's CPU, most of them with the embedded model and LoRA adapters.

    python -m benchmarks.cpu            # 2 rounds of 12 steps each, some 20 minutes on 2 idle cores
    python -m benchmarks.cpu --only trainer
    python -m benchmarks.cpu --only plan --cases "quick start;QLoRA"

trainer: fitune beside transformers.Trainer with peft: the same rows, micro-batches, adapters and dtypes. The losses are
printed too: where the first ones differ, the work was not the same, and the exit code is 1.
packing: short rows of mixed lengths packed into rows of PACKED_LENGTH tokens, beside the same rows padded.
plan:    what the plan says of short runs (cpu_plan.py), beside the runs: planned, measured, error.

Each contender runs in a process of its own, in turns, so that both meet the same machine. A step's time is the wall
time from the end of the step before, data, logging and all else included; the first WARM_STEPS are left out. Tokens are
counted without padding. Prints the speeds, their ratio, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from fitune.runtime.machine.host import probe_cpu

from . import cpu_plan
from .rows import write_mixed_rows

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.toml"
WARM_STEPS = 2
LOSS_TOLERANCE = 0.01
"""Relative difference of the first step's losses: before any update both see the same weights, in the same dtype."""
FIXED = (
    'method.kind="lora"',
    "method.rank=16",
    "train.gradient_checkpointing=false",
    'train.optimizer="adamw"',
    'train.schedule="constant"',
    'budget.memory="10GiB"',
)
"""What all do; the dtype is the one that the plan takes on this CPU."""
AS_TRAINER = ("train.micro_batch_size=4", 'train.loss_head="full"')
"""What fitune does as transformers.Trainer does."""
PACKED_LENGTH, PADDED_ROWS = 1024, 16


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What one contender did in one round, a value for each step.

    seconds: wall time from the end of the step before; the first is from the start of the training and not used
    tokens:  tokens computed, padding excepted
    losses:  mean cross-entropy before the update
    """

    seconds: Sequence[float]
    tokens: Sequence[int]
    losses: Sequence[float]

    @property
    def tokens_per_second(self) -> float:
        """Over all steps after the first WARM_STEPS."""
        return sum(self.tokens[WARM_STEPS:]) / sum(self.seconds[WARM_STEPS:])


def list_overrides(steps: int) -> list[str]:
    """The quick start's overrides for a round of `steps`."""
    return [*FIXED, *AS_TRAINER, f"train.max_steps={steps}"]


def run_fitune(recipe: Path, overrides: Sequence[str]) -> Steps:
    """`fitune run` with its monitor, log and report, as a user runs it."""
    from fitune.runtime.planning import Job

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        settings = [word for one in (*overrides, f'output.dir="{folder}"') for word in ("--set", one)]
        command = [sys.executable, "-m", "fitune.runtime.cli", "run", str(recipe), *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    ends = [line["unix_time"] for line in trained]
    return Steps(
        seconds=[0.0, *(after - before for before, after in pairwise(ends))],
        tokens=[batch.tokens for batch in iterate_global_batches(Job(str(recipe), overrides))],
        losses=[line["loss"] for line in trained],
    )


def run_quickstart(steps: int) -> Steps:
    """fitune on the quick start's rows."""
    return run_fitune(RECIPE, list_overrides(steps))


def run_mixed(steps: int, *, packing: bool) -> Steps:
    """fitune on short rows of mixed lengths; the two batches hold about as many tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        rows, recipe = Path(scratch) / "rows.jsonl", Path(scratch) / "recipe.toml"
        write_mixed_rows(rows, steps * PADDED_ROWS * 2, max_tokens=PACKED_LENGTH)
        recipe.write_text(
            f'[model]\nid = "smollm2-135m-instruct"\n[data]\ntrain = "{rows}"\nmax_length = {PACKED_LENGTH}\n'
        )
        own = (
            ("data.packing=true", "train.global_batch_size=2", "train.micro_batch_size=1")
            if packing
            else (f"train.global_batch_size={PADDED_ROWS}", f"train.micro_batch_size={PADDED_ROWS}")
        )
        return run_fitune(recipe, [*FIXED, f"train.max_steps={steps}", 'train.loss_head="fused"', *own])


def iterate_global_batches(job: Any) -> Iterator[Any]:
    """The batches that `fitune run` trains on."""
    from fitune.runtime.data.batches import iterate_batches

    train = job.recipe_file.recipe.train
    return iterate_batches(
        job.data.train,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        seed=train.seed,
        max_steps=train.max_steps,
    )


def run_trainer(steps: int) -> Steps:
    """transformers.Trainer with peft, on the micro-batches that fitune trains on, in their order."""
    import time

    import torch
    from datasets.utils.logging import disable_progress_bar
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from fitune.runtime.model.models import fetch_model
    from fitune.runtime.planning import Job

    disable_progress_bar()
    job = Job(str(RECIPE), list_overrides(steps))
    train, strategy = job.recipe_file.recipe.train, job.make_plan(quick=True).strategy
    global_batches = list(iterate_global_batches(job))
    micro_batches = [one for batch in global_batches for one in batch.micro_batches]
    half = strategy.compute_dtype == "bf16"
    base = AutoModelForCausalLM.from_pretrained(
        fetch_model(job.source), dtype=torch.bfloat16 if half else torch.float32
    )
    base.config.use_cache = False
    rank = strategy.adapter_rank
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=get_peft_model(base, adapters),
            args=TrainingArguments(
                output_dir=scratch,
                use_cpu=True,
                bf16=half,
                per_device_train_batch_size=1,  # an item of the dataset is a micro-batch
                gradient_accumulation_steps=len(global_batches[0].micro_batches),
                max_steps=steps,
                learning_rate=strategy.learning_rate,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=max(1, round(train.warmup * steps)),
                max_grad_norm=train.max_grad_norm,
                weight_decay=train.weight_decay,
                optim="adamw_torch",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
                train_sampling_strategy="sequential",
            ),
            train_dataset=[
                {"input_ids": one.input_ids, "labels": one.labels, "attention_mask": torch.ones_like(one.input_ids)}
                for one in micro_batches
            ],
            data_collator=lambda items: items[0],
            callbacks=[Clock()],
        )
        begin = time.perf_counter()
        trainer.train()
    return Steps(
        seconds=[after - before for before, after in pairwise([begin, *ends])],
        tokens=[batch.tokens for batch in global_batches],
        losses=[line["loss"] for line in trainer.state.log_history if "loss" in line],
    )


CONTENDERS: dict[str, Callable[[int], Steps]] = {
    "fitune": run_quickstart,
    "Trainer": run_trainer,
    "packed": partial(run_mixed, packing=True),
    "padded": partial(run_mixed, packing=False),
}
COMPARISONS = {"trainer": ("fitune", "Trainer"), "packing": ("packed", "padded")}


def run_contender(name: str, steps: int) -> Steps:
    """One contender's round in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.cpu", "--steps", str(steps), "--contender", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Steps(**json.loads(done.stdout.splitlines()[-1]))


def compare(names: tuple[str, str], rounds: int, steps: int) -> dict[str, Any]:
    """Both contenders in every round; who goes first alternates."""
    found: dict[str, list[Steps]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(run_contender(name, steps))
            print(f"round {number + 1}: {name:8} {found[name][-1].tokens_per_second:8.1f} tokens/s", flush=True)
    first, second = (found[name] for name in names)
    ratios = [one.tokens_per_second / other.tokens_per_second for one, other in zip(first, second, strict=True)]
    return {
        "tokens_per_second": {name: [one.tokens_per_second for one in runs] for name, runs in found.items()},
        "first_loss": {name: runs[0].losses[0] for name, runs in found.items()},
        "last_loss": {name: runs[0].losses[-1] for name, runs in found.items()},
        "ratio": median(ratios),
    }


def main() -> int:
    """The comparisons; 1 where fitune and Trainer did not do the same work."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help=f"a round's steps, {WARM_STEPS} of them to warm up")
    parser.add_argument("--only", choices=[*COMPARISONS, "plan"])
    parser.add_argument("--cases", default=";".join(cpu_plan.CASES), help="of the plan's runs, with ; between")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contender is not None:
        print(json.dumps(asdict(CONTENDERS[given.contender](given.steps))))
        return 0
    result: dict[str, Any] = {"cpu": probe_cpu().name, "cores": probe_cpu().cores, "rounds": given.rounds}
    same = True
    for comparison, (first, second) in COMPARISONS.items():
        if given.only not in (None, comparison):
            continue
        found = compare((first, second), given.rounds, given.steps)
        result[comparison] = found
        print(f"{first} / {second}: {found['ratio']:.3f} times the tokens a second")
        if comparison == "trainer":
            for when in ("first", "last"):
                losses = found[f"{when}_loss"]
                print(f"{when} loss: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
            same = abs(found["first_loss"][first] / found["first_loss"][second] - 1) <= LOSS_TOLERANCE
    if given.only in (None, "plan"):
        result["plan"] = cpu_plan.compare_plans([one.strip() for one in given.cases.split(";")])
    print(json.dumps(result))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
