"""The probe of a CPU's speed, and where it is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from fitune.runtime.machine.cpu_rates import find_cpu_rates


def test_a_cpu_is_probed_once_and_then_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    assert find_cpu_rates(may_probe=False) is None
    rates = find_cpu_rates(may_probe=True)
    assert rates is not None and rates.full_flops is not None
    assert 1e8 < rates.full_flops <= rates.peak_flops < 1e15
    assert 1e8 < rates.memory_bytes < 1e13
    assert 1e-8 < rates.operation_seconds < 1e-3
    assert not rates.overlaps and rates.host_bytes is None
    assert find_cpu_rates(may_probe=False) == rates


def test_rates_are_those_of_the_threads_that_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    assert find_cpu_rates(may_probe=True) is not None
    monkeypatch.setenv("OMP_NUM_THREADS", "977")
    assert find_cpu_rates(may_probe=False) is None


@pytest.mark.parametrize("content", ["", "[]", "null", '{"CPU": {"peak_flops": 0}}', "\x00"])
def test_a_broken_cache_is_as_good_as_none(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    (tmp_path / "cpu_rates.json").write_text(content)
    assert find_cpu_rates(may_probe=False) is None
