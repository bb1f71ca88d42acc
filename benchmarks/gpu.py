"""fitune's speed and memory on this machine's NVIDIA GPU, case by case, against the plan and the targets.

    python -m benchmarks.gpu                 # every case, under 8 minutes on an H100; needs 45 GB of free disk
    python -m benchmarks.gpu --cases lora-auto,qlora-auto
    python -m benchmarks.gpu --smoke         # the same script with tiny models on the CPU, to see that it works

Every case is `fitune run` as a user types it, in a process of its own, on a model of the real shape with random weights
(speed and memory do not depend on their values) and rows of a known number of tokens. Tokens per second are the
median over the steps after the first WARM_STEPS, from metrics.jsonl; predicted and measured memory and speed are the
run's own plan.json and report.json. Prints one table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from .rows import write_long_rows, write_mixed_rows

WARM_STEPS = 3
STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run.

    model:    key of MODELS
    rows:     `long`: each of max_length tokens; `mixed`: lengths drawn like Alpaca's
    micro:    rows in one forward, None for the planner's choice
    length:   data.max_length
    settings: further `--set`s
    target:   tokens per second to reach on an H100, None where there is none
    """

    name: str
    model: str
    length: int
    batch: int
    settings: Sequence[str]
    rows: str = "long"
    target: float | None = None


MODELS = {"8b": "llama-3.1-8b", "1b": "llama-3.2-1b"}
"""Names of fitune's model catalog."""
LORA, QLORA, FULL = 'method.kind="lora"', 'method.kind="qlora"', 'method.kind="full"'
PLAIN = ('train.loss_head="full"', "train.compile=false", "train.micro_batch_size=2")
CASES = (
    Case(
        name="lora-eager-ckpt",
        model="8b",
        length=4096,
        batch=2,
        settings=(LORA, *PLAIN, "train.gradient_checkpointing=true"),
    ),
    Case(
        name="lora-compiled-fused",
        model="8b",
        length=4096,
        batch=2,
        settings=(
            LORA,
            'train.loss_head="fused"',
            "train.compile=true",
            "train.gradient_checkpointing=false",
            "train.micro_batch_size=2",
        ),
        target=16_000,
    ),
    Case(name="lora-auto", model="8b", length=4096, batch=2, settings=(LORA,), target=16_000),
    Case(name="lora-auto-24GiB", model="8b", length=2048, batch=8, settings=(LORA, 'budget.memory="24GiB"')),
    Case(name="qlora-auto", model="8b", length=4096, batch=2, settings=(QLORA,), target=13_000),
    Case(name="qlora-auto-24GiB", model="8b", length=2048, batch=8, settings=(QLORA, 'budget.memory="24GiB"')),
    Case(
        name="full-auto",
        model="1b",
        length=2048,
        batch=4,
        settings=(FULL, 'model.dtype="bf16"'),
        target=55_000,
    ),
    Case(name="padded", model="1b", length=2048, batch=16, settings=(LORA, "train.micro_batch_size=16"), rows="mixed"),
    Case(name="packed", model="1b", length=2048, batch=2, settings=(LORA, "data.packing=true"), rows="mixed"),
)
ROWS_IN_A_PACK = 20
"""Rows that a packed row of 2,048 tokens holds, with some to spare."""
PACKING_TARGET = 3.0
"""Packed over padded, tokens per second."""


def write_model(name: str, folder: Path, *, smoke: bool) -> None:
    """Random bf16 weights of the catalog's shape, made on the GPU, with the embedded model's tokenizer."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fitune.planner.catalog import find_model
    from fitune.runtime.model.embedded import load_embedded_model

    embedded = load_embedded_model()
    catalog = find_model(name)
    if smoke or catalog is None:
        config = AutoConfig.from_pretrained(embedded)
        config.update({"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2})
        config.update({"num_key_value_heads": 1, "head_dim": 32})
    else:
        written = dict(catalog.config)
        config = AutoConfig.for_model(written.pop("model_type"), **written)
    torch.manual_seed(0)
    with torch.device("cpu" if smoke else "cuda"):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    built.save_pretrained(folder)
    for one in embedded.iterdir():
        if one.name.startswith(("token", "special", "vocab", "merges", "chat_template")):
            shutil.copy(one, folder)


def run_case(case: Case, model: Path, scratch: Path, *, smoke: bool) -> dict[str, Any]:
    """`fitune run` of one case: its plan and what it measured, or the error's last line."""
    length = 64 if smoke else case.length
    steps = WARM_STEPS + 2 if smoke else STEPS
    folder, rows = scratch / case.name, scratch / f"{case.name}.jsonl"
    if case.rows == "mixed":
        write_mixed_rows(rows, steps * case.batch * ROWS_IN_A_PACK, max_tokens=length)
    else:
        write_long_rows(rows, steps * case.batch, tokens=length)
    recipe = scratch / f"{case.name}.toml"
    recipe.write_text(
        f'[model]\nid = "{model}"\n[data]\ntrain = "{rows}"\nmax_length = {length}\n'
        f'[train]\nmax_steps = {steps}\nglobal_batch_size = {case.batch}\n[output]\ndir = "{folder}"\n'
    )
    settings = list(case.settings)
    if smoke:
        settings = [one for one in settings if not one.startswith(("train.compile", "budget.memory", "model.dtype"))]
    words = [word for one in settings for word in ("--set", one)]
    start = time.perf_counter()
    command = [sys.executable, "-m", "fitune.runtime.cli", "run", str(recipe), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    row: dict[str, Any] = {"case": case.name, "wall_seconds": time.perf_counter() - start, "target": case.target}
    if done.returncode != 0:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        return row | {"error": said[-1] if said else f"exit code {done.returncode}"}
    return row | read_run(folder)


def read_run(folder: Path) -> dict[str, Any]:
    """The figures of a finished run's directory."""
    plan, report = (json.loads((folder / name).read_text()) for name in ("plan.json", "report.json"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "loss" in line]
    memory, measured = plan["memory"], report["measured"]
    keys = ("method", "checkpointed_layers", "loss_head", "optimizer", "compile", "micro_batch_size")
    return {
        "strategy": {key: plan["strategy"][key] for key in keys},
        "tokens_per_second": median(speeds[WARM_STEPS:]),
        "predicted_tokens_per_second": (plan.get("speed") or {}).get("tokens_per_second"),
        **{
            f"{who}{key}": source[key]
            for key in ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes")
            for who, source in (("predicted_", memory), ("measured_", measured))
        },
        "required_bytes": memory["required_bytes"],
        "versions": report["versions"],
    }


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """One table: a line for each case."""
    table = Table(title="fitune run", title_justify="left")
    for name in ("case", "how", "tokens/s", "predicted", "target", "device GiB", "predicted GiB"):
        table.add_column(name, justify="left" if name in ("case", "how") else "right")
    for row in rows:
        if "error" in row:
            table.add_row(row["case"], row["error"], *[""] * 5)
            continue
        how = row["strategy"]
        layers = f"{how['checkpointed_layers']} checkpointed, " if how["checkpointed_layers"] else ""
        compiled = ", compiled" if how["compile"] else ""
        table.add_row(
            row["case"],
            f"micro-batch {how['micro_batch_size']}, {layers}{how['loss_head']} head{compiled}, {how['optimizer']}",
            f"{row['tokens_per_second']:,.0f}",
            _show_number(row["predicted_tokens_per_second"], 1),
            _show_number(row["target"], 1),
            _show_number(row["measured_peak_device_bytes"], 2**30),
            _show_number(row["predicted_peak_device_bytes"], 2**30),
        )
    console.print(table)
    speeds = {row["case"]: row["tokens_per_second"] for row in rows if "error" not in row}
    if {"packed", "padded"} <= set(speeds):
        ratio = speeds["packed"] / speeds["padded"]
        console.print(f"packed over padded: {ratio:.2f} times the tokens a second (target {PACKING_TARGET})")


def _show_number(value: float | None, unit: int) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if unit == 1 else f"{value / unit:.2f}"


def main() -> int:
    """All cases, or those that are named; 1 where one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(case.name for case in CASES), help="names, joined by commas")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU: does the script work?")
    given = parser.parse_args()
    known = {case.name: case for case in CASES}
    unknown = [name for name in given.cases.split(",") if name not in known]
    if unknown:
        parser.error(f"no case {unknown[0]}: there are {', '.join(known)}")
    chosen = [known[name] for name in given.cases.split(",")]
    if not given.smoke and not _has_gpu():
        print("error: no NVIDIA GPU is usable here; --smoke shows on the CPU that the script works", file=sys.stderr)
        return 1
    console = Console(width=160, highlight=False)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in dict.fromkeys(case.model for case in chosen):
            folder = Path(scratch) / f"model-{name}"
            write_model(MODELS[name], folder, smoke=given.smoke)
            for case in (one for one in chosen if one.model == name):
                rows.append(run_case(case, folder, Path(scratch), smoke=given.smoke))
                print(f"{case.name}: {rows[-1].get('tokens_per_second') or rows[-1].get('error')}", file=sys.stderr)
    show(rows, console)
    print(json.dumps({"smoke": given.smoke, "rows": rows}))
    return 1 if any("error" in row for row in rows) else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
