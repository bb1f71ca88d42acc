"""From a step's time to a run's: startup, the number of steps, and the price of an hour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from math import ceil

from ..recipes.schema import Recipe
from .catalog import find_gpu
from .kept import KeptForms
from .memory import Memory
from .rates import OPERATION_SECONDS, make_gpu_rates
from .run_time import LoadFacts, RunFacts, estimate_run_parts, estimate_startup_parts
from .shape import ModelShape
from .speed import (
    PhaseTime,
    RunPart,
    Speed,
    StepTime,
    estimate_phase_time,
    join_phases,
    make_speed,
    make_step_time,
    queue_phases,
    shorten,
)
from .step_cost import estimate_micro_batch_work, estimate_model_flops, estimate_shape_update_work, host_waits
from .strategy import DataFacts, Device, Rates, Strategy
from .widths import padded_width

Clock = Callable[[Strategy], StepTime]
"""Times one optimizer step of a strategy: closed forms or, from the runtime, a rehearsal of the step, or on a CPU a
measurement."""

ASSUMED_STEPS = 1000
"""Steps that startup is weighed against where their number is not known."""
UNSURE_SHARE = 0.3
"""By so much the closed forms may take a step for slower than it is."""
TYPICAL_CPU = Rates(
    peak_flops=2e11,
    half_flops=2e11,
    full_flops=1e11,
    memory_bytes=2e10,
    operation_seconds=OPERATION_SECONDS,
    kernel_seconds=0.0,
    overlaps=False,
    attention="cpu",
    source="a typical CPU of a few cores",
)
"""What candidates are put in order by where a CPU was not probed; no time is told by it."""
TYPICAL_GPU = "A100 80GB"
"""The same for a card that the catalog does not know."""


def find_order_rates(device: Device) -> Rates:
    """The device's own rates, else a typical device's: the order of candidates needs no more."""
    if device.rates is not None:
        return device.rates
    return TYPICAL_CPU if device.kind == "cpu" else make_gpu_rates(find_gpu(TYPICAL_GPU))


def make_closed_form_clock(
    shape: ModelShape,
    device: Device,
    sequence_length: int,
    *,
    document_tokens: float | None = None,
    kept: KeptForms | None = None,
) -> Clock:
    """The closed forms as a clock; document_tokens: as in DataFacts; kept: of this model and these rows."""
    rates, known = find_order_rates(device), kept or KeptForms()

    @cache
    def time_micro_batch(strategy: Strategy) -> dict[str, PhaseTime]:
        if strategy not in known.works:
            works = estimate_micro_batch_work(shape, strategy, sequence_length, document_tokens=document_tokens)
            known.works[strategy] = works
        return {name: estimate_phase_time(name, works, rates) for name, works in known.works[strategy].items()}

    @cache
    def clock(strategy: Strategy) -> StepTime:
        alike = strategy.model_copy(
            update={"optimizer": "adamw", "optimizer_in_backward": False, "gradient_accumulation_steps": 1}
        )
        if strategy not in known.updates:
            known.updates[strategy] = estimate_shape_update_work(shape, strategy)
        phases = {name: estimate_phase_time(name, works, rates) for name, works in known.updates[strategy].items()}
        tokens = strategy.micro_batch_size * sequence_length
        flops = estimate_model_flops(shape, strategy, document_tokens or sequence_length) * tokens
        micro_batch = time_micro_batch(alike)
        if strategy.optimizer_in_backward:
            joined = join_phases(
                "backward", (micro_batch["backward"], *phases.values()), rates, waits=host_waits(strategy)
            )
            micro_batch, phases = micro_batch | {"backward": joined}, {}
        return make_step_time(
            micro_batch,
            phases,
            strategy.gradient_accumulation_steps,
            tokens=tokens,
            flops=flops,
            estimator="closed_forms",
        )

    return clock


def estimate_widths(row_tokens: Sequence[int], strategy: Strategy, *, longest: int) -> list[int]:
    """To how many tokens each micro-batch of a step is padded: the rows of a global batch are sorted by length and
    divided, so the k-th micro-batch is as wide as the row than which k * micro_batch_size of them are longer, on
    average the (n - k * micro_batch_size) / (n + 1) quantile of the dataset.

    row_tokens: of rows that stand for all, shortest first
    """
    micro, count = strategy.micro_batch_size, strategy.gradient_accumulation_steps
    widths = []
    for number in range(count):
        place = (micro * count - number * micro) / (micro * count + 1)
        widest = row_tokens[ceil(place * len(row_tokens)) - 1]
        widths.append(padded_width(widest, max_length=longest))
    return widths


def add_paging(time: StepTime, memory: Memory, rates: Rates) -> StepTime:
    """The step with what paged states travel to the card and back: nothing where all of them stay there beside the
    rest, else 2 * managed_bytes / host_bytes.

    bitsandbytes brings the states of one tensor after the other to the card and waits for each update. The driver makes
    room by evicting what it brought there the longest ago (pick_root_chunk_to_evict in uvm_pmm_gpu.c,
    https://github.com/NVIDIA/open-gpu-kernel-modules), and that is what the next step asks for first: so if one page
    has to go, every one has gone by the time it is needed again. Not measured: all measured steps had room.

    memory: of the step's strategy
    """
    if not memory.managed_bytes or memory.peak_device_bytes <= memory.budget_bytes or rates.host_bytes is None:
        return time
    moved = 2 * memory.managed_bytes / rates.host_bytes
    last = time.phases[-1]
    paged = {"device_seconds": last.device_seconds + moved, "seconds": last.seconds + moved}
    return replace(time, phases=(*time.phases[:-1], last.model_copy(update=paged)))


def estimate_width(data: DataFacts, strategy: Strategy) -> int:
    """To how many tokens micro-batches are padded on average, a multiple of WIDTH_MULTIPLE."""
    longest = data.longest_row_tokens
    if data.row_tokens is None:
        return longest
    widths = estimate_widths(data.row_tokens, strategy, longest=longest)
    return padded_width(ceil(sum(widths) / len(widths)), max_length=longest)


def fit_to_rows(clock: Clock, device: Device, data: DataFacts) -> Clock:
    """A clock for rows as long as the dataset's, from one for rows as long as the longest."""
    row_tokens, longest = data.row_tokens, data.longest_row_tokens
    if row_tokens is None:
        return clock
    rates, mean_tokens = find_order_rates(device), sum(row_tokens) / len(row_tokens)

    def fit(strategy: Strategy) -> StepTime:
        widths = estimate_widths(row_tokens, strategy, longest=longest)
        return shorten(
            clock(strategy),
            rates,
            width_share=sum(widths) / len(widths) / longest,
            token_share=mean_tokens / longest,
        )

    return fit


def queue_steps(clock: Clock, device: Device) -> Clock:
    """A clock for steps whose host runs ahead of the device, from one for steps whose phases are waited for."""
    if not find_order_rates(device).overlaps:
        return clock
    return cache(lambda strategy: queue_phases(clock(strategy), strategy.gradient_accumulation_steps))


def make_row_clock(shape: ModelShape, device: Device, data: DataFacts, *, kept: KeptForms | None = None) -> Clock:
    """The closed forms as a clock for rows as long as the dataset's; kept: of this model and these rows."""
    length, documents = data.longest_row_tokens, data.document_tokens
    clock = make_closed_form_clock(shape, device, length, document_tokens=documents, kept=kept)
    return fit_to_rows(clock, device, data)


class Timer:
    """Times whole runs of a recipe.

    steps:         optimizer steps, None where they are not known
    limit_seconds: `budget.max_hours`, None without one
    """

    def __init__(
        self,
        recipe: Recipe,
        device: Device,
        *,
        quick: Clock,
        exact: Clock | None,
        steps: int | None,
        model: LoadFacts,
        data: DataFacts,
    ) -> None:
        """quick, exact: clocks for rows as long as the dataset's"""
        self.steps, self._device, self._model = steps, device, model
        self._quick, self._exact = queue_steps(quick, device), exact and queue_steps(exact, device)
        self._seconds: dict[Strategy, float] = {}
        self._facts: RunFacts | None = None
        if steps is not None:
            self._facts = RunFacts(recipe=recipe, data=data, steps=steps, model=model)
        self._price_per_hour, hours = recipe.budget.price_per_hour, recipe.budget.max_hours
        self.limit_seconds = None if hours is None else 3600 * hours

    def estimate(self, strategy: Strategy) -> StepTime:
        """A step by closed forms."""
        return self._quick(strategy)

    def rehearse(self, strategy: Strategy) -> StepTime:
        """A step as exactly as it can be had; TraceError where the model cannot be rehearsed."""
        return (self._exact or self._quick)(strategy)

    def page(self, time: StepTime, memory: Memory) -> StepTime:
        """See add_paging."""
        return add_paging(time, memory, find_order_rates(self._device))

    def estimate_seconds(self, strategy: Strategy) -> float:
        """The whole run by closed forms."""
        if strategy not in self._seconds:
            self._seconds[strategy] = self.rank_seconds(strategy, self.estimate(strategy))
        return self._seconds[strategy]

    def find_run_seconds(self, strategy: Strategy) -> float | None:
        """Of the whole run by closed forms; None where the number of steps or the device's rates are not known."""
        return None if self.steps is None or self._device.rates is None else self.estimate_seconds(strategy)

    def estimate_startup_seconds(self, strategy: Strategy) -> float:
        """Loading the model, and compiling layers or kernels."""
        return sum(part.seconds for part in estimate_startup_parts(self._model, strategy))

    def rank_seconds(self, strategy: Strategy, time: StepTime) -> float:
        """What candidates are compared by: startup and all steps, or ASSUMED_STEPS where their number is not known."""
        return self.estimate_startup_seconds(strategy) + (self.steps or ASSUMED_STEPS) * time.seconds

    def find_late_seconds(self, strategy: Strategy, time: StepTime, memory: Memory | None = None) -> float:
        """By how much a run misses `budget.max_hours`; 0 where there is no limit, or no telling.

        memory: of the strategy; without it evaluations and files do not count
        """
        if self.limit_seconds is None or self.steps is None or self._device.rates is None:
            return 0.0
        if memory is None:
            return self.rank_seconds(strategy, time) - self.limit_seconds
        return sum(part.seconds for part in self.list_parts(strategy, time, memory)) - self.limit_seconds

    def is_hopeless(self, strategy: Strategy) -> bool:
        """Whether a run is so late by closed forms that no rehearsal would save it."""
        late = self.find_late_seconds(strategy, self.estimate(strategy))
        return late > UNSURE_SHARE * (self.limit_seconds or 0.0)

    def list_parts(self, strategy: Strategy, time: StepTime, memory: Memory) -> tuple[RunPart, ...]:
        """The parts of the run; empty where the number of its steps or the device's rates are not known."""
        if self._facts is None or self._device.rates is None:
            return ()
        return estimate_run_parts(self._facts, strategy, time, self._device.rates, memory)

    def make_speed(self, strategy: Strategy, time: StepTime, memory: Memory) -> Speed | None:
        """The run's speed; None where the device's rates are not known."""
        if self._device.rates is None:
            return None
        return make_speed(
            time,
            self._device,
            steps=self.steps,
            startup_seconds=self.estimate_startup_seconds(strategy),
            parts=self.list_parts(strategy, time, memory),
            price_per_hour=self._price_per_hour,
        )
