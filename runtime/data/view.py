"""A data check on the terminal: sources, lengths, what is trained, and rows as the model sees them."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..shown import show_text
from .report import DataReport, SampleSequence, SetFacts, SourceFacts

BAR_COLUMNS = 40
MARKS = "⟦", "⟧"
"""What trained tokens stand between where there is no colour."""
SHOWN_CHARACTERS = 1200
"""Of a sample; the middle of a longer one is left out."""


def render_data(report: DataReport, console: Console) -> None:
    """Print a data check."""
    console.print(_render_sources(report))
    console.print()
    sets = (("training rows", report.train), ("held-out rows", report.eval), ("another task", report.forgetting))
    for name, facts in sets:
        if facts is not None:
            console.print(_render_set(name, facts, report))
            console.print()
    if report.leak is not None and not report.leak.normalized:
        console.print(Text("no held-out row is among the training rows\n"))
    for sample in report.samples:
        console.print(_render_sample(sample, marked=console.color_system is None))
    for note in report.notes:
        console.print(Text.assemble(("note: ", "yellow"), show_text(note)), soft_wrap=True)
    for problem in report.problems:
        console.print(Text.assemble(("problem: ", "bold red"), show_text(problem)), soft_wrap=True)
    if not report.problems:
        console.print(
            Text.assemble(("ok", "green"), f" {show_text(report.recipe)}: a run takes this data"), soft_wrap=True
        )


def describe_data(report: DataReport) -> str:
    """The data of a run in one line."""
    train = report.train
    parts = [
        f"{train.rows:,} rows, {train.tokens:,} tokens, {train.trained_share:.0%} trained",
        f"{train.truncated:,} cut" if train.truncated else "none cut",
    ]
    parts += [f"{count:,} {what}" for count, what in _list_left_out(train)]
    if report.stream is not None:
        stream = report.stream
        parts = [f"{stream.rows:,} rows read of a stream, {stream.truncated:,} cut, {stream.left_out:,} left out"]
    if len(report.sources) > 1 and not report.streamed:
        drawn = sum(source.epoch_rows for source in report.sources)
        parts.append(" + ".join(f"{show_text(one.name)} {one.epoch_rows / drawn:.0%}" for one in report.sources))
    if report.leak is not None:
        parts.append(f"{report.leak.normalized:,} leaked" if report.leak.normalized else "none leaked")
    return ", ".join(parts)


def _list_left_out(facts: SetFacts) -> Iterable[tuple[int, str]]:
    counted = (
        (facts.split, "split"),
        (facts.too_long + facts.empty, "left out"),
        (facts.duplicates, "repeated"),
    )
    return ((count, what) for count, what in counted if count)


def _render_sources(report: DataReport) -> RenderableType:
    table = Table(title=f"Data of {show_text(report.recipe)}", title_justify="left", box=None, padding=(0, 2))
    table.add_column("", overflow="fold")
    table.add_column("format", no_wrap=True)
    for name in ("rows", "sequences", "tokens", "trained", "an epoch"):
        table.add_column(name, justify="right", no_wrap=True)
    drawn = sum(source.epoch_rows for source in report.sources)
    for source in report.sources:
        share = f"({source.epoch_rows / drawn:.0%})"
        _add_source(table, source, "streamed" if report.streamed else f"{source.epoch_rows:,} {share}")
    for source in report.held_out:
        _add_source(table, source, "held out")
    for source in report.forgetting_sources:
        _add_source(table, source, "another task")
    return table


def _add_source(table: Table, source: SourceFacts, drawn: str) -> None:
    trained = f"{source.trained_tokens / max(1, source.tokens):.0%}"
    figures = [f"{one:,}" for one in (source.rows, source.sequences, source.tokens)]
    table.add_row(Text(show_text(source.name)), source.format, *figures, trained, drawn)


def _render_set(name: str, facts: SetFacts, report: DataReport) -> Group:
    packed = ""
    if report.packed is not None and facts is report.train:
        packed = f", packed into {report.packed:,} rows of at most {report.max_length:,} tokens"
    left_out = "".join(f", {count:,} {what}" for count, what in _list_left_out(facts))
    head = Text.assemble(
        (name, "bold"),
        f"  {facts.sequences:,} sequence{'' if facts.sequences == 1 else 's'}, {facts.tokens:,} tokens, "
        f"{facts.trained_share:.0%} trained, {facts.truncated:,} cut{left_out}{packed}",
    )
    most = max(one.sequences for one in facts.lengths)
    lines = [Text(f"  tokens (longest {facts.longest_tokens:,}, mean {facts.mean_tokens:,.0f})", style="bright_black")]
    for one in facts.lengths:
        over = one.most_tokens // 2 >= report.max_length
        columns = -(-one.sequences * BAR_COLUMNS // most)
        lines.append(
            Text.assemble(
                f"  {one.most_tokens // 2 + 1:>9,} to {one.most_tokens:<9,} ",
                ("█" * columns, "red" if over else "green"),
                f"{' ' if columns else ''}{one.sequences:,}",
            )
        )
    return Group(head, *lines)


def _render_sample(sample: SampleSequence, *, marked: bool) -> Panel:
    """A row with its trained tokens in green; without colour they stand between marks."""
    before, after = MARKS if marked else ("", "")
    text = Text()
    for piece in sample.pieces:
        said = show_text(piece.text)
        text.append(f"{before}{said}{after}" if piece.trained else said, "green" if piece.trained else "bright_black")
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = Text.assemble(text[:half], (f" [... {len(text) - 2 * half:,} characters ...] ", "yellow"), text[-half:])
    title = Text.assemble(
        show_text(sample.where), "  ", (f"{before}trained{after}", "green"), " ", ("given", "bright_black")
    )
    return Panel(text, title=title, title_align="left")
