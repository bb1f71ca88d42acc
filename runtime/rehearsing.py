"""Rehearsals for plans: one for a plan alone, and those of a view's many plans, which share traces and a time limit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.status import Status

from ..planner.clock import Clock, fit_to_rows, make_row_clock
from ..planner.plan import Plan, PlanInputs, count_planned_steps
from ..planner.search import Measure
from ..planner.views import Case
from ..recipes.errors import FituneError
from .parallel import count_processes, run_each

if TYPE_CHECKING:
    from .rehearsal.evaluation import Passes
    from .rehearsal.trace import Traces

TRACES_KEPT = 4
"""Models and lengths of rows whose traces stay in memory: some MB for each way to run a step."""


class Rehearsals:
    """Rehearsals of the step; those of the same model on rows of the same length share their traces."""

    def __init__(self) -> None:
        self._traces: dict[tuple[str, int, int | None, Passes], Traces] = {}

    def find(self, config: Mapping[str, Any], inputs: PlanInputs) -> tuple[Measure | None, Clock | None]:
        """The rehearsal of the step as a measuring function and a clock; None where it does not apply.

        It knows what CUDA allocates, so the memory of a plan for a CPU comes from closed forms, as without torch.
        """
        try:
            from .rehearsal.measure import Rehearsal
        except ImportError:
            return None, None
        if inputs.device.kind == "cpu":
            return None, self._make_cpu_clock(config, inputs)
        traces, merge = self._find_traces(config, inputs), inputs.recipe_file.recipe.output.merge
        documents = inputs.data.document_tokens
        rehearsal = Rehearsal(traces, inputs.shape, inputs.device, merge=merge, document_tokens=documents)
        return rehearsal.measure, fit_to_rows(rehearsal.time, inputs.device, inputs.data)

    @staticmethod
    def _make_cpu_clock(config: Mapping[str, Any], inputs: PlanInputs) -> Clock | None:
        """Steps timed on this machine; None where its rates are not known."""
        from .rehearsal.cpu_clock import CpuClock

        rates, data = inputs.device.rates, inputs.data
        if rates is None:
            return None
        steps = count_planned_steps(inputs.recipe_file.recipe, data.rows)
        quick = make_row_clock(inputs.shape, inputs.device, data)
        return CpuClock(config, inputs.shape, data, rates, steps=steps, quick=quick)

    def _find_traces(self, config: Mapping[str, Any], inputs: PlanInputs) -> Traces:
        from .rehearsal.evaluation import Passes
        from .rehearsal.trace import Traces

        length, documents = inputs.data.longest_row_tokens, inputs.data.documents_per_row
        data = inputs.recipe_file.recipe.data
        holds_out = data.eval is not None
        passes = Passes(evaluates=holds_out or data.forgetting is not None, answers=holds_out)
        key = json.dumps(config, sort_keys=True, default=str), length, documents, passes
        traces = self._traces.pop(key, None)
        traces = traces or Traces(config, sequence_length=length, documents_per_row=documents, passes=passes)
        self._traces[key] = traces
        while len(self._traces) > TRACES_KEPT:
            del self._traces[next(iter(self._traces))]
        return traces


class TimedRehearser:
    """Rehearses the cases of a view until its time is over, with a line on a terminal that says how far it is.

    is_over: whether time ran out with cases left
    """

    def __init__(self, console: Console, limit_seconds: float) -> None:
        self.is_over = False
        self._limit_seconds = limit_seconds
        self._start: float | None = None
        self._rehearsals = Rehearsals()
        self._status = Status("", console=console) if console.is_terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._status is not None:
            self._status.stop()

    def plan_each(
        self, cases: Sequence[Case], groups: Sequence[Sequence[int]], plan: Callable[[int], Plan | FituneError]
    ) -> Iterator[tuple[int, Plan | FituneError]]:
        """See planner.views.Rehearser; several at a time where the CPU has the cores."""
        numbers, total = count(), sum(map(len, groups))
        processes = count_processes(total) if self._can_rehearse() else 1

        def may_start(number: int) -> bool:
            return self.may_go_on(cases[number], done=next(numbers), total=total)

        return run_each(groups, plan, may_start=may_start, processes=processes)

    @staticmethod
    def _can_rehearse() -> bool:
        """Whether there is torch; it is imported here, once for all processes."""
        with contextlib.suppress(ImportError):
            from .rehearsal import measure  # noqa: F401

            return True
        return False

    def may_go_on(self, case: Case, *, done: int, total: int | None) -> bool:
        """See planner.views.Rehearser; time counts from the first call."""
        now = monotonic()
        if self._start is None:
            self._start = now
        seconds = now - self._start
        self.is_over = seconds >= self._limit_seconds
        if self._status is not None and not self.is_over:
            of = "" if total is None else f" of {total}"
            self._status.update(
                f"rehearsing {case.name}: {done + 1}{of}, {seconds:.0f} s of at most {self._limit_seconds:.0f} s"
            )
            self._status.start()
        return not self.is_over

    def rehearse(self, case: Case) -> tuple[Measure | None, Clock | None]:
        """See planner.views.Rehearser; many plans for a CPU are made by closed forms."""
        if case.inputs.device.kind == "cpu":
            return None, None
        return self._rehearsals.find(case.config, case.inputs)
