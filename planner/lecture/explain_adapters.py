"""The sections of `fitune explain` that count trainable parameters: by rank, and GPT-2's."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...recipes.units import format_count
from .adapters import RankColumn, RankRow, Table3Model
from .explain_tables import make_note, make_table


def render_ranks(columns: Sequence[RankColumn]) -> RenderableType:
    """The lecture's table as printed, with what is off beside it; then exact counts of real architectures."""
    counted = [column for column in columns if column.architecture]
    without = [column.size for column in columns if not column.architecture]
    missing = f" The catalog has no architecture of {' or '.join(without)}." if without else ""
    return Group(
        Text("The lecture's formula, 2 r sqrt(P), with the whole model as one square matrix; in red what is off:\n"),
        _render_formula(columns),
        Text(f"\nExactly, with adapters on every linear layer / on queries and values alone.{missing}\n"),
        _render_exact(counted),
        make_note("\n" + _describe_break_even(counted)),
    )


def _render_formula(columns: Sequence[RankColumn]) -> Table:
    table = make_table("rank", *(column.size for column in columns))
    for rows in zip(*(column.rows for column in columns), strict=True):
        table.add_row(f"{rows[0].rank:,}", *map(_describe_formula, rows))
    table.add_row("Full", *(_format_short(column.parameters) for column in columns))
    return table


def _describe_formula(row: RankRow) -> Text:
    if row.printed is None:
        return Text(_format_short(row.formula))
    if row.printed == row.printed_right:
        return Text(row.printed)
    return Text.assemble((row.printed, "red"), f" is {row.printed_right}")


def _render_exact(columns: Sequence[RankColumn]) -> Table:
    table = make_table("rank", *(column.architecture or "" for column in columns))
    for rows in zip(*(column.rows for column in columns), strict=True):
        table.add_row(f"{rows[0].rank:,}", *map(_describe_exact, rows))
    table.add_row("Full", *(_format_short(column.exact_parameters or 0) for column in columns))
    return table


def _describe_exact(row: RankRow) -> str:
    """Such as `40.0M / 8.4M`; a dash where queries and values go by no known name."""
    return " / ".join("-" if count is None else _format_short(count) for count in (row.all_linear, row.attention))


def _describe_break_even(columns: Sequence[RankColumn]) -> str:
    ranks = ", ".join(
        f"{column.break_even_rank:,} ({column.architecture})" for column in columns if column.break_even_rank
    )
    return f"Adapters outgrow the layers that they adapt from these ranks on: {ranks}."


def _format_short(count: int) -> str:
    """167K, 86.0M: as narrow as the lecture's."""
    return f"{round(count / 1000)}K" if 1000 <= count < 999_500 else format_count(count)


def render_table3(models: Sequence[Table3Model]) -> RenderableType:
    """All parameters, LoRA's and the top two layers', printed beside counted."""
    table = make_table("", "the lecture", "exactly")
    for model in models:
        table.add_row(
            *_make_row(
                f"{model.model}, all parameters", model.printed_parameters, model.parameters_right, model.parameters
            )
        )
        name = f"{model.model}, LoRA of rank {model.rank}"
        table.add_row(*_make_row(name, model.printed_adapters, model.adapters_right, model.adapters_fused))
        if model.printed_top2 is not None:
            name = f"{model.model}, its top two layers"
            table.add_row(*_make_row(name, model.printed_top2, model.top2_right, model.top2))
    same = all(model.adapters_fused == model.adapters_split for model in models)
    return Group(table, Text("\n" + _describe_fused(models[0], same)))


def _make_row(name: str, printed: str, right: str | None, count: int) -> tuple[str | Text, ...]:
    return name, Text(printed, style="" if printed == right else "red"), f"{count:,}"


def _describe_fused(model: Table3Model, same: bool) -> str:
    verdict = "come to the same" if same else "differ"
    return (
        "GPT-2 makes q, k and v in one matrix, c_attn [d, 3d]: peft's adapter on it has r (d + 3d) parameters a layer, "
        f"the paper's two on W_q and W_v have 2 r (d + d). Both {verdict}: {model.adapters_fused:,} and "
        f"{model.adapters_split:,} for {model.model}."
    )
