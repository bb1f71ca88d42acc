"""The timeline of a rehearsed step says what the rehearsal's figures say."""

from __future__ import annotations

from typing import Any

import pytest

from fitune.planner.allocator import CachingAllocator
from fitune.planner.memory import Memory, Timeline
from fitune.planner.strategy import Strategy
from fitune.planner.timeline import COMPONENTS, EventLog, list_spans
from fitune.runtime.rehearsal.accuracy import make_device
from fitune.runtime.rehearsal.measure import rehearse
from fitune.runtime.rehearsal.replay import Replay, keep_highest

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, accumulated": {"gradient_accumulation_steps": 5},
    "lora, twice": {"gradient_accumulation_steps": 2, "checkpointed_layers": 99},
    "qlora, paged": {"method": "qlora", "optimizer": "paged_adamw_8bit", "loss_head": "chunked"},
    "full": {"method": "full", "adapter_dtype": None, "adapter_rank": None, "adapter_targets": None},
    "full, adafactor": {
        "method": "full",
        "adapter_dtype": None,
        "adapter_rank": None,
        "adapter_targets": None,
        "optimizer": "adafactor",
        "rounding": "stochastic",
        "micro_batch_size": 1,
    },
    "full, updates in backward": {
        "method": "full",
        "adapter_dtype": None,
        "adapter_rank": None,
        "adapter_targets": None,
        "rounding": "stochastic",
        "checkpointed_layers": 99,
        "optimizer_in_backward": True,
    },
    "growing segments": {"expandable_segments": True},
}
EVERY_CASE = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)


def predict(changes: dict[str, Any]) -> tuple[Memory, Timeline]:
    values: dict[str, Any] = {
        "method": "lora",
        "weights_dtype": "bf16",
        "compute_dtype": "bf16",
        "adapter_dtype": "fp32",
        "adapter_rank": 8,
        "adapter_targets": "all-linear",
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "checkpointed_layers": 0,
        "loss_head": "full",
        "optimizer": "adamw",
        "learning_rate": 1e-4,
    }
    strategy = Strategy.model_validate(values | changes)
    memory = rehearse(LLAMA, strategy, make_device(), sequence_length=256, merge=False)
    assert memory.timeline is not None
    return memory, memory.timeline


@EVERY_CASE
def test_the_highest_point_is_the_peak_to_the_byte(changes: dict[str, Any]) -> None:
    memory, timeline = predict(changes)
    assert timeline.peak.total == memory.peak_allocated_bytes
    assert timeline.phases[timeline.peak.phase] == memory.peak_phase
    assert dict(zip(COMPONENTS, timeline.peak.live_bytes, strict=True)) == dict(memory.components)


@EVERY_CASE
def test_no_point_of_a_phase_is_above_that_phases_peak(changes: dict[str, Any]) -> None:
    memory, timeline = predict(changes)
    peaks = {phase.name: phase.peak_allocated_bytes for phase in memory.phases}
    for point in timeline.points:
        assert point.total <= peaks[timeline.phases[point.phase]]


@EVERY_CASE
def test_phases_come_in_the_order_of_a_step(changes: dict[str, Any]) -> None:
    _, timeline = predict(changes)
    shown = min(changes.get("gradient_accumulation_steps", 1), 2)
    update = [] if "optimizer_in_backward" in changes else ["clip", "optimizer"]
    assert [span.phase for span in list_spans(timeline)] == ["forward", "backward"] * shown + update
    assert timeline.micro_batches == changes.get("gradient_accumulation_steps", 1)


def make_log(peak_bytes: int) -> EventLog:
    log = EventLog(start={"weights": 10})
    log.enter("forward")
    log.add("activations", peak_bytes - 10)
    return log


def test_of_micro_batches_the_first_and_the_highest_other_are_kept() -> None:
    made = [make_log(peak) for peak in (90, 20, 70, 70, 30)]
    kept: list[EventLog] = []
    for log in made:
        kept = keep_highest(kept, log)
    assert [id(log) for log in kept] == [id(made[0]), id(made[2])]


def test_the_first_of_the_highest_steps_is_kept() -> None:
    replay, steps = Replay(CachingAllocator()), [[make_log(peak), make_log(5)] for peak in (50, 60, 60)]
    for step in steps:
        replay.keep_step(step)
    assert replay.step_logs is steps[1]


def test_weights_and_states_are_there_all_the_time_and_activations_come_and_go() -> None:
    _, timeline = predict({})
    first, last = timeline.points[0], timeline.points[-1]
    assert len({point.weights for point in timeline.points}) == 1
    assert {point.optimizer for point in timeline.points} == {first.optimizer} != {0}
    assert max(point.activations for point in timeline.points) > 2**20
    assert first.activations < 2**20
    assert last.activations == 0


def test_a_compiled_update_keeps_no_fp32_copies_where_an_eager_one_does() -> None:
    def update_bytes(**changes: Any) -> int:
        full = CASES["full"] | {"compile": True, **changes}
        phases = predict(full)[0].phases
        return next(phase.peak_allocated_bytes for phase in phases if phase.name == "optimizer")

    compiled, nearest = (update_bytes(rounding=rounding) for rounding in ("stochastic", "nearest"))
    assert compiled == nearest
    assert update_bytes(rounding="stochastic", compile=False) > compiled
