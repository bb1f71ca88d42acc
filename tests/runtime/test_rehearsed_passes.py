"""What a run does beside its steps, rehearsed: beside transformers' own loading, and an evaluation of real tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rehearsal import CONV1D, LLAMA, MIXTURE, SLIDING, make_strategy
from transformers import AutoConfig, AutoModelForCausalLM

from fitune.planner.allocator import CachingAllocator
from fitune.planner.memory import Memory
from fitune.runtime.model.build import make_quantization
from fitune.runtime.quiet import quiet_libraries
from fitune.runtime.rehearsal.accuracy import make_device
from fitune.runtime.rehearsal.cuda import CudaCard
from fitune.runtime.rehearsal.cut import no_cut
from fitune.runtime.rehearsal.evaluation import Passes, record_passes
from fitune.runtime.rehearsal.loading import replay_loading
from fitune.runtime.rehearsal.measure import rehearse
from fitune.runtime.rehearsal.model import build_rehearsal_model
from fitune.runtime.rehearsal.replay import Replay
from fitune.runtime.rehearsal.trace import TracedPass, Traces, record_step
from fitune.runtime.rehearsal.watch import Recording, StorageWatch

BOTH = Passes(evaluates=True, answers=True)
SMALLEST_BYTES = 4096
"""Below this are scalars and tables, which a CPU makes in other numbers."""


class LoadedTensors(StorageWatch):
    """Sees what is on the device, and not the meta tensors of the empty model."""

    def see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            super().see(tensor)


def list_changes(recording: Recording, start: int = 0) -> list[int]:
    """Sizes in the order of events, negative when freed."""
    sizes = recording.sizes
    return [sizes[event] if event >= 0 else -sizes[~event] for event in recording.events[start:]]


def count_changes(traced: TracedPass | None) -> Counter[tuple[bool, int]]:
    """How often a size is allocated, and freed, on the whole model."""
    assert traced is not None
    events = [event for segment in traced.segments if segment.name == "evaluate" for event in segment.events]
    return Counter((event >= 0, traced.recording.sizes[max(event, ~event)]) for event in events)


def list_large(changes: Sequence[int]) -> list[int]:
    """The large ones in whole blocks; those made one after the other, and those freed, in the order of their sizes."""
    rounded = [-(-abs(one) // 512) * 512 * (1 if one > 0 else -1) for one in changes if abs(one) > SMALLEST_BYTES]
    groups: list[list[int]] = []
    for one in rounded:
        if groups and (groups[-1][0] > 0) == (one > 0):
            groups[-1].append(one)
        else:
            groups.append([one])
    return [one for group in groups for one in sorted(group)]


@pytest.mark.parametrize(
    ("method", "config", "in_order"),
    [("lora", LLAMA, True), ("qlora", LLAMA, True), ("qlora", CONV1D, True), ("full", MIXTURE, False)],
    ids=["bf16", "nf4", "nf4 of transposed weights", "experts"],
)
def test_weights_come_and_go_as_in_transformers_own_loading(
    method: str, config: dict[str, Any], in_order: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of an expert's projections comes first is the file's."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a thread's tensors are not seen
    config = {**config, ("n_layer" if config is CONV1D else "num_hidden_layers"): 2}
    strategy = make_strategy(method)
    values = dict(config)
    settings = AutoConfig.for_model(values.pop("model_type"), **values)
    quantization = {"quantization_config": make_quantization(strategy)} if method == "qlora" else {}
    watch = LoadedTensors(temporaries=lambda *_: ())
    with quiet_libraries():
        AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(tmp_path)
        with watch:
            loaded = AutoModelForCausalLM.from_pretrained(
                tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"}, **quantization
            )
    replay = Replay(CachingAllocator(expandable=True))
    log = replay.start_log()
    replay_loading(replay, build_rehearsal_model(config, strategy, plan=no_cut), strategy)
    planned, seen = list_large([size for _, size in log.events[2:]]), list_large(list_changes(watch.recording))
    assert loaded is not None
    assert Counter(planned) == Counter(seen)
    assert max(accumulate(planned)) >= max(accumulate(seen))
    assert planned == seen or not in_order


@pytest.mark.parametrize(
    ("config", "strategy"),
    [
        (LLAMA, make_strategy()),
        (LLAMA, make_strategy("full", loss_head="fused", weights_dtype="fp32")),
        (CONV1D, make_strategy(loss_head="chunked")),
        (SLIDING, make_strategy("full")),
    ],
    ids=["lora", "fp32 and fused", "gpt2 and chunked", "sliding window"],
)
def test_fakes_are_evaluated_and_answer_as_real_tensors_do(config: dict[str, Any], strategy: Any) -> None:
    config = {**config, ("n_layer" if config is CONV1D else "num_hidden_layers"): 3}
    recorded = record_step(config, strategy, sequence_length=256, cut=False, passes=BOTH)
    real = build_rehearsal_model(config, strategy, plan=no_cut)
    real.model.to_empty(device=torch.device("cpu"))
    passes = record_passes(real, strategy, BOTH, {}, sequence_length=256)
    for fake, own in zip((recorded.evaluation, recorded.answer), passes, strict=True):
        assert fake is not None
        assert own is not None
        pair = [
            list_changes(one, next(start for start, name in one.marks if name == "evaluate")) for one in (fake, own)
        ]
        assert Counter(pair[0]) == Counter(pair[1])
        assert max(accumulate(pair[0])) == max(accumulate(pair[1])) > 2**20


def test_one_answer_serves_all_micro_batches_and_loss_heads() -> None:
    config, strategies = (
        LLAMA,
        [make_strategy(), make_strategy(micro_batch_size=1, loss_head="fused"), make_strategy(checkpointed_layers=2)],
    )
    traces = Traces(config, sequence_length=256, passes=BOTH)
    shared = [traces.find(strategy, CudaCard()).answer for strategy in strategies]
    fresh = [Traces(config, sequence_length=256, passes=BOTH).find(one, CudaCard()).answer for one in strategies]
    for pair in zip(shared, fresh, strict=True):
        one, other = (count_changes(one) for one in pair)
        assert one == other
    assert len({id(one.recording.marks) for one in shared if one is not None}) == 2


def predict(config: dict[str, Any], passes: Passes, *, length: int = 256, **changes: Any) -> Memory:
    strategy = make_strategy(**changes)
    return rehearse(config, strategy, make_device(), sequence_length=length, merge=False, passes=passes)


def find_peaks(memory: Memory) -> dict[str, int]:
    return {phase.name: phase.peak_allocated_bytes for phase in memory.phases}


def test_the_run_needs_what_its_highest_phase_needs() -> None:
    """Keys and values of many heads, against a checkpoint a layer."""
    config = LLAMA | {"num_key_value_heads": 8, "num_hidden_layers": 32, "intermediate_size": 256, "vocab_size": 64}
    changes: dict[str, Any] = {"checkpointed_layers": 32, "micro_batch_size": 1, "loss_head": "fused"}
    silent, answering = (predict(config, passes, length=4096, **changes) for passes in (Passes(), BOTH))
    peaks = find_peaks(answering)
    assert answering.peak_phase == "evaluate"
    assert answering.peak_allocated_bytes == peaks["evaluate"] == max(peaks.values()) == answering.components.total
    assert silent.peak_allocated_bytes == max(find_peaks(silent).values()) < answering.peak_allocated_bytes
    assert silent.required_bytes < answering.required_bytes


def test_an_evaluation_holds_the_optimizers_states_and_no_gradients() -> None:
    config, changes = LLAMA | {"num_hidden_layers": 3}, {"method": "full", "optimizer": "adamw_32bit"}
    memory = predict(config, Passes(evaluates=True), length=8, **changes)
    peaks = find_peaks(memory)
    assert (
        memory.components.optimizer < peaks["evaluate"] < memory.peak_allocated_bytes - memory.components.gradients // 2
    )
    assert peaks["save"] <= peaks["evaluate"]


def test_what_is_not_evaluated_is_no_phase_of_the_run() -> None:
    config = LLAMA | {"num_hidden_layers": 2}
    assert set(find_peaks(predict(config, Passes()))) == {"load", "forward", "backward", "clip", "optimizer", "save"}
    assert "evaluate" in find_peaks(predict(config, Passes(evaluates=True)))


def test_the_segment_that_transformers_makes_first_holds_the_weights() -> None:
    strategy = make_strategy("full")
    model = build_rehearsal_model(LLAMA | {"hidden_size": 1024, "num_key_value_heads": 8}, strategy)
    replay = Replay(CachingAllocator())
    replay_loading(replay, model, strategy)
    weights = sum(spec.elements * spec.width for spec in model.weights.values())
    assert 0 < replay.allocator.reserved_bytes - weights < 8 * 2**20


def test_an_evaluation_with_ligers_kernels_launches_none_of_them() -> None:
    """On a machine with a GPU a launch would read what is no memory."""
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    strategy = make_strategy("full", kernels="liger")
    recorded = record_step(LLAMA, strategy, sequence_length=256, cut=False, passes=BOTH)
    assert recorded.evaluation is not None
    assert recorded.answer is not None
