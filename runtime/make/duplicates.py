"""Equal and similar texts: normalised, as sets of character shingles, by their Jaccard similarity, exactly."""

from __future__ import annotations

import math
import unicodedata
import zlib
from collections import Counter, defaultdict
from functools import cache

SHINGLE_CHARACTERS = 5


def normalise_text(text: str) -> str:
    """The text for comparison: NFKC, without case, without punctuation, one space between words."""
    return " ".join("".join(map(_keep_or_space, unicodedata.normalize("NFKC", text).casefold())).split())


@cache
def _keep_or_space(character: str) -> str:
    return character if unicodedata.category(character)[0] in "LMNS" else " "


def make_shingles(text: str) -> frozenset[str]:
    """All runs of 5 characters of a normalised text; of a shorter one the text itself."""
    starts = range(max(1, len(text) - SHINGLE_CHARACTERS + 1))
    return frozenset([text[start : start + SHINGLE_CHARACTERS] for start in starts])


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """|one and other| / |one or other|."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


class SimilarTexts:
    """Texts that were added, to be asked for one that is as similar as `threshold` to a new one.

    Exact, not approximate. Of similarity t or more, sets x and y share at least ceil(t max(|x|, |y|)) shingles. Under
    one order of all shingles, the first `REQUIRED` of those lie among the first |s| - ceil(t |s|) + REQUIRED of each
    set s, so only these are indexed (prefix filtering: Wang, Li, Feng, Can we beat the prefix filtering?, SIGMOD 2012).
    The order is by checksum, which spreads common shingles evenly.
    """

    REQUIRED = 16

    def __init__(self, threshold: float) -> None:
        assert 0 < threshold <= 1
        self._threshold = threshold
        self._texts: list[str] = []
        self._sizes: list[int] = []
        self._index: defaultdict[str, list[int]] = defaultdict(list)

    def find(self, text: str) -> int | None:
        """The number, from 0, of the first text added that is equal or this similar; None where there is none."""
        shingles = make_shingles(normalise_text(text))
        shared = Counter[int]()
        for shingle in self._prefix(shingles):
            shared.update(self._index.get(shingle, ()))
        least = self._least_overlap(len(shingles))
        candidates = [number for number, count in shared.items() if count >= min(self.REQUIRED, least)]
        for number in sorted(candidates):
            fits = least <= self._sizes[number] and self._least_overlap(self._sizes[number]) <= len(shingles)
            if fits and jaccard(shingles, make_shingles(self._texts[number])) >= self._threshold:
                return number
        return None

    def add(self, text: str) -> None:
        """Remember a text."""
        normal = normalise_text(text)
        shingles = make_shingles(normal)
        for shingle in self._prefix(shingles):
            self._index[shingle].append(len(self._texts))
        self._texts.append(normal)
        self._sizes.append(len(shingles))

    def _least_overlap(self, size: int) -> int:
        # Rounded down a little: a product such as 0.8 x 5 must not become 4.0000000001 and miss a text.
        return math.ceil(self._threshold * size - 1e-9)

    def _prefix(self, shingles: frozenset[str]) -> list[str]:
        ordered = sorted((zlib.crc32(shingle.encode("utf-8", "surrogatepass")), shingle) for shingle in shingles)
        most = len(shingles) - self._least_overlap(len(shingles)) + self.REQUIRED
        return [shingle for _, shingle in ordered[:most]]
