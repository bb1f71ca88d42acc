"""What the host does for a step, measured on this CPU: HOST_PRICES, CLIP_CALLS and UPDATE_CALLS of `planner/rates.py`.

    python -m benchmarks.host                   # some two minutes on an idle core
    python -m benchmarks.host --models llama-3.2-1b,gpt2

One model of each family in tests/data, cut to 4 layers of 64 features so that nothing computes for long, does steps
with every method, with and without checkpointing. The processor time of each forward and backward, the shortest of
several, stands beside how often a rehearsal of the same step counts each kind of host work; the prices are the least
squares of the relative errors, none below 0. Prints them in units of an operation that Python calls, beside the
constants, and one JSON line. Updates of bitsandbytes are not measured: on a CPU their kernels take most of the time.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from fitune.planner.rates import CLIP_CALLS, HOST_PRICES, UPDATE_CALLS, HostWork
from fitune.planner.strategy import Strategy
from fitune.runtime.model.build import build_model
from fitune.runtime.quiet import quiet_libraries
from fitune.runtime.rehearsal.cuda import CudaCard
from fitune.runtime.rehearsal.time import list_works
from fitune.runtime.rehearsal.trace import trace_step
from fitune.runtime.training.optimizers import make_optimizer
from fitune.runtime.training.step import MicroBatch, make_scaler, training_step

ARCHITECTURES = Path(__file__).parents[1] / "tests/data/architectures.json"
LAYERS, TOKENS, REPEATS, WARM_STEPS = 4, 8, 8, 2
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "n_embd": 64,
    "n_head": 4,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
}
"""Keys of a config, where it has them."""
KINDS: tuple[HostWork, ...] = get_args(HostWork)
PHASES = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """One small model's step.

    name:    model and method
    counts:  of forward and backward, how often a rehearsal counts each kind of host work
    seconds: of every phase, processor time
    tensors: that are trained
    optimizer: that updates them
    """

    name: str
    counts: Mapping[str, Counter[str]]
    seconds: Mapping[str, float]
    tensors: int
    optimizer: str


def list_small_configs(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Small configs by name: those that are named, else one of each model type."""
    found, types = {}, set()
    for name, config in json.loads(ARCHITECTURES.read_text(encoding="utf-8")).items():
        if name in names or (not names and config["model_type"] not in types):
            types.add(config["model_type"])
            found[name] = config | {key: size for key, size in SMALL.items() if key in config} | {"pad_token_id": 1}
    return found


def list_strategies(config: Mapping[str, Any]) -> Iterator[Strategy]:
    """Every method, with and without checkpointing; the loss heads and optimizers in turn."""
    attention = "eager" if config.get("attn_logit_softcapping") else "sdpa"
    for method in ("full", "lora", "qlora"):
        has_adapter = method != "full"
        for layers, head, optimizer in ((0, "full", "adamw"), (LAYERS, "chunked", "adafactor")):
            yield Strategy.model_validate(
                {
                    "method": method,
                    "weights_dtype": "bf16",
                    "compute_dtype": "bf16",
                    "adapter_dtype": "fp32" if has_adapter else None,
                    "adapter_rank": 8 if has_adapter else None,
                    "adapter_targets": "all-linear" if has_adapter else None,
                    "attention": attention,
                    "micro_batch_size": 1,
                    "gradient_accumulation_steps": 1,
                    "checkpointed_layers": layers,
                    "loss_head": head,
                    "optimizer": optimizer,
                    "learning_rate": 1e-5,
                }
            )


def count_host_work(config: Mapping[str, Any], strategy: Strategy) -> dict[str, Counter[str]]:
    """How often a rehearsal of the step counts each kind, by phase."""
    found: dict[str, Counter[str]] = {name: Counter() for name in PHASES}
    for phase, work in list_works(trace_step(config, strategy, CudaCard(), sequence_length=TOKENS)):
        found[phase][work.host] += work.times * work.calls
    return found


def time_step(folder: Path, strategy: Strategy) -> tuple[dict[str, float], int]:
    """Processor time of each phase, the shortest of REPEATS; and how many tensors are trained."""
    built = build_model(folder, strategy, torch.device("cpu"))
    name, rate = strategy.optimizer, strategy.learning_rate
    optimizer = make_optimizer(name, built.model, learning_rate=rate, weight_decay=0.01, rounding="nearest")
    ids = torch.randint(4, SMALL["vocab_size"], (1, TOKENS))
    batch, shortest = MicroBatch(input_ids=ids, labels=ids), defaultdict[str, float](lambda: float("inf"))
    for step in range(WARM_STEPS + REPEATS):
        marks: list[tuple[str, float]] = []
        training_step(
            built.model,
            built.base,
            [batch],
            tokens=TOKENS,
            strategy=strategy,
            optimizer=optimizer,
            scaler=make_scaler(strategy, ids.device),
            clip=lambda: torch.nn.utils.clip_grad_norm_(built.trainable, 1.0),
            enter_phase=lambda name, marks=marks: marks.append((name, time.thread_time())),
        )
        marks.append(("end", time.thread_time()))
        for (name, start), (_, end) in pairwise(marks) if step >= WARM_STEPS else ():
            shortest[name] = min(shortest[name], end - start)
    return dict(shortest), len(built.trainable)


def measure_steps(configs: Mapping[str, dict[str, Any]]) -> Iterator[MeasuredStep]:
    """All steps of all models."""
    for name, config in configs.items():
        with tempfile.TemporaryDirectory(prefix="fitune-host-") as folder:
            whole = save_model(config, Path(folder))
            for strategy in list_strategies(whole):
                counts = count_host_work(whole, strategy)
                gc.disable()
                seconds, tensors = time_step(Path(folder), strategy)
                gc.enable()
                yield MeasuredStep(
                    name=f"{name} {strategy.method}, {strategy.checkpointed_layers} layers checkpointed",
                    counts=counts,
                    seconds=seconds,
                    tensors=tensors,
                    optimizer=strategy.optimizer,
                )


def save_model(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Random weights of a small model; its whole config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {key: value for key, value in config.items() if key != "model_type"}
    with quiet_libraries():
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **shape))
        made.to(torch.bfloat16).save_pretrained(folder)
    return dict(made.config.to_dict())


def fit_prices(counts: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Prices [kinds], none below 0, with the least sum of ((counts @ prices - seconds) / seconds)^2.

    counts: [phases, kinds]; seconds: [phases]
    """
    scaled, kept = counts / seconds[:, None], list(range(counts.shape[1]))
    while True:
        prices = np.zeros(counts.shape[1])
        prices[kept] = np.linalg.lstsq(scaled[:, kept], np.ones(len(seconds)))[0]
        if (prices >= 0).all():
            return prices
        kept.remove(int(prices.argmin()))


def summarise(steps: Sequence[MeasuredStep]) -> dict[str, Any]:
    """The prices in units of an operation, how well they meet the steps; what clipping and updates take a tensor."""
    pairs = [(step, phase) for step in steps for phase in PHASES]
    counts = np.array([[float(step.counts[phase][kind]) for kind in KINDS] for step, phase in pairs])
    seconds = np.array([step.seconds[phase] for step, phase in pairs])
    prices = fit_prices(counts, seconds)
    unit = float(prices[KINDS.index("operation")])
    off = np.abs(counts @ prices / seconds - 1)

    def find_calls(phase: str, optimizer: str | None = None) -> float:
        some = [one for one in steps if optimizer in (None, one.optimizer)]
        return median(one.seconds[phase] / one.tensors for one in some) / unit

    return {
        "operation_seconds": unit,
        "phases": len(pairs),
        "median_error": float(np.median(off)),
        "prices": {kind: float(price) / unit for kind, price in zip(KINDS, prices, strict=True)},
        "clip": find_calls("clip"),
        "updates": {name: find_calls("optimizer", name) for name in ("adamw", "adafactor")},
    }


def show(found: Mapping[str, Any]) -> None:
    """Measured prices beside the constants."""
    print(f"an operation that Python calls: {1e6 * found['operation_seconds']:.1f} us; other work in units of it")
    lines = [(kind, found["prices"][kind], HOST_PRICES[kind]) for kind in KINDS]
    lines += [("clipping, a tensor", found["clip"], CLIP_CALLS)]
    lines += [(f"{name}, a tensor", calls, UPDATE_CALLS[name]) for name, calls in found["updates"].items()]
    print(f"{'':24}{'measured':>10}{'constant':>10}")
    for name, measured, constant in lines:
        print(f"{name:24}{measured:10.2f}{constant:10.2f}")
    print(f"{found['phases']} forwards and backwards, half of them met within {100 * found['median_error']:.0f} %")


def main() -> int:
    """Measure, fit, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="", help="names in tests/data/architectures.json, joined by commas")
    given = parser.parse_args()
    names = [name for name in given.models.split(",") if name]
    configs = list_small_configs(names)
    unknown = [name for name in names if name not in configs]
    if unknown:
        parser.error(f"no model {unknown[0]} in {ARCHITECTURES.name}")
    torch.set_num_threads(1)
    steps = []
    for one in measure_steps(configs):
        print(f"{one.name}: {1e3 * sum(one.seconds[phase] for phase in PHASES):.1f} ms", file=sys.stderr, flush=True)
        steps.append(one)
    found = summarise(steps)
    show(found)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
