"""One request to an endpoint that speaks OpenAI's chat completions, and what came of it.

The key is read from the environment, sent in a header, and taken out of every text that comes back.
"""

from __future__ import annotations

import email.utils
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

import httpx2

from ...recipes.errors import DataError
from ...recipes.load import printable
from ...recipes.make_spec import EndpointTable, SpecFile
from ..redaction import redact

MAX_ANSWER_BYTES = 16 * 2**20
CONNECT_SECONDS = 15.0
LONG_KEY_CHARACTERS = 16
"""A key of this length is a secret; a shorter one, such as `none` or `ollama`, is a word that answers may hold."""
RETRIED_STATUS = frozenset({408, 409, 425, 429, *range(500, 600)})
"""What may pass: OpenAI's own client retries 408, 409, 429 and 5xx; 425 is "too early"."""
QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
"""A 429 that does not pass by waiting: the account has no money left."""
SHOWN_CHARACTERS = 300
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Answered:
    """An answer that was paid for.

    content:        its text, None where there was none
    finish_reason:  why it ended: `stop`, or `length` where it was cut off at max_tokens, or another
    refusal:        the model's refusal, None where it did not refuse
    prompt_tokens, answer_tokens: by the endpoint's count, None where it did not say
    """

    content: str | None
    finish_reason: str | None
    refusal: str | None
    prompt_tokens: int | None
    answer_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Failed:
    """An attempt without an answer, which another one may have.

    why:            a phrase for people
    after_seconds:  how long the endpoint asks to wait, None where it does not
    maybe_paid:     whether the endpoint may have made, and charged for, an answer that never came
    """

    why: str
    after_seconds: float | None = None
    maybe_paid: bool = False


@dataclass(frozen=True, kw_only=True)
class Refused:
    """An attempt that fails again however often it is made; `why` is a phrase for people."""

    why: str


Outcome = Answered | Failed | Refused


def read_key(spec_file: SpecFile) -> str | None:
    """The key from the variable that the spec names, None where it names none; DataError where it cannot be used."""
    name = spec_file.spec.endpoint.api_key_env
    if name is None:
        return None
    where = f"{printable(spec_file.path)}: endpoint.api_key_env"
    key = os.environ.get(name, "").strip()
    if not key:
        raise DataError(f"{where}: there is no environment variable of that name, or it is empty: export it first")
    if not (key.isascii() and key.isprintable()):
        raise DataError(f"{where}: the variable holds characters that no key has (it is not shown here)")
    return key


class Client:
    """Sends requests to one endpoint; may be used by several threads at once. A context manager."""

    def __init__(self, endpoint: EndpointTable, key: str | None) -> None:
        self._endpoint, self._key = endpoint, key
        headers = {"User-Agent": f"fitune/{version('fitune')}", "Accept": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        # Redirects are not followed: they could carry the key to another host.
        timeout = httpx2.Timeout(endpoint.timeout_seconds, connect=min(CONNECT_SECONDS, endpoint.timeout_seconds))
        self._client = httpx2.Client(headers=headers, timeout=timeout, limits=httpx2.Limits(max_connections=None))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def send(self, body: Mapping[str, Any]) -> Outcome:
        """Post one request and read its answer, within the endpoint's timeout."""
        url = f"{self._endpoint.base_url}/chat/completions"
        deadline = time.monotonic() + self._endpoint.timeout_seconds
        try:
            with self._client.stream("POST", url, json=body) as response:
                content = bytearray()
                for part in response.iter_bytes():
                    content += part
                    if len(content) > MAX_ANSWER_BYTES:
                        return Failed(why="the answer is larger than 16 MiB", maybe_paid=True)
                    if time.monotonic() > deadline:
                        raise httpx2.ReadTimeout("the whole answer took too long")
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            return Failed(why=self._clean(f"no connection to {self._endpoint.base_url}: {_name(error)}"))
        except httpx2.TimeoutException:
            return Failed(why=f"no answer within {self._endpoint.timeout_seconds:g} s", maybe_paid=True)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.ProxyError) as error:
            return Refused(why=self._clean(f"{self._endpoint.base_url}: {_name(error)}"))
        except httpx2.HTTPError as error:
            return Failed(why=self._clean(f"the connection broke: {_name(error)}"), maybe_paid=True)
        return self._read(response.status_code, response.headers, bytes(content))

    def _read(self, status: int, headers: Mapping[str, str], content: bytes) -> Outcome:
        text = content.decode("utf-8", errors="replace")
        if self._key is not None and len(self._key) >= LONG_KEY_CHARACTERS:
            text = text.replace(self._key, "[key]")
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            document = None
        problem = document.get("error") if isinstance(document, dict) else None
        if status == 200 and not problem:
            return _read_answer(document) or Failed(
                why=self._clean(f"HTTP 200 without a chat completion: {text}"), maybe_paid=True
            )
        # Some gateways answer 200 with the error, and its true status as the code.
        code = problem.get("code") if isinstance(problem, dict) else None
        status = code if status == 200 and isinstance(code, int) else status
        message = problem.get("message") if isinstance(problem, dict) else problem or text
        why = self._clean(f"HTTP {status}: {message}")
        if status == 401 and self._endpoint.api_key_env is None:
            return Refused(why=f"{why} (the endpoint wants a key: set endpoint.api_key_env)")
        if status in (401, 403):
            return Refused(why=f"{why} (the key in ${self._endpoint.api_key_env or '(none)'} was refused)")
        if status == 200 or (status in RETRIED_STATUS and code not in QUOTA_CODES):
            return Failed(why=why, after_seconds=parse_retry_after(headers, time.time()), maybe_paid=status == 200)
        return Refused(why=why + self._advise(status, str(message)))

    def _advise(self, status: int, message: str) -> str:
        if 300 <= status < 400:
            return " (a redirect: set endpoint.base_url to where it leads)"
        if status == 404:
            return " (is endpoint.base_url right, with its /v1, and endpoint.model?)"
        for word, key in (("response_format", "response_format"), ("max_tokens", "max_tokens_key")):
            if word in message:
                return f" (set generation.{key})"
        return ""

    def _clean(self, text: str) -> str:
        """What may be shown: without the key and other secrets, in one line, without control characters, cut."""
        if self._key is not None:
            text = text.replace(self._key, "[key]")
        text = redact(text)
        line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
        return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 1] + "…"


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait by `retry-after-ms` (OpenAI's) or `Retry-After`, a number or a date (RFC 9110, 10.2.3)."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (TypeError, ValueError):
        return None
    return max(0.0, date.timestamp() - now)


def _read_answer(document: object) -> Answered | None:
    """The first choice of a chat completion, None where the document is none."""
    try:
        choice = document["choices"][0]  # type: ignore[index]
        message, reason = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
    except (TypeError, KeyError, IndexError, AttributeError):
        return None
    usage = document.get("usage") if isinstance(document, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    return Answered(
        content=_read_text(content),
        finish_reason=_read_text(reason),
        refusal=_read_text(refusal) or None,
        prompt_tokens=_read_count(usage.get("prompt_tokens")),
        answer_tokens=_read_count(usage.get("completion_tokens")),
    )


def _read_count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _read_text(value: object) -> str | None:
    """A text with U+FFFD, as a decoder has it, for what is not Unicode: half a surrogate pair."""
    return SURROGATES.sub("\ufffd", value) if isinstance(value, str) else None


def _name(error: Exception) -> str:
    return str(error) or type(error).__name__
