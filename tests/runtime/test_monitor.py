"""The monitor, on this host for real and on a stand-in GPU."""

from __future__ import annotations

import json
import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fitune.runtime.machine import monitor as monitor_module
from fitune.runtime.machine.monitor import Monitor
from fitune.runtime.machine.samples import MonitorEvent, MonitorSummary

MIB = 2**20
NEVER_SECONDS = 3600.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the monitor did not get there"
        time.sleep(0.005)


def wait_for_samples(monitor: Monitor, count: int) -> None:
    enough = monitor.summary().samples + count
    wait_until(lambda: monitor.summary().samples >= enough)


def take_and_give_back(n_bytes: int) -> None:
    """Map, touch and unmap: a heap that earlier tests have grown would not grow again."""
    with mmap.mmap(-1, n_bytes) as block:
        for page in range(0, n_bytes, mmap.PAGESIZE):
            block[page] = 1


def peaks_of(summary: MonitorSummary) -> dict[str, int]:
    return {phase.name: phase.peak_rss_bytes for phase in summary.phases}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_json_lines_with_time_phase_memory_and_cpu(tmp_path: Path) -> None:
    with Monitor(tmp_path / "samples.jsonl", interval_seconds=0.005) as monitor:
        wait_for_samples(monitor, 3)
        monitor.enter_phase("forward")
        wait_for_samples(monitor, 3)
        latest = monitor.latest
    rows = read_rows(tmp_path / "samples.jsonl")
    assert latest is not None
    assert latest.phase == "forward"
    assert {"load", "forward"} == {row["phase"] for row in rows}
    assert len(rows) == monitor.summary().samples
    assert all(row["rss_bytes"] > MIB and row["ram_available_bytes"] > MIB for row in rows)
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert all(row["rss_peak_bytes"] >= row["rss_bytes"] * 0.99 for row in rows)
    assert rows[0]["device_bytes"] is None


def test_a_peak_between_two_samples_is_not_missed_and_belongs_to_its_phase(tmp_path: Path) -> None:
    with Monitor(tmp_path / "samples.jsonl", interval_seconds=NEVER_SECONDS) as monitor:
        monitor.enter_phase("forward")
        take_and_give_back(200 * MIB)
        monitor.enter_phase("backward")
    summary = monitor.summary()
    if not summary.rss_peak_is_exact:
        pytest.skip("this kernel does not let a process restart its peak")
    peaks = peaks_of(summary)
    assert peaks["forward"] > peaks["load"] + 190 * MIB
    assert peaks["forward"] > peaks["backward"] + 190 * MIB
    assert summary.peak_rss_bytes == peaks["forward"]
    assert summary.samples == 2


def test_phases_keep_the_order_of_their_first_entry_and_their_time_adds_up(tmp_path: Path) -> None:
    with Monitor(tmp_path / "samples.jsonl", interval_seconds=0.005) as monitor:
        for _ in range(3):
            monitor.enter_phase("forward")
            monitor.enter_phase("backward")
    summary = monitor.summary()
    assert list(peaks_of(summary)) == ["load", "forward", "backward"]
    assert sum(phase.seconds for phase in summary.phases) == pytest.approx(summary.seconds, abs=0.05)


def test_memory_that_leaves_the_plan_is_reported_once_with_figures(tmp_path: Path) -> None:
    heard: list[MonitorEvent] = []
    path = tmp_path / "samples.jsonl"
    with Monitor(path, interval_seconds=0.005, limit_bytes=10 * MIB, on_event=heard.append) as monitor:
        wait_for_samples(monitor, 5)
    (event,) = monitor.events
    assert heard == [event]
    assert event.kind == "memory_over_plan"
    assert event.planned_bytes == 10 * MIB
    assert event.measured_bytes is not None
    assert event.measured_bytes > 10 * MIB
    assert "the plan says 10.0 MiB" in event.message
    assert [row["event"]["kind"] for row in read_rows(path) if "event" in row] == ["memory_over_plan"]


def test_the_warning_names_the_phase_of_the_peak_even_when_it_is_over(tmp_path: Path) -> None:
    with Monitor(tmp_path / "samples.jsonl", interval_seconds=NEVER_SECONDS) as first:
        pass
    limit_bytes = first.summary().peak_rss_bytes + 100 * MIB
    with Monitor(tmp_path / "s.jsonl", interval_seconds=NEVER_SECONDS, limit_bytes=limit_bytes) as monitor:
        monitor.enter_phase("forward")
        take_and_give_back(200 * MIB)
        monitor.enter_phase("backward")
    if not monitor.summary().rss_peak_is_exact:
        pytest.skip("this kernel does not let a process restart its peak")
    (event,) = monitor.events
    assert "in phase forward" in event.message


def test_memory_within_the_plan_is_not_reported(tmp_path: Path) -> None:
    with Monitor(tmp_path / "samples.jsonl", interval_seconds=0.005, limit_bytes=2**50) as monitor:
        wait_for_samples(monitor, 3)
    assert monitor.events == ()


def test_stopping_twice_is_once_and_leaves_no_thread(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "samples.jsonl")
    monitor.start()
    monitor.stop()
    before = monitor.summary()
    monitor.stop()
    assert monitor.summary() == before
    assert not [thread for thread in threading.enumerate() if thread.name == "fitune-monitor"]


def test_an_error_of_the_training_passes_through_and_leaves_no_thread(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Monitor(tmp_path / "samples.jsonl"):
        raise ZeroDivisionError
    assert not [thread for thread in threading.enumerate() if thread.name == "fitune-monitor"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_ends_the_writing_and_nothing_else() -> None:
    with Monitor(Path("/dev/full"), interval_seconds=0.005) as monitor:
        wait_for_samples(monitor, 3)
    (event,) = monitor.events
    assert event.kind == "samples_not_written"
    assert "No space left" in event.message
    assert monitor.summary().samples > 3


def test_a_path_that_cannot_be_written_is_an_event(tmp_path: Path) -> None:
    with Monitor(tmp_path / "missing" / "samples.jsonl", interval_seconds=0.005) as monitor:
        wait_for_samples(monitor, 2)
    assert [event.kind for event in monitor.events] == ["samples_not_written"]


def test_a_listener_that_fails_is_dropped_and_sampling_goes_on(tmp_path: Path) -> None:
    def fail(event: MonitorEvent) -> None:
        raise RuntimeError("no screen")

    with Monitor(tmp_path / "s.jsonl", interval_seconds=0.005, limit_bytes=1, on_event=fail) as monitor:
        wait_for_samples(monitor, 3)
    assert [event.kind for event in monitor.events] == ["memory_over_plan", "monitor_failed"]
    assert "no screen" in monitor.events[1].message


def test_stopping_what_never_started_does_nothing(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "samples.jsonl")
    monitor.stop()
    assert monitor.summary().samples == 0
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_long_runs_file_is_thinned_and_its_maxima_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "DENSE_SECONDS", 0.0)
    monkeypatch.setattr(monitor_module, "SPARSE_SECONDS", NEVER_SECONDS)
    with Monitor(tmp_path / "samples.jsonl", interval_seconds=0.005) as monitor:
        wait_for_samples(monitor, 5)
    assert len(read_rows(tmp_path / "samples.jsonl")) == 1
    assert monitor.summary().samples > 5


GPU_RUN = """
    import time
    from fitune.runtime.machine.monitor import Monitor
    from fitune.runtime.machine.nvml import open_nvml

    def wait_for_samples(monitor, count=3):
        enough = monitor.summary().samples + count
        while monitor.summary().samples < enough:
            time.sleep(0.002)

    nvml = open_nvml()
    monitor = Monitor(Path("samples.jsonl"), nvml=nvml, interval_seconds=0.005, limit_bytes={limit_mib} * 2**20)
    with monitor:
        wait_for_samples(monitor)
        {steps}
    rows = [json.loads(line) for line in open("samples.jsonl")]
    show({{"summary": monitor.summary(), "rows": rows}})
"""


def make_gpu_run(*steps: str, limit_mib: int = 10**6) -> str:
    return GPU_RUN.format(limit_mib=limit_mib, steps="\n        ".join(steps))


def test_device_memory_is_followed_phase_by_phase(run_on_fake_gpus: Any) -> None:
    shown = run_on_fake_gpus(
        make_gpu_run(
            "monitor.enter_phase('forward')",
            "set_state(used_mib=5000, self_mib=4000)",
            "wait_for_samples(monitor)",
            "set_state(used_mib=3000, self_mib=2000)",
            "wait_for_samples(monitor)",
            "monitor.enter_phase('backward')",
            "wait_for_samples(monitor)",
        ),
        used_mib=1000,
    )
    summary = shown["summary"]
    peaks = {phase["name"]: phase["peak_device_bytes"] for phase in summary["phases"]}
    assert peaks == {"load": 0, "forward": 4000 * MIB, "backward": 2000 * MIB}
    assert (summary["peak_device_bytes"], summary["peak_memory_used_bytes"]) == (4000 * MIB, 5000 * MIB)
    assert summary["events"] == []
    row = shown["rows"][-1]
    assert (row["device_bytes"], row["gpu_process_memory_bytes"]) == (2000 * MIB, 2000 * MIB)
    assert (row["gpu_power_watts"], row["gpu_throttle_reasons"]) == (400.0, [])


def test_device_memory_that_leaves_the_plan_is_reported_once(run_on_fake_gpus: Any) -> None:
    source = make_gpu_run("set_state(used_mib=9000)", "wait_for_samples(monitor, 6)", limit_mib=6000)
    (event,) = run_on_fake_gpus(source, used_mib=1000)["summary"]["events"]
    assert (event["kind"], event["measured_bytes"], event["planned_bytes"]) == (
        "memory_over_plan",
        8000 * MIB,
        6000 * MIB,
    )
    assert "device memory reached 7.8 GiB in phase load; the plan says 5.9 GiB" in event["message"]


def test_memory_that_another_process_takes_does_not_leave_the_plan(run_on_fake_gpus: Any) -> None:
    source = make_gpu_run(
        "set_state(used_mib=9000, self_mib=3000, other_mib=5000)", "wait_for_samples(monitor)", limit_mib=4000
    )
    summary = run_on_fake_gpus(source, used_mib=1000)["summary"]
    assert summary["events"] == []
    assert summary["peak_device_bytes"] == 3000 * MIB


def test_a_gpu_lost_in_mid_run_is_one_event_and_the_host_is_still_watched(run_on_fake_gpus: Any) -> None:
    shown = run_on_fake_gpus(
        make_gpu_run("set_state(error=15)", "wait_for_samples(monitor, 6)"), used_mib=1000, millijoules=5000
    )
    assert [event["kind"] for event in shown["summary"]["events"]] == ["gpu_lost"]
    last = shown["rows"][-1]
    assert last["rss_bytes"] > MIB
    assert "gpu_power_watts" not in last
    assert sum("event" in row for row in shown["rows"]) == 1
    assert shown["summary"]["energy_joules"] == 0.0


def test_energy_utilisation_temperature_and_throttling_are_summed_up(run_on_fake_gpus: Any) -> None:
    source = make_gpu_run(
        "set_state(millijoules=9000, utilization=50, celsius=81, throttle=0x4)", "wait_for_samples(monitor)"
    )
    summary = run_on_fake_gpus(source, millijoules=5000, utilization=50, celsius=40)["summary"]
    assert summary["energy_joules"] == 4.0
    assert summary["mean_utilization_percent"] == 50.0
    assert summary["peak_temperature_celsius"] == 81.0
    assert list(summary["throttled_seconds"]) == ["power_cap"]
    assert 0 < summary["throttled_seconds"]["power_cap"] < summary["seconds"]


def test_a_card_that_supports_no_reading_at_all_still_lets_the_run_go_on(run_on_fake_gpus: Any) -> None:
    faults = ["memory", "processes", "utilization", "power", "energy", "temperature", "throttle"]
    summary = run_on_fake_gpus(make_gpu_run("pass"), **{f"{fault}_error": 3 for fault in faults})["summary"]
    assert (summary["peak_device_bytes"], summary["energy_joules"], summary["events"]) == (None, None, [])
    assert summary["peak_rss_bytes"] > MIB
