"""The benchmark scripts run from end to end; what they measure is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_script(module: str, *arguments: str) -> dict[str, object]:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
def test_the_gpu_benchmark_shows_on_a_cpu_that_every_case_runs() -> None:
    result = run_script("benchmarks.gpu", "--smoke", "--cases", "lora-compiled-fused,qlora-auto,full-auto,packed")
    rows = result["rows"]
    assert isinstance(rows, list)
    assert [row["case"] for row in rows] == ["lora-compiled-fused", "qlora-auto", "full-auto", "packed"]
    assert all(row["tokens_per_second"] > 0 and row["predicted_peak_device_bytes"] > 0 for row in rows)
    assert rows[0]["strategy"]["loss_head"] == "fused"


@pytest.mark.slow
def test_fitune_and_the_trainer_start_from_the_same_loss() -> None:
    result = run_script("benchmarks.cpu", "--only", "trainer", "--rounds", "1", "--steps", "3")
    trainer = result["trainer"]
    assert isinstance(trainer, dict)
    first = trainer["first_loss"]
    assert first["fitune"] == pytest.approx(first["Trainer"], rel=0.01)
