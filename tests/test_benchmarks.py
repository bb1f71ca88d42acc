"""The benchmark scripts run from end to end; what they measure is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import gpu, host, search
from benchmarks.gpu_cases import CASES, MODELS, MORE_CASES, START_SECONDS, Case, run_apart, write_recipe
from benchmarks.gpu_check import list_results
from benchmarks.gpu_table import compare_curves, list_comparisons
from fitune.planner.search import Family
from fitune.planner.strategy import Strategy
from fitune.runtime.planning import Job

ROOT = Path(__file__).parent.parent
PLAIN = Strategy(
    method="lora",
    weights_dtype="bf16",
    compute_dtype="bf16",
    micro_batch_size=1,
    gradient_accumulation_steps=1,
    checkpointed_layers=0,
    loss_head="full",
    optimizer="adamw",
    learning_rate=1e-4,
)


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
def test_the_self_test_of_a_gpu_is_skipped_without_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--check", "--smoke"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "0 failed" in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_fitune_and_the_trainer_start_from_the_same_loss() -> None:
    result = run_script("benchmarks.cpu", "--only", "trainer", "--rounds", "1", "--steps", "3")
    trainer = result["trainer"]
    assert isinstance(trainer, dict)
    first = trainer["first_loss"]
    assert first["fitune"] == pytest.approx(first["Trainer"], rel=0.01)


def test_a_case_that_fails_and_one_without_time_do_not_keep_the_others_from_running(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write_model(key: str, folder: Path, *, smoke: bool) -> str | None:
        return "disk full" if key == "8b" else None

    def run_case(case: Case, model: str, scratch: Path, **_: object) -> dict[str, object]:
        return {"case": case.name, "tokens_per_second": 1.0}

    monkeypatch.setattr(gpu, "write_model", write_model)
    monkeypatch.setattr(gpu, "run_case", run_case)
    rows = list(gpu.run_cases(CASES, tmp_path, smoke=False, minutes=10))
    assert [row["case"] for row in rows] == [case.name for case in CASES]
    assert all("disk full" in row["error"] for row in rows if row["case"].startswith("lora"))
    assert {"full-auto", "packed", "curve-eager"} <= {row["case"] for row in rows if "tokens_per_second" in row}
    assert all(
        "left of 0.1 minutes" in row["skipped"] for row in gpu.run_cases(CASES, tmp_path, smoke=False, minutes=0.1)
    )


def test_all_cases_with_a_target_fit_into_the_time_by_their_own_plans(tmp_path: Path) -> None:
    """By closed forms, for an H100; Liger's kernels and float8 need what is not here."""
    for case in (*CASES, *MORE_CASES):
        if not {"train.float8=true", 'train.kernels="liger"'} & set(case.settings):
            recipe = write_recipe(case, MODELS[case.model], tmp_path, smoke=False)
            plan = Job(str(recipe), [*case.settings, 'budget.gpu="H100 80GB"']).make_plan(quick=True)
            assert plan.fits and plan.speed is not None and plan.speed.total_seconds is not None
            assert 0 <= case.seconds - START_SECONDS - plan.speed.total_seconds < 12, case.name
    assert sum(case.seconds for case in CASES) + sum(gpu.WRITING_SECONDS.values()) <= 60 * gpu.MINUTES
    whole = sum(case.seconds for case in (*CASES, *MORE_CASES)) + sum(gpu.WRITING_SECONDS.values())
    assert whole <= 60 * gpu.ALL_MINUTES


def test_a_command_that_hangs_is_ended_and_one_that_fails_says_why() -> None:
    python = [sys.executable, "-c"]
    assert run_apart([*python, "import time; time.sleep(60)"], 0.5)[1] == "stopped after 0 s"
    assert run_apart([*python, "print('error: no room'); print('next: ...'); exit(3)"], 60) == (3, "error: no room")
    assert run_apart([*python, "print('well')"], 60) == (0, "well")


def test_what_cases_say_together_is_where_both_are_there() -> None:
    how = {"checkpointed_layers": 0, "loss_head": "full", "compile": True, "micro_batch_size": 4, "optimizer": "adamw"}
    how |= {"kernels": "torch", "fused_adapters": False, "float8": False}
    speeds = {"packed": 30.0, "padded": 10.0, "search-auto": 100.0, "search-1": 90.0, "search-2": 105.0}
    rows = [{"case": name, "tokens_per_second": speed, "strategy": how} for name, speed in speeds.items()]
    packed, searched = list_comparisons([*rows, {"case": "curve-eager", "error": "stopped"}])
    assert packed.startswith("packed over padded: 3.00 times")
    assert searched.startswith("fastest of 2 combinations over the plan's choice: 1.05")
    curves = [
        {"case": f"curve-{one}", "tokens_per_second": 1.0, "losses": [2.0] * 200}
        for one in ("eager", "compiled", "float8")
    ]
    compiled, float8 = list_comparisons(curves)
    assert compiled.startswith("loss compiled against eager over 200 steps: at most 0.00% apart")
    assert float8.endswith("(no target)")


def test_prices_of_host_work_are_found_again_and_none_is_below_zero() -> None:
    draw = np.random.default_rng(0)
    counts = draw.integers(0, 200, (60, 4)).astype(float)
    prices = np.array([5e-6, 0.0, 2e-5, 7e-5])
    assert host.fit_prices(counts, counts @ prices) == pytest.approx(prices, abs=1e-12)
    shifted = counts @ np.array([5e-6, -1e-6, 2e-5, 7e-5])
    found = host.fit_prices(counts, shifted)
    assert found[1] == 0 and (found >= 0).all()
    assert found[2:] == pytest.approx(prices[2:], rel=0.1)


@pytest.mark.slow
def test_the_prices_of_host_work_are_measured_on_this_machine() -> None:
    result = run_script("benchmarks.host", "--models", "llama-3.2-1b")
    assert result["phases"] == 12
    prices = result["prices"]
    assert isinstance(prices, dict) and prices["operation"] == 1.0
    assert prices["function"] > 2 and prices["view"] < prices["function"]


def test_curves_are_compared_by_their_moving_averages() -> None:
    steady, noisy = [2.0] * 40, [2.0 + 0.1 * (-1) ** step for step in range(40)]
    assert compare_curves(steady, noisy) == pytest.approx(0)
    assert compare_curves(steady, [2.2] * 40) == pytest.approx(0.1)
    assert compare_curves([2.0, 1.0], [2.0, 1.3]) == pytest.approx(0.1)


def test_results_of_tests_are_lines_with_the_reason_of_a_failure(tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    results.write_text(
        '<testsuites><testsuite><testcase name="test_a_run_learns" time="1.23"/>'
        '<testcase name="test_b_b" time="2"><failure message="assert 1 == 2&#10;more">...</failure></testcase>'
        '<testcase name="test_c" time="0"><skipped message="no GPU"/></testcase></testsuite></testsuites>'
    )
    assert list_results(results) == [
        "ok      (1.2 s) a run learns",
        "FAILED  (2.0 s) b b: assert 1 == 2",
        "skipped (0.0 s) c",
    ]


@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40), st.integers(0, 8)), min_size=1, max_size=6),
    st.integers(0, 100),
)
def test_the_exhaustive_search_finds_what_trying_every_candidate_finds(
    made: list[tuple[int, int, int]], budget: int
) -> None:
    """Families of made-up time and memory; each layer that is checkpointed takes time and spares memory."""
    families = [
        Family(fewest=PLAIN.model_copy(update={"adapter_rank": number + 1}), most=8) for number in range(len(made))
    ]

    def time_run(one: Strategy) -> float:
        seconds, _, slope = made[(one.adapter_rank or 1) - 1]
        return seconds + one.checkpointed_layers * (slope + 1) / 10

    def fits(one: Strategy) -> bool:
        _, size, slope = made[(one.adapter_rank or 1) - 1]
        return 3 * size - one.checkpointed_layers * slope <= budget

    def guess(one: Strategy) -> float:
        return time_run(one) * (1.4 if (one.adapter_rank or 1) % 2 else 0.7)

    every = [family.with_layers(layers) for family in families for layers in range(9)]
    expected = min((time_run(one) for one in every if fits(one)), default=None)
    found = search.find_best(families, fits, time_run, guess=guess, deadline=float("inf"))
    assert found.seconds == expected and found.finished
    assert (found.strategy is None) == (expected is None)


@pytest.mark.slow
def test_the_search_finds_nearly_the_best_of_all_candidates() -> None:
    result = run_script("benchmarks.search", "--jobs", "1b-full", "--minutes", "3")
    (row,) = result["rows"]  # type: ignore[misc]
    assert row["fits"] and row["ratio"] < search.MOST_RATIO
