"""The rehearsal beside the whole model's trace, and on architectures of every kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fitune.planner.catalog import find_gpu, make_catalog_device
from fitune.planner.families import FAMILIES
from fitune.planner.memory import Memory
from fitune.planner.shape import make_shape
from fitune.planner.strategy import Device, DeviceConstant, Strategy
from fitune.recipes.errors import ModelError
from fitune.recipes.schema import BudgetTable
from fitune.runtime.model import build
from fitune.runtime.rehearsal.accuracy import compare, load_rows, make_device
from fitune.runtime.rehearsal.attention import flash_backward_temporaries, known_documents
from fitune.runtime.rehearsal.cuda import CudaCard
from fitune.runtime.rehearsal.layers import Segment
from fitune.runtime.rehearsal.measure import Rehearsal, count_unsure, rehearse, replay_run
from fitune.runtime.rehearsal.time import list_works
from fitune.runtime.rehearsal.trace import RecordedStep, TracedStep, Traces, record_step, trace_step
from fitune.runtime.rehearsal.watch import WORKSPACES

DATA = Path(__file__).parents[1] / "data"
MiB = 2**20
MEASURED = DATA / "h100_reference_step.jsonl", DATA / "architectures.json"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
MIXTURE = {
    **LLAMA,
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}
SLIDING = {**LLAMA, "model_type": "mistral", "sliding_window": 128}
ALTERNATING = {**LLAMA, "model_type": "gemma2", "head_dim": 32, "num_hidden_layers": 16, "sliding_window": 128}
FUSED = {**LLAMA, "model_type": "phi3", "pad_token_id": 0}
CONV1D = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 8,
    "n_head": 8,
    "vocab_size": 4096,
    "n_positions": 1024,
}


def make_strategy(method: str = "lora", **changes: Any) -> Strategy:
    values: dict[str, Any] = {
        "method": method,
        "weights_dtype": "bf16",
        "compute_dtype": "bf16",
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "checkpointed_layers": 0,
        "loss_head": "full",
        "optimizer": "adamw",
        "learning_rate": 1e-4,
    }
    if method != "full":
        values |= {"adapter_dtype": "fp32", "adapter_rank": 8, "adapter_targets": "all-linear"}
    return Strategy(**(values | changes))


def trace(config: dict[str, Any], strategy: Strategy, *, cut: bool = True, length: int = 256) -> TracedStep:
    if cut:
        return trace_step(config, strategy, CudaCard(), sequence_length=length)
    return record_step(config, strategy, sequence_length=length, cut=False).extend().on(CudaCard())


def predict(config: dict[str, Any], strategy: Strategy, *, length: int = 256) -> Memory:
    return rehearse(config, strategy, make_device(), sequence_length=length, merge=False)


def list_sizes(traced: TracedStep) -> list[int]:
    """Sizes in the order of events, negative when freed."""
    sizes = traced.recording.sizes
    events = [event for segment in (*traced.first, *traced.next) for event in segment.events]
    return [sizes[event] if event >= 0 else -sizes[~event] for event in events]


@pytest.mark.parametrize(
    ("config", "strategy"),
    [
        (LLAMA, make_strategy()),
        (LLAMA, make_strategy(checkpointed_layers=9, gradient_accumulation_steps=3)),
        (LLAMA, make_strategy("full", weights_dtype="fp32", loss_head="chunked", checkpointed_layers=9)),
        (LLAMA, make_strategy("qlora", adapter_dropout=0.1)),
        (LLAMA, make_strategy("full", optimizer_in_backward=True, checkpointed_layers=9, loss_head="fused")),
        (CONV1D, make_strategy("full")),
        (CONV1D, make_strategy("full", optimizer_in_backward=True)),
        (CONV1D, make_strategy("qlora")),
    ],
    ids=[
        "lora",
        "checkpointed and accumulated",
        "full in fp32",
        "qlora with dropout",
        "updates in backward",
        "gpt2",
        "gpt2 with updates in backward",
        "gpt2 qlora",
    ],
)
def test_repeating_the_middle_layers_gives_the_whole_models_trace(config: dict[str, Any], strategy: Strategy) -> None:
    trace(config, strategy)  # fills the caches that the first trace of a process makes
    short, whole = trace(config, strategy), trace(config, strategy, cut=False)
    assert len(short.model.layers) < len(whole.model.layers)
    assert sorted(list_sizes(short)) == sorted(list_sizes(whole))
    assert short.model.trainable == whole.model.trainable
    assert short.model.adapters == whole.model.adapters


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "config", [LLAMA, LLAMA | {"tie_word_embeddings": True}, MIXTURE], ids=["llama", "tied", "moe"]
)
def test_updates_in_backward_are_of_every_tensor_once_and_leave_no_gradient(
    config: dict[str, Any], compiled: bool
) -> None:
    traced = trace(config, make_strategy("full", optimizer_in_backward=True, compile=compiled))
    updates = traced.recording.updates
    backward = [event for segment in traced.first if segment.name == "backward" for event in segment.events]
    updated = [spec for event in backward for spec in updates.get(event, ())]
    assert Counter(updated) == Counter(traced.model.trainable)
    made = {event for segment in traced.first for event in segment.events if event >= 0} - updates.keys()
    freed = {~event for segment in traced.first for event in segment.events if event < 0}
    kept = [one for one in made - freed if traced.recording.components[one] == "gradients"]
    assert not kept


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_updates_in_backward_spare_all_gradients_but_a_layers_and_the_heads(optimizer: str) -> None:
    ordinary, spared = (
        predict(LLAMA, make_strategy("full", optimizer=optimizer, optimizer_in_backward=on), length=8)
        for on in (False, True)
    )
    shape = make_shape(LLAMA)
    layer, head = shape.blocks[0].parameters, shape.head.weight_parameters
    assert ordinary.components.optimizer == spared.components.optimizer, "the states are the same ones"
    assert spared.components.gradients <= 2 * max(layer, head)
    assert not {"clip", "optimizer"} & {phase.name for phase in spared.phases}
    saved = ordinary.peak_allocated_bytes - spared.peak_allocated_bytes
    assert saved > 0.6 * 2 * (shape.parameters - layer - head)


def find_peak(traced: TracedStep) -> int:
    """The most that is live at one time."""
    return max(accumulate(list_sizes(traced)))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_no_other_half_of_the_layers_needs_less_when_checkpointed_than_the_first_one(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Every other one, or the last half: as much at the loss head, as much or more in backward."""
    config, layers = LLAMA | {"num_hidden_layers": 8}, range(8)
    strategy, real = make_strategy(method, checkpointed_layers=4, loss_head="fused"), build.checkpoint_layers

    def peaks_with(chosen: Sequence[int]) -> dict[str, int]:
        def checkpoint(base: Any, count: int, **options: Any) -> None:
            real(base, len(layers), **options)
            for index, layer in enumerate(build.find_layers(base)):
                vars(layer)["gradient_checkpointing"] = index in chosen

        monkeypatch.setattr(build, "checkpoint_layers", checkpoint)
        traced = record_step(config, strategy, sequence_length=512, cut=False).extend().on(CudaCard())
        return {
            name: peak.allocated_bytes for name, peak in replay_run(traced, strategy, limit_bytes=None).peaks.items()
        }

    first, *others = (peaks_with(chosen) for chosen in (layers[:4], layers[::2], layers[4:]))
    for other in others:
        assert first["forward"] <= other["forward"] * 1.005
        assert first["backward"] <= other["backward"] * 1.005
    assert first["backward"] < 0.97 * others[-1]["backward"]


@pytest.mark.parametrize("layers", [1, 6, 8, 13, 15])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointed_layers_and_others_are_repeated_each(method: str, layers: int) -> None:
    config = LLAMA | {"num_hidden_layers": 16}
    strategy = make_strategy(method, checkpointed_layers=layers, loss_head="fused")
    trace(config, strategy)
    short, whole = trace(config, strategy), trace(config, strategy, cut=False)
    assert len(short.model.layers) < len(whole.model.layers) == 16
    assert sorted(list_sizes(short)) == sorted(list_sizes(whole))
    assert find_peak(short) == find_peak(whole)
    assert short.model.trainable == whole.model.trainable


def test_each_layer_that_is_checkpointed_saves_about_as_much() -> None:
    """About: a block of the allocator that is less than 1 MiB too large is not split, and counts as a whole."""
    config, layers = LLAMA | {"num_hidden_layers": 16}, (0, 1, 5, 9)
    kept = [
        predict(config, make_strategy(checkpointed_layers=one), length=1024).components.activations for one in layers
    ]
    saved = [
        (more - less) / (after - before) for (before, more), (after, less) in pairwise(zip(layers, kept, strict=True))
    ]
    assert min(saved) > 2**20
    assert saved == pytest.approx([sum(saved) / len(saved)] * len(saved), rel=0.2)


def test_layers_that_alternate_are_repeated_in_pairs() -> None:
    strategy = make_strategy(attention="eager")
    short, whole = trace(ALTERNATING, strategy), trace(ALTERNATING, strategy, cut=False)
    assert short.model.cut.blocks == (2, 2, 2, 2, 2)
    assert sorted(list_sizes(short)) == sorted(list_sizes(whole))


@pytest.mark.parametrize("config", [MIXTURE, SLIDING, FUSED, CONV1D], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_every_kind_of_architecture_is_rehearsed(config: dict[str, Any], method: str) -> None:
    memory = predict(config, make_strategy(method))
    assert memory.components.total == memory.peak_allocated_bytes
    assert memory.components.weights > 0
    assert memory.peak_reserved_bytes is not None
    assert memory.peak_allocated_bytes <= memory.peak_reserved_bytes < memory.peak_device_bytes < memory.required_bytes


def test_rows_longer_than_the_sliding_window_pay_for_an_explicit_mask() -> None:
    strategy = make_strategy()
    within, beyond = predict(SLIDING | {"sliding_window": 512}, strategy), predict(SLIDING, strategy)
    mask_bytes = 2 * 2 * 256 * 256
    assert beyond.components.activations >= within.components.activations + 9 * mask_bytes


def test_eager_attention_keeps_the_scores_that_fused_attention_does_not() -> None:
    fused, eager = (predict(LLAMA, make_strategy(attention=kind)) for kind in ("sdpa", "eager"))
    scores_bytes = 2 * 2 * 8 * 256 * 256
    assert eager.components.activations > fused.components.activations + 9 * scores_bytes


def test_without_flash_attention_keys_and_values_of_all_heads_are_kept_and_no_scores() -> None:
    config = LLAMA | {"num_key_value_heads": 2}
    kinds = ("sdpa", "efficient", "eager")
    flash, efficient, eager = (
        predict(config, make_strategy(attention=kind, compute_dtype="fp16")).components.activations for kind in kinds
    )
    expanded_bytes = LLAMA["num_hidden_layers"] * 2 * 2 * (2 * 256) * (256 - 64)
    assert flash + 0.99 * expanded_bytes < efficient < eager
    assert efficient < flash + 1.2 * expanded_bytes


def test_dropout_keeps_a_mask_of_one_byte_an_element() -> None:
    plain, dropped = (predict(LLAMA, make_strategy(adapter_dropout=share)) for share in (0.0, 0.1))
    inputs = 4 * 256 + 2 * 256 + 768
    kept = dropped.components.activations - plain.components.activations
    assert kept >= 9 * 2 * 256 * inputs


def test_dropouts_mask_is_allocated_before_its_result() -> None:
    """As CUDA's kernel does; the order decides how segments are cut up."""
    mask, result = 2 * 256 * 256, 2 * 2 * 256 * 256
    assert (mask, result) in pairwise(list_sizes(trace(LLAMA, make_strategy(adapter_dropout=0.1))))


@pytest.mark.parametrize(("model_type", "workspaces"), [("llama", 0), ("qwen2", 2)])
def test_products_with_a_bias_hold_a_workspace_of_their_own_in_each_thread(model_type: str, workspaces: int) -> None:
    traced = trace({**LLAMA, "model_type": model_type}, make_strategy("full", checkpointed_layers=9))
    events = [event for segment in traced.first for event in segment.events]
    assert sum(traced.recording.sizes[event] == MiB for event in events if event in WORKSPACES) == workspaces


@pytest.mark.parametrize(("length", "sums"), [(1024, 0), (1792, 1)])
def test_an_embeddings_gradient_over_many_tokens_is_summed_in_fp32_first(length: int, sums: int) -> None:
    traced = trace({**LLAMA, "num_hidden_layers": 2}, make_strategy("full"), length=length)
    indices = 8 * 2 * length
    last = list_sizes(traced)[-40:]
    assert last.count(indices) == 6 * sums


def test_strategies_that_differ_in_the_update_share_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = [
        make_strategy(),
        make_strategy(optimizer="paged_adamw_8bit"),
        make_strategy(gradient_accumulation_steps=2),
        make_strategy(gradient_accumulation_steps=8, optimizer="adafactor"),
        make_strategy(micro_batch_size=1),
    ]
    alone = [predict(LLAMA, strategy) for strategy in strategies]
    traced: list[Strategy] = []

    def count(config: dict[str, Any], strategy: Strategy, **options: Any) -> RecordedStep:
        traced.append(strategy)
        return record_step(config, strategy, **options)

    monkeypatch.setattr("fitune.runtime.rehearsal.trace.record_step", count)
    rehearsal = Rehearsal(Traces(LLAMA, sequence_length=256), make_shape(LLAMA), make_device(), merge=False)
    assert [rehearsal.measure(strategy) for strategy in strategies] == alone
    assert len(traced) == 3


def test_all_cards_and_budgets_share_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (find_gpu(name) for name in ("RTX 4090", "A100 80GB", "H100 80GB", "B200"))
    devices = [make_catalog_device(card, BudgetTable()) for card in cards]
    tight = [devices[0].model_copy(update={"memory_bytes": size * 2**20}) for size in (1300, 1320, 1340, 1400, 1600)]
    devices = [*devices, *tight, *devices]
    alone = [rehearse(LLAMA, make_strategy(), device, sequence_length=256, merge=False) for device in devices]
    traced: list[Strategy] = []

    def count(config: dict[str, Any], strategy: Strategy, **options: Any) -> RecordedStep:
        traced.append(strategy)
        return record_step(config, strategy, **options)

    monkeypatch.setattr("fitune.runtime.rehearsal.trace.record_step", count)
    traces = Traces(LLAMA, sequence_length=256)
    shared = [Rehearsal(traces, make_shape(LLAMA), device, merge=False).measure(make_strategy()) for device in devices]
    assert shared == alone
    assert len(traced) == 1
    assert len({memory.peak_reserved_bytes for memory in shared}) > 2


def list_events(segments: Sequence[Segment]) -> list[tuple[str, int | None, list[int]]]:
    """The events of each segment; frees that follow each other in one order, since autocast's cache has none."""
    return [
        (
            one.name,
            one.block,
            [
                event
                for frees, run in groupby(one.events, lambda event: event < 0)
                for event in (sorted(run) if frees else run)
            ],
        )
        for one in segments
    ]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_recording_serves_any_number_of_checkpointed_layers(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLAMA | {"num_hidden_layers": 20}
    strategies = [
        make_strategy(method, checkpointed_layers=layers, gradient_accumulation_steps=2) for layers in (8, 13, 20, 0, 6)
    ]
    trace(config, strategies[0])
    fresh = [trace(config, strategy) for strategy in strategies]
    recorded: list[int] = []

    def count(config: dict[str, Any], strategy: Strategy, **options: Any) -> RecordedStep:
        recorded.append(strategy.checkpointed_layers)
        return record_step(config, strategy, **options)

    monkeypatch.setattr("fitune.runtime.rehearsal.trace.record_step", count)
    traces = Traces(config, sequence_length=256)
    for strategy, alone in zip(strategies, fresh, strict=True):
        shared = traces.find(strategy, CudaCard())
        assert list_events(shared.first) == list_events(alone.first)
        assert list_events(shared.next) == list_events(alone.next)
        assert shared.recording.sizes == alone.recording.sizes
        assert shared.recording.components == alone.recording.components
        assert list(list_works(shared)) == list(list_works(alone))
        assert (shared.model.trainable, shared.model.adapters) == (alone.model.trainable, alone.model.adapters)
    assert recorded == [8, 20, 0]


def test_the_range_of_what_the_addresses_may_change_is_required_twice_beside_the_highest() -> None:
    assert count_unsure([100, 100, 100]) == 0
    assert count_unsure([100, 90, 95]) == 20
    assert count_unsure([100, 130, 90]) == 110


def test_paged_states_of_large_tensors_are_beside_the_allocator() -> None:
    held, paged = (predict(LLAMA, make_strategy("full", optimizer=name)) for name in ("adamw_32bit", "paged_adamw"))
    assert paged.components.optimizer < held.components.optimizer / 5
    assert held.managed_bytes == 0
    assert paged.managed_bytes >= held.components.optimizer - paged.components.optimizer


def test_gradient_accumulation_keeps_gradients_through_the_next_forward() -> None:
    one, two = (predict(LLAMA, make_strategy("full", gradient_accumulation_steps=steps)) for steps in (1, 2))
    forward = [{phase.name: phase.peak_allocated_bytes for phase in memory.phases}["forward"] for memory in (one, two)]
    gradients = 2 * 9 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 768)
    assert forward[1] > forward[0] + gradients


def test_cards_before_hopper_hold_smaller_workspaces() -> None:
    hopper, ampere = (
        rehearse(LLAMA, make_strategy(), make_device(name), sequence_length=256, merge=False)
        for name in ("H100 80GB", "A100 80GB")
    )
    assert hopper.components.temporary - ampere.components.temporary == 2 * (33554432 - 8519680)


def test_at_the_cards_limit_the_cache_is_given_back_before_more_is_reserved() -> None:
    name = "llama-3.1-8b-lora-r16-adamw_torch_fused-b2-s16384-ckpt-full-bf16"
    row, config = next(pair for pair in load_rows(*MEASURED) if pair[0]["id"] == name)
    assert abs(compare(row, config, make_device()).error("reserved")) < 0.01
    roomy = make_device("H200")
    assert compare(row, config, roomy).predicted.peak_reserved_bytes > row["measured"]["peak_reserved_bytes"]


def test_offloaded_activations_leave_the_device() -> None:
    kept, offloaded = (predict(LLAMA, make_strategy(activation_offload=asked)) for asked in (False, True))
    assert offloaded.components.activations < kept.components.activations / 3


def test_packed_rows_pay_for_an_explicit_mask() -> None:
    whole, packed = (predict(LLAMA, make_strategy(packing=asked)) for asked in (False, True))
    assert packed.peak_allocated_bytes > whole.peak_allocated_bytes


@pytest.mark.parametrize("compiled", [False, True])
def test_each_packed_document_costs_backward_a_block_of_rows_in_fp32(compiled: bool) -> None:
    """128 rows of every head each, empty documents too, which fill up their number to 64 entries less one."""
    strategy = make_strategy(packing=True, attention="varlen", compile=compiled, micro_batch_size=1)
    peaks = []
    for documents in (20, 60, 500):
        traces = Traces(LLAMA, sequence_length=1024, documents_per_row=documents)
        rehearsal = Rehearsal(traces, make_shape(LLAMA), make_device(), merge=False)
        peaks.append(rehearsal.measure(strategy).peak_allocated_bytes)
    assert peaks[0] == peaks[1] < peaks[2]


@pytest.mark.parametrize(("documents", "rows"), [(None, 2 * 384), (63, 2 * 300 + 63 * 128)])
def test_flash_attentions_backward_sums_in_rows_of_whole_blocks(documents: int | None, rows: int) -> None:
    """mha_bwd and mha_varlen_bwd: softmax_d and dq_accum, heads of 80 rounded to 96; then what grouped heads expand."""
    query, key = torch.empty(2, 8, 300, 80, dtype=torch.bfloat16), torch.empty(2, 4, 300, 80, dtype=torch.bfloat16)
    with known_documents(documents):
        found = flash_backward_temporaries(query, key)
    assert found == (4 * 8 * rows, 4 * rows * 8 * 96, 2 * 300 * 8 * 80 * 2, 2 * 300 * 8 * 80 * 2)


def test_a_calibrated_device_brings_its_own_constant() -> None:
    general = make_device()
    calibrated = general.model_copy(update={"beside": DeviceConstant(bytes=2**29, source="a run")})
    first, second = (
        rehearse(LLAMA, make_strategy(), one, sequence_length=256, merge=False) for one in (general, calibrated)
    )
    assert second.peak_device_bytes == (second.peak_reserved_bytes or 0) + 2**29
    assert first.peak_reserved_bytes == second.peak_reserved_bytes


def test_flash_attention_2_is_rehearsed_as_the_fused_attention_that_it_is() -> None:
    plain = predict(LLAMA, make_strategy())
    assert predict(LLAMA, make_strategy(attention="flash_attention_2")).components == plain.components


def test_the_measure_gives_what_the_rehearsal_gives() -> None:
    """Forward and backward are traced once for all optimizers."""
    rehearsal = Rehearsal(Traces(LLAMA, sequence_length=256), make_shape(LLAMA), make_device(), merge=False)
    predict(LLAMA, make_strategy())  # fills the caches that the first trace of a process makes
    for optimizer in ("adamw", "adamw_8bit", "paged_adamw"):
        strategy = make_strategy(optimizer=optimizer)
        assert rehearsal.measure(strategy) == predict(LLAMA, strategy)


def test_on_a_cpu_the_closed_forms_answer() -> None:
    cpu = Device(name="CPU", kind="cpu", memory_bytes=2**34, budget_bytes=2**34, bf16=True)
    memory = rehearse(LLAMA, make_strategy(), cpu, sequence_length=256, merge=False)
    assert memory.peak_reserved_bytes is None


def test_a_config_that_cannot_be_built_is_an_error_that_says_so() -> None:
    with pytest.raises(ModelError, match=r"config\.json: .*nonsense"):
        predict({"model_type": "nonsense"}, make_strategy())
    with pytest.raises(ModelError, match="num_key_value_heads"):
        predict(LLAMA | {"num_key_value_heads": 3}, make_strategy())


def test_an_architecture_that_reads_values_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, hidden: hidden * hidden.sum().item())
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be rehearsed"):
        predict(LLAMA, make_strategy())


def test_a_family_without_closed_forms_is_rehearsed_all_the_same() -> None:
    config = {**LLAMA, "model_type": "arcee"}
    assert "arcee" not in FAMILIES
    memory = predict(config, make_strategy("full"))
    assert {phase.name for phase in memory.phases} == {"load", "forward", "backward", "clip", "optimizer", "save"}
    assert memory.disk_bytes > memory.components.weights / 2


def test_a_rehearsal_leaves_torch_and_transformers_as_they_were() -> None:
    from transformers import masking_utils

    before = torch.is_autocast_enabled, masking_utils.find_packed_sequence_indices
    predict(LLAMA, make_strategy())
    assert before == (torch.is_autocast_enabled, masking_utils.find_packed_sequence_indices)
    assert not torch.is_autocast_enabled("cpu")
