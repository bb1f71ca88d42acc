"""Rows to token ids and labels. Labels are the ids where a token is trained and -100 elsewhere.

Conversations are rendered by the tokenizer's own chat template, and every answer of the assistant is trained, with the
token that ends its turn; prompts, headers and what a template writes after that token are not. Which tokens are an
answer comes from the template's `{% generation %}` markers where it has them. Otherwise the conversation before an
answer, with the generation prompt, must be an exact prefix of the conversation with the answer: what is trained is then
precisely what the model is to write when it is used. A row for which that does not hold is refused.

A template may render an answer differently once it is history (Qwen3 drops its thinking). Such a conversation becomes
several rows, one for each answer in the form that it has when it is written.

Completions and text are raw: no template. The tokenizer's beginning-of-sequence token comes first where it uses one,
and the end-of-sequence token last, each once.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..recipes.errors import DataError
from .batches import UNTRAINED
from .rows import Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
"""Start and stop of trained tokens, as in a slice."""
Encoded = tuple[list[int], list[Span]]
"""Token ids of one sequence, and its trained spans."""


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
        return sum(label != UNTRAINED for label in self.labels[1:])


@dataclass(frozen=True, kw_only=True)
class TokenizedRows:
    """A tokenised dataset and the facts about it.

    rows:          the sequences, in the order of the dataset; 1 or more
    pad_token_id:  the id that fills up a batch; masked by length, so any id serves
    max_length:    longest allowed sequence, tokens
    truncated:     how many rows were cut at the right to max_length
    dropped:       how many rows were left out because no trained token was left
    """

    rows: tuple[TokenizedRow, ...]
    pad_token_id: int
    max_length: int
    truncated: int
    dropped: int

    def __len__(self) -> int:
        return len(self.rows)

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


def tokenize_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> TokenizedRows:
    """Rows as sequences of at most max_length tokens, cut at the right; those without a trained token are dropped.

    Raises DataError for a row whose answers cannot be told apart exactly, and where every row was dropped.
    Conversations need a chat template: see templates.ensure_chat_template.
    """
    encoder = _Encoder(tokenizer)
    kept, truncated, dropped = list[TokenizedRow](), 0, 0
    for row in rows:
        for ids, spans in encoder.encode(row):
            tokenized = _make_row(ids[:max_length], spans)
            truncated += len(ids) > max_length
            if tokenized.trained_tokens:
                kept.append(tokenized)
            else:
                dropped += 1
    if not kept:
        raise DataError(
            f"all {dropped} rows were dropped: none has a token to train on within data.max_length = {max_length}"
        )
    pad = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
    return TokenizedRows(
        rows=tuple(kept), pad_token_id=pad, max_length=max_length, truncated=truncated, dropped=dropped
    )


def find_stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens at which an answer ends: the end-of-sequence token, and the one that ends a turn in the template."""
    stops = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        messages = (Message(role="user", content="a"), Message(role="assistant", content="b"))
        encoder = _Encoder(tokenizer)
        ids, spans = next(encoder.encode(Row(where="an example conversation", messages=messages)))
        stops |= {ids[spans[-1][1] - 1]} & encoder.markup_ids
    return tuple(sorted(stops - {None}))


def _make_row(ids: list[int], spans: Sequence[Span]) -> TokenizedRow:
    labels = array("i", [UNTRAINED]) * len(ids)
    for start, stop in spans:
        labels[start:stop] = array("i", ids[start:stop])
    return TokenizedRow(input_ids=array("i", ids), labels=labels)


class _Encoder:
    """A tokenizer and what is asked of it again and again. `encode` gives sequences as (ids, trained spans)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        self.markup_ids = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
        marked = bool(tokenizer.chat_template) and GENERATION_MARKER.search(tokenizer.get_chat_template())
        self.has_generation_markers = bool(marked) and tokenizer.is_fast

    def encode(self, row: Row) -> Iterator[Encoded]:
        if row.text is not None:
            ids = self._end(self._tokens(row.text, raw=True))
            yield ids, [(0, len(ids))]
        elif row.completion is not None:
            yield self._encode_completion(row)
        elif self.has_generation_markers:
            yield self._encode_marked(row)
        else:
            yield from self._encode_by_prefix(row)

    def _tokens(self, text: str, *, raw: bool = False) -> list[int]:
        """Token ids of a rendered conversation, or of `raw` text after one beginning-of-sequence token, if any is used.

        An end-of-sequence token that the tokenizer adds to raw text is left to `_end`.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=raw, verbose=False)["input_ids"]
        if raw and ids[:2] == [self.tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        return ids[:-1] if raw and ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def _end(self, ids: list[int]) -> list[int]:
        """The ids and then the end-of-sequence token, where the tokenizer has one."""
        eos = self.tokenizer.eos_token_id
        return ids if eos is None else [*ids, eos]

    def _encode_completion(self, row: Row) -> Encoded:
        assert row.prompt is not None and row.completion is not None
        prompt_ids, whole_ids = self._split(row.prompt, row.prompt + row.completion, row, raw=True)
        ids = self._end(whole_ids)
        return ids, [(len(prompt_ids), len(ids))]

    def _encode_by_prefix(self, row: Row) -> Iterator[Encoded]:
        ids, spans = list[int](), list[Span]()
        for prompt_ids, whole_ids in self._turns(row):
            if spans and prompt_ids[: len(ids)] != ids:
                yield self._finish(ids, spans)
                spans = []
            ids = whole_ids
            spans.append((len(prompt_ids), len(whole_ids)))
        yield self._finish(ids, spans)

    def _turns(self, row: Row) -> Iterator[tuple[list[int], list[int]]]:
        """For each answer: the ids that the model is given, and those ids followed by the answer's."""
        assert row.messages is not None
        for index, message in enumerate(row.messages):
            if message.role == "assistant":
                prompt = self._render(row, row.messages[:index], add_generation_prompt=True)
                whole = self._render(row, row.messages[: index + 1])
                if not whole.startswith(prompt):
                    raise DataError(
                        f"{row.where}: message {index + 1}: which tokens are the answer is ambiguous, because the chat "
                        "template renders what comes before an answer in another way once the answer follows; use a "
                        "tokenizer whose template does not, or marks answers with {% generation %}"
                    )
                if whole == prompt:
                    raise DataError(f"{row.where}: message {index + 1}: the chat template leaves the answer out")
                yield self._split(prompt, whole, row)

    def _split(self, prompt: str, whole: str, row: Row, *, raw: bool = False) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and ids of the whole that begin with them exactly, as when a model continues the prompt.

        Where a token spans the boundary ("\\n\\n" of a prompt's and an answer's) the two parts are tokenised apart,
        provided that they still spell the same text.
        """
        prompt_ids, whole_ids = self._tokens(prompt, raw=raw), self._tokens(whole, raw=raw)
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, whole_ids
        apart = prompt_ids + self._tokens(whole[len(prompt) :])
        if self.tokenizer.decode(apart) != self.tokenizer.decode(whole_ids):
            raise DataError(
                f"{row.where}: which tokens are the answer is ambiguous, because the tokenizer joins what comes before "
                "an answer with its beginning; remove white space at the end of the one or the start of the other"
            )
        return prompt_ids, apart

    def _encode_marked(self, row: Row) -> Encoded:
        assert row.messages is not None
        encoded = self._apply_template(
            row, row.messages, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
        )
        spans, start = list[Span](), 0
        for trained, run in groupby(encoded["assistant_masks"]):
            stop = start + len(list(run))
            if trained:
                spans.append((start, self._end_of_character(encoded, stop)))
            start = stop
        if not spans:
            raise DataError(f"{row.where}: the chat template marks nothing of this conversation as the assistant's")
        return self._finish(encoded["input_ids"], spans)

    def _end_of_character(self, encoded: Any, stop: int) -> int:
        """Where the last character before `stop` ends: the mask takes only the first of the tokens of an emoji."""
        size = len(encoded["input_ids"])
        while stop < size and encoded.token_to_chars(stop).start < encoded.token_to_chars(stop - 1).end:
            stop += 1
        return stop

    def _render(self, row: Row, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        rendered = self._apply_template(row, messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(rendered, str)
        return rendered

    def _apply_template(self, row: Row, messages: Sequence[Message], **options: Any) -> Any:
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(conversation, **options)
        except TemplateError as error:
            raise DataError(f"{row.where}: the model's chat template refuses this conversation: {error}") from error

    def _finish(self, ids: list[int], spans: Sequence[Span]) -> Encoded:
        """Spans that end with the end of the turn; where a template writes none after the last answer, one is added."""
        spans = [self._end_of_turn(ids, span) for span in spans]
        start, stop = spans[-1]
        if ids[stop - 1] not in self.markup_ids:
            ids = self._end(ids[:stop])
            spans[-1] = (start, len(ids))
        return ids, spans

    def _end_of_turn(self, ids: Sequence[int], span: Span) -> Span:
        """The span up to its last token but white space if that is markup, else on to the markup that follows it.

        Some templates leave the token that ends a turn out of the `{% generation %}` block, or have none and let the
        next turn's header end it; a model that is not trained on it never stops.
        """
        start, stop = span
        last = next((index for index in reversed(range(start, stop)) if not self._is_blank(ids[index])), start)
        if ids[last] in self.markup_ids:
            return start, last + 1
        after = next((index for index in range(stop, len(ids)) if not self._is_blank(ids[index])), None)
        return (start, after + 1) if after is not None and ids[after] in self.markup_ids else span

    def _is_blank(self, token_id: int) -> bool:
        return not self.tokenizer.decode([token_id]).strip()
