"""Walks the candidates, fastest first, to the first that fits: closed forms for those that are far off, and the exact
measure, a rehearsal of the step, for all others and for the one that is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ..recipes.errors import PlanError, TraceError
from ..recipes.schema import Recipe
from .candidates import list_methods, list_strategies, order_key
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


def walk_strategies(recipe: Recipe, device: Device, shape: ModelShape, length: int) -> Iterator[Strategy]:
    """All candidates: methods in the recipe's order, fastest first within each.

    Raises the first PlanError where every method is ruled out.
    """
    problems = []
    for method in list_methods(recipe):
        try:
            strategies = list_strategies(recipe, device, method, shape)
            yield from sorted(strategies, key=lambda one: order_key(one, device, length, shape.layers))
        except PlanError as error:
            problems.append(error)
    if len(problems) == len(list_methods(recipe)):
        raise problems[0]


def walk_alike(recipe: Recipe, device: Device, shape: ModelShape, length: int, *, like: Strategy) -> Iterator[Strategy]:
    """The candidates that a run of `like` can go on with, fastest first: the same method, dtypes, optimizer and global
    batch. What the recipe fixed of the rest is free.

    Raises PlanError where there is none.
    """
    freed = recipe.model_copy(update={"train": recipe.train.model_copy(update=dict.fromkeys(FREE_KEYS, "auto"))})
    fixed = like.model_dump(exclude=MAY_DIFFER)
    found = [
        one for one in list_strategies(freed, device, like.method, shape) if one.model_dump(exclude=MAY_DIFFER) == fixed
    ]
    if not found:
        raise PlanError(f"there is no other plan that this run can go on with on {device.name}")
    yield from sorted(found, key=lambda one: order_key(one, device, length, shape.layers))


def search(strategies: Iterable[Strategy], device: Device, *, quick: Measure, exact: Measure | None) -> Found:
    """The first strategy that fits, else the one that misses by the least.

    quick: closed forms
    exact: a rehearsal; None to decide on closed forms alone
    """
    judge = _Judge(quick, exact)
    rejected: list[Candidate] = []
    for strategy in strategies:
        candidate = _make_candidate(strategy, judge.measure(strategy), device)
        if candidate.shortfall_bytes <= 0:
            return Found(closest=candidate, fits=True, rejected=tuple(rejected), failure=judge.failure)
        rejected.append(candidate)
    nearest = min(rejected, key=lambda one: (one.shortfall_bytes, one.memory.required_bytes))
    closest = _make_candidate(nearest.strategy, judge.measure_exactly(nearest.strategy), device)
    return Found(closest=closest, fits=closest.shortfall_bytes <= 0, rejected=tuple(rejected), failure=judge.failure)


def _make_candidate(strategy: Strategy, memory: Memory, device: Device) -> Candidate:
    shortfall = max(needed - budget for needed, budget in list_budgets(memory, device).values())
    return Candidate(strategy=strategy, memory=memory, shortfall_bytes=shortfall)


class _Judge:
    """Measures a strategy as exactly as its case needs.

    A rehearsal also shows how far the closed forms are off for strategies of its kind, which spares theirs.
    """

    def __init__(self, quick: Measure, exact: Measure | None) -> None:
        self._quick, self._exact = quick, exact
        self._factors: dict[tuple[object, ...], float] = {}
        self.failure: str | None = None

    def measure(self, strategy: Strategy) -> Memory:
        memory = self._quick(strategy)
        if self._exact is None:
            return memory
        factor = self._factors.get(_kind(strategy))
        likely_bytes = memory.peak_device_bytes * (1 - UNSURE_SHARE if factor is None else factor)
        if likely_bytes <= memory.budget_bytes:
            return self.measure_exactly(strategy)
        return memory if factor is None else memory.model_copy(update={"required_bytes": int(likely_bytes)})

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
        self._factors[_kind(strategy)] = exact.required_bytes / memory.peak_device_bytes
        return exact


def _kind(strategy: Strategy) -> tuple[object, ...]:
    return strategy.method, strategy.weights_dtype, strategy.checkpointed_layers, strategy.loss_head
