"""Packed rows train exactly as they do apart."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import save_small_model
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from fitune.recipes.errors import RunError
from fitune.runtime.data import packing
from fitune.runtime.data.batches import make_micro_batch
from fitune.runtime.data.packing import check_packing, pack_rows
from fitune.runtime.data.tokens import TokenizedRow, TokenizedRows
from fitune.runtime.model.attention import attend_documents, attention_kernels, list_document_inputs
from fitune.runtime.planning import Job
from fitune.runtime.training.losses import compute_loss

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES | {"sliding_window": 8},
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 16},
    "gemma2": SIZES | {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": SIZES | {"head_dim": 16, "sliding_window": 8},
    "phi3": SIZES,
    "olmoe": SIZES | {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": {**SIZES, "num_key_value_heads": 4},
}


def make_rows(lengths: list[int], max_length: int = 64) -> TokenizedRows:
    ids = [array("i", [(index * 31 + step * 7) % 90 + 3 for step in range(n)]) for index, n in enumerate(lengths)]
    rows = tuple(TokenizedRow(input_ids=one, labels=array("i", one)) for one in ids)
    return TokenizedRows(rows=rows, pad_token_id=2, max_length=max_length)


def make_model(model_type: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    attention = "eager" if model_type == "gemma2" else attention
    AttentionInterface.register("varlen", attend_documents)
    config = AutoConfig.for_model(model_type, **FAMILIES[model_type])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def losses_by_token(model: Any, rows: TokenizedRows) -> list[float]:
    """The loss of every trained token, sorted: packing changes their order only."""
    found = []
    for row in rows.rows:
        batch = make_micro_batch([row], pad_token_id=2, max_length=rows.max_length)
        starts = batch.document_starts if model.config._attn_implementation == "varlen" else None
        inputs = list_document_inputs(batch.position_ids, starts)
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, use_cache=False, **inputs).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, batch.labels[0, 1:], reduction="none", ignore_index=-100)
        found += each[batch.labels[0, 1:] != -100].tolist()
    return sorted(found)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_packed_rows_have_the_losses_that_they_have_apart(model_type: str, attention: str) -> None:
    if model_type == "gemma2" and attention == "varlen":
        pytest.skip("its scores are soft-capped: eager attention only")
    plain, model = (make_model(model_type, kind) for kind in ("sdpa", attention))
    rows = make_rows([30, 11, 25, 9, 40, 17])
    packed = pack_rows(rows)
    assert len(packed) < len(rows)
    expected = losses_by_token(plain, rows)
    assert losses_by_token(model, packed) == pytest.approx(expected, abs=2e-5)
    assert losses_by_token(model, rows) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_attention_without_flash_attentions_kernels_gives_the_same_losses(model_type: str) -> None:
    model, rows = make_model(model_type), make_rows([30, 11])
    expected = losses_by_token(model, rows)
    with attention_kernels("efficient"):
        assert losses_by_token(model, rows) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_packed_rows_without_a_mask_have_the_gradients_of_those_with_one(model_type: str) -> None:
    rows, found = pack_rows(make_rows([30, 11, 25, 9, 40, 17])), []
    for attention in ("sdpa", "varlen"):
        model = make_model(model_type, attention)
        batch = make_micro_batch(rows.rows, pad_token_id=2, max_length=64)
        starts = batch.document_starts if attention == "varlen" else None
        arguments = {"position_ids": batch.position_ids, "document_starts": starts}
        compute_loss(model, model, batch.input_ids, batch.labels, loss_head="fused", tokens=100, **arguments).backward()
        found.append({name: one.grad for name, one in model.named_parameters()})
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-3, atol=1e-6)


def test_documents_begin_where_the_rows_say_with_few_sizes() -> None:
    batch = make_micro_batch(pack_rows(make_rows([30, 11, 25, 9])).rows, pad_token_id=2, max_length=64)
    assert batch.document_starts is not None and batch.position_ids is not None
    starts = batch.document_starts.tolist()
    assert len(starts) == 64 and starts[-1] == batch.input_ids.numel()
    expected = [index for index, position in enumerate(batch.position_ids.flatten().tolist()) if position == 0]
    assert sorted(set(starts))[:-1] == expected


def test_the_last_row_of_a_batch_is_padded_without_seeing_the_padding() -> None:
    packed = pack_rows(make_rows([10, 9]))
    batch = make_micro_batch(packed.rows, pad_token_id=2, max_length=64)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[*range(10), *range(9), *range(5)]]
    assert batch.labels[0, 0] == batch.labels[0, 10] == -100, "nothing predicts the first token of a document"


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_packing_keeps_every_document_once_and_no_row_too_long(lengths: list[int]) -> None:
    rows = make_rows(lengths)
    packed = pack_rows(rows)
    assert sorted(length for row in packed.rows for length in row.documents) == sorted(lengths)
    assert all(len(row) == sum(row.documents) <= 64 for row in packed.rows)
    assert packed.total_tokens == rows.total_tokens
    assert packed.trained_tokens == rows.trained_tokens
    assert len(packed) <= max(1, 2 * sum(lengths) // 64 + 1), "no two rows are at most half full"


def test_a_plan_for_packed_rows_knows_how_long_documents_are_and_says_where_it_does_not(tmp_path: Path) -> None:
    save_small_model(tmp_path / "model")
    rows = [{"text": "late " * words} for words in (2, 5, 9, 20, 40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[model]\nid = "model"\n[data]\ntrain = "rows.jsonl"\nmax_length = 64\npacking = true\n[train]\nmax_steps = 2\n'
    )
    job = Job(str(recipe))
    facts, packed = job.find_data_facts(quick=False), job.data.train.rows
    lengths = [tokens for row in packed for tokens in row.documents]
    assert len(lengths) == 5 > len(packed)
    assert facts.document_tokens == pytest.approx(sum(n * n for n in lengths) / sum(lengths))
    assert facts.row_tokens == tuple(sorted(map(len, packed)))
    assert "each timed as one document" in job.find_data_facts(quick=True).source
    assert Job(str(recipe), ["data.packing=false"]).find_data_facts(quick=False).document_tokens is None


def test_an_architecture_whose_packed_rows_see_each_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    check_packing(model, model, device=torch.device("cpu"))
    plain = packing.make_micro_batch

    def forget_positions(*args: Any, **options: Any) -> Any:
        return replace(plain(*args, **options), position_ids=None)

    monkeypatch.setattr(packing, "make_micro_batch", forget_positions)
    with pytest.raises(RunError, match="packed rows see each other"):
        check_packing(model, model, device=torch.device("cpu"))
