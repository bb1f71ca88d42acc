"""The views over many plans as tables that a person reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ...recipes.units import format_bytes, format_count, format_seconds
from ..memory import Estimator
from ..strategy import Strategy
from ..sweep import Axis, Cell, FailedCell
from ..views import Card, LargestModel, LongestRows, Outcome, UnableCard, WhatFits
from .plan import METHOD_WORDS
from .reasons import describe_optimizer

ESTIMATOR_WORDS: dict[Estimator, str] = {"closed_forms": "closed forms", "rehearsal": "a rehearsal of the step"}
WIDE_COLUMNS = 100
"""A terminal from here on has room for a further column."""
LIMIT_WORDS = {"host": "RAM", "disk": "disk", "time": "time"}


def render_cards(
    cards: Sequence[Card | UnableCard], console: Console, *, sequence_length: int, limit: str | None = None
) -> None:
    """Which cards can run the recipe, how and with what headroom; by how much the others miss.

    limit: the recipe's `budget.memory`
    """
    able = [card for card in cards if isinstance(card, Card)]
    console.print(_render_cards(able, is_wide=console.width >= WIDE_COLUMNS))
    unable = [card for card in cards if isinstance(card, UnableCard)]
    if unable:
        names = ", ".join(card.gpu for card in unable)
        console.print(Text.assemble(("cannot follow the recipe: ", "red"), f"{names}: {unable[0].error}"))
    console.print(Text(f"{sum(card.fits for card in able)} of {len(cards)} cards can run it"))
    if limit is not None:
        console.print(Text(f"of each card at most budget.memory = {limit} is used"))
    _print_estimators(able, console, f"{sequence_length:,}")


def _render_cards(cards: Sequence[Card], *, is_wide: bool) -> Table:
    """A line a card; where nothing fits, the candidate that comes closest."""
    table = _make_table("card", *(["to use"] if is_wide else []), "needs", "to spare", "tokens/s", "how")
    for card in cards:
        table.add_row(
            card.gpu,
            *([_gib(card.budget_bytes)] if is_wide else []),
            _describe_need(card),
            _render_headroom(card),
            "" if card.tokens_per_second is None else f"{card.tokens_per_second:,.0f}",
            describe_briefly(card.strategy),
        )
    return table


def render_grid(axes: Sequence[Axis], cells: Sequence[Cell | FailedCell], console: Console) -> None:
    """One table with the first axis down and the second across, for each combination of the further axes."""
    by_values = {tuple(cell.settings.values()): cell for cell in cells}
    down, across, further = axes[0], axes[1] if len(axes) > 1 else None, axes[2:]
    for fixed in product(*(axis.values for axis in further)):
        title = ", ".join(f"{axis.key} = {value}" for axis, value in zip(further, fixed, strict=True))
        heads = [f"{across.key} = {value}" for value in across.values] if across else ["plan"]
        table = _make_table(down.key, title=title, columns=heads)
        for value in down.values:
            seconds = [(second,) for second in across.values] if across else [()]
            table.add_row(Text(value), *(_render_cell(by_values[value, *second, *fixed]) for second in seconds))
        console.print(table)
    failed = dict.fromkeys(cell.error for cell in cells if isinstance(cell, FailedCell))
    for error in failed:
        console.print(Text.assemble(("error: ", "bold red"), error))
    _print_estimators([cell for cell in cells if isinstance(cell, Cell)], console)


def render_what_fits(found: WhatFits, console: Console, *, sequence_length: int) -> None:
    """The longest rows and the largest model for the device."""
    device = found.device
    console.print(Text.assemble((device.name, "bold"), f": {format_bytes(device.budget_bytes)} to use"))
    table = _make_table("", "", "how", "needs", "to spare")
    table.add_row("longest rows", *_describe_longest(found.longest))
    table.add_row(f"largest model for rows of {sequence_length:,} tokens", *_describe_largest(found.largest))
    console.print(table)
    outcomes = [one for one in (found.longest, found.largest) if one is not None]
    if outcomes:
        _print_estimators(outcomes, console)


def describe_briefly(strategy: Strategy) -> str:
    """Such as `LoRA, 32 layers checkpointed, 4 x 4 rows, AdamW`."""
    parts = [_describe_method(strategy)]
    parts += [f"{strategy.checkpointed_layers} layers checkpointed"] if strategy.checkpointed_layers else []
    parts += [f"{strategy.loss_head} head"] if strategy.loss_head != "full" else []
    parts.append(f"{strategy.micro_batch_size} x {strategy.gradient_accumulation_steps} rows")
    parts.append(describe_optimizer(strategy))
    return ", ".join(parts)


def _describe_method(strategy: Strategy) -> str:
    """`QLoRA`, or `full fp32`: full fine-tuning differs in its weights' dtype."""
    return METHOD_WORDS[strategy.method] + (f" {strategy.weights_dtype}" if strategy.method == "full" else "")


def _describe_longest(longest: LongestRows | None) -> Iterator[RenderableType]:
    if longest is None:
        yield Text("not even 64 tokens fit", style="red")
        return
    limit = ", as long as the model was made for" if longest.is_model_limit else ""
    least = "" if longest.is_longest else "at least "
    yield Text(f"{least}{longest.sequence_length:,} tokens{limit}")
    yield from _describe_outcome(longest)


def _describe_largest(largest: LargestModel | None) -> Iterator[RenderableType]:
    if largest is None:
        yield Text("no model of the catalog fits", style="red")
        return
    yield Text(f"{largest.model}, {format_count(largest.parameters)} parameters")
    yield from _describe_outcome(largest)


def _describe_outcome(outcome: Outcome) -> tuple[RenderableType, ...]:
    return (
        describe_briefly(outcome.strategy) + _describe_pace(outcome),
        _describe_need(outcome),
        _render_headroom(outcome),
    )


def _render_cell(cell: Cell | FailedCell) -> Text:
    if isinstance(cell, FailedCell):
        return Text("error", style="red")
    verdict = ("fits", "green") if cell.fits else ("too much", "red")
    limit = "" if cell.limit == "device" else f", {LIMIT_WORDS.get(cell.limit, cell.limit)} missing"
    needs = f" {_describe_need(cell)} of {_gib(cell.budget_bytes)} GiB{limit}\n"
    return Text.assemble(verdict, needs, (describe_briefly(cell.strategy) + _describe_pace(cell), "bright_black"))


def _describe_pace(outcome: Outcome) -> str:
    """Such as `, 7,415 tokens/s, 2:15 h`, as far as it is known."""
    pace = "" if outcome.tokens_per_second is None else f", {outcome.tokens_per_second:,.0f} tokens/s"
    return pace + ("" if outcome.total_seconds is None else f", {format_seconds(outcome.total_seconds)}")


def _render_headroom(outcome: Outcome) -> Text:
    """What is left, rounded down; where something else than the device's memory is missing, its name too."""
    limit = "" if outcome.limit == "device" else f" {LIMIT_WORDS.get(outcome.limit, outcome.limit)}"
    hundredths = outcome.headroom_bytes * 100 // 2**30
    return Text(f"{hundredths / 100:.2f}{limit}", style="green" if outcome.fits else "red")


def _make_table(*heads: str, title: str | None = None, columns: Sequence[str] = ()) -> Table:
    """GiB to the right; names and words fold."""
    table = Table(title=title or None, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for head in (*heads, *columns):
        is_size = head in ("to use", "needs", "to spare", "tokens/s")
        table.add_column(Text(head), justify="right" if is_size else "left", no_wrap=is_size, overflow="fold")
    return table


def _print_estimators(outcomes: Sequence[Outcome], console: Console, length: str | None = None) -> None:
    """What the figures come from, and for rows of which length."""
    names = list(dict.fromkeys(ESTIMATOR_WORDS[one.estimator] for one in outcomes))
    source = f"~ by {ESTIMATOR_WORDS['closed_forms']}, the others by {ESTIMATOR_WORDS['rehearsal']}"
    if names:
        source = source if len(names) > 1 else f"estimated by {names[0]}"
        rows = "" if length is None else f", for rows of {length} tokens"
        console.print(Text(f"GiB, margin included{rows}; {source}"))


def _describe_need(outcome: Outcome) -> str:
    """GiB; `~` marks the less exact of the two estimators."""
    return ("~" if outcome.estimator == "closed_forms" else "") + _gib(outcome.required_bytes)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
