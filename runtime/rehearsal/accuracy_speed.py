"""Predicted against measured step times, row by row: the rehearsal and the closed forms.

python -m fitune.runtime.rehearsal.accuracy_speed tests/data/architectures.json tests/data/h100_*.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ...planner.clock import make_closed_form_clock
from ...planner.memory import Estimator
from ...planner.rates import ISSUE_SHARE, OPERATION_SECONDS
from ...planner.shape import is_known_family, make_shape
from ...planner.speed import StepTime
from ...planner.strategy import Device
from ..model.meta_shape import make_shape_of_model
from .accuracy import load_rows, make_device, make_spread, make_strategy
from .measure import Rehearsal
from .trace import Traces

SHORTEST_SECONDS = 0.5
"""Steps below this are noisy: three were measured, and they wait for the host."""
LONG_UPDATE_SHARE = 0.2
"""From this part of a step up its update can be told from the rest, which is met within a tenth."""
PAUSE_SECONDS = 0.3
"""What took this much longer than predicted is shown apart: steps differ by less, and a pause of the host by more."""
UNPLANNED = ("compile_whole_model", "sdpa_backend")
"""Levers of measured rows that no strategy has, or that leave it to the row what it is compared with."""


@dataclass(frozen=True, kw_only=True)
class TimedRow:
    """One measured row beside the times that are predicted for it.

    row:          the row: its knobs, and under `measured` its figures
    rehearsed:    from a rehearsal of the step
    closed_forms: the quick estimate
    """

    row: Mapping[str, Any]
    rehearsed: StepTime
    closed_forms: StepTime

    @property
    def id(self) -> str:
        """The row's label."""
        return str(self.row["id"])

    @property
    def measured_seconds(self) -> float:
        """Of one step: the slower of the second and the third."""
        return float(self.row["measured"]["step_seconds"])

    @property
    def is_long(self) -> bool:
        """Whether it took long enough to judge by."""
        return self.measured_seconds > SHORTEST_SECONDS

    def time(self, estimator: Estimator = "rehearsal") -> StepTime:
        """The predicted time."""
        return self.rehearsed if estimator == "rehearsal" else self.closed_forms

    def error(self, estimator: Estimator = "rehearsal") -> float:
        """predicted / measured - 1."""
        return self.time(estimator).seconds / self.measured_seconds - 1

    @property
    def limit(self) -> str:
        """What most of the step waits for."""
        host = sum(phase.host_seconds > phase.device_seconds for phase in self.rehearsed.phases[:2])
        return "host" if host == 2 else "device" if host == 0 else "both"

    @property
    def late_seconds(self) -> float:
        """How much longer it took than predicted, negative where it was faster."""
        return self.measured_seconds - self.rehearsed.seconds

    @property
    def is_late(self) -> bool:
        """Whether the host seems to have paused in it."""
        return self.late_seconds > PAUSE_SECONDS

    @property
    def operation_seconds(self) -> float:
        """Time of the step for each operation that the host starts, in units of one that Python calls."""
        return self.measured_seconds * OPERATION_SECONDS / sum(phase.host_seconds for phase in self.rehearsed.phases)

    @property
    def update_seconds(self) -> tuple[float, float] | None:
        """Of an 8-bit update, if it issued all instructions that the card can, and what it took, if all else took as
        long as predicted; None for others, and where it is too short to tell."""
        update = next(phase.device_seconds for phase in self.rehearsed.phases if phase.name == "optimizer")
        rest = self.rehearsed.seconds - update
        is_long = update >= LONG_UPDATE_SHARE * self.rehearsed.seconds and self.measured_seconds > rest
        if "8bit" not in self.row["optimizer"] or not is_long:
            return None
        return ISSUE_SHARE * update, self.measured_seconds - rest


def time_row(row: Mapping[str, Any], config: Mapping[str, Any], device: Device) -> TimedRow:
    """Rehearse what a row measured, and estimate it by closed forms."""
    shape = make_shape(config) if is_known_family(config) else make_shape_of_model(config)
    strategy, length = make_strategy(row, shape.layers), row["sequence_length"]
    return TimedRow(
        row=row,
        rehearsed=Rehearsal(Traces(config, sequence_length=length), shape, device, merge=False).time(strategy),
        closed_forms=make_closed_form_clock(shape, device, length)(strategy),
    )


def load_timed_rows(architectures_path: Path, rows_paths: Iterable[Path], *, short: bool = False) -> list[TimedRow]:
    """Every measured row that a strategy can say, those of short steps on demand: a second a row."""
    device = make_device()
    return [
        time_row(row, config, device)
        for path in rows_paths
        for row, config in load_rows(path, architectures_path)
        if is_planned(row) and (short or row["measured"]["step_seconds"] > SHORTEST_SECONDS)
    ]


def is_planned(row: Mapping[str, Any]) -> bool:
    """Whether a strategy can say what a row ran."""
    return not any(row.get(lever) for lever in UNPLANNED)


def render_speed_table(rows: Sequence[TimedRow]) -> str:
    """A line a row: measured and predicted seconds, the errors in percent, and what the step waits for."""
    head = f"{'row':86} {'measured':>9} {'rehearsed':>10} {'error':>7} {'closed':>8}  waits for"
    lines = (
        f"{one.id:86} {one.measured_seconds:8.3f}s {one.rehearsed.seconds:9.3f}s {100 * one.error():+6.1f}% "
        f"{100 * one.error('closed_forms'):+7.1f}%  {one.limit}"
        for one in sorted(rows, key=lambda row: row.measured_seconds)
    )
    return "\n".join([head, *lines])


def render_speed_summary(rows: Sequence[TimedRow]) -> Iterator[str]:
    """Median, 95th percentile and worst of the absolute errors: of all rows, of those without a pause, and of those
    that wait for the device."""
    steady = [one for one in rows if not one.is_late]
    bound = [one for one in rows if one.limit == "device"]
    for name, part in (("all", rows), ("steady", steady), ("device", bound)):
        for estimator in ("rehearsal", "closed_forms"):
            if part:
                spread = make_spread(one.error(estimator) for one in part)
                yield (
                    f"{name:7} {estimator:13} median {100 * spread.median:.1f} %, 95 % of {len(part)} rows within "
                    f"{100 * spread.high:.1f} %, worst {100 * spread.worst:.1f} %"
                )


def render_host_cost(rows: Sequence[TimedRow]) -> Iterator[str]:
    """The host's time an operation over the rows that wait for it, and over those of all other models."""
    waiting = [one for one in rows if one.limit == "host" and not one.is_late]
    for model in (None, *sorted({str(one.row["model"]) for one in waiting})):
        costs = [one.operation_seconds for one in waiting if one.row["model"] != model]
        left = "of all rows" if model is None else f"without {model}"
        if costs:
            yield f"{left:24} {len(costs)} rows wait for the host: {1e6 * median(costs):.1f} us an operation"


def render_issue_share(rows: Sequence[TimedRow]) -> Iterator[str]:
    """What 8-bit updates reach of the card's instructions, over all rows that tell together, and over those of other
    models."""
    told = [(str(one.row["model"]), one.update_seconds) for one in rows]
    for model in (None, *sorted({model for model, seconds in told if seconds is not None})):
        left = [seconds for name, seconds in told if seconds is not None and name != model]
        if left:
            words = "of all rows" if model is None else f"without {model}"
            share = sum(best for best, _ in left) / sum(taken for _, taken in left)
            yield f"{words:24} {len(left)} rows of 8-bit updates: {100 * share:.0f} % of the instructions"


def main(architectures_path: str, *rows_paths: str) -> None:
    """Print the table, its summary, and the constants that come from the rows."""
    rows = load_timed_rows(Path(architectures_path), [Path(path) for path in rows_paths])
    constants = (*render_host_cost(rows), *render_issue_share(rows))
    print(render_speed_table(rows), *render_speed_summary(rows), *constants, sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
