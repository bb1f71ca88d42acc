from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from small_runs import write_recipe

from benchmarks.rows import write_mixed_rows
from fitune.runtime.model.embedded import EMBEDDED_MODEL
from fitune.runtime.planning import Job
from fitune.runtime.report import list_phase_peaks, load_report


@pytest.mark.slow
def test_ram_of_every_phase_and_the_files_are_as_planned(embedded_model: Path, tmp_path: Path) -> None:
    """In a process of its own: what a process holds of other tests would count."""
    recipe = write_recipe(
        tmp_path,
        EMBEDDED_MODEL,
        rows=60,
        model={"dtype": "bf16"},
        method={"kind": "lora", "rank": 16},
        data={"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 192},
        train={"max_steps": 3, "global_batch_size": 8, "micro_batch_size": 8},
        output={"dir": "run", "merge": True, "save_every": 2},
    )
    command = [sys.executable, "-m", "fitune.runtime.cli", "run", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    plan, report = load_report(tmp_path / "run")
    peaks = list_phase_peaks(plan, report)
    assert {one.name for one in peaks} == {phase.name for phase in plan.memory.phases}
    for one in peaks:
        assert one.measured_bytes == pytest.approx(one.predicted_bytes, rel=0.1), one.name
    weights: Counter[str] = Counter()
    for path in (tmp_path / "run").rglob("*.safetensors"):
        weights[str(path.relative_to(tmp_path / "run").parent)] += path.stat().st_size
    files_of = Job(str(recipe)).files_of
    files = None if files_of is None else files_of(plan.strategy)
    assert files is not None
    assert weights == {
        "adapter": files.trained_bytes,
        "checkpoints/step-000002": files.checkpoint_bytes,
        "merged": files.merged_bytes,
    }
    assert sum(one.disk_bytes or 0 for one in plan.memory.phases) > sum(weights.values())
    assert plan.memory.disk_bytes > report.measured.disk_bytes > 0.9 * (plan.memory.disk_bytes - 16 * 2**20)


@pytest.mark.slow
def test_ram_of_every_phase_is_as_planned_after_many_widths_of_rows(embedded_model: Path, tmp_path: Path) -> None:
    """Each width leaves kernels of its products; the heap gives back what is free before an evaluation and saving."""
    recipe = write_recipe(
        tmp_path,
        EMBEDDED_MODEL,
        model={"dtype": "bf16"},
        method={"kind": "lora", "rank": 16},
        data={"train": "mixed.jsonl", "eval": "held.jsonl", "max_length": 160, "max_truncated": 0.5, "max_leaked": 1.0},
        train={"max_steps": 30, "global_batch_size": 2, "micro_batch_size": 2, "eval_every": 20},
        output={"dir": "run", "save_every": 20},
    )
    write_mixed_rows(tmp_path / "mixed.jsonl", 60, max_tokens=160)
    write_mixed_rows(tmp_path / "held.jsonl", 8, max_tokens=160)
    command = [sys.executable, "-m", "fitune.runtime.cli", "run", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    peaks = list_phase_peaks(*load_report(tmp_path / "run"))
    assert {one.name for one in peaks} >= {"load", "evaluate", "forward", "backward", "clip", "optimizer", "save"}
    for one in peaks:
        assert one.measured_bytes == pytest.approx(one.predicted_bytes, rel=0.1), one.name
