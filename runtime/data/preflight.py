"""The data check: what a recipe's rows are, what of them is trained, and what is wrong with them.

`fitune data` shows it, and the same check runs at the start of every run: its problems refuse the run.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from ...recipes.data_table import DataTable
from ...recipes.errors import DataError
from .encoding import UNTRAINED
from .mixture import count_draws
from .prepare import TokenizedData, make_settings
from .report import DataReport, Leak, LengthBin, SamplePiece, SampleSequence, SetFacts, SourceFacts
from .rows import Row
from .sources import STREAM_HEAD_ROWS, LoadedRows, SourceRows, normalize
from .tokens import Counts, RowTokenizer, TokenizedRow, TokenizedRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = 3
"""Rows that are shown as the model sees them."""


@dataclass(frozen=True, kw_only=True)
class _Twins:
    """Rows that say the same.

    repeated: pairs within the training rows: (the later one's place, the earlier one's)
    """

    repeated: list[tuple[str, str]]
    repeated_held_out: list[tuple[str, str]]
    leak: Leak | None


def check_data(recipe: str, table: DataTable, loaded: LoadedRows, data: TokenizedData, *, seed: int) -> DataReport:
    """Everything that can be said of a recipe's rows; `seed` chooses the rows that are shown."""
    twins = _find_twins(loaded)
    train = _make_facts(data.unpacked, duplicates=len(twins.repeated))
    held_out = None if data.eval is None else _make_facts(data.eval, duplicates=len(twins.repeated_held_out))
    other = [row for source in loaded.forgetting for row in source.rows]
    forgetting = None
    if data.forgetting is not None:
        forgetting = _make_facts(data.forgetting, duplicates=len(_list_repeated(other, {})))
    return DataReport(
        recipe=recipe,
        max_length=table.max_length,
        sources=tuple(_list_sources(loaded.train, data.unpacked)),
        held_out=() if data.eval is None else tuple(_list_sources(loaded.eval, data.eval)),
        train=train,
        eval=held_out,
        forgetting_sources=() if data.forgetting is None else tuple(_list_sources(loaded.forgetting, data.forgetting)),
        forgetting=forgetting,
        streamed=table.streaming,
        packed=len(data.train) if table.packing else None,
        leak=twins.leak,
        samples=tuple(_draw_samples(loaded.train_rows, data.tokenizer, table, seed)),
        problems=tuple(_list_problems(table, train, held_out, twins.leak)),
        notes=tuple(
            dict.fromkeys(
                [
                    *_list_notes(table, loaded, data, train, held_out, twins),
                    *_list_forgetting_notes(table, loaded, forgetting),
                ]
            )
        ),
    )


def refuse_problems(report: DataReport) -> None:
    """DataError where the data check found problems."""
    if report.problems:
        more = "`fitune data` shows the rows"
        raise DataError("\n".join([*report.problems, more]))


def _list_sources(sources: Sequence[SourceRows], tokenized: TokenizedRows) -> Iterable[SourceFacts]:
    start = 0
    for source, part, drawn in zip(sources, tokenized.parts, count_draws(tokenized.parts), strict=True):
        rows = tokenized.rows[start : start + part.rows]
        start += part.rows
        yield SourceFacts(
            name=source.name,
            format=source.format,
            rows=len(source.rows),
            sequences=part.rows,
            tokens=sum(map(len, rows)),
            trained_tokens=sum(row.trained_tokens for row in rows),
            epoch_rows=drawn,
            unread=dict(source.unread),
        )


def _make_facts(tokenized: TokenizedRows, *, duplicates: int) -> SetFacts:
    counts = tokenized.counts
    kept = {
        name: getattr(counts, name)
        for name in ("rows", "truncated", "split", "too_long", "empty", "escaped", "unended")
    }
    return SetFacts(
        **kept,
        sequences=len(tokenized),
        tokens=tokenized.total_tokens,
        trained_tokens=tokenized.trained_tokens,
        longest_tokens=max(counts.lengths),
        mean_tokens=sum(counts.lengths) / len(counts.lengths),
        lengths=_make_histogram(counts),
        duplicates=duplicates,
    )


def _make_histogram(counts: Counts) -> tuple[LengthBin, ...]:
    """Bins up to 2, 4, 8, ... tokens, from the first to the last that is not empty."""
    numbers = [max(0, length - 1).bit_length() for length in counts.lengths]
    return tuple(
        LengthBin(most_tokens=2**number, sequences=numbers.count(number))
        for number in range(min(numbers), max(numbers) + 1)
    )


def _digest(texts: Sequence[str]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def _find_twins(loaded: LoadedRows) -> _Twins:
    """Rows that say the same, within training and held-out rows, and across."""
    train, held_out = loaded.train_rows, loaded.eval_rows
    exact = {_digest(row.texts) for row in train} if held_out else set()
    seen = dict[bytes, str]()
    repeated = _list_repeated(train, seen)
    if not held_out:
        return _Twins(repeated=repeated, repeated_held_out=[], leak=None)
    questions = {_digest(normalize(row)[:-1]) for row in train}
    digests = [_digest(normalize(row)) for row in held_out]
    leaked = [(row, seen[digest]) for row, digest in zip(held_out, digests, strict=True) if digest in seen]
    asked = [
        row
        for row, digest in zip(held_out, digests, strict=True)
        if digest not in seen and row.text is None and _digest(normalize(row)[:-1]) in questions
    ]
    leak = Leak(
        exact=sum(_digest(row.texts) in exact for row in held_out),
        normalized=len(leaked),
        same_question=len(asked),
        first=f"{leaked[0][0].where} is {leaked[0][1]}" if leaked else None,
    )
    return _Twins(repeated=repeated, repeated_held_out=_list_repeated(held_out, {}), leak=leak)


def _list_repeated(rows: Sequence[Row], seen: dict[bytes, str]) -> list[tuple[str, str]]:
    """The places of rows that say what an earlier one says, with its place; `seen` gets each row's first place."""
    repeated = list[tuple[str, str]]()
    for row in rows:
        digest = _digest(normalize(row))
        if digest in seen:
            repeated.append((row.where, seen[digest]))
        else:
            seen[digest] = row.where
    return repeated


def _draw_samples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, table: DataTable, seed: int
) -> Iterable[SampleSequence]:
    """Some rows of the training set, by chance, and what of them is trained."""
    making = RowTokenizer(tokenizer, make_settings(table))
    drawn = random.Random(f"samples {seed}").sample(range(len(rows)), min(SAMPLES, len(rows)))
    for row in (rows[index] for index in sorted(drawn)):
        for sequence in making.tokenize(row)[:1]:
            yield SampleSequence(where=row.where, pieces=tuple(_list_pieces(sequence, tokenizer)))


def _list_pieces(sequence: TokenizedRow, tokenizer: PreTrainedTokenizerBase) -> Iterable[SamplePiece]:
    pairs = zip(sequence.input_ids, sequence.labels, strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != UNTRAINED):
        yield SamplePiece(text=str(tokenizer.decode([token for token, _ in run])), trained=trained)


def _list_problems(table: DataTable, train: SetFacts, held_out: SetFacts | None, leak: Leak | None) -> Iterable[str]:
    if train.truncated_share > table.max_truncated:
        yield (
            f"{train.truncated:,} of {train.rows:,} training rows ({train.truncated_share:.1%}) are longer than "
            f"data.max_length = {table.max_length:,} tokens and would lose their end, allowed is data.max_truncated = "
            f"{table.max_truncated:g}: set data.max_length (the longest row has {train.longest_tokens:,}), "
            'data.overlong = "split" or "drop", or data.max_truncated'
        )
    if leak is not None and held_out is not None and leak.normalized > table.max_leaked * held_out.rows:
        yield (
            f"{leak.normalized:,} of {held_out.rows:,} held-out rows ({leak.normalized / held_out.rows:.1%}) are among "
            f"the training rows ({leak.first}), {leak.exact:,} of them to the letter: the held-out loss would measure "
            f"memory; take them out, or set data.max_leaked, which is {table.max_leaked:g}"
        )
    if train.unended:
        yield (
            f"conversations that do not end with a token that ends a turn: {train.unended:,}; the tokenizer has no "
            "end-of-sequence token either, so the model would not learn to stop"
        )


def _list_notes(
    table: DataTable,
    loaded: LoadedRows,
    data: TokenizedData,
    train: SetFacts,
    held_out: SetFacts | None,
    twins: _Twins,
) -> Iterable[str]:
    if table.streaming:
        yield f"data.streaming: the first {STREAM_HEAD_ROWS:,} rows of each source were looked at, not those after them"
    if data.default_template:
        yield "the tokenizer has no chat template: ChatML is used, and saved with the result"
    for name, facts in (("training", train), ("held-out", held_out)):
        if facts is not None:
            yield from _list_counts(name, facts, table)
    if twins.repeated:
        later, earlier = twins.repeated[0]
        yield (
            f"training rows that say the same as one before: {len(twins.repeated):,} "
            f"({len(twins.repeated) / train.rows:.1%}; the first: {later} is {earlier})"
        )
    if twins.leak is not None and twins.leak.same_question:
        yield f"held-out rows that ask what a training row asks, with another answer: {twins.leak.same_question:,}"
    for source in (*loaded.train, *loaded.eval, *loaded.forgetting):
        if source.unread:
            listed = ", ".join(f"{name} ({rows:,})" for name, rows in sorted(source.unread.items())[:8])
            yield f"{source.name}: columns not read, with their rows: {listed}"


def _list_forgetting_notes(table: DataTable, loaded: LoadedRows, facts: SetFacts | None) -> Iterable[str]:
    if facts is None:
        return
    yield from _list_counts("data.forgetting", facts, table)
    trained = {_digest(normalize(row)) for row in loaded.train_rows}
    both = sum(_digest(normalize(row)) in trained for source in loaded.forgetting for row in source.rows)
    if both:
        yield (
            f"{both:,} of {facts.rows:,} rows of data.forgetting are trained on: they cannot show what is forgotten; "
            "hold them out"
        )


def _list_counts(name: str, facts: SetFacts, table: DataTable) -> Iterable[str]:
    """What became of rows that were not taken as they are."""
    length = f"data.max_length = {table.max_length:,} tokens"
    if facts.truncated:
        yield f"{name} rows cut at {length}: {facts.truncated:,} ({facts.truncated_share:.1%})"
    counted = {
        f"longer than {length}, split": facts.split,
        f"longer than {length}, left out": facts.too_long,
        f"with nothing to train within {length}, left out": facts.empty,
        "in which a message spells a control token of the model, encoded as text": facts.escaped,
    }
    for what, rows in counted.items():
        if rows:
            yield f"{name} rows {what}: {rows:,}"
