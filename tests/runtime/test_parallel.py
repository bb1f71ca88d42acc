"""Work on many items at a time gives what it gives one after the other."""

from __future__ import annotations

import os
import signal

import pytest

from fitune.runtime.parallel import count_processes, run_each


def always(_: int) -> bool:
    return True


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_item_of_every_group_comes_once_with_its_result(processes: int) -> None:
    groups = [[3, 1, 2], [], list(range(10, 20))]
    found = list(run_each(groups, square, may_start=always, processes=processes))
    assert sorted((item, result) for item, (result, _) in found) == sorted(
        (n, n * n) for group in groups for n in group
    )
    workers = {pid for _, (_, pid) in found}
    assert (workers == {os.getpid()}) == (processes == 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_group_is_started_before_the_next_one(processes: int) -> None:
    started: list[int] = []

    def may_start(item: int) -> bool:
        started.append(item)
        return True

    list(run_each([[1, 2, 3, 4], [11, 12, 13]], square, may_start=may_start, processes=processes))
    assert set(started[:4]) == {1, 2, 3, 4}


@pytest.mark.parametrize("processes", [1, 2])
def test_nothing_more_is_started_when_time_is_over(processes: int) -> None:
    left = [True, True, True]
    found = list(run_each([range(20)], square, may_start=lambda _: bool(left and left.pop()), processes=processes))
    assert len(found) == 3


def test_the_work_of_a_process_that_was_killed_is_done_here() -> None:
    parent = os.getpid()

    def work(number: int) -> int:
        if number == 5 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return -number

    assert sorted(run_each([range(9)], work, may_start=always, processes=2)) == [(n, -n) for n in range(9)]


def test_an_error_of_the_work_is_raised_here() -> None:
    def work(number: int) -> int:
        return 1 // (number - 4)

    with pytest.raises(ZeroDivisionError):
        list(run_each([range(9)], work, may_start=always, processes=2))


def test_one_item_needs_no_process_of_its_own() -> None:
    assert [count_processes(items) for items in (0, 1, 2, 3)] == [1, 1, 1, 1]
