"""From answers to rows: parsed strictly, nothing repaired, what is not good enough counted with its reason."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...recipes.make_spec import MadeTable, MakeSpec
from .client import Answered
from .duplicates import SimilarTexts
from .journal import AnswerLine
from .prompts import Request
from .sources import Passage

NOT_DECODED = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class MadeRow:
    """A row that was accepted, and the request and passage that it came from."""

    question: str
    answer: str
    request: str
    passage: Passage


class Unusable(Exception):
    """Why an answer, or one pair of it, is not used: a short reason, the same for all of a kind, to be counted."""


class Harvest:
    """The rows accepted so far and the reasons of what was rejected.

    rows:      accepted, in the order in which their answers came
    rejected_answers, rejected_rows: how many, by reason; none of an answer that is rejected becomes a row
    """

    def __init__(self, spec: MakeSpec) -> None:
        self._output, self._pairs = spec.output, spec.generation.questions_per_request
        self.rows: list[MadeRow] = []
        self.rejected_answers, self.rejected_rows = Counter[str](), Counter[str]()
        self._questions = defaultdict[Passage | None, SimilarTexts](lambda: SimilarTexts(spec.output.near_duplicate))
        self._answers = SimilarTexts(spec.output.near_duplicate)

    def take(self, request: Request, answer: AnswerLine | Answered) -> int:
        """Make rows of an answer, as many as are still wanted; returns how many were accepted."""
        try:
            pairs = parse_answer(answer)
        except Unusable as reason:
            self.rejected_answers[str(reason)] += 1
            return 0
        before = len(self.rows)
        # The same question about another passage is another question where the passage is part of it.
        asked = self._questions[request.passage if self._output.include_passage else None]
        for pair in pairs:
            try:
                question, text = self._check(pair, asked)
            except Unusable as reason:
                self.rejected_rows[str(reason)] += 1
                continue
            if len(self.rows) < self._output.rows:
                row = MadeRow(question=question, answer=text, request=request.key, passage=request.passage)
                asked.add(question)
                self._answers.add(text)
                self.rows.append(row)
            else:
                self.rejected_rows["more than output.rows"] += 1
        if len(pairs) < self._pairs:
            self.rejected_rows["missing: fewer pairs than asked for"] += self._pairs - len(pairs)
        return len(self.rows) - before

    def _check(self, pair: object, asked: SimilarTexts) -> tuple[str, str]:
        question, answer = parse_pair(pair)
        check_pair(question, answer, self._output)
        if asked.find(question) is not None:
            raise Unusable("the question is like an earlier one")
        if self._answers.find(answer) is not None:
            raise Unusable("the answer is like an earlier one")
        return question, answer


def parse_answer(answer: AnswerLine | Answered) -> list[object]:
    """The pairs of an answer, not yet checked; Unusable where it is not what was asked for."""
    if answer.refusal is not None or answer.finish_reason == "content_filter":
        raise Unusable("the model refused")
    if answer.finish_reason == "length":
        raise Unusable("cut off at max_tokens")
    if answer.content is None or not answer.content.strip():
        raise Unusable("empty")
    if answer.content.lstrip().startswith("```"):
        raise Unusable("not JSON: in a code fence")
    try:
        document = json.loads(answer.content, object_pairs_hook=_make_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise Unusable("not JSON") from None
    if not isinstance(document, dict) or list(document) != ["pairs"] or not isinstance(document["pairs"], list):
        raise Unusable('not an object of the form {"pairs": [...]}')
    if not document["pairs"]:
        raise Unusable("no pairs in it")
    return list(document["pairs"])


def parse_pair(pair: object) -> tuple[str, str]:
    """Question and answer; Unusable where it is not an object of exactly these two texts."""
    if not isinstance(pair, Mapping) or set(pair) != {"question", "answer"}:
        raise Unusable('not an object of the form {"question": ..., "answer": ...}')
    question, answer = pair["question"], pair["answer"]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise Unusable("question or answer is not text")
    return question.strip(), answer.strip()


def check_pair(question: str, answer: str, output: MadeTable) -> None:
    """Unusable where a question or an answer is not good enough by itself."""
    if not question or not answer:
        raise Unusable("question or answer is empty")
    for text in (question, answer):
        if NOT_DECODED in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise Unusable("a character that cannot be decoded")
        if any(ord(character) < 32 and character not in "\t\n\r" for character in text):
            raise Unusable("a control character")
    if len(answer) < output.min_answer_characters:
        raise Unusable("the answer is shorter than output.min_answer_characters")
    if output.max_answer_characters is not None and len(answer) > output.max_answer_characters:
        raise Unusable("the answer is longer than output.max_answer_characters")
    folded = f"{question}\n{answer}".casefold()
    for phrase in output.reject_phrases:
        if phrase.casefold() in folded:
            raise Unusable(f'holds "{phrase}"')


def make_record(row: MadeRow, output: MadeTable) -> dict[str, Any]:
    """The row as `fitune run` reads it."""
    context = row.passage.text if output.include_passage else ""
    if output.format == "instruction":
        return {"instruction": row.question, "context": context, "output": row.answer}
    user = "\n\n".join(filter(None, [row.question, context]))
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": row.answer}]}


def make_reference(row: MadeRow, file: str, number: int) -> dict[str, Any]:
    """Where a row came from: its file and line, and the document's characters or the topic."""
    passage = row.passage
    place: dict[str, Any] = {"topic": passage.text}
    if passage.source is not None:
        place = {"document": passage.source, "start": passage.start, "end": passage.end}
    return {"file": file, "line": number, **place, "request": row.request}


def _make_object(items: Iterable[tuple[str, object]]) -> dict[str, object]:
    made: dict[str, object] = {}
    for key, value in items:
        if key in made:
            raise ValueError(f"the key {key} occurs twice")
        made[key] = value
    return made


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
