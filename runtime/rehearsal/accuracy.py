"""Predicted against measured, row by row: the rehearsal, the closed forms, the constants that rows have given.

python -m fitune.runtime.rehearsal.accuracy tests/data/h100_reference_step.jsonl tests/data/architectures.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ...planner.catalog import find_gpu
from ...planner.estimate import estimate_memory
from ...planner.memory import STEP_PHASES, Estimator, Memory
from ...planner.rates import make_gpu_rates
from ...planner.shape import is_known_family, make_shape
from ...planner.strategy import Device, Strategy
from ..model.meta_shape import make_shape_of_model
from .measure import rehearse

MiB = 2**20
MEASURED_CARD = "H100 80GB"
FIGURES = {
    "allocated": "peak_allocated_bytes",
    "reserved": "peak_reserved_bytes",
    "device": "peak_nvml_bytes",
}
"""What is compared, and the measured row's name for it."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measured row beside what is predicted for it.

    row:          the row: its knobs, and under `measured` its figures in bytes
    predicted:    the rehearsal
    closed_forms: the quick estimate
    """

    row: Mapping[str, Any]
    predicted: Memory
    closed_forms: Memory

    @property
    def id(self) -> str:
        """The row's label."""
        return str(self.row["id"])

    @property
    def measured(self) -> Mapping[str, int]:
        """The row's figures, bytes."""
        return dict(self.row["measured"])

    def bytes_of(self, figure: str, estimator: Estimator = "rehearsal") -> int:
        """Predicted bytes of allocated, reserved or device."""
        memory = self.predicted if estimator == "rehearsal" else self.closed_forms
        return {
            "allocated": memory.peak_allocated_bytes,
            "reserved": memory.peak_reserved_bytes or 0,
            "device": memory.peak_device_bytes,
        }[figure]

    def error(self, figure: str, estimator: Estimator = "rehearsal") -> float:
        """predicted / measured - 1 of allocated, reserved or device."""
        return self.bytes_of(figure, estimator) / self.measured[FIGURES[figure]] - 1

    @property
    def measured_phase(self) -> str:
        """The phase of the step with the highest measured peak."""
        return max(STEP_PHASES, key=lambda phase: self.measured[f"{phase}_peak_bytes"])

    @property
    def margin(self) -> float:
        """required / measured - 1: what `fits` is decided on, above what the device showed; negative if below."""
        return self.predicted.required_bytes / self.measured[FIGURES["device"]] - 1

    @property
    def beside_bytes(self) -> int:
        """What the device showed beside reserved and managed memory."""
        measured = self.measured
        return measured["peak_nvml_bytes"] - measured["peak_reserved_bytes"] - self.predicted.managed_bytes


class Spread(NamedTuple):
    """How far off the rows are: shares of the measured figure, signs dropped.

    median: half of the rows are nearer
    high:   95 % of the rows are nearer
    worst:  the farthest row
    """

    median: float
    high: float
    worst: float


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """The device peak of one model's rows, with the device constant taken from the other models' rows alone.

    model:          the model that is left out
    constant_bytes: the constant as its rows get it, by attention
    errors:         predicted / measured - 1 of its rows
    """

    model: str
    constant_bytes: Mapping[str, int]
    errors: Sequence[float]


def make_strategy(row: Mapping[str, Any], layers: int) -> Strategy:
    """The strategy that a measured row ran on a model of `layers` layers; a row leaves out what it did not vary."""
    full = row["method"] == "full"
    targets = row.get("lora_targets", "all-linear")
    head = row["loss_head"]
    return Strategy(
        method=row["method"],
        weights_dtype=row.get("weights_dtype", "bf16"),
        compute_dtype="bf16",
        adapter_dtype=None if full else row["adapter_dtype"],
        adapter_rank=None if full else row.get("lora_rank", 16),
        adapter_targets=None if full else tuple(targets) if isinstance(targets, list) else targets,
        adapter_dropout=0.0 if full else row.get("lora_dropout", 0.0),
        attention=row.get("attention", "sdpa"),
        micro_batch_size=row["micro_batch_size"],
        gradient_accumulation_steps=row.get("gradient_accumulation_steps", 1),
        checkpointed_layers=layers if row["gradient_checkpointing"] else 0,
        loss_head="fused" if head == "liger_fused_linear_cross_entropy" else head,
        recasts_adapter_inputs=True,
        optimizer=row["optimizer"],
        compile=row.get("compile_layers", False),
        kernels="liger" if row.get("liger_layers") else "torch",
        expandable_segments=row.get("expandable_segments", False),
        learning_rate=1e-5,
    )


def make_device(name: str = MEASURED_CARD) -> Device:
    """A card of the catalog, all of it to use."""
    card = find_gpu(name)
    return Device(
        name=card.name,
        kind="cuda",
        memory_bytes=card.memory_bytes,
        budget_bytes=card.memory_bytes,
        bf16=card.bf16,
        rates=make_gpu_rates(card),
    )


def compare(row: Mapping[str, Any], config: Mapping[str, Any], device: Device) -> Comparison:
    """Rehearse what a row measured, and estimate it by closed forms."""
    shape = make_shape(config) if is_known_family(config) else make_shape_of_model(config)
    strategy, length = make_strategy(row, shape.layers), row["sequence_length"]
    return Comparison(
        row=row,
        predicted=rehearse(config, strategy, device, sequence_length=length, merge=False, as_measured=True),
        closed_forms=estimate_memory(shape, strategy, device, sequence_length=length, merge=False),
    )


def load_rows(rows_path: Path, architectures_path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(row, config) of every measured row."""
    architectures = json.loads(architectures_path.read_text())
    for line in rows_path.read_text().splitlines():
        row = json.loads(line)
        yield row, architectures[row["model"]]


def load_comparisons(rows_path: Path, architectures_path: Path) -> list[Comparison]:
    """Every measured row, compared: a second a row."""
    device = make_device()
    return [compare(row, config, device) for row, config in load_rows(rows_path, architectures_path)]


def make_spread(errors: Iterable[float]) -> Spread:
    """The spread of predicted / measured - 1 over rows."""
    sizes = sorted(abs(error) for error in errors)
    return Spread(median=median(sizes), high=sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))], worst=sizes[-1])


def make_left_out(comparisons: Sequence[Comparison]) -> list[LeftOut]:
    """Each model in turn without its own rows: the constant is the median of the others', by attention.

    Rows whose attention no other model has are left away.
    """
    left_out = []
    for model in sorted({one.row["model"] for one in comparisons}):
        constants = _fit_constants([one for one in comparisons if one.row["model"] != model])
        own = [one for one in comparisons if one.row["model"] == model and one.row["attention"] in constants]
        if own:
            used = {attention: constants[attention] for attention in sorted({one.row["attention"] for one in own})}
            errors = [_error_with(one, used[one.row["attention"]]) for one in own]
            left_out.append(LeftOut(model=model, constant_bytes=used, errors=errors))
    return left_out


def _fit_constants(comparisons: Sequence[Comparison]) -> dict[str, int]:
    """Device memory beside reserved and managed memory, by attention: the rows' median."""
    beside: dict[str, list[int]] = {}
    for one in comparisons:
        beside.setdefault(one.row["attention"], []).append(one.beside_bytes)
    return {attention: int(median(sizes)) for attention, sizes in beside.items()}


def _error_with(one: Comparison, constant_bytes: int) -> float:
    device_bytes = one.bytes_of("reserved") + one.predicted.managed_bytes + constant_bytes
    return device_bytes / one.measured[FIGURES["device"]] - 1


def render_table(comparisons: Sequence[Comparison]) -> str:
    """A line a row: error of each figure in percent, and the phase of the peak, predicted and measured."""
    lines = [f"{'row':78} {'allocated':>10} {'reserved':>10} {'device':>10}  peak phase"]
    for one in comparisons:
        errors = " ".join(f"{100 * one.error(figure):+9.2f}%" for figure in FIGURES)
        lines.append(f"{one.id:78} {errors}  {render_phase(one)}")
    return "\n".join(lines)


def render_phase(one: Comparison) -> str:
    """The phase of the predicted peak, and of the measured one where that is another."""
    same = one.predicted.peak_phase == one.measured_phase
    return one.predicted.peak_phase + ("" if same else f" (measured: {one.measured_phase})")


def render_summary(comparisons: Sequence[Comparison], estimator: Estimator = "rehearsal") -> str:
    """Median, 95th percentile and worst of the absolute errors of each figure."""
    lines = []
    for figure in FIGURES:
        spread = make_spread(one.error(figure, estimator) for one in comparisons)
        lines.append(
            f"{figure:9} median {100 * spread.median:.3f} %, 95 % of {len(comparisons)} rows within "
            f"{100 * spread.high:.2f} %, worst {100 * spread.worst:.2f} %"
        )
    return "\n".join(lines)


def render_margin(comparisons: Sequence[Comparison]) -> str:
    """What the margin costs at the median, and the rows that need more than is required."""
    short = [f"  {one.id} {-100 * one.margin:.2f} %" for one in comparisons if one.margin < 0]
    cost = 100 * median(one.margin for one in comparisons)
    return "\n".join(
        [f"required  {cost:.2f} % above the measured device peak at the median; below it: {len(short)}", *short]
    )


def render_left_out(comparisons: Sequence[Comparison]) -> str:
    """A line a model: the device constant from the other models' rows, and the device error with it."""
    lines = []
    for one in make_left_out(comparisons):
        constants = ", ".join(f"{name} {size / MiB:.0f} MiB" for name, size in one.constant_bytes.items())
        spread = make_spread(one.errors)
        lines.append(
            f"{one.model:14} {len(one.errors):2} rows, device median {100 * spread.median:.3f} %, "
            f"worst {100 * spread.worst:.2f} %, beside from other models: {constants}"
        )
    return "\n".join(lines)


def main(rows_path: str, architectures_path: str) -> None:
    """Print the table, its summary, the margin, the closed forms' summary, and each model left out."""
    comparisons = load_comparisons(Path(rows_path), Path(architectures_path))
    print(render_table(comparisons), render_summary(comparisons), render_margin(comparisons), sep="\n")
    print("\nclosed forms", render_summary(comparisons, "closed_forms"), sep="\n")
    print("\none model left out", render_left_out(comparisons), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
