"""Walks the candidates, fastest first, to the first that fits: closed forms for those that are far off, and the exact
measure, a rehearsal of the step, for all others and for the one that is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Protocol

from ..recipes.errors import PlanError, TraceError
from ..recipes.schema import Recipe
from .candidates import list_methods, list_strategies
from .memory import Memory
from .shape import ModelShape
from .strategy import Device, Strategy

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
    "compile",
    "activation_offload",
    "expandable_segments",
}
"""Fields of a strategy that change memory and speed, and the result by rounding alone."""
Rank = tuple[bool, float, int, int]
"""Of two strategies the one with the lower rank is preferred."""


class Measure(Protocol):
    """Predicts the memory of a strategy; closed forms or, from the runtime, a rehearsal of the step."""

    def __call__(self, strategy: Strategy) -> Memory:
        """The memory of a run of `strategy`; TraceError where the model cannot be rehearsed."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A strategy and what it needs.

    shortfall_bytes: by how much the worst of the budgets is missed; 0 or less where it fits
    """

    strategy: Strategy
    memory: Memory
    shortfall_bytes: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to.

    closest:  the chosen candidate; where none fits, the one that misses by the least
    fits:     whether it fits
    rejected: those that were preferred to it
    failure:  why the model could not be rehearsed, None where it could
    """

    closest: Candidate
    fits: bool
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
    methods: Iterable[Sequence[Family]],
    device: Device,
    *,
    rank: Callable[[Strategy], Rank],
    quick: Measure,
    exact: Measure | None,
) -> Found:
    """The first strategy that fits, method by method and by rank, else the one that misses by the least.

    rank:  orders strategies, preferred ones first; it grows with the checkpointed layers
    quick: closed forms
    exact: a rehearsal; None to decide on closed forms alone
    """
    walk = _Walk(device, _Judge(device, quick, exact), rank)
    for families in methods:
        chosen = walk.find(families)
        if chosen is not None:
            return Found(closest=chosen, fits=True, rejected=tuple(walk.rejected), failure=walk.judge.failure)
    nearest = min(walk.rejected, key=lambda one: (one.shortfall_bytes, one.memory.required_bytes))
    closest = walk.make(nearest.strategy, walk.judge.measure_exactly(nearest.strategy))
    fits = closest.shortfall_bytes <= 0
    return Found(closest=closest, fits=fits, rejected=tuple(walk.rejected), failure=walk.judge.failure)


class _Walk:
    """Walks the families of a method by the rank of each one's next strategy, most preferred first.

    A family begins with the fewest checkpointed layers. Where those do not fit, it goes on with the fewest that
    probably do; so the first strategy that fits is the best of all, but for what its family can still be relieved of.
    """

    def __init__(self, device: Device, judge: _Judge, rank: Callable[[Strategy], Rank]) -> None:
        self.device, self.judge, self.rank = device, judge, rank
        self.rejected: list[Candidate] = []

    def make(self, strategy: Strategy, memory: Memory) -> Candidate:
        return Candidate(strategy=strategy, memory=memory, shortfall_bytes=count_shortfall(memory, self.device))

    def find(self, families: Sequence[Family]) -> Candidate | None:
        """The best candidate that fits, None where none does."""
        waiting = [(self.rank(family.fewest), number, family.fewest) for number, family in enumerate(families)]
        heapify(waiting)
        while waiting:
            _, number, strategy = heappop(waiting)
            family = families[number]
            candidate = self.make(strategy, self.judge.measure(strategy))
            if candidate.shortfall_bytes <= 0:
                return self._relieve(candidate, family)
            self.rejected.append(candidate)
            if strategy.checkpointed_layers < family.most:
                following = family.with_layers(self._find_fewest(family, strategy.checkpointed_layers + 1, family.most))
                heappush(waiting, (self.rank(following), number, following))
        return None

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
            fewer = self.make(strategy, self.judge.measure(strategy))
            if fewer.shortfall_bytes <= 0:
                candidate, high = fewer, guess
            else:
                self.rejected.append(fewer)
                low = guess
        return candidate


class _Judge:
    """Measures a strategy as exactly as its case needs.

    A rehearsal also shows how far the closed forms are off for strategies of its kind, which spares theirs.
    """

    def __init__(self, device: Device, quick: Measure, exact: Measure | None) -> None:
        self._device, self._quick, self._exact = device, quick, exact
        self._factors: dict[tuple[object, ...], dict[int, float]] = {}
        self.failure: str | None = None

    def measure(self, strategy: Strategy) -> Memory:
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
    return strategy.method, strategy.weights_dtype, strategy.loss_head
