"""The requests of `fitune data make`: what is asked of the endpoint, in an order that never depends on the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...recipes.make_spec import MakeSpec
from .sources import Passage

TEMPLATE_TOKENS = 64
"""Most tokens that an endpoint's chat template adds to two messages: Llama 3.1's, with its two dates, adds 36."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request.

    index:    its number, from 0
    passage:  what it is about
    body:     the JSON that is posted
    """

    index: int
    passage: Passage
    body: dict[str, Any]

    @property
    def key(self) -> str:
        """SHA-256 in hexadecimal of the body: what an answer is known by."""
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()

    @property
    def max_prompt_tokens(self) -> int:
        """Most tokens of the prompt: no tokenizer in use needs more than one a byte of UTF-8, beside the template's."""
        texts = [message["content"] for message in self.body["messages"]]
        schema = json.dumps(self.body.get("response_format", ""))
        return sum(len(text.encode()) for text in (*texts, schema)) + TEMPLATE_TOKENS

    @property
    def max_answer_tokens(self) -> int:
        """Most tokens of the answer: what the endpoint is told."""
        return int(self.body.get("max_tokens") or self.body["max_completion_tokens"])


def make_request(spec: MakeSpec, passages: Sequence[Passage], index: int) -> Request:
    """Request number `index`, of which there is no last one: every passage once, then again with the next angle."""
    round_, place = divmod(index, len(passages))
    passage = passages[place]
    return Request(index=index, passage=passage, body=_make_body(spec, passage, index, round_=round_))


def make_answer_schema(count: int) -> dict[str, Any]:
    """The JSON schema of an answer: an object with `count` pairs of question and answer.

    The number of pairs is asked for in words: OpenAI's strict mode refused minItems and maxItems for long.
    """
    text = {"type": "string"}
    pair = {
        "type": "object",
        "properties": {"question": text, "answer": text},
        "required": ["question", "answer"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"pairs": {"type": "array", "items": pair, "description": f"{count} pairs"}},
        "required": ["pairs"],
        "additionalProperties": False,
    }


def _make_body(spec: MakeSpec, passage: Passage, index: int, *, round_: int) -> dict[str, Any]:
    generation = spec.generation
    body: dict[str, Any] = {
        **generation.extra,
        "model": spec.endpoint.model,
        "messages": [
            {"role": "system", "content": _make_system(spec)},
            {"role": "user", "content": _make_question(spec, passage, round_)},
        ],
        generation.max_tokens_key: generation.max_tokens,
    }
    for name in ("temperature", "top_p"):
        if getattr(generation, name) is not None:
            body[name] = getattr(generation, name)
    if generation.seed is not None:
        body["seed"] = generation.seed + index
    if generation.response_format == "json_object":
        body["response_format"] = {"type": "json_object"}
    elif generation.response_format == "json_schema":
        schema = make_answer_schema(generation.questions_per_request)
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "questions_and_answers", "strict": True, "schema": schema},
        }
    return body


def _make_system(spec: MakeSpec) -> str:
    persona = spec.persona
    lines = [
        persona.description.strip(),
        f"You write questions and the answers that {persona.name} gives to them, to train a language model that speaks "
        f"as {persona.name} does.",
        f"Questions and answers are in {persona.language}.",
    ]
    if persona.style is not None:
        lines.append(f"How {persona.name} answers: {persona.style.strip()}")
    return "\n".join(lines)


def _make_question(spec: MakeSpec, passage: Passage, round_: int) -> str:
    count, name, angles = spec.generation.questions_per_request, spec.persona.name, spec.generation.angles
    if passage.source is None:
        lines = [
            f"Topic: {passage.text}",
            "",
            f"Write {count} different questions on this topic, and {name}'s answers.",
        ]
        lines.append("Each question makes sense by itself, without the others.")
    else:
        lines = ["<passage>", passage.text, "</passage>", ""]
        lines.append(f"Write {count} different questions that this passage answers, and {name}'s answers.")
        lines.append(
            "State only what the passage says. Each question makes sense by itself; neither question nor answer "
            "mentions the passage, which its reader does not have."
        )
    lines.append(angles[round_ % len(angles)])
    if round_ >= len(angles):
        lines.append(f"This is set {round_ + 1}: ask what earlier sets will hardly have asked.")
    if spec.generation.instructions is not None:
        lines.append(spec.generation.instructions.strip())
    lines.append(
        f"Reply with one JSON object and nothing else, without a code fence: "
        f'{{"pairs": [{{"question": "...", "answer": "..."}}]}}, with exactly {count} pairs.'
    )
    return "\n".join(lines)
