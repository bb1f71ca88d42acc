"""The data check as a document: what `fitune data --json` prints and a run's report holds."""

from __future__ import annotations

from typing import Literal

from ...planner.strategy import Value


class SourceFacts(Value):
    """One source of the data.

    name:           as the recipe writes it
    format:         of its rows
    rows:           as they were read
    sequences:      that are trained on or evaluated
    tokens:         of the sequences
    trained_tokens: of them with a label
    epoch_rows:     sequences that an epoch draws
    unread:         how many rows have each column that is not read
    """

    name: str
    format: str
    rows: int
    sequences: int
    tokens: int
    trained_tokens: int
    epoch_rows: int
    unread: dict[str, int]


class LengthBin(Value):
    """How many sequences have at most so many tokens, and more than the bin before; as written, before any is cut."""

    most_tokens: int
    sequences: int


class SetFacts(Value):
    """The training rows, or the held-out ones.

    rows:           as they were read
    sequences:      that are trained on or evaluated
    tokens:         of the sequences
    trained_tokens: of them with a label
    longest_tokens: of the longest row as it was written
    mean_tokens:    of a row as it was written
    lengths:        a histogram
    truncated:      sequences that are cut at data.max_length
    split:          rows that were split because they are longer
    too_long:       sequences that were left out because they are longer
    empty:          sequences that were left out because nothing of them is trained
    escaped:        rows in which a message says a control token's text
    unended:        conversations that do not end with a token that ends a turn
    duplicates:     rows that say the same as one before, but for case and white space
    """

    rows: int
    sequences: int
    tokens: int
    trained_tokens: int
    longest_tokens: int
    mean_tokens: float
    lengths: tuple[LengthBin, ...]
    truncated: int
    split: int
    too_long: int
    empty: int
    escaped: int
    unended: int
    duplicates: int

    @property
    def trained_share(self) -> float:
        """trained_tokens / tokens."""
        return self.trained_tokens / max(1, self.tokens)

    @property
    def truncated_share(self) -> float:
        """truncated / (sequences before any was left out)."""
        return self.truncated / max(1, self.sequences + self.too_long + self.empty)


class Leak(Value):
    """Held-out rows that are among the training rows: what they measure is memory.

    exact:         rows that are the same to the letter
    normalized:    rows that are the same but for case and white space, exact ones included
    same_question: rows of which everything but the last answer is in training, with another answer
    first:         the first such pair, such as `eval.jsonl:3 is train.jsonl:17`; None where there is none
    """

    exact: int
    normalized: int
    same_question: int
    first: str | None


class SamplePiece(Value):
    """A stretch of a sequence: its text, and whether it is trained."""

    text: str
    trained: bool


class SampleSequence(Value):
    """A row as the model sees it, with the file and line that it comes from."""

    where: str
    pieces: tuple[SamplePiece, ...]


class StreamFacts(Value):
    """What the last session of a run read of its stream: blocks of rows, some of them not trained on yet.

    rows:      that were tokenised
    truncated: of them, cut at data.max_length
    left_out:  of them, too long or without a trained token
    """

    rows: int
    truncated: int
    left_out: int


class DataReport(Value):
    """The data check.

    recipe:    the recipe's path
    max_length: data.max_length, tokens
    streamed:  whether the rows are the first of each source only, since data.streaming reads them in the run
    stream:    what a run with data.streaming has read; None before the run, and without
    packed:    rows that the training sequences were packed into, None where they are not
    forgetting_sources, forgetting: the sources and rows of another task (data.forgetting); None without
    leak:      None without held-out rows
    problems:  why a run is refused; empty where it is not
    notes:     what else should be known
    """

    format_version: Literal[1] = 1
    recipe: str
    max_length: int
    sources: tuple[SourceFacts, ...]
    held_out: tuple[SourceFacts, ...]
    train: SetFacts
    eval: SetFacts | None
    forgetting_sources: tuple[SourceFacts, ...] = ()
    forgetting: SetFacts | None = None
    streamed: bool = False
    stream: StreamFacts | None = None
    packed: int | None
    leak: Leak | None
    samples: tuple[SampleSequence, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
