"""What `fitune data make` may spend and how fast: money, requests, tokens a minute, and waiting after a failure."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from ...recipes.make_spec import MakeSpec
from .prompts import Request

WINDOW_SECONDS = 60.0
MAX_ATTEMPTS = 6
"""Attempts at one request before the run stops: with exponential backoff half a minute on average, a minute at most."""
LONGEST_BACKOFF_SECONDS = 60.0
TOKENS_OF_A_PRICE = 1_000_000


def choose_wait(failures: int, after_seconds: float | None) -> float:
    """Seconds before the next attempt after `failures` of them, 1 or more.

    Exponential backoff with full jitter, uniform in 0 ... min(60, 2^(failures - 1)) (Brooker, Exponential backoff and
    jitter, AWS Architecture Blog, 2015); where the endpoint says how long, that and up to a second more.
    """
    if after_seconds is not None:
        return after_seconds + random.uniform(0, 1)
    return random.uniform(0, min(LONGEST_BACKOFF_SECONDS, 2.0 ** (failures - 1)))


@dataclass(kw_only=True)
class Sent:
    """A request in the window: when it was sent, and its tokens, most until its answer tells them."""

    at: float
    tokens: int


class Pacer:
    """At most so many requests, and so many tokens, in any 60 seconds; None is no limit. Times are of one clock."""

    def __init__(self, *, requests: int | None, tokens: int | None) -> None:
        self._requests, self._tokens = requests, tokens
        self._window = deque[Sent]()

    def find_wait(self, now: float, tokens: int) -> float:
        """Seconds until a request of `tokens` may be sent; one larger than the limit waits for an empty window."""
        while self._window and self._window[0].at <= now - WINDOW_SECONDS:
            self._window.popleft()
        count, total, wait = len(self._window), sum(one.tokens for one in self._window), 0.0
        for oldest in self._window:
            enough_requests = self._requests is None or count < self._requests
            if enough_requests and (self._tokens is None or total + tokens <= self._tokens):
                break
            wait = oldest.at + WINDOW_SECONDS - now
            count, total = count - 1, total - oldest.tokens
        return wait

    def record(self, now: float, tokens: int) -> Sent:
        """A request is sent; the value that comes back may be told its true tokens."""
        sent = Sent(at=now, tokens=tokens)
        self._window.append(sent)
        return sent


class Ledger:
    """What was spent, and what requests under way may still cost.

    requests:       requests sent
    answers:        answers that came
    lost:           requests whose answer never came, although it may be charged for
    uncounted:      answers whose tokens the endpoint did not tell; they count at their bound, as lost ones do
    prompt_tokens, answer_tokens: by the endpoint's count
    cost:           of all that came or was lost, 0 without prices
    """

    def __init__(self, spec: MakeSpec) -> None:
        self._price_input, self._price_output = spec.endpoint.price_input, spec.endpoint.price_output
        self._max_cost, self._max_requests = spec.limits.max_cost, spec.max_requests
        self._under_way = 0.0
        self.requests = self.answers = self.lost = self.uncounted = self.prompt_tokens = self.answer_tokens = 0
        self.cost = 0.0

    def price(self, prompt_tokens: int, answer_tokens: int) -> float:
        """Cost of so many tokens, 0 without prices."""
        if self._price_input is None or self._price_output is None:
            return 0.0
        return (prompt_tokens * self._price_input + answer_tokens * self._price_output) / TOKENS_OF_A_PRICE

    def bound(self, request: Request) -> float:
        """The most that a request can cost."""
        return self.price(request.max_prompt_tokens, request.max_answer_tokens)

    def find_limit(self, request: Request) -> str | None:
        """Which limit forbids one more request, None where none does. What is under way counts at its bound."""
        if self.requests >= self._max_requests:
            return f"limits.max_requests = {self._max_requests:,} is reached"
        bound, spent = self.bound(request), self.cost + self._under_way
        if self._max_cost is not None and spent + bound > self._max_cost:
            return (
                f"limits.max_cost = {self._max_cost:g}: {spent:.4f} is spent or under way, and the next request can "
                f"cost up to {bound:.4f}"
            )
        return None

    def send(self, request: Request) -> None:
        """A request goes out."""
        self.requests += 1
        self._under_way += self.bound(request)

    def end(self, request: Request) -> None:
        """A request of this process is no longer under way; what it cost is told apart from this."""
        self._under_way -= self.bound(request)

    def count_answer(self, request: Request, prompt_tokens: int | None, answer_tokens: int | None) -> None:
        """An answer came."""
        self.answers += 1
        if prompt_tokens is None or answer_tokens is None:
            self.uncounted += 1
            self.cost += self.bound(request)
            return
        self.prompt_tokens += prompt_tokens
        self.answer_tokens += answer_tokens
        self.cost += self.price(prompt_tokens, answer_tokens)

    def count_lost(self, request: Request) -> None:
        """An answer that may be charged for never came."""
        self.lost += 1
        self.cost += self.bound(request)
