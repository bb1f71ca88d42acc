"""Rows that are read and tokenised while the model trains: for datasets larger than memory or disk.

A source is read in blocks of BLOCK_ROWS rows. The order within a block depends on the seed, the pass over the source
and the block alone, so every position of the stream can be found again: blocks before it are read and not tokenised.
Rows without a trained token give their place to another row of their block, so that a position is a row. Of several
sources the one that is furthest behind its share comes next.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import TYPE_CHECKING

from ...recipes.data_table import DataSource, DataTable
from ...recipes.errors import DataError
from .readers import Record
from .records import Dataset, load_records
from .rows import BadRow, Row, RowParser
from .sources import Resolve, list_sources, open_source, with_system
from .tokens import Counts, RowTokenizer, TokenizedRow, TokenSettings, find_pad_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_ROWS = 1024
"""Rows that are shuffled among each other."""


@dataclass(frozen=True, kw_only=True)
class StreamedRows:
    """The training rows of a recipe with data.streaming.

    table:        the recipe's [data]
    resolve:      finds its paths
    tokenizer:    with a chat template
    settings:     what decides over a row's tokens
    counts:       what became of the rows that were read so far, their lengths excepted
    """

    table: DataTable
    resolve: Resolve
    tokenizer: PreTrainedTokenizerBase
    settings: TokenSettings
    counts: Counts = field(default_factory=Counts)

    @property
    def pad_token_id(self) -> int:
        """The id that fills up a batch."""
        return find_pad_token_id(self.tokenizer)

    @property
    def max_length(self) -> int:
        """Longest sequence, tokens."""
        return self.settings.max_length

    def iterate(self, *, start: int, seed: int) -> Iterator[tuple[int, TokenizedRow]]:
        """(pass over its source, from 0, sequence) without end, beginning with position `start`."""
        sources = list_sources(self.table.train, self.table)
        drawn = [0] * len(sources)
        weights = [source.weight or 1.0 for source in sources]
        for _ in range(start):
            drawn[_choose(weights, drawn)] += 1
        streams = [
            self._iterate_source(number, one, skip=drawn[number], seed=seed) for number, one in enumerate(sources)
        ]
        while True:
            number = _choose(weights, drawn)
            drawn[number] += 1
            yield next(streams[number])

    def _iterate_source(
        self, number: int, source: DataSource, *, skip: int, seed: int
    ) -> Iterator[tuple[int, TokenizedRow]]:
        """The positions of one source after the first `skip`, pass after pass."""
        parser, dataset = open_source(source, self.table, self.resolve)
        passes = count()
        for again in passes:
            rows = 0
            for block, records in enumerate(_iterate_blocks(dataset)):
                if not rows and parser.row_format == "auto":
                    _parse(parser, records[0])
                rows += len(records)
                if skip >= len(records):
                    skip -= len(records)
                    continue
                order = random.Random(f"stream {number} pass {again} block {block} seed {seed}")
                for sequence in self._tokenize(parser, records, order)[skip:]:
                    yield again, sequence
                skip = 0
            if not rows:
                raise DataError(f"{source.path}: no rows")
            for _ in range(skip // rows):
                next(passes)
            skip %= rows

    def _tokenize(self, parser: RowParser, records: Sequence[Record], order: random.Random) -> list[TokenizedRow]:
        """As many sequences as records, in the block's order."""
        making, kept = RowTokenizer(self.tokenizer, self.settings), list[TokenizedRow]()
        for record in records:
            row = _parse(parser, record)
            made = making.tokenize(row if self.table.system is None else with_system(row, self.table.system))
            if len(made) > 1:
                raise DataError(
                    f"{row.where}: data.streaming takes one sequence of a row, and the chat template makes {len(made)} "
                    "of this conversation, since it renders answers differently once they are history: set "
                    'data.train_on = "last"'
                )
            kept += made
        self.counts.add(making.counts)
        if not kept:
            raise DataError(
                f"{records[0].where}: none of {len(records):,} rows from here on has a token to train on within "
                f"data.max_length = {self.max_length}"
            )
        order.shuffle(kept)
        return [kept[index % len(kept)] for index in range(len(records))]


def _iterate_blocks(dataset: Dataset) -> Iterator[list[Record]]:
    records = load_records(dataset, streaming=True)
    while block := list(islice(records, BLOCK_ROWS)):
        yield block


def _parse(parser: RowParser, record: Record) -> Row:
    try:
        return parser.parse_one(record)
    except BadRow as problem:
        raise DataError(f"{record.where}: {problem}") from problem


def _choose(weights: Sequence[float], drawn: Sequence[int]) -> int:
    """The source that is furthest behind its share, the first of them where several are."""
    share = (sum(drawn) + 1) / sum(weights)
    behind = [weight * share - had for weight, had in zip(weights, drawn, strict=True)]
    return behind.index(max(behind))
