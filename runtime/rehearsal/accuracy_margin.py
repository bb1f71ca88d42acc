"""How the margin of what is required was chosen, and what comes of that for models that it was not chosen on.

python -m fitune.runtime.rehearsal.accuracy_margin tests/data/h100_reference_step.jsonl tests/data/architectures.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median

from ...planner.allocator import SEGMENT_ORDERS
from .accuracy import load_rows, make_device, make_strategy
from .collector import collector_paused
from .measure import context_bytes, count_limit, count_unsure, find_card, replay_run
from .trace import trace_step

MEDIAN_COST = 0.0285
"""What the margin may cost at the median: a little below 3 %, since other rows will differ."""
MOST_SPREADS = 3


@dataclass(frozen=True, kw_only=True)
class ReplayedRow:
    """A measured row, replayed in each order of addresses.

    model:          as the row names it
    device_bytes:   predicted, by order
    measured_bytes: what NVML showed
    """

    id: str
    model: str
    device_bytes: Sequence[int]
    measured_bytes: int


@dataclass(frozen=True, kw_only=True)
class Margin:
    """A way to choose what is required.

    orders:  which of SEGMENT_ORDERS are replayed, the measured machine's always
    spreads: how often the range of their figures is added to the highest
    share:   added to that
    """

    orders: tuple[int, ...]
    spreads: int
    share: float = 0.0

    def exceed(self, row: ReplayedRow) -> float:
        """required / measured - 1; below 0 where the row needs more than is required."""
        figures = [row.device_bytes[order] for order in self.orders]
        needed = figures[0] + count_unsure(figures, spreads=self.spreads)
        return needed * (1 + self.share) / row.measured_bytes - 1


def list_margins() -> Iterator[Margin]:
    """All that were tried."""
    for count in range(len(SEGMENT_ORDERS)):
        for others in combinations(range(1, len(SEGMENT_ORDERS)), count):
            for spreads in range(MOST_SPREADS + 1 if others else 1):
                yield Margin(orders=(0, *others), spreads=spreads)


def spend(margin: Margin, rows: Sequence[ReplayedRow]) -> Margin:
    """The same with the share that makes its median cost MEDIAN_COST."""
    share = (1 + MEDIAN_COST) / (1 + median(map(margin.exceed, rows))) - 1
    return Margin(orders=margin.orders, spreads=margin.spreads, share=share)


def choose_margin(rows: Sequence[ReplayedRow]) -> Margin:
    """Of margins that cost the same at the median the one that leaves the lowest row the most; of equal ones that with
    more orders, then with more spreads."""
    spent = [spend(margin, rows) for margin in list_margins()]
    return max(spent, key=lambda one: (min(map(one.exceed, rows)), len(one.orders), one.spreads))


@collector_paused()
def load_replayed(rows_path: Path, architectures_path: Path) -> list[ReplayedRow]:
    """Every measured row in every order: two seconds a row."""
    device, replayed = make_device(), []
    for row, config in load_rows(rows_path, architectures_path):
        strategy = make_strategy(row, _count_layers(config))
        traced = trace_step(config, strategy, find_card(device), sequence_length=row["sequence_length"])
        sizes = []
        for order in SEGMENT_ORDERS:
            limit_bytes = count_limit(strategy, device)
            replay = replay_run(traced, strategy, limit_bytes=limit_bytes, order=order, as_measured=True)
            reserved = replay.allocator.peak_reserved_bytes
            sizes.append(reserved + context_bytes(strategy, device) + replay.managed_bytes)
        measured = row["measured"]["peak_nvml_bytes"]
        replayed.append(ReplayedRow(id=row["id"], model=row["model"], device_bytes=sizes, measured_bytes=measured))
    return replayed


def _count_layers(config: dict[str, object]) -> int:
    return int(str(config.get("num_hidden_layers") or config.get("n_layer")))


def render_choice(rows: Sequence[ReplayedRow]) -> str:
    """The margin chosen on all rows; for each model the one chosen without it, and what its rows then have to spare."""
    lines = [f"on all rows: {_render(choose_margin(rows), rows)}"]
    exceeds: list[float] = []
    for model in sorted({row.model for row in rows}):
        margin = choose_margin([row for row in rows if row.model != model])
        own = [row for row in rows if row.model == model]
        exceeds += map(margin.exceed, own)
        lines.append(f"without {model:14} {_render(margin, own)}")
    below = sum(one < 0 for one in exceeds)
    lines.append(f"left out: median {100 * median(exceeds):+.2f} %, lowest {100 * min(exceeds):+.2f} %, below: {below}")
    return "\n".join(lines)


def _render(margin: Margin, rows: Sequence[ReplayedRow]) -> str:
    names = ", ".join(getattr(SEGMENT_ORDERS[order], "__name__", "?") for order in margin.orders)
    exceeds = sorted(map(margin.exceed, rows))
    return (
        f"{100 * margin.share:.2f} % and {margin.spreads} x the range of {names}: median "
        f"{100 * median(exceeds):+.2f} %, lowest {100 * exceeds[0]:+.2f} %"
    )


if __name__ == "__main__":
    print(render_choice(load_replayed(Path(sys.argv[1]), Path(sys.argv[2]))))
