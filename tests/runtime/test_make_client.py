"""One request over real HTTP, and what came of it."""

from __future__ import annotations

import json
import socket
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from stub_endpoint import Reply, complete, fail, run_stub

from fitune.recipes.errors import DataError
from fitune.recipes.make_spec import EndpointTable, MakeSpec, SpecFile
from fitune.runtime.make.client import Answered, Client, Failed, Outcome, Refused, parse_retry_after, read_key

KEY = "sk-0123456789abcdefghij"


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def send_to(url: str, *, key: str | None = KEY, timeout_seconds: float = 5.0, **fields: Any) -> Outcome:
    name = {} if key is None else {"api_key_env": "MY_KEY"}
    endpoint = EndpointTable(base_url=url, model="m", timeout_seconds=timeout_seconds, **name, **fields)
    with Client(endpoint, key) as client:
        return client.send({"model": "m", "messages": []})


def send(reply: Reply, **options: Any) -> Outcome:
    with run_stub(lambda number, body: reply) as stub:
        return send_to(stub.url, **options)


def test_an_answer_comes_with_its_tokens_and_the_key_goes_in_a_header_only() -> None:
    with run_stub(lambda number, body: complete("hello")) as stub:
        outcome = send_to(stub.url)
    assert outcome == Answered(content="hello", finish_reason="stop", refusal=None, prompt_tokens=100, answer_tokens=50)
    (received,) = stub.received
    assert received.headers["Authorization"] == f"Bearer {KEY}"
    assert received.headers["User-Agent"].startswith("fitune/")
    assert KEY not in json.dumps(received.body)


def test_without_a_key_no_authorization_is_sent() -> None:
    with run_stub(lambda number, body: complete("hello")) as stub:
        send_to(stub.url, key=None)
    assert "Authorization" not in stub.received[0].headers


@pytest.mark.parametrize("usage", [{}, "much", {"prompt_tokens": -1, "completion_tokens": True}])
def test_tokens_that_the_endpoint_does_not_tell_are_not_made_up(usage: object) -> None:
    outcome = send(complete("hello", usage=usage))
    assert isinstance(outcome, Answered)
    assert (outcome.prompt_tokens, outcome.answer_tokens) == (None, None)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_what_may_pass_is_tried_again_and_is_not_paid(status: int) -> None:
    assert send(fail(status)) == Failed(why=f"HTTP {status}: try later")


def test_the_wait_that_the_endpoint_asks_for_is_read() -> None:
    outcome = send(fail(429, Retry_After="7"))
    assert isinstance(outcome, Failed)
    assert outcome.after_seconds == 7


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "20", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": formatdate(1030, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(900, usegmt=True)}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers: dict[str, str], seconds: float | None) -> None:
    assert parse_retry_after(headers, 1000.0) == seconds


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (
            fail(401, f"Incorrect API key provided: {KEY}"),
            "HTTP 401: Incorrect API key provided: [key] (the key in $MY_KEY",
        ),
        (fail(403, "not yours"), "HTTP 403: not yours (the key in $MY_KEY was refused)"),
        (fail(404, "The model `m` does not exist"), "(is endpoint.base_url right, with its /v1, and endpoint.model?)"),
        (fail(400, "response_format json_schema is unknown"), "(set generation.response_format)"),
        (fail(400, "use max_completion_tokens, not max_tokens"), "(set generation.max_tokens_key)"),
        (fail(429, "You exceeded your quota", code="insufficient_quota"), "HTTP 429: You exceeded your quota"),
        (Reply(status=302, headers={"Location": "http://evil/"}, body=""), "(a redirect: set endpoint.base_url"),
        (Reply(status=400, body=b"<html>\x1b[31mno\x07</html>"), "HTTP 400: <html> [31mno </html>"),
    ],
)
def test_what_will_fail_again_is_refused_with_what_to_do_and_without_the_key(reply: Reply, why: str) -> None:
    outcome = send(reply)
    assert isinstance(outcome, Refused)
    assert why in outcome.why
    assert KEY not in outcome.why
    assert outcome.why.isprintable()


def test_another_secret_in_an_error_is_hidden_too() -> None:
    outcome = send(fail(400, "see https://me:secret@host/ with hf_abcdefghijklmnopqrstuvwxyz"))
    assert outcome == Refused(why="HTTP 400: see https://***@host/ with ***")


def test_an_endpoint_that_wants_a_key_where_the_spec_has_none_says_which_setting() -> None:
    outcome = send(fail(401, "no key"), key=None)
    assert outcome == Refused(why="HTTP 401: no key (the endpoint wants a key: set endpoint.api_key_env)")


@pytest.mark.parametrize(
    "body", [b"<html>login</html>", b"", [], {}, {"choices": []}, {"choices": [{"message": None}]}]
)
def test_a_page_in_place_of_an_answer_may_have_been_paid(body: object) -> None:
    outcome = send(Reply(body=body))
    assert isinstance(outcome, Failed)
    assert outcome.maybe_paid


def test_an_error_that_comes_with_status_200_is_the_error_that_it_names() -> None:
    assert send(Reply(body={"error": {"code": 503, "message": "busy"}})) == Failed(why="HTTP 503: busy")


def test_an_answer_that_takes_too_long_may_have_been_paid() -> None:
    outcome = send(Reply(delay_seconds=1.0), timeout_seconds=0.2)
    assert outcome == Failed(why="no answer within 0.2 s", maybe_paid=True)


def test_a_connection_that_breaks_may_have_been_paid() -> None:
    outcome = send(Reply(hang_up=True))
    assert isinstance(outcome, Failed)
    assert outcome.maybe_paid


def test_an_endpoint_that_is_not_there_is_tried_again_and_is_not_paid() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    outcome = send_to(url)
    assert isinstance(outcome, Failed)
    assert outcome.why.startswith(f"no connection to {url}: ")
    assert not outcome.maybe_paid


def test_an_answer_that_never_ends_ends_with_the_timeout() -> None:
    outcome = send(Reply(body="x" * 100, drips=True), timeout_seconds=0.5)
    assert outcome == Failed(why="no answer within 0.5 s", maybe_paid=True)


def test_a_key_that_the_endpoint_echoes_is_not_kept_and_half_a_character_is_marked() -> None:
    outcome = send(complete(f"{KEY} \ud800"))
    assert isinstance(outcome, Answered)
    assert outcome.content == "[key] \ufffd"
    short = send(complete("none of it"), key="none")
    assert isinstance(short, Answered)
    assert short.content == "none of it"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "no environment variable of that name"),
        ("  ", "it is empty"),
        ("sk-ä", "no key has"),
        ("a\nb", "no key has"),
    ],
)
def test_a_key_that_cannot_be_used_is_said_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, value: str | None, message: str
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(DataError) as caught:
        read_key(make_spec_file())
    assert message in str(caught.value)
    assert value is None or not value.strip() or value not in str(caught.value)


def make_spec_file() -> SpecFile:
    spec = MakeSpec.model_validate(
        {
            "source": {"topics": ["feta"]},
            "persona": {"name": "Pavlos", "description": "You are Pavlos."},
            "output": {"file": "out.jsonl", "rows": 8},
            "endpoint": {"base_url": "http://localhost/v1", "model": "m", "api_key_env": "MY_KEY"},
        }
    )
    return SpecFile(path=Path("spec.toml"), spec=spec)
