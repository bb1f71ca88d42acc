"""Rates, money and waiting."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.recipes.make_spec import MakeSpec
from fitune.runtime.make.limits import Ledger, Pacer, choose_wait
from fitune.runtime.make.prompts import Request, make_request
from fitune.runtime.make.sources import Passage


def make_spec(**tables: Any) -> MakeSpec:
    whole: dict[str, Any] = {
        "source": {"topics": ["feta"]},
        "persona": {"name": "Pavlos", "description": "You are Pavlos."},
        "output": {"file": "out.jsonl", "rows": 400},
        "endpoint": {"base_url": "http://localhost/v1", "model": "m", "price_input": 1.0, "price_output": 4.0},
    }
    return MakeSpec.model_validate({key: {**whole.get(key, {}), **tables.get(key, {})} for key in {**whole, **tables}})


def ask(spec: MakeSpec, index: int = 0) -> Request:
    return make_request(spec, [Passage(source=None, text="feta")], index)


@given(
    requests=st.one_of(st.none(), st.integers(1, 6)),
    tokens=st.one_of(st.none(), st.integers(100, 1000)),
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    pauses=st.lists(st.floats(0, 30), min_size=40, max_size=40),
)
def test_no_60_seconds_have_more_requests_or_tokens_than_allowed(
    requests: int | None, tokens: int | None, sizes: list[int], pauses: list[float]
) -> None:
    pacer, now, sent = Pacer(requests=requests, tokens=tokens), 0.0, list[tuple[float, int]]()
    for size, pause in zip(sizes, pauses, strict=False):
        now += pause
        now += pacer.find_wait(now, size)
        assert pacer.find_wait(now + 1e-9, size) == 0
        now += 1e-9
        pacer.record(now, size)
        sent.append((now, size))
        window = [its for at, its in sent if at > now - 60]
        assert requests is None or len(window) <= requests
        assert tokens is None or sum(window) <= tokens or len(window) == 1


def test_true_tokens_free_what_was_only_reserved() -> None:
    pacer = Pacer(requests=None, tokens=1000)
    first = pacer.record(0.0, 900)
    assert pacer.find_wait(1.0, 200) == 59.0
    first.tokens = 300
    assert pacer.find_wait(1.0, 200) == 0


@given(failures=st.integers(1, 30))
def test_waiting_grows_exponentially_up_to_a_minute(failures: int) -> None:
    assert 0 <= choose_wait(failures, None) <= min(60, 2 ** (failures - 1))


def test_what_the_endpoint_asks_for_is_waited_for() -> None:
    assert 20 <= choose_wait(1, 20.0) <= 21


def test_money_is_spent_under_way_or_left_and_never_more_than_there_is() -> None:
    spec = make_spec(limits={"max_cost": 0.05})
    ledger, spent = Ledger(spec), 0.0
    for index in range(1000):
        request = ask(spec, index)
        if ledger.find_limit(request) is not None:
            break
        ledger.send(request)
        ledger.end(request)
        ledger.count_answer(request, request.max_prompt_tokens, request.max_answer_tokens)
        spent += (request.max_prompt_tokens * 1.0 + 2048 * 4.0) / 1e6
    assert ledger.cost == pytest.approx(spent)
    assert ledger.cost <= 0.05 < ledger.cost + ledger.bound(request)
    assert "limits.max_cost = 0.05" in str(ledger.find_limit(request))


def test_requests_under_way_count_at_their_bound() -> None:
    spec = make_spec(limits={"max_cost": 0.02})
    ledger, request = Ledger(spec), ask(spec)
    ledger.send(request)
    ledger.send(request)
    assert ledger.find_limit(request) is not None
    ledger.end(request)
    ledger.count_answer(request, 10, 10)
    assert ledger.find_limit(request) is None


def test_answers_without_a_count_and_lost_ones_count_at_their_bound() -> None:
    spec = make_spec()
    ledger, request = Ledger(spec), ask(spec)
    ledger.count_answer(request, None, 7)
    ledger.count_lost(request)
    assert ledger.cost == pytest.approx(2 * ledger.bound(request))
    assert (ledger.answers, ledger.uncounted, ledger.lost) == (1, 1, 1)


@given(st.text(min_size=1, max_size=200).filter(lambda text: text.strip()))
def test_a_prompt_has_no_more_tokens_than_its_bound_by_a_byte_level_tokenizer(topic: str) -> None:
    spec = make_spec()
    request = make_request(spec, [Passage(source=None, text=topic)], 0)
    prompt = "".join(message["content"] for message in request.body["messages"])
    assert request.max_prompt_tokens > len(prompt.encode("utf-8", "surrogatepass")) >= len(prompt)
