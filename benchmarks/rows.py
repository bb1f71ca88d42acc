"""Rows of text with a known number of tokens, for speed: what they say does not matter."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORD = " the"
"""One token of the embedded tokenizer."""
MEDIAN_TOKENS, SPREAD = 80, 0.75
"""Lengths of short, mixed rows are drawn from a log-normal: half of them below 80 tokens, one in a hundred above 460,
much as in instruction sets such as Alpaca's (whose own lengths were not at hand)."""


def write_long_rows(path: Path, count: int, *, tokens: int) -> None:
    """`count` rows that fill `tokens` tokens, end-of-text included."""
    _write_rows(path, [tokens] * count)


def write_mixed_rows(path: Path, count: int, *, max_tokens: int) -> None:
    """`count` rows of mixed lengths, at most `max_tokens`; the same ones each time."""
    draw = random.Random(0)
    _write_rows(
        path, [min(max_tokens, max(8, round(MEDIAN_TOKENS * draw.lognormvariate(0, SPREAD)))) for _ in range(count)]
    )


def _write_rows(path: Path, lengths: list[int]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for tokens in lengths:
            file.write(json.dumps({"text": "The" + WORD * (tokens - 2)}) + "\n")
