"""From a step's time to a run's: the parts of a run that take time, in the order in which it does them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ..recipes.schema import Recipe
from .memory import Memory
from .speed import RunPart, StepTime
from .strategy import DataFacts, Rates, Strategy

LOAD_BYTES_PER_SECOND = 1.5e9
"""At which weights are read from a local disk and brought to the device; a guess."""
WRITE_BYTES_PER_SECOND = 1e9
"""At which files are written to a local disk and flushed; a guess."""
COMPILE_SECONDS = 30.0
"""Of compiling one kind of layer, forward and backward, where no cache has it; a guess, not measured."""
LIGER_SECONDS = 2.0
"""Of compiling Liger's kernels where no cache has them: 1.9 s for the six of Llama-3.1-8B and compute capability 9.0,
measured on one core of a CPU with Triton 3.9."""
CHECKPOINT_SECONDS = 15 * 60.0
"""With save_every = "auto", the most work that a killed run loses; a choice."""
ANSWER_TOKENS = 96
"""Longest answer to the sample question, in tokens."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run does, whatever the strategy.

    recipe:            says when it is evaluated, saved and merged
    data:              the rows
    steps:             optimizer steps
    weight_file_bytes: of the model, read at the start, and again before a merge
    """

    recipe: Recipe
    data: DataFacts
    steps: int
    weight_file_bytes: int


def estimate_startup_parts(strategy: Strategy, weight_file_bytes: int) -> tuple[RunPart, ...]:
    """Reading the weights, and compiling layers or kernels, which the first step does."""
    load = RunPart(name="load", seconds=weight_file_bytes / LOAD_BYTES_PER_SECOND)
    compiling = COMPILE_SECONDS if strategy.compile else LIGER_SECONDS if strategy.kernels == "liger" else 0.0
    return (load, RunPart(name="compile", seconds=compiling)) if compiling else (load,)


def estimate_run_parts(
    facts: RunFacts, strategy: Strategy, time: StepTime, rates: Rates, memory: Memory
) -> tuple[RunPart, ...]:
    """Every part of a run.

    memory: of the strategy, with the files that it writes
    """
    train = facts.steps * time.seconds
    parts = (
        *estimate_startup_parts(strategy, facts.weight_file_bytes),
        RunPart(name="evaluate", seconds=_estimate_evaluations(facts, strategy, time, rates, memory)),
        RunPart(name="train", seconds=train),
        RunPart(name="save", seconds=_estimate_saving(facts, memory, train)),
        RunPart(name="merge", seconds=_estimate_merge(facts, memory)),
    )
    return tuple(part for part in parts if part.seconds > 0)


def count_evaluations(recipe: Recipe, steps: int | None) -> int:
    """Between the first and the last step."""
    every = recipe.train.eval_every
    return 0 if every is None or steps is None else max(steps - 1, 0) // every


def _estimate_evaluations(facts: RunFacts, strategy: Strategy, time: StepTime, rates: Rates, memory: Memory) -> float:
    """Forwards of the held-out rows before, between and after the steps, those of another task before and after, and
    one question answered twice, in as many tokens as it may have."""
    forward = next(phase for phase in time.phases if phase.name == "forward")
    count, micro = strategy.gradient_accumulation_steps, strategy.micro_batch_size
    held_out, other = ceil(facts.data.eval_rows / micro), ceil(facts.data.forgetting_rows / micro)
    forwards = (2 + count_evaluations(facts.recipe, facts.steps)) * held_out + 2 * other
    seconds = forwards * (forward.seconds / count if time.evaluation_seconds is None else time.evaluation_seconds)
    if facts.data.has_question:
        reading = memory.components.weights / rates.memory_bytes
        starting = forward.host_seconds / count
        token = max(reading, starting) if rates.overlaps else reading + starting
        seconds += 2 * ANSWER_TOKENS * (token if time.token_seconds is None else time.token_seconds)
    return seconds


def _estimate_saving(facts: RunFacts, memory: Memory, train_seconds: float) -> float:
    """The checkpoints that are written on the way, and the result."""
    every = facts.recipe.output.save_every
    if every == "never" or not memory.checkpoint_bytes:
        written = 0
    elif every == "auto":
        written = int(train_seconds / CHECKPOINT_SECONDS)
    else:
        written = max(facts.steps - 1, 0) // every
    result = sum(phase.disk_bytes or 0 for phase in memory.phases if phase.name == "save")
    return (written * memory.checkpoint_bytes + result) / WRITE_BYTES_PER_SECOND


def _estimate_merge(facts: RunFacts, memory: Memory) -> float:
    """Reading the base again and writing the merged model; the additions themselves are quick."""
    merged = sum(phase.disk_bytes or 0 for phase in memory.phases if phase.name == "merge")
    return facts.weight_file_bytes / LOAD_BYTES_PER_SECOND + merged / WRITE_BYTES_PER_SECOND if merged else 0.0
