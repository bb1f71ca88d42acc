"""What samples add up to."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fitune.runtime.machine.nvml import GpuSample
from fitune.runtime.machine.samples import DeviceShare, Sample, Tally

NOTHING = GpuSample(
    memory_used_bytes=None,
    process_memory_bytes=None,
    other_memory_bytes=None,
    utilization_percent=None,
    power_watts=None,
    energy_joules=None,
    temperature_celsius=None,
    throttle_reasons=None,
)
sizes = st.integers(min_value=0, max_value=2**40)


def make_sample(
    seconds: float, gpu: GpuSample | None = None, *, phase: str = "forward", device_bytes: int = 0
) -> Sample:
    return Sample(
        seconds=seconds,
        unix_time=1.8e9 + seconds,
        phase=phase,
        rss_bytes=1,
        rss_peak_bytes=1,
        cpu_percent=50.0,
        ram_available_bytes=100,
        device_bytes=None if gpu is None else device_bytes,
        gpu=gpu,
    )


def summarise(samples: list[Sample]) -> Tally:
    tally = Tally()
    for sample in samples:
        tally.add(sample)
    return tally


@given(watts=st.floats(0, 1000), pauses=st.lists(st.floats(0.01, 10), min_size=1, max_size=20))
def test_without_a_counter_constant_power_gives_watts_times_seconds(watts: float, pauses: list[float]) -> None:
    moments = [sum(pauses[:n]) for n in range(len(pauses) + 1)]
    tally = summarise([make_sample(moment, replace(NOTHING, power_watts=watts)) for moment in moments])
    joules = tally.make_summary(seconds=1, rss_peak_is_exact=True, events=()).energy_joules
    assert joules is not None
    assert math.isclose(joules, watts * sum(pauses), rel_tol=1e-9, abs_tol=1e-9)


def test_the_boards_counter_is_preferred_to_its_power() -> None:
    gpus = [replace(NOTHING, power_watts=100.0, energy_joules=joules) for joules in (5000.0, 5003.0, 5010.0)]
    summary = summarise([make_sample(n, gpu) for n, gpu in enumerate(gpus)]).make_summary(
        seconds=2, rss_peak_is_exact=True, events=()
    )
    assert summary.energy_joules == 10.0


def test_energy_is_counted_to_the_phase_in_which_it_was_taken() -> None:
    counters = {"load": [1000.0], "forward": [1004.0, 1010.0], "backward": [1025.0]}
    moments = [(phase, joules) for phase, values in counters.items() for joules in values]
    samples = [
        replace(make_sample(n, replace(NOTHING, energy_joules=joules)), phase=phase)
        for n, (phase, joules) in enumerate(moments)
    ]
    summary = summarise(samples).make_summary(seconds=3, rss_peak_is_exact=True, events=())
    energies = {phase.name: phase.energy_joules for phase in summary.phases}
    assert energies == {"load": None, "forward": 10.0, "backward": 15.0}


def test_without_power_and_counter_there_is_no_energy() -> None:
    summary = summarise([make_sample(0, NOTHING), make_sample(1, NOTHING)]).make_summary(
        seconds=1, rss_peak_is_exact=True, events=()
    )
    assert summary.energy_joules is None
    assert summary.mean_utilization_percent is None


def test_throttling_counts_the_seconds_of_each_reason() -> None:
    reasons = [("power_cap",), ("power_cap", "thermal_slowdown"), (), ("power_cap",)]
    samples = [make_sample(2.0 * n, replace(NOTHING, throttle_reasons=names)) for n, names in enumerate(reasons)]
    summary = summarise(samples).make_summary(seconds=6, rss_peak_is_exact=True, events=())
    assert summary.throttled_seconds == {"power_cap": 4.0, "thermal_slowdown": 2.0}


@given(values=st.lists(st.tuples(st.sampled_from(["forward", "backward"]), sizes), min_size=1))
def test_the_peak_is_the_highest_of_its_phases(values: list[tuple[str, int]]) -> None:
    samples = [make_sample(n, NOTHING, phase=phase, device_bytes=size) for n, (phase, size) in enumerate(values)]
    summary = summarise(samples).make_summary(seconds=1, rss_peak_is_exact=True, events=())
    assert summary.peak_device_bytes == max(size for _, size in values)
    for phase in summary.phases:
        assert phase.peak_device_bytes == max(size for name, size in values if name == phase.name)


def test_a_reading_that_spans_two_phases_counts_for_the_run_but_for_neither_phase() -> None:
    tally = Tally()
    tally.add(make_sample(0, NOTHING, device_bytes=7), phase_is_sure=False)
    summary = tally.make_summary(seconds=1, rss_peak_is_exact=True, events=())
    assert (summary.peak_device_bytes, summary.phases) == (7, ())


@given(driver=sizes, others=sizes, growth=sizes, own=sizes, managed=sizes)
def test_a_runs_share_is_its_own_and_managed_memory_whatever_others_do(
    driver: int, others: int, growth: int, own: int, managed: int
) -> None:
    before = replace(NOTHING, memory_used_bytes=driver + others, other_memory_bytes=others)
    after = replace(
        NOTHING,
        memory_used_bytes=driver + others + growth + own + managed,
        process_memory_bytes=own,
        other_memory_bytes=others + growth,
    )
    assert DeviceShare(before).estimate_bytes(after) == own + managed


@given(driver=sizes, own=sizes)
def test_in_a_container_a_runs_share_is_what_was_added_since_the_start(driver: int, own: int) -> None:
    before = replace(NOTHING, memory_used_bytes=driver, other_memory_bytes=0)
    after = replace(NOTHING, memory_used_bytes=driver + own, other_memory_bytes=own)
    assert DeviceShare(before).estimate_bytes(after) == own


@given(driver=sizes, own=sizes)
def test_what_the_process_held_before_the_start_is_its_own(driver: int, own: int) -> None:
    sample = replace(NOTHING, memory_used_bytes=driver + own, process_memory_bytes=own, other_memory_bytes=0)
    assert DeviceShare(sample).estimate_bytes(sample) == own


def test_a_gpu_that_tells_nothing_has_no_share() -> None:
    assert DeviceShare(NOTHING).estimate_bytes(NOTHING) is None
