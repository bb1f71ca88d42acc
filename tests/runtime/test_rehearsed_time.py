"""The time of a rehearsed step: its operations beside what can be counted by hand, and beside steps of an H100."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from test_rehearsal import ALTERNATING, LLAMA, make_strategy, trace

from fitune.planner.catalog import find_gpu
from fitune.planner.rates import ISSUE_SHARE, KERNEL_SECONDS, make_gpu_rates
from fitune.planner.shape import make_shape
from fitune.planner.speed import PhaseTime, StepTime
from fitune.planner.step_cost import estimate_model_flops
from fitune.planner.strategy import Strategy
from fitune.runtime.rehearsal.accuracy import load_rows, make_device
from fitune.runtime.rehearsal.accuracy_speed import (
    TimedRow,
    is_planned,
    render_host_cost,
    render_issue_share,
    render_speed_summary,
    render_speed_table,
    time_row,
)
from fitune.runtime.rehearsal.measure import Rehearsal
from fitune.runtime.rehearsal.time import list_works, time_step
from fitune.runtime.rehearsal.trace import Traces

DATA = Path(__file__).parents[1] / "data"
RATES = make_gpu_rates(find_gpu("H100 80GB"))
LENGTH = 256
SAMPLE = {
    "h100_reference_step.jsonl": [
        "llama-3.1-8b-qlora-r16-adamw_torch_fused-b2-s16384-ckpt-full-fp32",
        "llama-3.2-1b-full-fp32-adamw_bnb_8bit-b8-s4096-ckpt-chunked",
        "qwen3-1.7b-lora-r64-adamw_torch_fused-b8-s4096-ckpt-dropout=0.05-chunked-fp32",
        "mistral-7b-qlora-r16-paged_adamw_8bit-b4-s1024-ckpt-accum=4-chunked-fp32",
    ],
    "h100_speed_levers.jsonl": [
        "llama-3.1-8b-lora-adamw_torch_fused-b2s4096-nockpt-full",
        "llama-3.1-8b-lora-adamw_torch_fused-b2s4096-ckpt-full-compile",
    ],
}


def count(config: dict[str, Any], strategy: Strategy, kind: str, *, cut: bool = True) -> dict[str, float]:
    """Floating point operations of one kind, by phase."""
    found = {"forward": 0.0, "backward": 0.0}
    for phase, work in list_works(trace(config, strategy, cut=cut)):
        found[phase] += work.times * work.flops if work.kind == kind else 0.0
    return found


def time_of(config: dict[str, Any], strategy: Strategy, *, cut: bool = True) -> StepTime:
    traced = trace(config, strategy, cut=cut)
    return time_step(traced, strategy, RATES, flops_per_token=1.0, length=LENGTH)


def test_products_are_those_of_the_model_twice_as_many_in_backward() -> None:
    shape, tokens = make_shape(LLAMA), 2 * LENGTH
    met = shape.parameters - shape.embedding_parameters - shape.other_parameters - 9 * 2 * 256
    found = count(LLAMA, make_strategy("full"), "matrix")
    assert found == {"forward": 2 * met * tokens, "backward": 4 * met * tokens}


def test_checkpointed_layers_compute_their_forward_again_up_to_the_last_tensor_that_backward_needs() -> None:
    plain, checkpointed = (
        count(LLAMA, make_strategy("full", checkpointed_layers=layers), "matrix") for layers in (0, 9)
    )
    head, last = 2 * 2 * LENGTH * 256 * 4096, 9 * 2 * 2 * LENGTH * 768 * 256
    assert checkpointed["forward"] == plain["forward"]
    assert checkpointed["backward"] - plain["backward"] == plain["forward"] - head - last


def test_attention_is_causal_and_two_and_a_half_times_as_much_in_backward() -> None:
    forward = 9 * 4 * 2 * 8 * LENGTH * LENGTH * 32 / 2
    assert count(LLAMA, make_strategy("full"), "attention") == {"forward": forward, "backward": 2.5 * forward}


def test_a_packed_weights_product_counts_as_the_weights() -> None:
    qlora, lora = (count(LLAMA, make_strategy(method), "matrix") for method in ("qlora", "lora"))
    assert qlora == lora


@pytest.mark.parametrize(
    ("config", "changes"),
    [(LLAMA, {}), (LLAMA, {"checkpointed_layers": 9}), (ALTERNATING, {"loss_head": "fused", "attention": "eager"})],
    ids=["plain", "checkpointed", "alternating"],
)
def test_the_cut_models_time_is_the_whole_ones(config: dict[str, Any], changes: dict[str, Any]) -> None:
    strategy = make_strategy(**changes)
    cut, whole = (time_of(config, strategy, cut=cut) for cut in (True, False))
    for one, other in zip(cut.phases, whole.phases, strict=True):
        assert one.device_seconds == pytest.approx(other.device_seconds)
        assert one.host_seconds == pytest.approx(other.host_seconds)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_updates_in_backward_take_the_devices_time_there(optimizer: str) -> None:
    plain, early = (
        time_of(LLAMA, make_strategy("full", optimizer=optimizer, clips_gradients=False, optimizer_in_backward=on))
        for on in (False, True)
    )
    assert [phase.name for phase in early.phases] == ["forward", "backward"]
    moved, small_kernels = sum(phase.device_seconds for phase in plain.phases), (9 + 3) * 15 * KERNEL_SECONDS
    assert moved < sum(phase.device_seconds for phase in early.phases) < moved + small_kernels
    assert early.phases[1].host_seconds > plain.phases[1].host_seconds


def test_offload_adds_what_crosses_the_bus() -> None:
    plain, offloaded = (time_of(LLAMA, make_strategy(activation_offload=on)) for on in (False, True))
    for name, one, other in zip(("forward", "backward"), plain.phases, offloaded.phases, strict=False):
        assert other.device_seconds > 1.1 * one.device_seconds, name


def test_compiled_layers_move_fewer_bytes_and_compute_the_same() -> None:
    eager, compiled = (make_strategy("full", compile=on) for on in (False, True))
    assert count(LLAMA, compiled, "matrix") == count(LLAMA, eager, "matrix")
    moved = {}
    for strategy in (eager, compiled):
        works = [work for _, work in list_works(trace(LLAMA, strategy)) if work.kind == "memory"]
        moved[strategy.compile] = sum(work.times * work.bytes for work in works)
    assert moved[True] < 0.75 * moved[False]


def count_host(strategy: Strategy, phase: str) -> dict[str, float]:
    """What the host does in a phase, by kind."""
    found: dict[str, float] = defaultdict(float)
    for name, work in list_works(trace(LLAMA, strategy)):
        found[work.host] += work.times * work.calls * (name == phase)
    return found


def test_the_host_work_of_a_step_is_counted_by_kind() -> None:
    full, lora, qlora = (make_strategy(method) for method in ("full", "lora", "qlora"))
    assert count_host(full, "forward")["engine"] == 0 < count_host(full, "backward")["engine"]
    assert count_host(full, "backward")["operation"] <= 1, "the gradient of the loss itself"
    assert count_host(full, "backward")["module"] == 0
    assert count_host(full, "forward")["adapter"] == 0
    assert count_host(lora, "forward")["adapter"] == 7 * 9
    for phase in ("forward", "backward"):  # three products read the first layer's input, which needs no gradient
        assert count_host(qlora, phase)["function"] - count_host(lora, phase)["function"] == 7 * 9 - 3


def test_a_checkpointed_layer_calls_its_modules_again_and_hooks_on_what_it_would_keep() -> None:
    plain, checkpointed = (make_strategy("lora", checkpointed_layers=layers) for layers in (0, 9))
    assert count_host(plain, "forward")["hook"] == 0
    assert count_host(checkpointed, "forward")["hook"] > 9 * 10
    assert count_host(checkpointed, "backward")["adapter"] == 7 * 9
    assert count_host(checkpointed, "forward")["module"] == count_host(plain, "forward")["module"]


def test_compiled_layers_call_no_modules() -> None:
    eager, compiled = (count_host(make_strategy("lora", compile=on), "forward") for on in (False, True))
    again = count_host(make_strategy("lora", compile=True), "forward")
    assert compiled == again, "whether a layer was compiled before makes no difference"
    assert compiled["adapter"] == 0 and compiled["module"] < 0.2 * eager["module"]


def test_memory_and_time_come_from_one_trace() -> None:
    strategy = make_strategy(gradient_accumulation_steps=4)
    shape = make_shape(LLAMA)
    rehearsal = Rehearsal(Traces(LLAMA, sequence_length=LENGTH), shape, make_device(), merge=False)
    time = rehearsal.time(strategy)
    assert time.estimator == rehearsal.measure(strategy).estimator == "rehearsal"
    assert time.tokens == 4 * 2 * LENGTH
    assert time.flops == estimate_model_flops(shape, strategy, LENGTH) * time.tokens
    assert [phase.name for phase in time.phases] == ["forward", "backward", "clip", "optimizer"]


@pytest.mark.parametrize("attention", ["varlen", "sdpa"])
def test_packed_rows_without_a_mask_are_timed_document_by_document(attention: str) -> None:
    strategy = make_strategy(packing=True, attention=attention, micro_batch_size=8)
    traced = trace(LLAMA, strategy, cut=True)
    rates = RATES.model_copy(update={"kernel_seconds": 0.0, "memory_bytes": 1e20})  # a small model's arithmetic counts

    def time_documents(tokens: float | None) -> dict[str, float]:
        time = time_step(traced, strategy, rates, flops_per_token=1.0, length=LENGTH, document_tokens=tokens)
        return {phase.name: phase.device_seconds for phase in time.phases}

    whole, documents = time_documents(None), time_documents(LENGTH / 8)
    for phase in ("forward", "backward"):
        assert (documents[phase] < whole[phase]) == (attention == "varlen")
    assert documents["optimizer"] == whole["optimizer"]


@pytest.fixture(scope="module")
def timed() -> list[TimedRow]:
    device = make_device()
    return [
        time_row(row, config, device)
        for file, names in SAMPLE.items()
        for row, config in load_rows(DATA / file, DATA / "architectures.json")
        if row["id"] in names
    ]


def test_a_sample_of_measured_steps_is_met(timed: list[TimedRow]) -> None:
    """Of all rows over 0.5 s docs/accuracy.md has the figures; these are ones that nothing slowed down."""
    assert len(timed) == sum(len(names) for names in SAMPLE.values())
    for estimator, middle, worst in (("rehearsal", 0.055, 0.10), ("closed_forms", 0.095, 0.20)):
        errors = [abs(one.error(estimator)) for one in timed]  # type: ignore[arg-type]
        assert median(errors) < middle
        assert max(errors) < worst


def test_what_8_bit_updates_reach_is_told_from_steps_that_they_are_a_good_part_of() -> None:
    def row(model: str, measured: float, update: float, optimizer: str = "adamw_8bit") -> TimedRow:
        seconds = {"forward": 0.1, "backward": 0.2, "optimizer": update}
        phases = tuple(PhaseTime(name=n, device_seconds=s, host_seconds=0.0, seconds=s) for n, s in seconds.items())
        time = StepTime(phases=phases, tokens=1, flops=1.0, estimator="rehearsal")
        told = {"id": model, "model": model, "optimizer": optimizer, "measured": {"step_seconds": measured}}
        return TimedRow(row=told, rehearsed=time, closed_forms=time)

    rows = [row("a", 0.5, 0.2), row("b", 0.7, 0.2), row("c", 0.9, 0.01), row("d", 0.9, 0.2, "adamw")]
    best = pytest.approx(0.2 * ISSUE_SHARE)
    assert [one.update_seconds for one in rows] == [(best, pytest.approx(0.2)), (best, pytest.approx(0.4)), None, None]
    lines = list(render_issue_share(rows))
    shares = (0.4 / 0.6, 0.2 / 0.4, 0.2 / 0.2)
    assert [line.split()[-5] for line in lines] == [f"{100 * ISSUE_SHARE * share:.0f}" for share in shares]
    assert "2 rows" in lines[0] and lines[1].startswith("without a")


def test_the_table_of_times_names_every_row_and_what_it_waits_for(timed: list[TimedRow]) -> None:
    lines = render_speed_table(timed).splitlines()[1:]
    assert [float(line.split()[1].rstrip("s")) for line in lines] == sorted(
        round(one.measured_seconds, 3) for one in timed
    )
    assert {line.split()[-1] for line in lines} == {"device", "host"}
    assert [line.split()[0] for line in render_speed_summary(timed)] == [
        "all",
        "all",
        "steady",
        "steady",
        "device",
        "device",
    ]
    assert next(iter(render_host_cost(timed))).startswith("of all rows              1 rows wait for the host")


def test_the_page_of_times_shows_every_row_and_sums_them_up() -> None:
    page = (DATA.parents[1] / "docs" / "speed.md").read_text(encoding="utf-8")
    rows, summary = (
        [line.strip("| ").split(" | ") for line in part.splitlines() if line[:2] == "| "]
        for part in (page.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0] for name in ("rows", "summary"))
    )
    errors = {row[0]: abs(float(row[3].rstrip(" %"))) for row in rows[1:]}
    measured = [
        row
        for file in SAMPLE
        for row, _ in load_rows(DATA / file, DATA / "architectures.json")
        if is_planned(row) and row["measured"]["step_seconds"] > 0.5
    ]
    assert set(errors) == {row["id"] for row in measured}
    (everything,) = (row for row in summary if row[:3] == ["all over 0.5 s", str(len(errors)), "rehearsal"])
    assert float(everything[3].rstrip(" %")) == pytest.approx(median(errors.values()), abs=0.06)
    assert float(everything[5].rstrip(" %")) == max(errors.values())
    assert float(everything[3].rstrip(" %")) <= 10, "what the time model promises"
    (steady,) = (row for row in summary if row[0] == "over 0.5 s, without a pause" and row[2] == "rehearsal")
    assert int(steady[1]) >= 0.8 * len(errors) and float(steady[5].rstrip(" %")) <= 30
