"""The spec of `fitune data make`: where facts come from, who speaks, what is asked of whom, what it may cost."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from .errors import Problem, RecipeError
from .fields import Count, Prompt, Share, Table, Text
from .load import parse_toml, printable, read_text
from .problems import Key, make_problems, render_key
from .schema import make_document_schema

DEFAULT_ANGLES = (
    "Ask what a beginner would ask.",
    "Ask how something is done, step by step.",
    "Ask why something is so.",
    "Ask for a comparison, or for a choice between two things.",
    "Ask about a problem that went wrong and how to mend it.",
    "Ask about a detail that only someone who knows the subject would think of.",
)
OWN_KEYS = ("model", "messages", "temperature", "top_p", "seed", "response_format", "max_tokens", "stream", "n")
"""Keys of a request that the spec sets elsewhere, or that fitune needs as they are."""


def _check_base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_url = False
    if not is_url or any(character.isspace() for character in url):
        raise ValueError('is not a URL such as "https://api.openai.com/v1" or "http://localhost:8000/v1"')
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("holds more than a host and a path: a key belongs into the variable that api_key_env names")
    return url.rstrip("/")


def _check_variable(name: str) -> str:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):  # the value is not shown: it may be the key itself
        raise ValueError('is not the name of an environment variable, such as "OPENAI_API_KEY"; never the key itself')
    return name


def _check_file(name: str) -> str:
    if not name.endswith(".jsonl"):
        raise ValueError(f'"{name}" does not end in .jsonl')
    return name


Texts = Annotated[tuple[Prompt, ...], Field(strict=False, min_length=1)]
Paths = Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
Price = Annotated[float, Field(ge=0, le=1e6)]
Rate = Annotated[int, Field(ge=1, le=10**9)]


class SourceTable(Table):
    """What the questions are about: documents or topics, one of the two."""

    documents: Text | Paths | None = None
    """Text files, UTF-8: a path or glob such as "docs/**/*.md", or a list of them."""
    topics: Text | Texts | None = Field(default=None, validate_default=True)
    """A text file with one topic a line, or a list of topics."""
    chunk_characters: Annotated[int, Field(ge=200, le=10**6)] = 4000
    """Longest passage of a document in characters, from 200; cut between paragraphs, else sentences, else words."""

    @field_validator("topics")
    @classmethod
    def _check_topics(cls, topics: Any, info: ValidationInfo) -> Any:
        if "documents" in info.data and (topics is None) == (info.data["documents"] is None):
            raise ValueError("give either source.documents or source.topics")
        return topics


class PersonaTable(Table):
    """Who answers."""

    name: Text
    """What the persona is called."""
    description: Prompt
    """Who the persona is, in the second person: "You are a warm Greek cheese expert.\""""
    style: Prompt | None = None
    """How the persona speaks: length, phrases, tone."""
    language: Text = "English"
    """Language of questions and answers."""


class MadeTable(Table):
    """Which rows are written, and which are not good enough."""

    file: Annotated[Text, AfterValidator(_check_file)]
    """The training rows: a .jsonl file, relative to the spec's folder; what else is written lies beside it."""
    rows: Count
    """How many rows to make, held-out ones included."""
    format: Literal["instruction", "messages"] = "instruction"
    """Form of the rows."""
    eval: Share = 0.0
    """Share of the rows to hold out into a file of their own, 0 or more and below 1."""
    include_passage: bool = False
    """Whether a row's question comes with the passage that it was made from; documents only."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.7
    """A question or an answer that is this similar to an earlier one is rejected, above 0; 1: equal ones only."""
    min_answer_characters: Count = 1
    """Shorter answers are rejected."""
    max_answer_characters: Count | None = None
    """Longer answers are rejected; unset: no limit but the request's max_tokens."""
    reject_phrases: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """A row with one of these in its question or answer is rejected, in any case of letters."""


class EndpointTable(Table):
    """An endpoint that speaks OpenAI's chat completions."""

    base_url: Annotated[Text, AfterValidator(_check_base_url)]
    """What comes before /chat/completions, such as "https://api.openai.com/v1" or "http://localhost:8000/v1"."""
    model: Text
    """The model's name at the endpoint."""
    api_key_env: Annotated[Text, AfterValidator(_check_variable)] | None = None
    """Name of the environment variable that holds the key; unset: no key is sent."""
    price_input: Price | None = None
    """Price of a million prompt tokens, in the currency of max_cost."""
    price_output: Price | None = Field(default=None, validate_default=True)
    """Price of a million answer tokens, in the currency of max_cost."""
    timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 120.0
    """Longest wait for a whole answer in seconds, above 0."""

    @field_validator("price_output")
    @classmethod
    def _check_prices(cls, price: float | None, info: ValidationInfo) -> float | None:
        if "price_input" in info.data and (price is None) != (info.data["price_input"] is None):
            raise ValueError("give both endpoint.price_input and endpoint.price_output, or neither")
        return price


class LimitsTable(Table):
    """What may be spent, and how fast."""

    max_cost: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Most that all requests together may cost, above 0; needs prices; unset: no limit."""
    max_requests: Count | None = None
    """Most requests, repeated ones included; unset: twice what the rows need where nothing is rejected."""
    requests_per_minute: Rate | None = None
    """Most requests in any 60 seconds; unset: no limit."""
    tokens_per_minute: Rate | None = None
    """Most tokens in any 60 seconds, prompt and answer together; unset: no limit."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 4
    """Requests under way at once, 1 to 256."""


class GenerationTable(Table):
    """What one request asks for."""

    questions_per_request: Annotated[int, Field(ge=1, le=100)] = 4
    """Questions with their answers in one request, 1 to 100."""
    angles: Texts = DEFAULT_ANGLES
    """What kind of questions to ask; each pass over the documents or topics takes the next one."""
    instructions: Prompt | None = None
    """More that every request says about questions and answers."""
    max_tokens: Annotated[int, Field(ge=16, le=10**6)] = 2048
    """Longest answer to a request in tokens, from 16."""
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls it; OpenAI's reasoning models take max_completion_tokens only."""
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How JSON is asked for beside the prompt; not every endpoint knows json_schema."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Sampling temperature, 0 to 2; unset: the endpoint's default."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus sampling, above 0; unset: the endpoint's default."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seed; the request's number is added; unset: none is sent."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """More keys of every request, such as reasoning_effort = "low"."""

    @field_validator("extra")
    @classmethod
    def _check_extra(cls, extra: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(key for key in extra if key in (*OWN_KEYS, "max_completion_tokens"))
        if taken:
            raise ValueError(f"cannot set {', '.join(taken)}: fitune sets them itself")
        try:
            json.dumps(extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"is not JSON: {error}") from error
        return extra


class MakeSpec(Table):
    """The spec of a dataset to make. Relative paths are relative to the spec's folder."""

    model_config = ConfigDict(title="spec")

    source: SourceTable
    persona: PersonaTable
    output: MadeTable
    endpoint: EndpointTable
    limits: LimitsTable = Field(default_factory=LimitsTable)
    generation: GenerationTable = Field(default_factory=GenerationTable)

    @field_validator("output")
    @classmethod
    def _check_passage(cls, output: MadeTable, info: ValidationInfo) -> MadeTable:
        source = info.data.get("source")
        if source is not None and output.include_passage and source.documents is None:
            raise ValueError("include_passage needs source.documents: a topic is no passage")
        return output

    @field_validator("limits")
    @classmethod
    def _check_cost(cls, limits: LimitsTable, info: ValidationInfo) -> LimitsTable:
        endpoint = info.data.get("endpoint")
        if endpoint is not None and limits.max_cost is not None and endpoint.price_output is None:
            raise ValueError("max_cost needs endpoint.price_input and endpoint.price_output")
        return limits

    @property
    def requests_needed(self) -> int:
        """Requests for all rows if none is rejected."""
        return math.ceil(self.output.rows / self.generation.questions_per_request)

    @property
    def max_requests(self) -> int:
        """`limits.max_requests`, or twice what is needed."""
        return self.limits.max_requests or 2 * self.requests_needed


@dataclass(frozen=True, kw_only=True)
class SpecFile:
    """A valid spec and the file that it came from."""

    path: Path
    spec: MakeSpec

    def resolve(self, written: str) -> Path:
        """The path that `written` means in this spec: `~` is the home folder, relative is to the spec's folder."""
        try:
            return self.path.parent / Path(written).expanduser()
        except RuntimeError as error:
            raise RecipeError(
                [Problem(where=printable(self.path), what=f'"{written}": there is no such user')]
            ) from error


def load_spec(path: Path, limits: Mapping[str, int | float | None]) -> SpecFile:
    """The spec in a TOML file, with those `limits` that are not None instead of its own; all problems at once."""
    given = parse_toml(read_text(path), path, hint="`fitune data make --example` prints a spec to start from")
    return make_spec_file(path, given, limits)


def make_spec_file(path: Path, given: dict[str, Any], limits: Mapping[str, int | float | None]) -> SpecFile:
    """The spec that the tables of a file are."""
    overridden = {key: value for key, value in limits.items() if value is not None}
    table = given.setdefault("limits", {}) if overridden else None
    if isinstance(table, dict):
        table.update(overridden)

    def locate(key: Key) -> str:
        if key[0] == "limits" and key[-1] in overridden:
            return f"--{str(key[-1]).replace('_', '-')}"
        return f"{printable(path)}: {render_key(key)}"

    try:
        return SpecFile(path=path, spec=MakeSpec.model_validate(given))
    except ValidationError as error:
        raise RecipeError(make_problems(error, given, locate, _make_schema())) from error


@cache
def _make_schema() -> dict[str, Any]:
    return make_document_schema(MakeSpec)


def read_example() -> str:
    """The spec that ships with fitune: Pavlos, the cheese expert."""
    return (Path(__file__).parent / "data" / "make" / "pavlos.toml").read_text(encoding="utf-8")
