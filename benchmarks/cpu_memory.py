"""RAM by phase and files of real runs on this machine's CPU, beside what their plans said.

    python -m benchmarks.cpu_memory                                      # every case, 4 steps each
    python -m benchmarks.cpu_memory --steps 60 --only lora-bf16,full-fp32

The quick start's rows, with the embedded model and three other architectures with random weights. Each run is a process
of its own. Prints a table of errors, (predicted / measured - 1) of each phase and of all files, and one line of JSON.
The exit code is 1 where a phase is off by more than TOLERANCE, or weights' files have other sizes than planned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fitune.planner.memory import PHASES
from fitune.planner.plan import Plan

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.toml"
TOLERANCE = 0.1
FIXED = (
    'budget.memory="16GiB"',
    "data.max_length=136",
    "data.max_truncated=0.5",
    "data.eval=0.05",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.gradient_checkpointing=false",
)
"""A fifth of the rows are as long as max_length: a few batches show the longest that was planned for."""
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "qwen3": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
    },
}
"""Other architectures, of some 130 to 180M parameters: model type, and what differs from its defaults."""
LORA, FULL, QLORA = ('method.kind="lora"',), ('method.kind="full"',), ('method.kind="qlora"',)
BF16, FP32 = ('model.dtype="bf16"',), ('model.dtype="fp32"',)
PACKED = ("data.packing=true", "data.max_length=256", "train.micro_batch_size=1", "train.global_batch_size=2")
CASES: dict[str, tuple[str, ...]] = {
    "lora-bf16": (*LORA, *BF16),
    "lora-fp32": (*LORA, *FP32),
    "lora-bf16-merge": (*LORA, *BF16, "output.merge=true"),
    "lora-bf16-batch8": (*LORA, *BF16, "train.micro_batch_size=8"),
    "lora-bf16-checkpointed": (*LORA, *BF16, "train.gradient_checkpointing=true"),
    "lora-bf16-packed": (*LORA, *BF16, *PACKED),
    "qlora": (*QLORA, 'train.optimizer="adamw"'),
    "qlora-packed": (*QLORA, 'train.optimizer="adamw"', *PACKED),
    "full-bf16": (*FULL, *BF16, 'train.optimizer="adamw"'),
    "full-fp32": (*FULL, *FP32, 'train.optimizer="adamw"'),
    "full-bf16-8bit": (*FULL, *BF16, 'train.optimizer="adamw_8bit"'),
    "gpt2-lora-bf16": (*LORA, *BF16),
    "gpt2-full-fp32": (*FULL, *FP32, 'train.optimizer="adamw"'),
    "qwen3-lora-bf16": (*LORA, *BF16),
    "qwen3-qlora": (*QLORA, 'train.optimizer="adamw"'),
    "gemma3_text-lora-bf16": (*LORA, *BF16),
    "gemma3_text-full-bf16": (*FULL, *BF16, 'train.optimizer="adamw"'),
}
"""What each run is set to, beside FIXED; a name begins with a model of MODELS, or it is the embedded one."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run.

    predicted, measured:        resident memory by phase, and under `run` its highest, bytes
    weights, planned_weights:   sizes of the weights' files by folder, bytes
    disk_bytes, planned_disk_bytes: all files; None planned where the run wrote no result
    """

    predicted: dict[str, int]
    measured: dict[str, int]
    weights: dict[str, int]
    planned_weights: dict[str, int]
    disk_bytes: int
    planned_disk_bytes: int | None

    @property
    def errors(self) -> dict[str, float]:
        """predicted / measured - 1 of each phase, and of the whole run."""
        return {name: size / self.measured[name] - 1 for name, size in self.predicted.items()}


def write_model(model_type: str, folder: Path) -> Path:
    """Random bf16 weights of an architecture in MODELS, with the embedded model's tokenizer."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fitune.runtime.model.embedded import load_embedded_model

    embedded = load_embedded_model()
    vocabulary = json.loads((embedded / "config.json").read_text())["vocab_size"]
    config = AutoConfig.for_model(model_type, vocab_size=vocabulary, **MODELS[model_type])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for one in embedded.iterdir():
        if one.name.startswith(("token", "chat_template")):
            shutil.copy(one, folder)
    return folder


def list_settings(name: str, steps: int, scratch: Path) -> list[str]:
    """The overrides of a case; its model is written where it is not there yet."""
    settings = [*FIXED, *CASES[name], f"train.max_steps={steps}", f"output.save_every={steps - 1}"]
    model = next((one for one in MODELS if name.startswith(one)), None)
    if model is None:
        return settings
    folder = scratch / model
    return [*settings, f'model.id="{folder if folder.exists() else write_model(model, folder)}"']


def run_case(name: str, steps: int, scratch: Path) -> Result:
    """One run in a process of its own, and what its plan and its report say."""
    from fitune.runtime.report import list_phase_peaks, load_report, predict_file_bytes

    run = scratch / name
    settings = [*list_settings(name, steps, scratch), f'output.dir="{run}"']
    words = [word for one in settings for word in ("--set", one)]
    subprocess.run([sys.executable, "-m", "fitune.runtime.cli", "run", str(RECIPE), *words], check=True, stdout=2)
    plan, report = load_report(run)
    peaks = list_phase_peaks(plan, report)
    weights: Counter[str] = Counter()
    for path in run.rglob("*.safetensors"):
        weights[str(path.relative_to(run).parent)] += path.stat().st_size
    return Result(
        predicted={one.name: one.predicted_bytes for one in peaks} | {"run": plan.memory.peak_device_bytes},
        measured={one.name: one.measured_bytes or 0 for one in peaks} | {"run": report.measured.peak_device_bytes or 0},
        weights=dict(weights),
        planned_weights=plan_weights(plan, settings, steps),
        disk_bytes=report.measured.disk_bytes,
        planned_disk_bytes=predict_file_bytes(plan, report),
    )


def plan_weights(plan: Plan, settings: Sequence[str], steps: int) -> dict[str, int]:
    """Sizes of the weights' files by folder: the result, the last checkpoint, and a merged model."""
    from fitune.runtime.planning import Job

    files_of = Job(str(RECIPE), list(settings)).files_of
    files = None if files_of is None else files_of(plan.strategy)
    assert files is not None, "the weights' files are known"
    result = "model" if plan.strategy.method == "full" else "adapter"
    planned = {result: files.trained_bytes, f"checkpoints/step-{steps - 1:06}": files.checkpoint_bytes}
    return planned | ({"merged": files.merged_bytes} if files.merged_bytes else {})


def render(results: dict[str, Result]) -> str:
    """A Markdown table of errors, a row each case."""
    names = (*PHASES, "run")
    lines = [f"| | {' | '.join(names)} | measured | files |", "|---" * (len(names) + 3) + "|"]
    for case, result in results.items():
        cells = [f"{100 * result.errors[name]:+.1f} %" if name in result.errors else "" for name in names]
        files = (result.planned_disk_bytes or 0) / result.disk_bytes - 1
        size = f"{result.measured['run'] / 2**30:.2f} GiB"
        lines.append(f"| {case} | {' | '.join(cells)} | {size} | {100 * files:+.1f} % |")
    return "\n".join(lines)


def main() -> int:
    """The cases; 1 where a phase or a file is not as planned."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_memory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=4, help="of each run, 2 or more")
    parser.add_argument("--only", help=f"cases, separated by commas: {', '.join(CASES)}")
    given = parser.parse_args()
    names = list(CASES) if given.only is None else given.only.split(",")
    unknown = sorted(set(names) - set(CASES))
    if unknown or given.steps < 2:
        parser.error(f"no such case: {', '.join(unknown)}" if unknown else "--steps: 2 or more")
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            results[name] = run_case(name, given.steps, Path(scratch))
            print(json.dumps({"case": name, "steps": given.steps} | asdict(results[name])), file=sys.stderr)
    print(render(results))
    off = [name for name, one in results.items() if max(map(abs, one.errors.values())) > TOLERANCE]
    wrong = [name for name, one in results.items() if one.weights != one.planned_weights]
    print(f"off by more than {TOLERANCE:.0%} in a phase: {', '.join(off) or 'none'}")
    print(f"weights of other sizes than planned: {', '.join(wrong) or 'none'}")
    print(json.dumps({name: asdict(one) for name, one in results.items()}))
    return 1 if off or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
