"""Work on many items at a time, in processes that share what this one has in memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar, cast

from .machine.host import probe_cpu, probe_host_memory

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST_PROCESSES = 4
"""More would trace what others have traced."""
PROCESS_BYTES = 2 * 2**30
"""RAM that each may come to take beside what is shared: the traces of a large model."""


def count_processes(items: int) -> int:
    """Processes for so many items: as many as the CPU and RAM have room for, one where processes cannot be forked
    safely."""
    if not sys.platform.startswith("linux"):
        return 1
    room = probe_host_memory().available_bytes // PROCESS_BYTES
    return max(1, min(items // 2, probe_cpu().cores, room, MOST_PROCESSES))


def run_each(
    groups: Sequence[Sequence[Item]],
    function: Callable[[Item], Result],
    *,
    may_start: Callable[[Item], bool],
    processes: int,
) -> Iterator[tuple[Item, Result]]:
    """(item, result) of every item that may be started, as they come; all of a group are started before the next one.

    Every other process takes items from the end of a group, so that each one's are neighbours.
    """
    queues = [list(group) for group in groups if group]
    workers = [_Worker(function) for _ in range(processes)] if processes > 1 else []
    try:
        if not workers:
            yield from ((item, function(item)) for group in queues for item in group if may_start(item))
            return
        idle, busy = list(workers), dict[Any, _Worker[Item, Result]]()
        while idle or busy:
            for worker in idle:
                item = _take(queues, from_end=workers.index(worker) % 2 == 1)
                if item is not None and may_start(item):
                    worker.start(item)
                    busy[worker.connection] = worker
            idle = [busy.pop(connection) for connection in wait(list(busy))] if busy else []
            yield from [worker.finish(function) for worker in idle]
    finally:
        for worker in workers:
            worker.stop()


def _take(queues: list[list[Item]], *, from_end: bool) -> Item | None:
    while queues and not queues[0]:
        del queues[0]
    return queues[0].pop(-1 if from_end else 0) if queues else None


class _Worker(Generic[Item, Result]):
    """A forked process that applies a function to one item after the other."""

    def __init__(self, function: Callable[[Item], Result]) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, function), daemon=True)
        self._item: Item | None = None
        with warnings.catch_warnings():
            # From Python 3.12 on a fork beside threads is warned of: those of libraries wait for work of this process.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        other.close()

    def start(self, item: Item) -> None:
        self._item = item
        with contextlib.suppress(ConnectionError):  # of a process that has ended; finish() sees to it
            self.connection.send(item)

    def finish(self, function: Callable[[Item], Result]) -> tuple[Item, Result]:
        """The item that was started and its result; where the process has ended, as for want of memory, the work is
        done here."""
        item = cast(Item, self._item)
        try:
            return item, self.connection.recv()
        except (EOFError, ConnectionError):
            return item, function(item)

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection[Any, Any], function: Callable[[Any], Any]) -> None:
    """Ctrl-C is the other process's; OpenMP's threads are not there after a fork."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        connection.send(function(connection.recv()))
