"""Walks the candidates, fastest first, to the first that fits: closed forms for those that are far off, and the exact
measure, a rehearsal of the step, for all others and for the one that is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import log
from typing import Protocol

from ..recipes.errors import PlanError, TraceError
from ..recipes.schema import Recipe
from .candidates import is_rounded, list_methods, list_strategies, preference
from .clock import Timer
from .memory import Memory
from .shape import ModelShape
from .speed import StepTime
from .strategy import Device, Strategy

TIE_SHARE = 0.02
"""Candidates whose times differ by less are equally fast."""
NEAR_SHARE = 0.08
"""By so much a candidate may be slower by the closed forms than the first one that fits and still be measured beside
it: they are within this of the rehearsal for most of the measured steps."""
MOST_CONFIRMED = 4
"""Candidates that are measured beside the first one that fits."""
UNSURE_SHARE = 0.2
"""By so much a closed form may be too high: a candidate further above the budget is rejected without a rehearsal."""

FREE_KEYS = ("micro_batch_size", "gradient_checkpointing", "loss_head")
"""Keys of the recipe that another plan of the same run need not keep."""
MAY_DIFFER = {
    "micro_batch_size",
    "gradient_accumulation_steps",
    "checkpointed_layers",
    "gradient_checkpointing",
    "loss_head",
    "save_attention",
    "optimizer_in_backward",
    "compile",
    "kernels",
    "fused_adapters",
    "activation_offload",
    "expandable_segments",
}
"""Fields of a strategy that change memory and speed, and the result by rounding alone."""
Rank = tuple[int, ...]
"""Of two strategies the one with the lower rank is preferred."""


class Measure(Protocol):
    """Predicts the memory of a strategy; closed forms or, from the runtime, a rehearsal of the step."""

    def __call__(self, strategy: Strategy) -> Memory:
        """The memory of a run of `strategy`; TraceError where the model cannot be rehearsed."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A strategy and what it needs.

    shortfall_bytes: by how much the worst of the budgets of memory is missed; 0 or less where it fits
    time:            of one step
    seconds:         of the whole run, or of one of a thousand steps where its length is not known
    late_seconds:    by how much it misses `budget.max_hours`; 0 or less where it is kept or does not bind
    """

    strategy: Strategy
    memory: Memory
    shortfall_bytes: int
    time: StepTime
    seconds: float
    late_seconds: float

    @property
    def fits(self) -> bool:
        """Whether all budgets are kept."""
        return self.shortfall_bytes <= 0 and self.late_seconds <= 0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to.

    closest:  the chosen candidate; where none fits, the one that misses by the least
    rejected: those that were preferred to it
    failure:  why the model could not be rehearsed, None where it could
    """

    closest: Candidate
    rejected: tuple[Candidate, ...]
    failure: str | None


def list_budgets(memory: Memory, device: Device) -> dict[str, tuple[int, int]]:
    """(needed, budget) in bytes of each memory that is limited: the device's, and RAM and disk where known."""
    budgets = {"device": (memory.required_bytes, memory.budget_bytes)}
    if device.host_memory_bytes is not None and device.kind == "cuda":
        budgets["host"] = (memory.host_bytes, device.host_memory_bytes)
    if device.disk_bytes is not None:
        budgets["disk"] = (memory.disk_bytes, device.disk_bytes)
    return budgets


def count_shortfall(memory: Memory, device: Device) -> int:
    """By how many bytes the worst of the budgets is missed; 0 or less where all are kept."""
    return max(needed - budget for needed, budget in list_budgets(memory, device).values())


@dataclass(frozen=True, kw_only=True)
class Family:
    """Strategies that differ in the number of checkpointed layers alone.

    fewest: the one with the fewest
    most:   the most layers that may be checkpointed
    """

    fewest: Strategy
    most: int

    def with_layers(self, layers: int) -> Strategy:
        """The one that checkpoints `layers` layers."""
        return self.fewest.model_copy(update={"checkpointed_layers": layers})


def walk_methods(recipe: Recipe, device: Device, shape: ModelShape) -> Iterator[list[Family]]:
    """The candidates of each method, in the recipe's order of methods.

    Raises the first PlanError where every method is ruled out.
    """
    problems = []
    for method in list_methods(recipe):
        try:
            strategies = list(list_strategies(recipe, device, method, shape))
        except PlanError as error:
            problems.append(error)
            continue
        yield make_families(strategies)
    if len(problems) == len(list_methods(recipe)):
        raise problems[0]


def find_alike(recipe: Recipe, device: Device, shape: ModelShape, *, like: Strategy) -> list[Family]:
    """The candidates that a run of `like` can go on with: the same method, dtypes, optimizer and global batch. What
    the recipe fixed of the rest is free.

    Raises PlanError where there is none.
    """
    freed = recipe.model_copy(update={"train": recipe.train.model_copy(update=dict.fromkeys(FREE_KEYS, "auto"))})
    fixed = like.model_dump(exclude=MAY_DIFFER)
    found = [
        one for one in list_strategies(freed, device, like.method, shape) if one.model_dump(exclude=MAY_DIFFER) == fixed
    ]
    if not found:
        raise PlanError(f"there is no other plan that this run can go on with on {device.name}")
    return make_families(found)


def make_families(strategies: Iterable[Strategy]) -> list[Family]:
    """Strategies by what they have in common beside the checkpointed layers.

    With offload, which is the faster the fewer activations leave the device, each stands alone.
    """
    families: dict[Strategy, Family] = {}
    for one in strategies:
        layers = one.checkpointed_layers
        key = one if one.activation_offload else one.model_copy(update={"checkpointed_layers": 0})
        known = families.get(key, Family(fewest=one, most=layers))
        fewest = min(known.fewest, one, key=lambda strategy: strategy.checkpointed_layers)
        families[key] = Family(fewest=fewest, most=max(known.most, layers))
    return list(families.values())


def search(
    methods: Iterable[Sequence[Family]], device: Device, *, timer: Timer, quick: Measure, exact: Measure | None
) -> Found:
    """The fastest strategy that fits of the first method in which one fits, else the one that misses by the least.

    quick: closed forms
    exact: a rehearsal; None to decide on closed forms alone
    """
    walk = _Walk(device, _Judge(device, quick, exact), timer)
    for families in methods:
        chosen = walk.find(families)
        if chosen is not None:
            return Found(closest=chosen, rejected=tuple(walk.rejected), failure=walk.judge.failure)
    nearest = min(walk.rejected, key=lambda one: _miss(one, device))
    closest = walk.make(nearest.strategy, walk.judge.measure_exactly(nearest.strategy))
    return Found(closest=closest, rejected=tuple(walk.rejected), failure=walk.judge.failure)


def _miss(candidate: Candidate, device: Device) -> tuple[int, float, int]:
    """What a candidate misses, all budgets of memory together before time; of those that miss as much the one that
    needs least."""
    missed = sum(max(0, needed - budget) for needed, budget in list_budgets(candidate.memory, device).values())
    return missed, max(candidate.late_seconds, 0.0), candidate.memory.required_bytes


class _Walk:
    """Walks the families of a method by the rank of each one's next strategy, most preferred first.

    A family begins with the fewest checkpointed layers. Where those do not fit, it goes on with the fewest that
    probably do; so the first strategy that fits is the best of all, but for what its family can still be relieved of,
    and for what a rehearsal tells of those that closed forms take for nearly as fast.
    """

    def __init__(self, device: Device, judge: _Judge, timer: Timer) -> None:
        self.device, self.judge, self.timer = device, judge, timer
        self.rejected: list[Candidate] = []

    def rank(self, strategy: Strategy) -> Rank:
        """Exact weights before rounded ones, then the time by closed forms, then `preference`. Times TIE_SHARE apart
        have different numbers, closer ones mostly the same; it grows with the checkpointed layers."""
        bucket = round(log(self.timer.estimate_seconds(strategy)) / log(1 + TIE_SHARE))
        return is_rounded(strategy), bucket, *preference(strategy)

    def make(self, strategy: Strategy, memory: Memory) -> Candidate:
        """The strategy timed as exactly as its memory was measured; on a CPU as exactly as can be where that fits."""
        fits = count_shortfall(memory, self.device) <= 0
        is_exact = fits if self.device.kind == "cpu" else memory.estimator == "rehearsal"
        time = self.timer.rehearse(strategy) if is_exact else self.timer.estimate(strategy)
        time = self.timer.page(time, memory)
        return Candidate(
            strategy=strategy,
            memory=memory,
            shortfall_bytes=count_shortfall(memory, self.device),
            time=time,
            seconds=self.timer.rank_seconds(strategy, time),
            late_seconds=self.timer.find_late_seconds(strategy, time, memory),
        )

    def measure(self, strategy: Strategy) -> Candidate:
        """A candidate; by closed forms where those take it for too late by far."""
        if self.timer.is_hopeless(strategy):
            return self.make(strategy, self.judge.estimate(strategy))
        return self.make(strategy, self.judge.measure(strategy))

    def find(self, families: Sequence[Family]) -> Candidate | None:
        """The best candidate that fits, None where none does."""
        waiting = [(self.rank(family.fewest), number, family.fewest) for number, family in enumerate(families)]
        heapify(waiting)
        fitting: list[Candidate] = []
        confirmed = 0
        while waiting:
            _, number, strategy = heappop(waiting)
            if fitting and (confirmed == MOST_CONFIRMED or not self._is_near(strategy, fitting[0])):
                break
            if any(self._is_settled(strategy, one.strategy) for one in fitting):
                continue
            family, candidate = families[number], self.measure(strategy)
            confirmed += bool(fitting)
            if candidate.fits:
                fitting.append(self._relieve(candidate, family))
                continue
            if not fitting:
                self.rejected.append(candidate)
            if candidate.shortfall_bytes > 0 and strategy.checkpointed_layers < family.most:
                following = family.with_layers(self._find_fewest(family, strategy.checkpointed_layers + 1, family.most))
                heappush(waiting, (self.rank(following), number, following))
        return _choose(fitting)

    def _is_near(self, strategy: Strategy, first: Candidate) -> bool:
        """Whether closed forms take a strategy for nearly as fast as the first one that fits."""
        limit = (1 + NEAR_SHARE) * self.timer.estimate_seconds(first.strategy)
        return is_rounded(strategy) == is_rounded(first.strategy) and self.timer.estimate_seconds(strategy) <= limit

    def _is_settled(self, strategy: Strategy, fitting: Strategy) -> bool:
        """Whether one that fits is preferred to a strategy that differs in the optimizer and in the checkpointed
        layers alone: of such a pair the closed forms know which is the faster."""
        alike = {"optimizer": fitting.optimizer, "checkpointed_layers": fitting.checkpointed_layers}
        if preference(strategy) < preference(fitting) or strategy.model_copy(update=alike) != fitting:
            return False
        return self.timer.estimate_seconds(strategy) * (1 + TIE_SHARE) >= self.timer.estimate_seconds(fitting)

    def _find_fewest(self, family: Family, low: int, high: int) -> int:
        """The fewest layers from low to high that probably fit; high, where none do."""
        if not self.judge.probably_fits(family.with_layers(high)):
            return high
        while low < high:
            middle = (low + high) // 2
            if self.judge.probably_fits(family.with_layers(middle)):
                high = middle
            else:
                low = middle + 1
        return low

    def _relieve(self, candidate: Candidate, family: Family) -> Candidate:
        """The same with as few checkpointed layers as fit: closed forms guess how few, which was too careful a guess
        where a rehearsal of the candidate showed them to be too high."""
        tried = {one.strategy for one in self.rejected}
        low, high = family.fewest.checkpointed_layers, candidate.strategy.checkpointed_layers
        low = max([low - 1, *(n for n in range(low, high) if family.with_layers(n) in tried)])
        while high - low > 1:
            guess = self._find_fewest(family, low + 1, high)
            if guess == high:
                break
            strategy = family.with_layers(guess)
            fewer = self.measure(strategy)
            if fewer.fits:
                candidate, high = fewer, guess
            else:
                self.rejected.append(fewer)
                low = guess
        return candidate


def _choose(fitting: Sequence[Candidate]) -> Candidate | None:
    """The fastest; of equally fast ones the preferred."""
    fastest = min((one.seconds for one in fitting), default=0.0)
    ties = [one for one in fitting if one.seconds <= fastest * (1 + TIE_SHARE)]
    return min(ties, key=lambda one: preference(one.strategy), default=None)


class _Judge:
    """Measures a strategy as exactly as its case needs.

    A rehearsal also shows how far the closed forms are off for strategies of its kind, which spares theirs.
    """

    def __init__(self, device: Device, quick: Measure, exact: Measure | None) -> None:
        self._device, self._quick, self._exact = device, quick, exact
        self._factors: dict[tuple[object, ...], dict[int, float]] = {}
        self.failure: str | None = None

    def estimate(self, strategy: Strategy) -> Memory:
        """Closed forms."""
        return self._quick(strategy)

    def measure(self, strategy: Strategy) -> Memory:
        """Closed forms for what cannot fit in any case, a rehearsal for all else."""
        memory = self._quick(strategy)
        if self._exact is None:
            return memory
        factor = self._factors.get(_kind(strategy), {}).get(strategy.checkpointed_layers)
        likely_bytes = memory.peak_device_bytes * (1 - UNSURE_SHARE if factor is None else factor)
        if likely_bytes <= memory.budget_bytes:
            return self.measure_exactly(strategy)
        return memory if factor is None else memory.model_copy(update={"required_bytes": int(likely_bytes)})

    def probably_fits(self, strategy: Strategy) -> bool:
        """By closed forms, corrected by the rehearsal of its kind that is nearest in checkpointed layers."""
        memory = self._quick(strategy)
        factors = self._factors.get(_kind(strategy))
        if self._exact is not None:
            nearest = min(factors or (), key=lambda layers: abs(layers - strategy.checkpointed_layers), default=None)
            factor = factors[nearest] if factors and nearest is not None else 1.0
            memory = memory.model_copy(update={"required_bytes": int(memory.peak_device_bytes * factor)})
        return count_shortfall(memory, self._device) <= 0

    def measure_exactly(self, strategy: Strategy) -> Memory:
        """A rehearsal; closed forms where there is none."""
        memory = self._quick(strategy)
        if self._exact is None:
            return memory
        try:
            exact = self._exact(strategy)
        except TraceError as error:
            self._exact, self.failure = None, str(error)
            return memory
        factors = self._factors.setdefault(_kind(strategy), {})
        factors[strategy.checkpointed_layers] = exact.required_bytes / memory.peak_device_bytes
        return exact


def _kind(strategy: Strategy) -> tuple[object, ...]:
    return (
        strategy.method,
        strategy.weights_dtype,
        strategy.loss_head,
        strategy.compile,
        strategy.kernels,
        strategy.fused_adapters,
        strategy.save_attention,
        strategy.optimizer_in_backward,
    )
