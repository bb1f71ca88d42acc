"""The search's choice beside the best of all candidates, for jobs on a card with 24 GB: predicted times, no GPU needed.

    python -m benchmarks.search                            # every job, for 30 minutes at most
    python -m benchmarks.search --jobs 1b-full,8b-qlora --minutes 5
    python -m benchmarks.search --list

For each job the plan is made as `fitune plan` makes it. Then all candidates of its method are measured by rehearsals of
the step, memory and time, and the fastest that fits is the best. One thing is taken for granted: of candidates that
differ in the number of checkpointed layers alone, more layers need less memory and more time. So each such family is
bisected; it is left out where it is slower with its fewest layers than the best one found so far, or where closed
forms take it for half as slow again. Prints for each job the ratio of the two runs' predicted times (1.00: the search
found the best), and one JSON line. Exit code 1 where a ratio is above 1.10.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitune.planner.candidates import is_rounded
from fitune.planner.plan import make_plan, make_timer
from fitune.planner.search import Family, count_shortfall, walk_methods
from fitune.planner.show.reasons import describe_strategy
from fitune.planner.strategy import Strategy
from fitune.runtime.planning import Job
from fitune.runtime.rehearsing import Rehearsals

MOST_RATIO = 1.10
"""Of the choice's time to the best one's: beyond, the search is at fault."""
COMMON = (
    'budget.gpu = "RTX 4090"',
    'budget.host_memory = "64GiB"',
    'budget.disk = "1TB"',
    "train.max_steps = 1000",
)
GUESSED_WRONG = 1.5
"""Closed forms may take a run for so many times as slow as it is (the worst of the measured steps: 1.45)."""
JOBS: dict[str, tuple[str, ...]] = {
    "1b-full": ('model.id = "llama-3.2-1b"', 'method.kind = "full"', "train.global_batch_size = 4"),
    "1b-full-unclipped": (
        'model.id = "llama-3.2-1b"',
        'method.kind = "full"',
        'train.max_grad_norm = "off"',
        "train.global_batch_size = 4",
    ),
    "1b-lora": ('model.id = "llama-3.2-1b"', 'method.kind = "lora"', "data.max_length = 4096"),
    "1.7b-lora": ('model.id = "qwen3-1.7b"', 'method.kind = "lora"', "train.global_batch_size = 8"),
    "8b-lora": ('model.id = "llama-3.1-8b"', 'method.kind = "lora"', "train.global_batch_size = 4"),
    "8b-qlora": ('model.id = "llama-3.1-8b"', 'method.kind = "qlora"', "train.global_batch_size = 8"),
    "8b-qlora-long": (
        'model.id = "llama-3.1-8b"',
        'method.kind = "qlora"',
        "data.max_length = 8192",
        "train.global_batch_size = 2",
    ),
}
"""Keys of a recipe."""


@dataclass(kw_only=True)
class Best:
    """The fastest candidate found so far.

    strategy, seconds: of it and its whole run; None before any fits
    measured: candidates that were rehearsed
    finished: whether all were looked at in time
    """

    strategy: Strategy | None = None
    seconds: float | None = None
    measured: int = 0
    finished: bool = True

    def beats(self, seconds: float) -> bool:
        """Whether a run of so many seconds is none the better."""
        return self.seconds is not None and seconds >= self.seconds


def find_best(
    families: Sequence[Family],
    fits: Callable[[Strategy], bool],
    time_run: Callable[[Strategy], float],
    *,
    guess: Callable[[Strategy], float],
    deadline: float,
) -> Best:
    """The fastest of all candidates that fit; exact weights before rounded ones, as the planner has it.

    guess: a run's time by closed forms
    """
    best = Best()
    for rounded in (False, True):
        waiting = [family for family in families if is_rounded(family.fewest) == rounded]
        for family in sorted(waiting, key=lambda one: guess(one.fewest)):
            if time.monotonic() > deadline:
                best.finished = False
                return best
            hopeless = best.beats(guess(family.fewest) / GUESSED_WRONG)
            if not hopeless and not best.beats(time_run(family.fewest)):
                _bisect(family, fits, time_run, best)
        if best.strategy is not None:
            return best
    return best


def _bisect(
    family: Family, fits: Callable[[Strategy], bool], time_run: Callable[[Strategy], float], best: Best
) -> None:
    """The family's candidate with the fewest layers that fits, if it is better than the best."""
    low, high = family.fewest.checkpointed_layers, family.most
    best.measured += 1
    if not fits(family.with_layers(high)):
        return
    while low < high:
        middle = (low + high) // 2
        best.measured += 1
        if fits(family.with_layers(middle)):
            high = middle
        else:
            low = middle + 1
    found = family.with_layers(high)
    seconds = time_run(found)
    if not best.beats(seconds):
        best.strategy, best.seconds = found, seconds


def compare_job(name: str, folder: Path, *, deadline: float) -> dict[str, Any]:
    """One row: what the search chose, the best, and their times."""
    path = folder / f"{name}.toml"
    path.write_text("\n".join(['data.train = "rows.jsonl"', *JOBS[name], *COMMON]) + "\n", encoding="utf-8")
    job = Job(str(path))
    inputs = job.find_inputs(quick=False)
    measure, clock = Rehearsals().find(job.source.config, inputs)
    assert measure is not None, "a rehearsal needs torch"
    start = time.monotonic()
    plan = make_plan(inputs, measure, clock, with_reasons=False)
    search_seconds = time.monotonic() - start
    timer = make_timer(inputs, clock)

    def time_run(strategy: Strategy) -> float:
        return timer.rank_seconds(strategy, timer.rehearse(strategy))

    def fits(strategy: Strategy) -> bool:
        return count_shortfall(measure(strategy), inputs.device) <= 0

    (families,) = walk_methods(inputs.recipe_file.recipe, inputs.device, inputs.shape)
    best = find_best(families, fits, time_run, guess=timer.estimate_seconds, deadline=deadline)
    chosen = time_run(plan.strategy)
    return {
        "job": name,
        "fits": plan.fits,
        "choice": describe_strategy(plan.strategy),
        "choice_seconds": chosen,
        "best": None if best.strategy is None else describe_strategy(best.strategy),
        "best_seconds": best.seconds,
        "ratio": None if best.seconds is None else chosen / best.seconds,
        "search_seconds": search_seconds,
        "exhaustive_seconds": time.monotonic() - start - search_seconds,
        "families": len(families),
        "measured": best.measured,
        "finished": best.finished,
    }


def compare_jobs(names: Sequence[str], *, minutes: float) -> Iterator[dict[str, Any]]:
    """The rows of all jobs, for as long as there is time."""
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="fitune-search-") as folder:
        for name in names:
            if time.monotonic() < deadline:
                yield compare_job(name, Path(folder), deadline=deadline)


def show(row: dict[str, Any]) -> None:
    """A line for people."""
    nothing = "nothing fits" if row["finished"] else "nothing compared"
    ratio = nothing if row["ratio"] is None else f"{row['ratio']:.3f}"
    rest = "" if row["finished"] else " (not all candidates: no time left)"
    seconds = f"{row['search_seconds']:.0f} s to search, {row['exhaustive_seconds']:.0f} s for all"
    print(f"{row['job']}: {ratio}{rest}; {seconds}; {row['families']} families, {row['measured']} candidates measured")
    print(f"  choice {row['choice']}: {row['choice_seconds']:,.0f} s", flush=True)
    if row["best"] is not None:
        print(f"  best   {row['best']}: {row['best_seconds']:,.0f} s", flush=True)


def main() -> int:
    """All jobs, or those that are named; 1 where the search missed by more than MOST_RATIO."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", help="names, joined by commas")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all jobs together (default 30)")
    parser.add_argument("--list", action="store_true", help="the jobs")
    given = parser.parse_args()
    names = list(JOBS) if given.jobs is None else given.jobs.split(",")
    unknown = [name for name in names if name not in JOBS]
    if unknown:
        parser.error(f"no job {unknown[0]}: there are {', '.join(JOBS)}")
    if given.list:
        print("\n".join(f"{name}: {', '.join(keys)}" for name, keys in JOBS.items()))
        return 0
    rows = []
    for row in compare_jobs(names, minutes=given.minutes):
        show(row)
        rows.append(row)
    left = names[len(rows) :]
    if left:
        print(f"not compared, no time left: {', '.join(left)}")
    print(json.dumps({"rows": rows, "left": left}))
    return 1 if any(row["ratio"] is not None and row["ratio"] > MOST_RATIO for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
