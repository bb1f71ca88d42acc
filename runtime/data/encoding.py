"""One row as token ids, and which of them are trained.

Conversations are rendered by the tokenizer's own chat template. By default every answer of the assistant is trained,
with the token that ends its turn; prompts, headers and what a template writes after that token are not. Which tokens
are an answer comes from the template's `{% generation %}` markers where it has them. Otherwise the conversation before
an answer, with the generation prompt, must be an exact prefix of the conversation with the answer: what is trained is
then precisely what the model is to write when it is used. A row for which that does not hold is refused.

A template may render an answer differently once it is history (Qwen3 drops its thinking). Such a conversation becomes
several rows, one for each answer in the form that it has when it is written.

What a message says is text. Where it spells one of the tokenizer's control tokens (`<|im_end|>` in a question about
templates), it is encoded as that text and not as the token, which would end the turn: a model must not learn that a
user's words can do that. Raw text and completions are given as the model is to read them, control tokens included.

Completions and text are raw: no template. The tokenizer's beginning-of-sequence token comes first where it uses one,
and the end-of-sequence token last, each once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ...recipes.errors import DataError
from .rows import Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
FIRST_STAND_IN = 0xF0000
"""Characters for private use, which stand in for control tokens in the words of a message while it is rendered."""
SHOWN_CHARACTERS = 30
UNTRAINED = -100
"""The label of a token that is not trained."""

Span = tuple[int, int]
"""Start and stop of trained tokens, as in a slice."""
Encoded = tuple[list[int], list[Span]]
"""Token ids of one sequence, and its trained spans."""


class Encoder:
    """A tokenizer and what is asked of it again and again. `encode` gives sequences as (ids, trained spans).

    markup_ids: the ids of control tokens, and of other tokens that were added to the vocabulary
    escaped:    how many rows said a control token's text in a message
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, train_on: str = "assistant") -> None:
        self.tokenizer: Any = tokenizer
        self.train_on = train_on
        self.markup_ids = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
        marked = bool(tokenizer.chat_template) and GENERATION_MARKER.search(tokenizer.get_chat_template())
        self.has_generation_markers = bool(marked) and tokenizer.is_fast
        added = {str(one) for one in tokenizer.added_tokens_decoder.values() if one.special}
        controls = sorted({*added, *map(str, tokenizer.all_special_tokens)} - {""}, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, controls)) or r"(?!)")
        self._stand_ins = dict[str, str]()
        self.escaped = 0

    def encode(self, row: Row) -> Iterator[Encoded]:
        """The row's sequences: one, but for a conversation whose history is rendered differently."""
        self._stand_ins = {}
        if row.text is not None:
            ids = self._end(self._tokens(row.text, raw=True))
            yield ids, [(0, len(ids))]
            return
        if row.completion is not None:
            yield self._encode_completion(row)
            return
        guarded = self._stand_in(row)
        if self.train_on == "all":
            yield self._encode_all(guarded)
        elif self.has_generation_markers:
            yield self._encode_marked(guarded)
        else:
            yield from self._encode_by_prefix(guarded)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """What a model is given to answer, as it is given in training."""
        row = self._stand_in(Row(where="the conversation", messages=tuple(messages)))
        assert row.messages is not None
        return self._tokens(self._render(row, row.messages, add_generation_prompt=True), row=row)

    def _stand_in(self, row: Row) -> Row:
        """The row with a character for private use in place of every control token that its messages spell."""
        assert row.messages is not None
        said = {match for one in row.messages for match in self._control.findall(one.content)}
        self._stand_ins = {}
        if not said:
            return row
        self.escaped += 1
        used = {character for one in row.messages for character in one.content}
        free = (chr(code) for code in range(FIRST_STAND_IN, 0xFFFFE) if chr(code) not in used)
        by_control = {control: next(free) for control in sorted(said)}
        self._stand_ins = {character: control for control, character in by_control.items()}
        messages = tuple(
            replace(one, content=self._control.sub(lambda match: by_control[match.group()], one.content))
            for one in row.messages
        )
        return replace(row, messages=messages)

    def _tokens(self, text: str, *, raw: bool = False, row: Row | None = None) -> list[int]:
        """Token ids of a rendered conversation, or of `raw` text after one beginning-of-sequence token, if any is used.

        An end-of-sequence token that the tokenizer adds to raw text is left to `_end`.
        """
        if self._stand_ins:
            return self._place(text, row)[0]
        ids: list[int] = self.tokenizer(text, add_special_tokens=raw, verbose=False)["input_ids"]
        if raw and ids[:2] == [self.tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        return ids[:-1] if raw and ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def _place(self, text: str, row: Row | None) -> tuple[list[int], list[Span]]:
        """Ids of a rendered conversation and the characters of each, a stand-in's being its control token as text."""
        ids, places, start = list[int](), list[Span](), 0
        pieces = re.split(f"([{''.join(self._stand_ins)}])", text) if self._stand_ins else [text]
        options = {"add_special_tokens": False, "verbose": False}
        for piece in filter(None, pieces):
            control = self._stand_ins.get(piece)
            if control is not None:
                spelled = self.tokenizer(control, split_special_tokens=True, **options)["input_ids"]
                ids += spelled
                places += [(start, start + 1)] * len(spelled)
            else:
                encoded = self.tokenizer(piece, return_offsets_mapping=self.tokenizer.is_fast, **options)
                ids += encoded["input_ids"]
                places += [(start + first, start + last) for first, last in encoded.get("offset_mapping", ())]
            start += len(piece)
        if self._stand_ins:
            self._check_spelling(text, ids, row)
        return ids, places

    def _check_spelling(self, text: str, ids: Sequence[int], row: Row | None) -> None:
        """DataError where the ids do not spell the text with its control tokens written out, or hold one too many."""
        written = "".join(self._stand_ins.get(character, character) for character in text)
        rendered = self.tokenizer("".join(one for one in text if one not in self._stand_ins), add_special_tokens=False)
        markup = sum(token in self.markup_ids for token in ids)
        decoded = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        same = markup == sum(token in self.markup_ids for token in rendered["input_ids"])
        if not same or decoded.removeprefix(" ") != written.removeprefix(" "):
            where = "" if row is None else f"{row.where}: "
            raise DataError(
                f"{where}a message says {' and '.join(self._stand_ins.values())}, and this tokenizer cannot write that "
                "as text: as a control token it would end or start a turn; remove it"
            )

    def _end(self, ids: list[int]) -> list[int]:
        """The ids and then the end-of-sequence token, where the tokenizer has one."""
        eos = self.tokenizer.eos_token_id
        return ids if eos is None else [*ids, eos]

    def _encode_completion(self, row: Row) -> Encoded:
        assert row.prompt is not None and row.completion is not None
        prompt_ids, whole_ids = self._split(row.prompt, row.prompt + row.completion, row, raw=True)
        ids = self._end(whole_ids)
        return ids, [(0 if self.train_on == "all" else len(prompt_ids), len(ids))]

    def _encode_all(self, row: Row) -> Encoded:
        assert row.messages is not None
        ids = self._tokens(self._render(row, row.messages), row=row)
        return self._finish(ids, [(0, len(ids))])

    def _encode_by_prefix(self, row: Row) -> Iterator[Encoded]:
        ids, spans = list[int](), list[Span]()
        for prompt_ids, whole_ids, is_trained in self._turns(row):
            if spans and prompt_ids[: len(ids)] != ids:
                yield self._finish(ids, spans)
                spans = []
            ids = whole_ids
            if is_trained:
                spans.append((len(prompt_ids), len(whole_ids)))
        yield self._finish(ids, spans)

    def _turns(self, row: Row) -> Iterator[tuple[list[int], list[int], bool]]:
        """For each answer: the ids that the model is given, those ids and the answer's, whether it is trained."""
        assert row.messages is not None
        answers = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
        for index in answers[-1:] if self.train_on == "last" else answers:
            prompt = self._render(row, row.messages[:index], add_generation_prompt=True)
            whole = self._render(row, row.messages[: index + 1])
            if not whole.startswith(prompt):
                raise DataError(
                    f"{row.where}: message {index + 1}: which tokens are the answer is ambiguous, because the chat "
                    "template renders what comes before an answer in another way once the answer follows"
                    f"{_show_difference(prompt, whole)}; set data.chat_template to a template that does not, or that "
                    "marks answers with {% generation %}"
                )
            if whole == prompt:
                raise DataError(f"{row.where}: message {index + 1}: the chat template leaves the answer out")
            yield *self._split(prompt, whole, row), row.messages[index].trained

    def _split(self, prompt: str, whole: str, row: Row, *, raw: bool = False) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and ids of the whole that begin with them exactly, as when a model continues the prompt.

        Where a token spans the boundary ("\\n\\n" of a prompt's and an answer's) the two parts are tokenised apart,
        provided that they still spell the same text.
        """
        prompt_ids, whole_ids = self._tokens(prompt, raw=raw, row=row), self._tokens(whole, raw=raw, row=row)
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, whole_ids
        apart = prompt_ids + self._tokens(whole[len(prompt) :], row=row)
        if self.tokenizer.decode(apart) != self.tokenizer.decode(whole_ids):
            raise DataError(
                f"{row.where}: which tokens are the answer is ambiguous, because the tokenizer joins what comes before "
                f"an answer with its beginning (... {prompt[-SHOWN_CHARACTERS:]!r} + "
                f"{whole[len(prompt) :][:SHOWN_CHARACTERS]!r} ...); remove white space at the end of the one or the "
                "start of the other"
            )
        return prompt_ids, apart

    def _encode_marked(self, row: Row) -> Encoded:
        """By the template's markers, which tell characters: a token that holds one of them is trained."""
        from transformers.utils.chat_template_utils import render_jinja_template

        assert row.messages is not None
        with _refusing(row):
            rendering: Any = render_jinja_template(
                conversations=[_as_dicts(row.messages)],
                chat_template=self.tokenizer.get_chat_template(),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        (rendered,), (marked,) = rendering
        ids, places = self._place(rendered, row)
        answers = [one for one in row.messages if one.role == "assistant"]
        spans = [self._cover(places, start, stop) for start, stop in marked if start < stop]
        if len(spans) != len(answers) and (self.train_on == "last" or not all(one.trained for one in answers)):
            raise DataError(
                f"{row.where}: the chat template marks {len(spans)} answers, the conversation has {len(answers)}"
            )
        if not spans:
            raise DataError(f"{row.where}: the chat template marks nothing of this conversation as the assistant's")
        if len(spans) == len(answers):
            spans = [span for span, one in zip(spans, answers, strict=True) if one.trained]
        return self._finish(ids, spans[-1:] if self.train_on == "last" else spans)

    @staticmethod
    def _cover(places: Sequence[Span], start: int, stop: int) -> Span:
        """The tokens from the first to the last that holds a character of start to stop."""
        touching = [index for index, (first, last) in enumerate(places) if first < stop and last > start]
        return (touching[0], touching[-1] + 1) if touching else (0, 0)

    def _render(self, row: Row, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        with _refusing(row):
            rendered = self.tokenizer.apply_chat_template(
                _as_dicts(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        assert isinstance(rendered, str)
        return rendered

    def _finish(self, ids: list[int], spans: Sequence[Span]) -> Encoded:
        """Spans that end with the end of the turn; where a template writes none after the last answer, one is added."""
        spans = [self._end_of_turn(ids, span) for span in spans]
        if not spans:
            return ids, []
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


@contextmanager
def _refusing(row: Row) -> Iterator[None]:
    """What a template raises becomes a DataError that names the row."""
    try:
        yield
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{row.where}: the model's chat template refuses this conversation: {error}") from error


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _show_difference(prompt: str, whole: str) -> str:
    """` (... 'assistant\\n<think>' is rendered as 'assistant\\n' ...)`: the first place where the two differ."""
    same = next((index for index, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), None)
    place = min(len(prompt), len(whole)) if same is None else same
    start = max(0, place - SHOWN_CHARACTERS // 2)
    return f" (... {prompt[start : place + SHOWN_CHARACTERS]!r}, then {whole[start : place + SHOWN_CHARACTERS]!r} ...)"
