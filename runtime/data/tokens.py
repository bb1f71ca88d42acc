"""Rows to token ids and labels. Labels are the ids where a token is trained and -100 elsewhere.

encoding.py says which tokens those are; here rows are made to fit `data.max_length`, and everything is counted.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from ...recipes.errors import DataError
from .encoding import UNTRAINED, Encoded, Encoder, Span
from .mixture import Part, count_draws, draw_epoch
from .rows import Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["truncate", "split", "drop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedRow:
    """One sequence to train on.

    input_ids: token ids, 1 or more
    labels:    as many: the id of a trained token, -100 for one that is not
    documents: lengths of the rows packed into this one, in tokens; empty where it is one row
    """

    input_ids: array[int]
    labels: array[int]
    documents: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """Tokens with a label, but for the first of the row: nothing predicts it."""
        predicted = self.labels[1:]
        return len(predicted) - predicted.count(UNTRAINED)


@dataclass(kw_only=True)
class Counts:
    """What became of a dataset's rows.

    rows:       rows of the dataset
    truncated:  sequences that were cut at the right to max_length
    split:      rows that became several sequences because they were too long
    too_long:   sequences that were left out because they were too long
    empty:      sequences that were left out because no trained token was left
    escaped:    rows in which a message says a control token's text, which is encoded as text
    unended:    conversations whose last trained token is none that can end a turn
    lengths:    tokens of each sequence as it was written
    """

    rows: int = 0
    truncated: int = 0
    split: int = 0
    too_long: int = 0
    empty: int = 0
    escaped: int = 0
    unended: int = 0
    lengths: array[int] = field(default_factory=lambda: array("i"))

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})

    def add(self, other: Counts) -> None:
        """Count the other's rows too, without their lengths."""
        for name in vars(self).keys() - {"lengths"}:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, kw_only=True)
class TokenizedRows:
    """A tokenised dataset and the facts about it.

    rows:          the sequences, source by source in the order of the dataset; 1 or more
    pad_token_id:  the id that fills up a batch; masked by length, so any id serves
    max_length:    longest allowed sequence, tokens
    parts:         how many sequences come from which source, and how often they are drawn; empty: each once an epoch
    counts:        what became of the rows
    """

    rows: tuple[TokenizedRow, ...]
    pad_token_id: int
    max_length: int
    parts: tuple[Part, ...] = ()
    counts: Counts = field(default_factory=Counts)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def epoch_rows(self) -> int:
        """Sequences that an epoch draws."""
        return sum(count_draws(self.parts)) if self.parts else len(self.rows)

    def draw_epoch(self, *, epoch: int, seed: int) -> list[int]:
        """Indices of the sequences of an epoch, in no order to train in."""
        return draw_epoch(self.parts, epoch=epoch, seed=seed) if self.parts else list(range(len(self.rows)))

    @cached_property
    def longest_row_tokens(self) -> int:
        """Tokens of the longest row, at most max_length."""
        return max(len(row) for row in self.rows)

    @cached_property
    def total_tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(len(row) for row in self.rows)

    @cached_property
    def trained_tokens(self) -> int:
        """Trained tokens of all rows; 1 or more."""
        return sum(row.trained_tokens for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """What of a recipe decides over a row's tokens.

    max_length: longest sequence, tokens
    overlong:   what becomes of a longer one: cut at the right, split, or left out
    train_on:   the assistant's answers, the last one, or everything
    """

    max_length: int
    overlong: Overlong = "truncate"
    train_on: Literal["assistant", "last", "all"] = "assistant"


class RowTokenizer:
    """Makes sequences out of rows, one after the other, and counts what becomes of them.

    counts: so far
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings) -> None:
        self.encoder = Encoder(tokenizer, train_on=settings.train_on)
        self.settings = settings
        self.counts = Counts()
        self._ends = self.encoder.markup_ids

    def tokenize(self, row: Row) -> list[TokenizedRow]:
        """The sequences of a row that have a trained token; DataError where its answers cannot be told apart."""
        before = self.encoder.escaped
        encoded = list(self.encoder.encode(row))
        self.counts.escaped += self.encoder.escaped > before
        self.counts.rows += 1
        self.counts.lengths.extend(len(ids) for ids, _ in encoded)
        if row.messages is not None:
            self.counts.unended += any(spans and ids[spans[-1][1] - 1] not in self._ends for ids, spans in encoded)
        if self.settings.overlong == "split" and any(len(ids) > self.settings.max_length for ids, _ in encoded):
            self.counts.split += 1
            encoded = list(self._split(row, encoded))
        made = [one for ids, spans in encoded if (one := self._fit(ids, spans)) is not None]
        kept = [one for one in made if one.trained_tokens]
        self.counts.empty += len(made) - len(kept)
        return kept

    def _fit(self, ids: list[int], spans: Sequence[Span]) -> TokenizedRow | None:
        """The sequence in at most max_length tokens; None where it is left out."""
        longest = self.settings.max_length
        if len(ids) > longest and self.settings.overlong == "drop":
            self.counts.too_long += 1
            return None
        self.counts.truncated += len(ids) > longest
        return _make_row(ids[:longest], spans)

    def _split(self, row: Row, encoded: Sequence[Encoded]) -> Iterator[Encoded]:
        """A conversation in parts of whole exchanges, each after the system prompt; raw text in windows."""
        if row.messages is not None:
            for part in self._split_conversation(row.messages):
                yield from self.encoder.encode(replace(row, messages=part))
            return
        size = self.settings.max_length
        for ids, spans in encoded:
            for start in range(0, len(ids), size):
                clipped = [(max(first - start, 0), min(last - start, size)) for first, last in spans]
                yield ids[start : start + size], [span for span in clipped if span[0] < span[1]]

    def _split_conversation(self, messages: tuple[Message, ...]) -> Iterator[tuple[Message, ...]]:
        """As many exchanges a part as fit; an exchange that does not fit alone is a part, and is cut later."""
        system = messages[:1] if messages[0].role == "system" else ()
        part = system
        for exchange in _list_exchanges(messages[len(system) :]):
            longer = (*part, *exchange)
            if len(part) > len(system) and self._measure(longer) > self.settings.max_length:
                yield part
                longer = (*system, *exchange)
            part = longer
        yield part

    def _measure(self, messages: tuple[Message, ...]) -> int:
        row = Row(where="a part of a conversation", messages=messages)
        return max(len(ids) for ids, _ in self.encoder.encode(row))


def tokenize_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: TokenSettings) -> TokenizedRows:
    """Rows as sequences of at most max_length tokens; those without a trained token are left out.

    Raises DataError for a row whose answers cannot be told apart exactly, and where every row was left out.
    Conversations need a chat template: see templates.ensure_chat_template.
    """
    making = RowTokenizer(tokenizer, settings)
    kept = tuple(one for row in rows for one in making.tokenize(row))
    check_not_empty(len(kept), making.counts, settings)
    return TokenizedRows(
        rows=kept, pad_token_id=find_pad_token_id(tokenizer), max_length=settings.max_length, counts=making.counts
    )


def check_not_empty(kept: int, counts: Counts, settings: TokenSettings) -> None:
    """DataError where nothing is left to train on."""
    if not kept:
        reason = f"none has a token to train on within data.max_length = {settings.max_length}"
        if counts.too_long:
            reason = f"data.overlong is drop, and {counts.too_long} are longer than data.max_length"
            reason += f" = {settings.max_length}"
        raise DataError(f"all {counts.rows} rows were dropped: {reason}")


def find_pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up a batch: the pad token's, else the end-of-sequence token's, else 0."""
    return next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)


def find_stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens at which an answer ends: the end-of-sequence token, and the one that ends a turn in the template."""
    stops = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        messages = (Message(role="user", content="a"), Message(role="assistant", content="b"))
        encoder = Encoder(tokenizer)
        ids, spans = next(encoder.encode(Row(where="an example conversation", messages=messages)))
        stops |= {ids[spans[-1][1] - 1]} & encoder.markup_ids
    return tuple(sorted(stops - {None}))


def _make_row(ids: list[int], spans: Sequence[Span]) -> TokenizedRow:
    labels = array("i", [UNTRAINED]) * len(ids)
    for start, stop in spans:
        labels[start:stop] = array("i", ids[start:stop])
    return TokenizedRow(input_ids=array("i", ids), labels=labels)


def _list_exchanges(messages: Sequence[Message]) -> Iterator[tuple[Message, ...]]:
    """Runs of messages that end with an answer, such as question and answer."""
    exchange: tuple[Message, ...] = ()
    for index, message in enumerate(messages):
        exchange = (*exchange, message)
        is_last_answer = index + 1 == len(messages) or messages[index + 1].role != "assistant"
        if message.role == "assistant" and is_last_answer:
            yield exchange
            exchange = ()
