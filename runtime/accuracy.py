"""Predicted against measured, row by row.

python -m fitune.runtime.accuracy tests/data/h100_reference_step.jsonl tests/data/architectures.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..planner.catalog import find_gpu
from ..planner.memory import Memory
from ..planner.strategy import Device, Strategy
from .rehearsal import rehearse

MEASURED_CARD = "H100 80GB"
FIGURES = {
    "allocated": "peak_allocated_bytes",
    "reserved": "peak_reserved_bytes",
    "device": "peak_nvml_bytes",
}
"""What is compared, and the measured row's name for it."""
MEASURED_PHASES = ("forward", "backward", "clip", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measured row beside its rehearsal.

    id:        the row's label
    predicted: the rehearsal
    measured:  the row's figures, bytes
    """

    id: str
    predicted: Memory
    measured: Mapping[str, Any]

    def error(self, figure: str) -> float:
        """predicted / measured - 1 of allocated, reserved or device."""
        values = {
            "allocated": self.predicted.peak_allocated_bytes,
            "reserved": self.predicted.peak_reserved_bytes or 0,
            "device": self.predicted.peak_device_bytes,
        }
        return float(values[figure] / self.measured[FIGURES[figure]] - 1)

    @property
    def measured_phase(self) -> str:
        """The phase of the step with the highest measured peak."""
        return max(MEASURED_PHASES, key=lambda phase: self.measured[f"{phase}_peak_bytes"])


def make_strategy(row: Mapping[str, Any]) -> Strategy:
    """The strategy that a measured row ran, knob by knob."""
    full = row["method"] == "full"
    targets = row.get("lora_targets")
    return Strategy(
        method=row["method"],
        weights_dtype=row.get("weights_dtype", "bf16"),
        compute_dtype="bf16",
        adapter_dtype=None if full else row["adapter_dtype"],
        adapter_rank=None if full else row["lora_rank"],
        adapter_targets=None if full else tuple(targets) if isinstance(targets, list) else targets,
        adapter_dropout=0.0 if full else row["lora_dropout"],
        attention=row["attention"],
        micro_batch_size=row["micro_batch_size"],
        gradient_accumulation_steps=row["gradient_accumulation_steps"],
        gradient_checkpointing=row["gradient_checkpointing"],
        loss_head=row["loss_head"],
        optimizer=row["optimizer"],
        expandable_segments=row["expandable_segments"],
        learning_rate=1e-5,
    )


def make_device(name: str = MEASURED_CARD) -> Device:
    """A card of the catalog, all of it to use."""
    card = find_gpu(name)
    return Device(
        name=card.name, kind="cuda", memory_bytes=card.memory_bytes, budget_bytes=card.memory_bytes, bf16=card.bf16
    )


def compare(row: Mapping[str, Any], config: Mapping[str, Any], device: Device) -> Comparison:
    """Rehearse what a row measured."""
    predicted = rehearse(config, make_strategy(row), device, sequence_length=row["sequence_length"], merge=False)
    return Comparison(id=row["id"], predicted=predicted, measured=row["measured"])


def load_rows(rows_path: Path, architectures_path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(row, config) of every measured row."""
    architectures = json.loads(architectures_path.read_text())
    for line in rows_path.read_text().splitlines():
        row = json.loads(line)
        yield row, architectures[row["model"]]


def render_table(comparisons: Sequence[Comparison]) -> str:
    """A line a row: error of each figure in percent, and the phase of the peak, predicted and measured."""
    lines = [f"{'row':78} {'allocated':>10} {'reserved':>10} {'device':>10}  peak phase"]
    for one in comparisons:
        errors = " ".join(f"{100 * one.error(figure):+9.2f}%" for figure in FIGURES)
        same = one.predicted.peak_phase == one.measured_phase
        phase = one.predicted.peak_phase + ("" if same else f" (measured: {one.measured_phase})")
        lines.append(f"{one.id:78} {errors}  {phase}")
    return "\n".join(lines)


def render_summary(comparisons: Sequence[Comparison]) -> str:
    """Median, 95th percentile and worst of the absolute errors of each figure."""
    lines = []
    for figure in FIGURES:
        errors = sorted(abs(one.error(figure)) for one in comparisons)
        high = errors[min(len(errors) - 1, int(0.95 * len(errors)))]
        lines.append(
            f"{figure:9} median {100 * median(errors):.3f} %, 95 % of {len(errors)} rows within {100 * high:.2f} %, "
            f"worst {100 * errors[-1]:.2f} %"
        )
    return "\n".join(lines)


def main(rows_path: str, architectures_path: str) -> None:
    """Print the table and its summary."""
    device = make_device()
    comparisons = [compare(row, config, device) for row, config in load_rows(Path(rows_path), Path(architectures_path))]
    print(render_table(comparisons))
    print(render_summary(comparisons))


if __name__ == "__main__":
    main(*sys.argv[1:3])
