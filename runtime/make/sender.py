"""Sends requests to an endpoint, several at once, within all limits, and again where that may help."""

from __future__ import annotations

import heapq
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Literal, Protocol

from ...recipes.make_spec import MakeSpec
from ..resume.signals import Stopped, StopSignals
from .client import Answered, Client, Failed, Outcome, Refused
from .limits import MAX_ATTEMPTS, Ledger, Pacer, Sent, choose_wait
from .prompts import Request

LONGEST_WAIT_SECONDS = 300.0
"""An endpoint that asks to wait longer is not waited for: the run ends, and goes on when it is started again."""
POLL_SECONDS = 0.5

Status = Literal["finished", "limit", "failed", "interrupted"]


class Work(Protocol):
    """What a Sender sends, and who gets what comes of it. All calls come from the Sender's own thread."""

    def peek(self, coming: int) -> Request | None:
        """The next new request, None where the `coming` ones suffice for now."""

    def pop(self) -> None:
        """The request that `peek` showed is being sent."""

    def keep(self, request: Request, answer: Answered) -> str | None:
        """An answer came; a phrase where it is no use to send more."""

    def lose(self, request: Request, why: str) -> None:
        """An answer that may be charged for never came."""

    def show(self, under_way: int) -> None:
        """Something changed."""

    def note(self, message: str) -> None:
        """Something happened that a user should know."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How it ended.

    status:  finished; limit where one was reached; failed where the endpoint or its answers were no use; interrupted
    why:     a phrase for people, None of a finished one
    signal:  what interrupted it, None without one
    """

    status: Status
    why: str | None = None
    signal: int | None = None


@dataclass(order=True, kw_only=True)
class Attempt:
    """A request that is to be sent, not before a moment of the monotonic clock; `failures` counts earlier attempts."""

    not_before: float = 0.0
    index: int
    request: Request = field(compare=False)
    failures: int = field(default=0, compare=False)


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What came of an attempt: an outcome, or an error that nobody expected."""

    attempt: Attempt
    sent: Sent
    outcome: Outcome | Exception


class Sender:
    """One thread decides, one more for each request under way only waits for its answer."""

    def __init__(self, spec: MakeSpec, client: Client, ledger: Ledger, work: Work) -> None:
        limits = spec.limits
        self._client, self._ledger, self._work = client, ledger, work
        self._concurrency = limits.concurrency
        self._pacer = Pacer(requests=limits.requests_per_minute, tokens=limits.tokens_per_minute)
        self._retries: list[Attempt] = []
        self._under_way = 0
        self._pause_until = 0.0
        self._failures = 0
        self._inbox = SimpleQueue[Arrival]()
        self._ending: Ending | None = None

    def run(self) -> Ending:
        """Until nothing more is wanted and nothing is under way; Ctrl-C or SIGTERM: until nothing is under way."""
        with StopSignals(waits_for="what is under way will be charged for and is waited for") as signals:
            while True:
                try:
                    with signals.deferred():  # an answer that came is never dropped
                        if not self._go_on():
                            return self._ending or Ending(status="finished")
                except Stopped as stopped:
                    self._ending = Ending(status="interrupted", why="interrupted", signal=stopped.number)

    def _go_on(self) -> bool:
        """Send what may go, and take what comes within half a second; False where there is nothing left to do."""
        wait = self._send_what_may_go()
        self._work.show(self._under_way)
        if wait is None and not self._under_way:
            return False
        with suppress(Empty):
            self._take(self._inbox.get(timeout=min(POLL_SECONDS, POLL_SECONDS if wait is None else wait)))
        return True

    def _send_what_may_go(self) -> float | None:
        """Send what may go now; returns the seconds until more may, None where nothing more is wanted."""
        while self._ending is None:
            now = time.monotonic()
            attempt = self._choose(now)
            if attempt is None:
                return None
            if self._under_way >= (1 if self._failures else self._concurrency):
                return POLL_SECONDS
            limit = self._ledger.find_limit(attempt.request)
            if limit is not None:
                self._end("limit", limit)
                return None
            tokens = attempt.request.max_prompt_tokens + attempt.request.max_answer_tokens
            wait = max(attempt.not_before - now, self._pause_until - now, self._pacer.find_wait(now, tokens))
            if wait > 0:
                return wait
            self._send(attempt, self._pacer.record(now, tokens))
        return None

    def _choose(self, now: float) -> Attempt | None:
        """What goes next: an attempt that is due again, else a new request if one is wanted, else the next again."""
        again = self._retries[0] if self._retries else None
        if again is not None and again.not_before <= now:
            return again
        request = self._work.peek(self._under_way + len(self._retries))
        return again if request is None else Attempt(index=request.index, request=request)

    def _send(self, attempt: Attempt, sent: Sent) -> None:
        if self._retries and self._retries[0] is attempt:
            heapq.heappop(self._retries)
        else:
            self._work.pop()
        self._ledger.send(attempt.request)
        self._under_way += 1

        def send() -> None:
            try:
                outcome: Outcome | Exception = self._client.send(attempt.request.body)
            except Exception as error:
                outcome = error
            self._inbox.put(Arrival(attempt=attempt, sent=sent, outcome=outcome))

        # Daemons: the process can end without their answers.
        threading.Thread(target=send, daemon=True).start()

    def _take(self, arrival: Arrival) -> None:
        request, outcome = arrival.attempt.request, arrival.outcome
        self._under_way -= 1
        self._ledger.end(request)
        if isinstance(outcome, Answered):
            self._failures = 0
            if outcome.prompt_tokens is not None and outcome.answer_tokens is not None:
                arrival.sent.tokens = outcome.prompt_tokens + outcome.answer_tokens
            useless = self._work.keep(request, outcome)
            if useless is not None:
                self._end("failed", useless)
        elif isinstance(outcome, Failed):
            if outcome.maybe_paid:
                self._work.lose(request, outcome.why)
            self._try_again(arrival.attempt, outcome)
        elif isinstance(outcome, Refused):
            self._end("failed", outcome.why)
        else:
            raise outcome

    def _try_again(self, attempt: Attempt, failed: Failed) -> None:
        """Later, and nothing else before; then one request at a time until an answer comes.

        What one request met, the others would meet too: those that fail while all wait already are not a further
        failure of the endpoint.
        """
        now, failures, after = time.monotonic(), attempt.failures + 1, failed.after_seconds
        is_new = now >= self._pause_until
        self._failures += is_new
        if after is not None and after > LONGEST_WAIT_SECONDS:
            self._end("failed", f"{failed.why} (the endpoint asks to wait {after:,.0f} s: start again then)")
        elif max(failures, self._failures) >= MAX_ATTEMPTS:
            self._end("failed", f"{MAX_ATTEMPTS} attempts failed, the last one: {failed.why}")
        elif self._ending is None:
            wait = choose_wait(max(failures, self._failures), after)
            self._pause_until = max(self._pause_until, now + wait)
            again = Attempt(not_before=now + wait, index=attempt.index, request=attempt.request, failures=failures)
            heapq.heappush(self._retries, again)
            if is_new:
                self._work.note(f"{failed.why}: trying again in {wait:.1f} s")

    def _end(self, status: Status, why: str) -> None:
        """Send nothing more; what is under way is waited for, as it will be charged for."""
        if self._ending is None:
            self._ending = Ending(status=status, why=why)
