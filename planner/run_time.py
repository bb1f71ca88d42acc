"""From a step's time to a run's: the parts of a run that take time, in the order in which it does them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ..recipes.schema import Recipe
from .memory import Memory
from .model_shape import LinearShape, ModelShape
from .speed import RunPart, StepTime
from .strategy import DataFacts, Rates, Strategy

LOAD_BYTES_PER_SECOND = 1.5e9
"""At which weights are read from a local disk and brought to the device; a guess."""
WRITE_BYTES_PER_SECOND = 1e9
"""At which files are written to a local disk and flushed; a guess."""
LAYER_SECONDS = 3e-3
"""Of making a decoder layer's modules and reading its tensors, however small: Python's. This and what follows was
measured on one CPU of 2 cores, in runs of models with 2, 32 and 64 small layers."""
ADAPTER_SECONDS = 1.1e-3
"""Of putting an adapter beside a linear layer."""
PACKED_LINEAR_SECONDS = 1e-3
"""Of making a 4-bit layer, beside quantising its weight."""
CPU_QUANTIZE_SECONDS = 2.6e-8
"""Of quantising an element to NF4 on that CPU; a GPU does it while it reads."""
SAVE_SECONDS = 0.08
"""Of saving what was trained, however small."""
LET_GO_SECONDS = 0.25
"""Of collecting the trained model's objects before a merge, at the end of saving."""
MERGE_SECONDS = 4e-9
"""Of adding an adapter's product to an element of a large weight, on that CPU."""
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
class LoadFacts:
    """What is loaded at the start, and again before a merge.

    shape:             of the model
    weight_file_bytes: of its files
    on_cpu:            whether it is trained, and so quantised, there
    """

    shape: ModelShape
    weight_file_bytes: int
    on_cpu: bool


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run does, whatever the strategy.

    recipe: says when it is evaluated, saved and merged
    data:   the rows
    steps:  optimizer steps
    model:  what is trained
    """

    recipe: Recipe
    data: DataFacts
    steps: int
    model: LoadFacts


def estimate_startup_parts(model: LoadFacts, strategy: Strategy) -> tuple[RunPart, ...]:
    """Loading the model, and compiling layers or kernels, which the first step does."""
    seconds = _estimate_base(model) + _estimate_adapters(model, strategy)
    if strategy.method == "qlora":
        linears = sum(count for linear, count in model.shape.linears if linear.is_packed)
        seconds += PACKED_LINEAR_SECONDS * linears
        seconds += CPU_QUANTIZE_SECONDS * model.shape.quantized_parameters if model.on_cpu else 0.0
    load = RunPart(name="load", seconds=seconds)
    compiling = COMPILE_SECONDS if strategy.compile else LIGER_SECONDS if strategy.kernels == "liger" else 0.0
    return (load, RunPart(name="compile", seconds=compiling)) if compiling else (load,)


def _estimate_base(model: LoadFacts) -> float:
    return LAYER_SECONDS * model.shape.layers + model.weight_file_bytes / LOAD_BYTES_PER_SECOND


def _estimate_adapters(model: LoadFacts, strategy: Strategy) -> float:
    return ADAPTER_SECONDS * sum(count for _, count in _list_adapted(model, strategy))


def _list_adapted(model: LoadFacts, strategy: Strategy) -> tuple[tuple[LinearShape, int], ...]:
    return () if strategy.adapter_targets is None else model.shape.lora_linears(strategy.adapter_targets)


def estimate_run_parts(
    facts: RunFacts, strategy: Strategy, time: StepTime, rates: Rates, memory: Memory
) -> tuple[RunPart, ...]:
    """Every part of a run.

    memory: of the strategy, with the files that it writes
    """
    train = facts.steps * time.seconds
    parts = (
        *estimate_startup_parts(facts.model, strategy),
        RunPart(name="evaluate", seconds=_estimate_evaluations(facts, strategy, time, rates, memory)),
        RunPart(name="train", seconds=train),
        RunPart(name="save", seconds=_estimate_saving(facts, memory, train)),
        RunPart(name="merge", seconds=_estimate_merge(facts, strategy, memory)),
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
    count, data = strategy.gradient_accumulation_steps, facts.data
    host = forward.host_seconds / count if time.evaluation_seconds is None else 0.0
    device = forward.device_seconds / count if time.evaluation_seconds is None else time.evaluation_seconds
    row_tokens = time.tokens / (strategy.micro_batch_size * count)

    def evaluate(rows: int, lengths: tuple[int, ...] | None) -> float:
        shorter = device * (1.0 if lengths is None else sum(lengths) / len(lengths) / row_tokens)
        return ceil(rows / strategy.micro_batch_size) * (max(shorter, host) if rates.overlaps else shorter + host)

    seconds = (2 + count_evaluations(facts.recipe, facts.steps)) * evaluate(data.eval_rows, data.eval_row_tokens)
    seconds += 2 * evaluate(data.forgetting_rows, data.forgetting_row_tokens)
    if data.has_question:
        reading = memory.components.weights / rates.memory_bytes
        token = max(reading, host) if rates.overlaps else reading + host
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
    result = _count_file_bytes(memory, "save") - memory.checkpoints * memory.checkpoint_bytes
    seconds = (written + 1) * SAVE_SECONDS + (LET_GO_SECONDS if _count_file_bytes(memory, "merge") else 0.0)
    return seconds + (written * memory.checkpoint_bytes + result) / WRITE_BYTES_PER_SECOND


def _estimate_merge(facts: RunFacts, strategy: Strategy, memory: Memory) -> float:
    """Loading the base again with the adapters, adding them, and writing the merged model; all of it on the CPU."""
    merged = _count_file_bytes(memory, "merge")
    if not merged:
        return 0.0
    elements = sum(count * linear.weight_parameters for linear, count in _list_adapted(facts.model, strategy))
    loading = _estimate_base(facts.model) + _estimate_adapters(facts.model, strategy)
    return loading + MERGE_SECONDS * elements + merged / WRITE_BYTES_PER_SECOND


def _count_file_bytes(memory: Memory, phase: str) -> int:
    """What a phase adds to the run's files; 0 where it is not in the run."""
    return sum(one.disk_bytes or 0 for one in memory.phases if one.name == phase)
