"""What benchmarks.gpu prints of its rows: one table, and the comparisons between rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PACKING_TARGET = 3.0
"""Packed over padded, tokens per second."""
CURVES = {"compiled": 0.01, "liger": 0.01, "float8": None}
"""What is compared with eager layers, and the largest relative difference of the loss, averaged over WINDOW steps, that
is aimed at; float8 is reported apart."""
WINDOW = 20
SEARCH_TARGET = 1.10
"""The fastest of all combinations over the plan's choice, tokens per second."""
MEMORY = ("allocated", "reserved", "device")
Row = Mapping[str, Any]


def show(rows: Sequence[Row], console: Console) -> None:
    """One table: a line for each case; then what cases say together."""
    table = Table(title="fitune run", title_justify="left")
    left = ("case", "how")
    for name in (*left, "tokens/s", "predicted", "target", "device GiB", *(f"{one} %" for one in MEMORY), "wall s"):
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for row in rows:
        wall = f"{row['wall_seconds']:.0f}" if "wall_seconds" in row else ""
        if "error" in row or "skipped" in row:
            text = Text(str(row.get("error") or row["skipped"]), style="red" if "error" in row else "yellow")
            table.add_row(row["case"], text, *[""] * 7, wall)
            continue
        device = row["measured_peak_device_bytes"]
        table.add_row(
            row["case"],
            describe(row["strategy"]),
            _show(row["tokens_per_second"]),
            _show(row["predicted_tokens_per_second"]),
            _show(row["target"]),
            "-" if device is None else f"{device / 2**30:.2f}",
            *(_show_error(row, one) for one in MEMORY),
            wall,
        )
    console.print(table)
    console.print("% of memory: predicted over measured, less 1")
    for line in list_comparisons(rows):
        console.print(line)


def describe(how: Mapping[str, Any]) -> str:
    """A strategy in a few words."""
    layers = f"{how['checkpointed_layers']} checkpointed, " if how["checkpointed_layers"] else ""
    used = (
        ("compiled", how["compile"]),
        ("Liger's kernels", how["kernels"] == "liger"),
        ("fused adapters", how["fused_adapters"]),
        ("float8", how["float8"]),
    )
    levers = "".join(f", {name}" for name, is_used in used if is_used)
    return f"micro-batch {how['micro_batch_size']}, {layers}{how['loss_head']} head{levers}, {how['optimizer']}"


def list_comparisons(rows: Sequence[Row]) -> list[str]:
    """Packed over padded, compiled against eager losses, the plan's choice against all others: where both are there."""
    done = {row["case"]: row for row in rows if "tokens_per_second" in row}
    found = []
    if {"packed", "padded"} <= set(done):
        ratio = done["packed"]["tokens_per_second"] / done["padded"]["tokens_per_second"]
        found.append(f"packed over padded: {ratio:.2f} times the tokens a second (target {PACKING_TARGET})")
    for name, aim in CURVES.items():
        if {"curve-eager", f"curve-{name}"} <= set(done):
            eager, losses = (done[case]["losses"] for case in ("curve-eager", f"curve-{name}"))
            target = "no target" if aim is None else f"target {aim:.0%}"
            worst = compare_curves(eager, losses)
            found.append(
                f"loss {name} against eager over {len(eager)} steps: at most {worst:.2%} apart, averaged over {WINDOW} "
                f"steps ({target})"
            )
    searched = {name: row for name, row in done.items() if name.startswith("search-") and name != "search-auto"}
    if searched and "search-auto" in done:
        best = max(searched.values(), key=lambda row: row["tokens_per_second"])
        ratio = best["tokens_per_second"] / done["search-auto"]["tokens_per_second"]
        found.append(
            f"fastest of {len(searched)} combinations over the plan's choice: {ratio:.2f} (target {SEARCH_TARGET}): "
            f"{describe(best['strategy'])}"
        )
    return found


def compare_curves(first: Sequence[float], second: Sequence[float]) -> float:
    """The largest |b - a| / a of the losses' moving averages over WINDOW steps, or over all where there are fewer."""
    window = min(WINDOW, len(first), len(second))
    averages = [list(_average(losses, window)) for losses in (first, second)]
    return max(abs(b - a) / a for a, b in zip(*averages, strict=False))


def _average(losses: Sequence[float], window: int) -> Sequence[float]:
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    starts = zip(sums, sums[window:], strict=False)
    return [(end - start) / window for start, end in starts]


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _show_error(row: Row, name: str) -> str:
    ours, theirs = (row[f"{who}_peak_{name}_bytes"] for who in ("predicted", "measured"))
    return f"{100 * (ours / theirs - 1):+.1f}" if ours and theirs else "-"
