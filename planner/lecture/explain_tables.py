"""What the sections of `fitune explain` share: plain tables and sizes in GB."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

GB = 10**9


def make_table(first: str, *figures: str, gap: int = 3) -> Table:
    """A table without lines: a first column of text, then figures, `gap` characters apart."""
    table = Table(box=None, padding=(0, gap, 0, 0), header_style="bright_black")
    table.add_column(first)
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    return table


def make_note(text: str) -> Text:
    return Text(text, style="bright_black")


def format_gb(size: int) -> str:
    """Two decimals; none from 1,000 GB up, two digits below 0.1 GB: 1,440, 120.00, 0.13, 0.012."""
    if size and abs(size) < GB // 10:
        return f"{size / GB:.2g}"
    return f"{size / GB:,.0f}" if abs(size) >= 1000 * GB else f"{size / GB:,.2f}"


def format_short_gb(size: int) -> str:
    """As the lecture writes it, at most four digits: 120, 60.31, 0.7096."""
    return f"{size / GB:,.0f}" if size >= 1000 * GB else f"{size / GB:.4g}"
