"""The lecture's quantisation examples, worked exactly: absmax int8, blocks, double quantisation.

Values are fractions, so that no figure depends on floating point; rounding is to the nearest, halves to even, as
`torch.round` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from statistics import mean

from pydantic import Field

from ..strategy import DTYPE_BYTES, Value
from .nf4 import make_nf4_levels

INT8_MAX = 127
FP32_BYTES = DTYPE_BYTES["fp32"]
ARRAY = "1.5 2.3 3.7 4.1 5.6 6.8 7.9 8.4 9.2 10.2"
ARRAY_PRINTED = (18, 29, 46, 51, 69, 85, 98, 105, 115, 127)
SCALE_PRINTED = "12.4509"
MATRIX = (
    "-0.7 -0.3  0.0 -0.4  0.3",
    "-1.0  0.2  0.7  1.7 -0.9",
    "-0.1 -1.5 -0.1  0.8  0.5",
    " 1.2 -1.7 -0.9 -0.3  0.7",
    " 0.4  0.1 -1.4  2.2 -1.1",
)
WHOLE_PRINTED = (
    (-4, -2, 0, -22, 16),
    (-60, 10, 40, 99, -57),
    (-5, -88, -9, 48, 27),
    (72, -100, -50, -18, 40),
    (22, 8, -81, 127, -66),
)
BLOCKS_PRINTED = (
    (-127, -54, 0, -73, 54),
    (-77, 13, 51, 127, -74),
    (-9, -127, -12, 70, 40),
    (93, -127, -64, -24, 52),
    (22, 8, -81, 127, -66),
)
REDUCTION_PRINTED = 70
HALF_DIGIT = Fraction(1, 20)
"""The matrix is printed to one decimal: its weights may be this far from what was quantised."""

Row = tuple[Fraction, ...]


class Int8Value(Value):
    """One value of the array example.

    scaled:      127 / absmax * value, before rounding
    code:        the int8 value
    printed:     the lecture's
    dequantized: code * absmax / 127
    error:       dequantized - value
    """

    value: float
    scaled: float
    code: int
    printed: int
    dequantized: float
    error: float


class ArrayExample(Value):
    """The 10-value array in int8.

    scale:         127 / absmax
    printed_scale: the lecture's
    scale_right:   scale with as many decimals
    largest_error: of the dequantised values; at most half a step, absmax / 254
    """

    scale: float
    printed_scale: str
    scale_right: str
    values: tuple[Int8Value, ...]
    largest_error: float = Field(ge=0)


class MatrixCodes(Value):
    """The 5x5 matrix in int8, computed and as the lecture prints it.

    scales:      127 / absmax, one a block: one of the whole matrix, or one a row
    codes:       the int8 values
    printed:     the lecture's
    off:         cells whose printed value is another
    unexplained: those of them that weights rounded to the one decimal shown cannot explain either
    """

    scales: tuple[float, ...]
    codes: tuple[tuple[int, ...], ...]
    printed: tuple[tuple[int, ...], ...]
    off: int = Field(ge=0)
    unexplained: int = Field(ge=0)


class Storage(Value):
    """One way to store the 25 weights, with what it costs and loses.

    weight_bytes:   of the weights themselves, whole bytes
    constant_bytes: of the constants beside them
    mean_error:     mean of |dequantised - weight|
    largest_error:  the largest of them
    """

    name: str
    weight_bytes: int = Field(ge=1)
    constant_bytes: int = Field(ge=0)
    total_bytes: int = Field(ge=1)
    mean_error: float = Field(ge=0)
    largest_error: float = Field(ge=0)


class MatrixExample(Value):
    """The 5x5 matrix: int8 with one constant, with one a row, and those quantised in their turn.

    weights:           as the lecture prints them
    constant_codes:    the row scales c1 in int8
    second_scale:      c2 = 127 / max(c1)
    storages:          fp32 first, then what each step makes of it
    reduction_percent: of double quantisation, 100 - 34
    printed_reduction: the lecture's
    """

    weights: tuple[tuple[float, ...], ...]
    whole: MatrixCodes
    blocks: MatrixCodes
    constant_codes: tuple[int, ...]
    second_scale: float
    storages: tuple[Storage, ...]
    reduction_percent: float
    printed_reduction: int


def make_scale(values: Sequence[Fraction]) -> Fraction:
    """c = 127 / absmax(X)."""
    largest = max(abs(value) for value in values)
    assert largest > 0, "a block of zeros has no scale"
    return INT8_MAX / largest


def make_codes(values: Sequence[Fraction], scale: Fraction) -> tuple[int, ...]:
    """X_int8 = round(c * X)."""
    return tuple(round(scale * value) for value in values)


def parse_values(text: str) -> Row:
    return tuple(Fraction(value) for value in text.split())


def make_array_example() -> ArrayExample:
    values = parse_values(ARRAY)
    scale = make_scale(values)
    codes = make_codes(values, scale)
    errors = [code / scale - value for code, value in zip(codes, values, strict=True)]
    decimals = len(SCALE_PRINTED.partition(".")[2])
    return ArrayExample(
        scale=float(scale),
        printed_scale=SCALE_PRINTED,
        scale_right=f"{float(scale):.{decimals}f}",
        values=tuple(
            Int8Value(
                value=float(value),
                scaled=float(scale * value),
                code=code,
                printed=printed,
                dequantized=float(code / scale),
                error=float(error),
            )
            for value, code, printed, error in zip(values, codes, ARRAY_PRINTED, errors, strict=True)
        ),
        largest_error=float(max(abs(error) for error in errors)),
    )


def make_matrix_example() -> MatrixExample:
    rows = tuple(parse_values(text) for text in MATRIX)
    whole_scale = make_scale([weight for row in rows for weight in row])
    row_scales = tuple(make_scale(row) for row in rows)
    second_scale = make_scale(row_scales)
    constant_codes = make_codes(row_scales, second_scale)
    restored = tuple(code / second_scale for code in constant_codes)
    count, blocks = sum(len(row) for row in rows), len(rows)
    whole, by_row = _restore(rows, [whole_scale]), _restore(rows, row_scales)
    double = _restore(rows, row_scales, restored)
    storages = (
        _make_storage("fp32", rows, rows, FP32_BYTES * count, 0),
        _make_storage("int8, one fp32 constant", rows, whole, count, FP32_BYTES),
        _make_storage("int8 by rows, 5 fp32 constants", rows, by_row, count, FP32_BYTES * blocks),
        _make_storage("int8 by rows, constants in int8", rows, double, count, blocks + FP32_BYTES),
        _make_storage("NF4, one block, one fp32 constant", rows, _restore_nf4(rows), (count + 1) // 2, FP32_BYTES),
    )
    return MatrixExample(
        weights=tuple(tuple(float(weight) for weight in row) for row in rows),
        whole=_compare(rows, [whole_scale], WHOLE_PRINTED),
        blocks=_compare(rows, row_scales, BLOCKS_PRINTED),
        constant_codes=constant_codes,
        second_scale=float(second_scale),
        storages=storages,
        reduction_percent=100 - 100 * storages[3].total_bytes / storages[0].total_bytes,
        printed_reduction=REDUCTION_PRINTED,
    )


def _restore(
    rows: Sequence[Row], scales: Sequence[Fraction], restored_scales: Sequence[Fraction] | None = None
) -> tuple[Row, ...]:
    """Quantise each row by its scale and dequantise it, by another where the scales were quantised too."""
    scales = _spread(scales, len(rows))
    back = scales if restored_scales is None else restored_scales
    return tuple(
        tuple(code / restored for code in make_codes(row, scale))
        for row, scale, restored in zip(rows, scales, back, strict=True)
    )


def _spread(scales: Sequence[Fraction], rows: int) -> Sequence[Fraction]:
    """One scale a row, also where the whole matrix has one."""
    return [scales[0]] * rows if len(scales) == 1 else scales


def _restore_nf4(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Each weight as its nearest level times the absmax of the whole matrix, which is less than one block of 64."""
    levels = [Fraction(level) for level in make_nf4_levels()]
    absmax = max(abs(weight) for row in rows for weight in row)
    return tuple(tuple(absmax * min(levels, key=lambda level: abs(level - w / absmax)) for w in row) for row in rows)


def _make_storage(
    name: str, rows: Sequence[Row], restored: Sequence[Row], weight_bytes: int, constant_bytes: int
) -> Storage:
    pairs = zip((w for row in rows for w in row), (w for row in restored for w in row), strict=True)
    errors = [abs(after - before) for before, after in pairs]
    return Storage(
        name=name,
        weight_bytes=weight_bytes,
        constant_bytes=constant_bytes,
        total_bytes=weight_bytes + constant_bytes,
        mean_error=float(mean(errors)),
        largest_error=float(max(errors)),
    )


def _compare(rows: Sequence[Row], scales: Sequence[Fraction], printed: tuple[tuple[int, ...], ...]) -> MatrixCodes:
    row_scales = _spread(scales, len(rows))
    codes = tuple(make_codes(row, scale) for row, scale in zip(rows, row_scales, strict=True))
    cells = [
        (weight, scale, code, shown)
        for row, scale, row_codes, row_shown in zip(rows, row_scales, codes, printed, strict=True)
        for weight, code, shown in zip(row, row_codes, row_shown, strict=True)
    ]
    off = [(weight, scale, shown) for weight, scale, code, shown in cells if shown != code]
    return MatrixCodes(
        scales=tuple(float(scale) for scale in scales),
        codes=codes,
        printed=printed,
        off=len(off),
        unexplained=sum(not _can_be_rounding(*cell) for cell in off),
    )


def _can_be_rounding(weight: Fraction, scale: Fraction, shown: int) -> bool:
    """Whether a weight and an absmax within half a printed digit of these would be quantised to `shown`."""
    absmax = INT8_MAX / scale
    ratios = [
        INT8_MAX * (weight + sign * HALF_DIGIT) / (absmax + other * HALF_DIGIT) for sign in (-1, 1) for other in (-1, 1)
    ]
    return min(ratios) - Fraction(1, 2) <= shown <= max(ratios) + Fraction(1, 2)
