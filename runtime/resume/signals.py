"""Ctrl-C and SIGTERM end a run in good order: after the step that is going on, with a checkpoint. A second one ends the
process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asks the run to end.

    number: of the signal
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count: 130 or 143."""
        return 128 + self.number


def find_signal(error: KeyboardInterrupt) -> int:
    """The signal behind an interruption: SIGINT where nothing else is known."""
    return error.number if isinstance(error, Stopped) else signal.SIGINT


class StopSignals:
    """Turns the first SIGINT or SIGTERM into `Stopped`, raised at once or where a step has ended; a context manager.

    From then on the kernel handles them, so a second one ends the process even within a long computation. Outside the
    main thread, which alone gets signals, nothing is changed.

    waits_for: what is said to go on first where the first one has to wait
    """

    def __init__(self, *, waits_for: str = "this step is finished first") -> None:
        self._notice = f"\ninterrupted: {waits_for}; once more to stop at once\n".encode()
        self._before: dict[int, Any] = {}
        self._received: int | None = None
        self._is_deferring = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for one in STOPPING:
            signal.signal(one, signal.SIG_DFL)
        self._received = number
        if not self._is_deferring:
            raise Stopped(number)
        os.write(2, self._notice)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A signal that arrives in here is raised at the end: weights and optimizer states then belong together."""
        self._is_deferring = True
        try:
            yield
        finally:
            self._is_deferring = False
        if self._received is not None:
            received, self._received = self._received, None
            raise Stopped(received)
