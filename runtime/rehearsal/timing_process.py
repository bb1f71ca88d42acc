"""Steps timed in a process of their own, so that the memory of a run that follows a plan is the run's."""

from __future__ import annotations

import multiprocessing
import signal
import weakref
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from ...planner.strategy import Strategy
from ...recipes.errors import TraceError
from ..quiet import quiet_bitsandbytes_import

if TYPE_CHECKING:
    from .timed_step import StepSeconds


class TimingProcess:
    """time_step_on_cpu in another process, which starts with the first step and ends with this object.

    It is spawned: one that was forked beside OpenMP's threads would wait for them for ever. What is left of timing, 140
    MiB of generated code and buffers, ends with it; so does a process that the kernel kills for its memory.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __call__(
        self, config: Mapping[str, Any], strategy: Strategy, *, rows: int, length: int, documents_per_row: int
    ) -> StepSeconds:
        """As time_step_on_cpu; TraceError where the process died."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
            weakref.finalize(self, self._pool.shutdown, cancel_futures=True)
        # Ctrl-C is for this process; the mask is inherited by the one that the first task starts.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            timed = self._pool.submit(
                _time_quietly, dict(config), strategy, rows=rows, length=length, documents_per_row=documents_per_row
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            return timed.result()
        except BrokenExecutor as error:
            raise TraceError(f"the process that timed a step ended: {error}") from error


def _time_quietly(config: dict[str, Any], strategy: Strategy, **sizes: int) -> StepSeconds:
    """time_step_on_cpu, without what bitsandbytes says of itself when it is imported."""
    quiet_bitsandbytes_import()
    from .timed_step import time_step_on_cpu

    return time_step_on_cpu(config, strategy, **sizes)
