"""Sizes and counts: what is read, what is refused, and that writing and reading agree."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fitune.recipes.units import GiB, KiB, MiB, format_bytes, format_count, parse_bytes, parse_count

FACTORS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": KiB, "MiB": MiB, "GiB": GiB, "TiB": 2**40}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GiB),
        ("24 GiB", 24 * GiB),
        ("80GB", 80 * 10**9),
        ("512MiB", 512 * MiB),
        ("1.5TiB", 3 * 2**39),
        ("17B", 17),
        (" 2gib ", 2 * GiB),
    ],
)
def test_a_size_means_what_its_unit_says(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@settings(deadline=None)
@given(number=st.integers(0, 10**15 - 1), unit=st.sampled_from(sorted(FACTORS)), space=st.sampled_from(["", " "]))
def test_whole_sizes_are_exact(number: int, unit: str, space: str) -> None:
    assert parse_bytes(f"{number}{space}{unit}") == number * FACTORS[unit]


@settings(deadline=None)
@given(digits=st.decimals(0, 10**6, places=6), unit=st.sampled_from(sorted(FACTORS)))
def test_a_fraction_of_a_unit_is_exact_to_the_byte(digits: object, unit: str) -> None:
    assert parse_bytes(f"{digits:f}{unit}") == int(Fraction(str(digits)) * FACTORS[unit])


@pytest.mark.parametrize("text", ["24", "1.5", "0"])
def test_a_number_without_a_unit_is_refused_and_shown_with_one(text: str) -> None:
    with pytest.raises(ValueError, match=f'has no unit: write "{text}GiB" or "{text}GB"'):
        parse_bytes(text)


def test_an_unknown_unit_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r'"quarks" is not one of B, KB, .*GiB'):
        parse_bytes("3 quarks")


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e3GiB", "1,5GiB", "inf GiB", "nanGiB", "1..5GiB", "٣GiB"])
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as"):
        parse_bytes(text)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_other_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        assert parse_bytes(text) >= 0
    except ValueError as error:
        assert text in str(error)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (512 * MiB, "512.0 MiB"),
        (24_481_314_406, "22.8 GiB"),
        (GiB - 1, "1.0 GiB"),
        (-3 * GiB // 2, "-1.5 GiB"),
        (2**61, "2048.0 PiB"),
    ],
)
def test_bytes_are_written_in_the_largest_unit_that_they_fill(size: int, text: str) -> None:
    assert format_bytes(size) == text


@settings(deadline=None)
@given(st.integers(0, 2**59))
@example(1023 * KiB + 1023)
@example(2**50 - 1)
def test_a_written_size_is_read_back_within_half_a_tenth_of_its_unit(size: int) -> None:
    text = format_bytes(size)
    number, unit = text.split()
    factor = 1 if unit == "B" else 2**50 if unit == "PiB" else FACTORS[unit]
    assert abs(parse_bytes(text) - size) <= factor / 20 + 1
    assert Fraction(number) < 1024
    assert unit == "B" or Fraction(number) >= 1


@settings(deadline=None)
@given(st.integers(1, 2**59))
def test_a_negative_size_is_the_positive_one_with_a_sign(size: int) -> None:
    assert format_bytes(-size) == "-" + format_bytes(size)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("10B", 10**10),
        ("354.92M", 354_920_000),
        ("7b", 7 * 10**9),
        ("1.5T", 15 * 10**11),
        ("350 k", 350_000),
        ("8030261248", 8_030_261_248),
        ("8,030,261,248", 8_030_261_248),
        ("393_216", 393_216),
    ],
)
def test_a_count_means_what_its_unit_says(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "10GB", "ten", "-7B", "1e9", "12,34", "9" * 5000])
def test_what_is_not_a_count_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not a count such as"):
        parse_count(text)


@pytest.mark.parametrize("text", ["0", "0B", "0.0001K"])
def test_a_count_is_whole_and_at_least_one(text: str) -> None:
    with pytest.raises(ValueError, match="is not a whole number of at least 1"):
        parse_count(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (6_738_415_616, "6.7B"),
        (354_823_168, "354.8M"),
        (393_216, "393,216"),
        (999_999, "999,999"),
        (999_960_000, "1.0B"),
        (1_800_000_000_000, "1.8T"),
        (-737_280, "-737,280"),
    ],
)
def test_counts_keep_every_digit_below_a_million_and_one_decimal_above(count: int, text: str) -> None:
    assert format_count(count) == text


@settings(deadline=None)
@given(st.integers(1, 10**15 - 1))
def test_a_written_count_is_read_back_within_half_a_tenth_of_its_unit(count: int) -> None:
    read = parse_count(format_count(count))
    assert read == count if count < 10**6 else abs(read - count) * 20 <= 10 ** (3 * ((len(str(read)) - 1) // 3))
