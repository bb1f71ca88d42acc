"""Step times: a roofline over the operations of a step, and what follows from it for a run.

An operation takes the longest of its arithmetic, its traffic and, where a kernel is known to be bound by them, its
instructions: max(operations / matrix rate, bytes / bandwidth, instructions / issue rate). Where
the host runs ahead of the device, a phase takes the longer of what the device computes and what the host starts, and
what the host starts early takes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from .memory import Estimator
from .rates import ATTENTION_SHARES, HALF_LENGTH, HOST_PRICES, AttentionKernels, HostWork
from .strategy import Device, Rates, Value

TimeEstimator = Estimator | Literal["measured", "measured_beside_others"]
"""What a step's time comes from; measured: a few of its layers, on the CPU that it is planned for, which had nothing
else to do, or had other processes to serve."""
IDLE_SHARE = 0.15
"""Of its power limit that a board draws while it waits: some 100 of an H100's 700 W."""
JOULES_PER_KWH = 3.6e6
ATTENTION_BACKWARD_FACTOR = 2.5
"""Products of attention's backward for each of its forward: scores again, and four gradients, beside two."""
MICRO_BATCH_PHASES = ("forward", "backward")
"""Phases that every micro-batch has; the others come once a step."""
ROUNDS_UNTIL_ALIKE = 3
"""From this micro-batch on each adds as much as the one before: by how much the host is ahead grows or does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Operations of one kind and size.

    kind:     matrix, attention, memory (all that only moves bytes), transfer (to or from the host) or none
    flops:    floating point operations of one of them
    bytes:    that one of them reads and writes
    instructions: of all threads, where these are what it waits for
    width:    bytes of an element: 4 computes at the fp32 rate, 1 at float8's
    head_dim, sequence: of attention
    is_packed: whether it is attention of packed rows, document by document
    backward: whether it is attention's backward
    is_masked: whether attention reads a mask, which FlashAttention has no kernels for
    host:     what the host does for one of them
    calls:    how often
    waits:    whether the host waits for it before it goes on
    together: whether the host has prepared all of it before the device begins, as it does for kernels that take a list
              of tensors
    times:    how many there are
    """

    kind: Literal["matrix", "attention", "memory", "transfer", "none"]
    flops: float = 0.0
    bytes: float = 0.0
    instructions: float = 0.0
    width: int = 2
    head_dim: int = 128
    sequence: float = 1
    is_packed: bool = False
    backward: bool = False
    is_masked: bool = False
    host: HostWork = "operation"
    calls: float = 1.0
    waits: bool = False
    together: bool = False
    times: float = 1.0

    def repeat(self, times: float) -> Work:
        """The same, so many times as often."""
        return replace(self, times=times * self.times)

    def divide(self, document_tokens: float) -> Work:
        """Of attention of whole rows the same document by document: a token sees as much less as its document is
        shorter than the row.

        document_tokens: of the document that a token is in, on average: sum(n^2) / sum(n) over documents of n tokens
        """
        flops = self.flops * document_tokens / self.sequence
        return replace(self, flops=flops, sequence=document_tokens, is_packed=True)


class PhaseTime(Value):
    """A phase of the step, all its micro-batches together.

    name:           forward, backward, clip or optimizer
    device_seconds: what the device computes
    host_seconds:   what the host takes to start it
    seconds:        by how much the phase makes the step longer: alone the longer of the two; their sum where nothing
                    overlaps, as on a CPU; less where the host had started it before the device came to it
    waits:          whether the host waits for the device in it, again and again
    together:       whether the device begins when the host has prepared all of it
    """

    name: str
    device_seconds: float = Field(ge=0)
    host_seconds: float = Field(ge=0)
    seconds: float = Field(ge=0)
    waits: bool = False
    together: bool = False


class RunPart(Value):
    """A part of a run that takes time.

    name:    load, compile (in the first step), evaluate, train, save (checkpoints and result) or merge
    seconds: all of it together
    """

    name: str
    seconds: float = Field(ge=0)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The time of one optimizer step.

    phases: forward, backward, clip, optimizer
    tokens: of the step
    flops:  that the model needs for them
    estimator: what it comes from
    evaluation_seconds: of a micro-batch without gradients, None where its forward stands for it
    token_seconds: of a token of an answer, None where it follows from the weights
    """

    phases: tuple[PhaseTime, ...]
    tokens: int
    flops: float
    estimator: TimeEstimator
    evaluation_seconds: float | None = None
    token_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def device_seconds(self) -> float:
        """Of which the device computes."""
        return sum(min(phase.device_seconds, phase.seconds) for phase in self.phases)


def shorten(time: StepTime, rates: Rates, *, width_share: float, token_share: float) -> StepTime:
    """A step whose micro-batches are padded to a share of the longest row, and hold a share of its tokens.

    The device computes as much less, the host starts as many operations; attention, of which there is less still, is
    taken like the rest.
    """

    def fit(phase: PhaseTime) -> PhaseTime:
        if phase.name not in MICRO_BATCH_PHASES:
            return phase
        device = width_share * phase.device_seconds
        seconds = max(device, phase.host_seconds) if rates.overlaps else device + phase.host_seconds
        if phase.waits:
            seconds = phase.seconds - phase.device_seconds + device
        return phase.model_copy(update={"device_seconds": device, "seconds": seconds})

    return replace(
        time,
        phases=tuple(map(fit, time.phases)),
        tokens=max(1, round(token_share * time.tokens)),
        flops=token_share * time.flops,
    )


def queue_phases(time: StepTime, micro_batches: int) -> StepTime:
    """A step in which the host waits for the device at its end alone, as fitune's does, and runs ahead before that.

    What the host starts while the device has work left takes no time of its own: the update of many small tensors, as
    a rule. From each phase to the next, h and d being when the host has started all and when the device is done:
    h' = h + host_seconds,  d' = max(d + device_seconds, h'), or max(d, h') + device_seconds where the host prepares all
    of it before. A phase that waits begins when both are done.

    time:          each phase alone, of a device whose host runs ahead
    micro_batches: that forward and backward alternate for
    """
    host = device = 0.0
    seconds: dict[str, float] = defaultdict(float)

    def queue(phase: PhaseTime, share: float, times: float = 1.0) -> None:
        nonlocal host, device
        before = device
        if phase.waits:
            device = max(host, device) + share * phase.seconds
            host = device
        else:
            host += share * phase.host_seconds
            if phase.together:
                device = max(device, host) + share * phase.device_seconds
            else:
                device = max(device + share * phase.device_seconds, host)
        seconds[phase.name] += times * (device - before)

    repeated = [phase for phase in time.phases if phase.name in MICRO_BATCH_PHASES]
    rounds = min(micro_batches, ROUNDS_UNTIL_ALIKE)
    for number in range(rounds):
        for phase in repeated:
            queue(phase, 1 / micro_batches, 1.0 if number < rounds - 1 else micro_batches - rounds + 1.0)
    for phase in time.phases:
        if phase.name not in MICRO_BATCH_PHASES:
            queue(phase, 1.0)
    phases = tuple(phase.model_copy(update={"seconds": seconds[phase.name]}) for phase in time.phases)
    return replace(time, phases=phases)


class Speed(Value):
    """How fast a run will go, the sibling of a plan's memory.

    tokens_per_second:       of training steps, padding excepted; on rows as long as the longest where others are
                             unknown
    step_seconds:            of one optimizer step
    startup_seconds:         loading the model, compiling its layers
    total_seconds:           all parts of the run; None where the number of its steps is not known
    model_flops_utilization: operations that the model needs, recomputation excepted, over what the device could do in
                             the time by its data sheet, 0 to 1
    joules_per_1000_tokens:  of the board; None where its power limit is not known
    energy_kwh:              of the run's steps; None where that or their number is not known
    cost:                    total hours times `budget.price_per_hour`, in the same currency; None without one
    limit:                   what most of the step waits for: the device, or the host that starts its operations
    phases:                  of the step
    parts:                   of the run, in its order; empty where the number of its steps is not known
    estimator:               what these figures come from
    """

    tokens_per_second: float = Field(gt=0)
    step_seconds: float = Field(gt=0)
    startup_seconds: float = Field(ge=0)
    total_seconds: float | None = Field(default=None, gt=0)
    model_flops_utilization: float = Field(ge=0)
    joules_per_1000_tokens: float | None = None
    energy_kwh: float | None = None
    cost: float | None = None
    limit: Literal["device", "host"]
    phases: tuple[PhaseTime, ...]
    parts: tuple[RunPart, ...] = ()
    estimator: TimeEstimator = "closed_forms"


def estimate_operation_seconds(work: Work, rates: Rates) -> float:
    """Device time of one operation: max(flops / rate, bytes / bandwidth, instructions / issue rate), and at least that
    of the shortest kernel.

    Attention reaches a share of the peak that grows with its rows: share * sequence / (sequence + 350). Of documents of
    n tokens that is n (n + 350) for each, so that the average of the documents that tokens are in stands for all.
    """
    if work.kind == "none":
        return 0.0
    if work.kind == "transfer":
        return 0.0 if rates.host_bytes is None else work.bytes / rates.host_bytes
    rate = rates.half_flops
    if work.kind == "attention":
        shares = ATTENTION_SHARES[_pick_kernels(work, rates), work.backward]
        size = next((one for one in shares if work.head_dim <= one), max(shares))
        rate = rates.peak_flops * shares[size] * work.sequence / (work.sequence + HALF_LENGTH)
    elif work.width == 1:
        rate = rates.float8_flops or rates.half_flops
    elif work.width >= 4:
        rate = rates.full_flops or rates.half_flops
    issued = 0.0 if rates.instructions is None else work.instructions / rates.instructions
    return max(work.flops / rate, work.bytes / rates.memory_bytes, issued, rates.kernel_seconds)


def _pick_kernels(work: Work, rates: Rates) -> AttentionKernels:
    """FlashAttention takes no mask; rows of several documents go to it, whatever the card's kernels are."""
    if work.is_packed and rates.attention == "cudnn":
        return "flash_on_hopper"
    return "efficient" if work.is_masked and rates.attention == "flash" else rates.attention


def estimate_phase_time(name: str, works: Iterable[Work], rates: Rates) -> PhaseTime:
    """A phase, done once. Where the host waits for its operations one by one, or the device for the host to prepare
    them, their times add up, as on a CPU."""
    device = host = 0.0
    waits = together = False
    for work in works:
        waits, together = waits or work.waits, together or work.together
        device += work.times * estimate_operation_seconds(work, rates)
        host += work.times * work.calls * HOST_PRICES[work.host] * rates.operation_seconds
    seconds = device + host if waits or together or not rates.overlaps else max(device, host)
    return PhaseTime(
        name=name, device_seconds=device, host_seconds=host, seconds=seconds, waits=waits, together=together
    )


def join_phases(name: str, phases: Iterable[PhaseTime], rates: Rates, *, waits: bool) -> PhaseTime:
    """Phases whose operations alternate; waits: the host does for the device, each time."""
    joined = tuple(phases)
    device, host = sum(one.device_seconds for one in joined), sum(one.host_seconds for one in joined)
    seconds = max(device, host) if rates.overlaps else device + host
    if waits:
        seconds = sum(one.seconds for one in joined)
    return PhaseTime(name=name, device_seconds=device, host_seconds=host, seconds=seconds, waits=waits)


def make_step_time(
    micro_batch: Mapping[str, PhaseTime],
    update: Mapping[str, PhaseTime],
    micro_batches: int,
    *,
    tokens: int,
    flops: float,
    estimator: Estimator,
) -> StepTime:
    """A step of `micro_batches`, each with the phases of `micro_batch`, and one update.

    tokens, flops: of one micro-batch
    """
    repeated = tuple(
        PhaseTime(
            name=phase.name,
            device_seconds=micro_batches * phase.device_seconds,
            host_seconds=micro_batches * phase.host_seconds,
            seconds=micro_batches * phase.seconds,
            waits=phase.waits,
        )
        for phase in micro_batch.values()
    )
    return StepTime(
        phases=(*repeated, *update.values()),
        tokens=tokens * micro_batches,
        flops=flops * micro_batches,
        estimator=estimator,
    )


def make_speed(
    time: StepTime,
    device: Device,
    *,
    steps: int | None,
    startup_seconds: float,
    parts: tuple[RunPart, ...],
    price_per_hour: float | None,
) -> Speed:
    """What a step's time means for a run.

    parts: of the run, where the number of its steps is known
    """
    assert device.rates is not None, "a step's time comes from rates"
    total = None if steps is None else sum(part.seconds for part in parts)
    watts = _estimate_watts(time, device.rates)
    joules = None if watts is None else watts * time.seconds
    waits = sum(phase.host_seconds - phase.device_seconds for phase in time.phases if phase.name in MICRO_BATCH_PHASES)
    return Speed(
        tokens_per_second=time.tokens / time.seconds,
        step_seconds=time.seconds,
        startup_seconds=startup_seconds,
        total_seconds=total,
        model_flops_utilization=time.flops / (time.seconds * device.rates.peak_flops),
        joules_per_1000_tokens=None if joules is None else 1000 * joules / time.tokens,
        energy_kwh=None if joules is None or steps is None else steps * joules / JOULES_PER_KWH,
        cost=None if total is None or price_per_hour is None else total / 3600 * price_per_hour,
        limit="host" if waits > 0 else "device",
        phases=time.phases,
        parts=parts,
        estimator=time.estimator,
    )


def _estimate_watts(time: StepTime, rates: Rates) -> float | None:
    """Mean draw of the board: its limit while it computes, an idle share of it while it waits."""
    if rates.board_watts is None:
        return None
    busy = time.device_seconds / time.seconds
    return rates.board_watts * (IDLE_SHARE + (1 - IDLE_SHARE) * busy)
