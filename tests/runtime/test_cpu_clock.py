"""Step times on a CPU: the runtime's own step on a few layers, beside the whole model's, and where they are kept."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_models import SIZES

from fitune.planner.clock import make_row_clock
from fitune.planner.shape import make_shape
from fitune.planner.strategy import DataFacts, Device, Rates, Strategy
from fitune.runtime.rehearsal import cpu_clock, timed_step
from fitune.runtime.rehearsal.cpu_clock import CpuClock
from fitune.runtime.rehearsal.cut import plan_shortest_cut
from fitune.runtime.rehearsal.timed_step import StepSeconds, time_step_on_cpu

LAYERS = 6
CONFIG: dict[str, Any] = {**SIZES, "model_type": "llama", "num_hidden_layers": LAYERS, "tie_word_embeddings": True}
RATES = Rates(
    peak_flops=1e11,
    half_flops=1e11,
    full_flops=1e11,
    memory_bytes=1e10,
    operation_seconds=1e-6,
    kernel_seconds=0.0,
    overlaps=False,
    attention="cpu",
    source="made up",
)
DATA = DataFacts(rows=100, longest_row_tokens=64, row_tokens=(16, 32, 64), source="made up")
STEP = StepSeconds(
    forward=1.0,
    backward=2.0,
    next_forward=3.0,
    next_backward=4.0,
    clip=0.5,
    optimizer=0.25,
    evaluation=0.75,
    token=0.125,
    waiting=0.0,
)


def make_strategy(**changes: Any) -> Strategy:
    values: dict[str, Any] = {
        "method": "full",
        "weights_dtype": "fp32",
        "compute_dtype": "fp32",
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "checkpointed_layers": 0,
        "loss_head": "fused",
        "optimizer": "adamw",
        "learning_rate": 1e-4,
    }
    if changes.get("method") in ("lora", "qlora"):
        values |= {"adapter_dtype": "fp32", "adapter_rank": 4, "adapter_targets": "all-linear"}
    return Strategy(**values | changes)


class Asked(list[tuple[int, int, int]]):
    """The (rows, length, documents) that were asked for, in the place of measurements."""

    def __call__(self, _: Any, __: Strategy, *, rows: int, length: int, documents_per_row: int) -> StepSeconds:
        self.append((rows, length, documents_per_row))
        return STEP


def make_clock(
    measure: Callable[..., StepSeconds] | None,
    *,
    config: dict[str, Any] = CONFIG,
    steps: int | None = None,
    data: DataFacts = DATA,
    rates: Rates = RATES,
) -> CpuClock:
    shape = make_shape(CONFIG)
    device = Device(name="a CPU", kind="cpu", memory_bytes=2**33, budget_bytes=2**33, bf16=True, rates=rates)
    quick = make_row_clock(shape, device, data)
    return CpuClock(config, shape, data, rates, steps=steps, quick=quick, measure=measure)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def measured() -> Asked:
    return Asked()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "lora", "weights_dtype": "bf16", "compute_dtype": "bf16", "checkpointed_layers": 5},
        {"method": "qlora", "weights_dtype": "bf16", "compute_dtype": "bf16"},
        {"gradient_accumulation_steps": 3, "loss_head": "full", "rounding": "stochastic"},
        {"optimizer": "adamw_8bit", "optimizer_in_backward": True, "clips_gradients": False},
        {"packing": True, "attention": "varlen", "micro_batch_size": 1},
    ],
    ids=["full", "lora, checkpointed", "qlora", "accumulated", "in backward", "packed"],
)
def test_every_part_of_a_step_takes_time(changes: dict[str, Any]) -> None:
    found = time_step_on_cpu(CONFIG, make_strategy(**changes), rows=2, length=32, documents_per_row=3)
    in_backward = changes.get("optimizer_in_backward", False)
    for name, seconds in found.model_dump().items():
        expected = name != "waiting" and not (in_backward and name in ("clip", "optimizer"))
        assert (seconds > 0) or not expected, name
    assert found.token is not None and found.token < found.forward


@pytest.mark.parametrize("changes", [{}, {"checkpointed_layers": 3}], ids=["kept", "checkpointed"])
def test_each_layer_of_the_whole_model_counts(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second each time it is read, so that every section takes one."""
    monkeypatch.setattr(timed_step, "time", SimpleNamespace(perf_counter=count().__next__))
    strategy = make_strategy(**changes)
    few, many = (
        time_step_on_cpu(CONFIG | {"num_hidden_layers": layers}, strategy, rows=1, length=16, documents_per_row=1)
        for layers in (LAYERS, 2 * LAYERS)
    )
    for name in ("forward", "backward", "optimizer", "evaluation", "token"):
        assert getattr(many, name) - getattr(few, name) == LAYERS, name


def test_the_shortest_cut_has_the_first_layer_and_one_of_each_kind() -> None:
    kinds = ["a", "b", "a", "b", "a", "b"]
    cut = plan_shortest_cut(kinds, make_strategy(checkpointed_layers=3))
    assert cut.picked == (0, 1, 2, 3, 4)
    assert cut.sources == (0, 1, 2, 3, 4, 3)


def test_micro_batches_after_the_first_and_rows_beyond_the_measured_ones_count(
    measured: Asked,
) -> None:
    strategy = make_strategy(micro_batch_size=64, gradient_accumulation_steps=3)
    time = make_clock(measured)(strategy)
    ((rows, length, _),) = measured
    assert rows * length <= cpu_clock.MEASURED_TOKENS < (rows + 1) * length
    scale = 64 / rows
    phases = {phase.name: phase.seconds for phase in time.phases}
    assert phases["forward"] == pytest.approx(scale * (1 + 2 * 3))
    assert phases["backward"] == pytest.approx(scale * (2 + 2 * 4))
    assert (phases["clip"], phases["optimizer"]) == (0.5, 0.25)
    assert time.evaluation_seconds == pytest.approx(scale * 0.75)
    assert time.estimator == "measured"
    assert time.tokens == round(64 * 3 * (16 + 32 + 64) / 3)


def test_a_measured_step_is_known_to_later_plans_of_any_learning_rate(measured: Asked) -> None:
    first = make_clock(measured)(make_strategy())
    again = make_clock(measured)(make_strategy(learning_rate=5e-4))
    assert (len(measured), again) == (1, first)
    make_clock(measured)(make_strategy(checkpointed_layers=LAYERS))
    assert len(measured) == 2


def test_what_was_measured_beside_other_work_is_not_kept(own_cache: Path) -> None:
    busy = STEP.model_copy(update={"waiting": 0.6})
    clock = make_clock(lambda *_, **__: busy)
    assert clock(make_strategy()).estimator == "measured_beside_others"
    assert not (own_cache / "cpu_steps.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "null", '{"a": {"forward": -1}}', "\x00"])
def test_a_broken_cache_is_measured_anew(content: str, measured: Asked, own_cache: Path) -> None:
    (own_cache / "cpu_steps.json").write_text(content)
    assert make_clock(measured)(make_strategy()).estimator == "measured"
    assert len(measured) == 1


@pytest.mark.parametrize(
    "changes",
    [{"steps": 3}, {"rates": RATES.model_copy(update={"full_flops": 1e6})}],
    ids=["a run that is over sooner", "a model that takes too long"],
)
def test_what_is_not_worth_measuring_is_timed_by_closed_forms(changes: dict[str, Any], measured: Asked) -> None:
    assert make_clock(measured, **changes)(make_strategy()).estimator == "closed_forms"
    assert measured == []


def test_steps_are_timed_in_a_process_of_their_own() -> None:
    before = Path("/proc/self/statm").read_text().split()[1]
    assert make_clock(None)(make_strategy()).estimator.startswith("measured")
    assert not multiprocessing.active_children(), "it ends with the clock, or races with the interpreter's own end"
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1]) - int(before)
    assert resident_pages * 4096 < 16 * 2**20, "a step in this process leaves more"


def test_a_model_that_cannot_be_run_is_timed_by_closed_forms() -> None:
    broken = CONFIG | {"hidden_act": "no such function"}
    assert make_clock(None, config=broken)(make_strategy()).estimator == "closed_forms"
