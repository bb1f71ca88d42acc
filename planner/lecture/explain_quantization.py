"""The quantisation sections of `fitune explain`, and the list of the lecture's figures that are off."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .arithmetic import Correction
from .explain_tables import make_note, make_table
from .nf4 import Nf4Example
from .quantization import ArrayExample, MatrixCodes, MatrixExample

LINE_WIDTH = 90
LEVELS_A_ROW = 8


def render_array(array: ArrayExample) -> RenderableType:
    """The ten values: scaled, rounded, and back."""
    table = make_table("X", *(f"{value.value:g}" for value in array.values), gap=1)
    table.add_row("c X", *(f"{value.scaled:.2f}" for value in array.values))
    table.add_row("int8", *(str(value.code) for value in array.values), style="bold")
    table.add_row(
        "the lecture", *(Text(str(one.printed), style="" if one.printed == one.code else "red") for one in array.values)
    )
    table.add_row("int8 / c", *(f"{value.dequantized:.4f}" for value in array.values))
    table.add_row("error", *(f"{value.error:+.4f}" for value in array.values))
    return Group(
        Text(f"c = 127 / absmax(X) = 127 / {array.values[-1].value:g} = {array.scale:.6f}\n"),
        table,
        make_note(
            f"\nLargest error {array.largest_error:.4f}, within half a step: 1 / (2 c) = {0.5 / array.scale:.4f}."
        ),
    )


def render_matrix(matrix: MatrixExample) -> RenderableType:
    """Both int8 matrices with the lecture's differing cells beside, then what each way of storing costs and loses."""
    grids = Table.grid(padding=(0, 5, 0, 0))
    grids.add_row(Text("one constant", style="bright_black"), Text("one constant a row", style="bright_black"))
    grids.add_row(_render_codes(matrix.whole), _render_codes(matrix.blocks))
    table = make_table("25 weights as", "bytes", "weights + constants", "mean error", "largest")
    for storage in matrix.storages:
        sizes = f"{storage.weight_bytes} + {storage.constant_bytes}"
        errors = (f"{storage.mean_error:.4f}", f"{storage.largest_error:.4f}")
        table.add_row(storage.name, str(storage.total_bytes), sizes, *errors)
    scales = ", ".join(f"{scale:.2f}" for scale in matrix.blocks.scales)
    codes = ", ".join(map(str, matrix.constant_codes))
    return Group(
        Text("round(c W), and in red the lecture's figure where it has another:\n"),
        grids,
        Text(f"\nThe rows' c1: {scales}; in int8 with c2 = {matrix.second_scale:g}: {codes}.\n"),
        table,
        Text(
            f"\n100 -> 34 bytes is the lecture's 25 + 5 + 4: {matrix.reduction_percent:.0f} % less. "
            "Rounding the constants loses more here than a constant a row had won."
        ),
    )


def _render_codes(codes: MatrixCodes) -> Table:
    table = Table.grid()
    for row, printed_row in zip(codes.codes, codes.printed, strict=True):
        table.add_row(*(_describe_code(code, printed) for code, printed in zip(row, printed_row, strict=True)))
    return table


def _describe_code(code: int, printed: int) -> Text:
    beside = "" if code == printed else str(printed)
    return Text.assemble(f"{code:>4} ", (f"{beside:<4}", "red"))


def render_nf4(nf4: Nf4Example) -> RenderableType:
    """The levels on a line and as figures, then what NF4 costs."""
    table = Table.grid(padding=(0, 3, 0, 0))
    for start in range(0, len(nf4.levels), LEVELS_A_ROW):
        table.add_row(*(f"{level:+.5f}" for level in nf4.levels[start : start + LEVELS_A_ROW]))
    return Group(
        Text("Quantiles of the normal distribution over the largest: dense around zero, where most weights are.\n"),
        _make_number_line(nf4.levels),
        Text(),
        table,
        Text(
            f"\nBytes a parameter: 0.5 + 4/64 = {nf4.plain_bytes_per_parameter:.4f} with an fp32 constant for 64,\n"
            f"0.5 + 1/64 + 4/(64 x 256) = {nf4.double_bytes_per_parameter:.4f} with double quantisation."
        ),
        make_note(
            f"bitsandbytes adds its tables to each matrix: the 25 weights above take {nf4.matrix_plain_bytes:,} bytes, "
            f"or {nf4.matrix_double_bytes:,} with double quantisation."
        ),
    )


def _make_number_line(levels: Sequence[float]) -> Text:
    """-1 to 1 with a tick at every level."""
    ticks = {round((level + 1) / 2 * (LINE_WIDTH - 1)) for level in levels}
    line = "".join("┼" if place in ticks else "─" for place in range(LINE_WIDTH))
    return Text(f"{line}\n-1{'0':^{LINE_WIDTH - 4}} 1", style="cyan")


def render_corrections(corrections: Sequence[Correction]) -> RenderableType:
    """One row a figure: where, printed, right, why."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bright_black")
    table.add_column("where")
    table.add_column("printed", justify="right", no_wrap=True)
    table.add_column("right", justify="right")
    table.add_column("why")
    for correction in corrections:
        table.add_row(correction.where, Text(correction.printed, style="red"), correction.right, correction.why)
    return table
