"""What a plan says of a run on this machine's CPU, beside the run: tokens a second, and the seconds of its parts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import write_long_rows

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.toml"
STEPS = 6
"""Of each run, the first of which does not count."""
FIXED = (f"train.max_steps={STEPS}", 'budget.memory="12GiB"', "output.merge=true")
PARTS = ("load", "evaluate", "train", "save", "merge")
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
    "qwen3": {
        "hidden_size": 640,
        "intermediate_size": 1920,
        "num_hidden_layers": 14,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "head_dim": 64,
    },
}
"""Other architectures than the embedded model's, some 120M parameters each; random weights, its tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of the quick start's recipe.

    model:     the embedded one, or one of MODELS
    tokens:    length of all rows, None for the quick start's own
    overrides: beside FIXED
    """

    model: str | None = None
    tokens: int | None = None
    overrides: tuple[str, ...] = ()


def _fix(method: str, *, dtype: str = "bf16", micro: int = 4, checkpointing: str = "false") -> tuple[str, ...]:
    return (
        f'method.kind="{method}"',
        f'model.dtype="{dtype}"',
        f"train.micro_batch_size={micro}",
        f"train.gradient_checkpointing={checkpointing}",
    )


CASES: dict[str, Case] = {
    "quick start": Case(overrides=('budget.memory="1.6GiB"',)),
    "LoRA bf16, 1 row": Case(overrides=_fix("lora", micro=1)),
    "LoRA bf16, 8 rows": Case(overrides=_fix("lora", micro=8)),
    "LoRA fp32": Case(overrides=_fix("lora", dtype="fp32")),
    "LoRA bf16, checkpointed": Case(overrides=_fix("lora", checkpointing="true")),
    "LoRA bf16, 1 x 1,024": Case(tokens=1024, overrides=(*_fix("lora", micro=1), "train.global_batch_size=2")),
    "LoRA bf16, 4 x 128": Case(tokens=128, overrides=_fix("lora")),
    "QLoRA": Case(overrides=_fix("qlora")),
    "full bf16": Case(overrides=_fix("full")),
    "full fp32, checkpointed": Case(overrides=_fix("full", dtype="fp32", checkpointing="true")),
    "full bf16, 8-bit AdamW": Case(overrides=(*_fix("full"), 'train.optimizer="adamw_8bit"')),
    "gpt2, full fp32": Case(model="gpt2", overrides=_fix("full", dtype="fp32")),
    "gpt2, LoRA bf16": Case(model="gpt2", overrides=_fix("lora")),
    "qwen3, LoRA bf16, 2 x 512": Case(model="qwen3", tokens=512, overrides=_fix("lora", micro=2)),
    "qwen3, full bf16": Case(model="qwen3", overrides=_fix("full")),
}


def run_case(name: str) -> dict[str, Any]:
    """Plans and runs a case; predicted and measured tokens a second and seconds."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = [*FIXED, *case.overrides, f'output.dir="{folder / "run"}"']
        if case.model is not None:
            write_model(case.model, folder / "model")
            settings.append(f'model.id="{folder / "model"}"')
        if case.tokens is not None:
            write_long_rows(folder / "rows.jsonl", 64, tokens=case.tokens)
            settings += [f'data.train="{folder / "rows.jsonl"}"', f"data.max_length={case.tokens}"]
        words = [word for one in settings for word in ("--set", one)]
        _call("run", str(RECIPE), *words)
        report = json.loads(_call("report", "--json", str(folder / "run")))
    predicted = report["predicted_speed"]
    rates = predicted["tokens_per_second"], report["speed"]["tokens_per_second"]
    parts = {one["name"]: (one["predicted_seconds"], one["measured_seconds"]) for one in report["parts"]}
    whole = predicted["total_seconds"], report["speed"]["total_seconds"]
    return {"case": name, "estimator": predicted["estimator"], "tokens_per_second": rates, **parts, "whole": whole}


def write_model(model_type: str, folder: Path) -> None:
    """Random weights, and the embedded model's tokenizer."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fitune.runtime.model.embedded import load_embedded_model
    from fitune.runtime.quiet import quiet_libraries

    embedded = load_embedded_model()
    like = AutoConfig.from_pretrained(embedded)
    kept = {name: getattr(like, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(model_type, tie_word_embeddings=True, **MODELS[model_type], **kept)
    torch.manual_seed(0)
    with quiet_libraries():
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for one in embedded.iterdir():
        if one.name.startswith(("token", "special", "vocab", "merges", "chat_template")):
            shutil.copy(one, folder)


def _call(*arguments: str) -> str:
    command = [sys.executable, "-m", "fitune.runtime.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def compare_plans(names: Sequence[str]) -> list[dict[str, Any]]:
    """Every case, a line each as soon as it is there: planned, measured, and how far the plan is off."""
    columns = ("tokens_per_second", *PARTS, "whole")
    print(f"{'':26}" + "".join(f"{name.replace('_per_second', '/s'):>18}" for name in columns))
    found = []
    for name in names:
        row = run_case(name)
        print(f"{name:26}" + "".join(f"{_show(row.get(column)):>18}" for column in columns), flush=True)
        found.append(row)
    return found


def _show(pair: tuple[float, float | None] | None) -> str:
    if pair is None or not pair[1]:
        return "-"
    planned, measured = pair
    return f"{planned:.4g} {measured:.4g} {100 * (planned / measured - 1):+.0f}%"
