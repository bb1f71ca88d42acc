from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import ARCHITECTURES, build_small_model, make_tokens
from torch import Tensor, nn

from fitune.recipes.errors import RunError
from fitune.runtime.training import losses
from fitune.runtime.training.losses import check_loss_head, compute_loss, make_logit_transform

HEADS = ("full", "chunked", "fused")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, so that a small batch has several and a part of one."""
    monkeypatch.setattr(losses, "CHUNK_ROWS", 10)


def make_labels(ids: Tensor) -> Tensor:
    """The ids as labels, with the first third of each row untrained, as a prompt is."""
    labels = ids.clone()
    labels[:, : ids.shape[1] // 3] = -100
    return labels


def find_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of the loss, and none left in the model."""
    loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def compute_own_mean(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """transformers' own mean loss, and over how many tokens it is."""
    return model(input_ids=ids, labels=labels).loss, int((labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("head", HEADS)
def test_a_loss_head_equals_the_models_own_loss_and_gradients(model_type: str, head: str) -> None:
    model = build_small_model(model_type)
    ids = make_tokens(2, 24)
    labels = make_labels(ids)
    own, count = compute_own_mean(model, ids, labels)
    loss = compute_loss(model, model, ids, labels, loss_head=head, tokens=2 * count)
    torch.testing.assert_close(2 * loss, own)
    assert_same_gradients(find_gradients(model, 2 * loss), find_gradients(model, own))


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "granite", "granitemoe", "cohere", "cohere2"])
def test_what_a_model_does_to_its_logits_is_known(model_type: str) -> None:
    model = build_small_model(model_type)
    hidden = torch.randn(5, 64)
    logits = model.get_output_embeddings()(hidden)
    treated = make_logit_transform(model.config)(logits)
    assert not torch.allclose(treated, logits, rtol=0.1), "the test's config gives the treatment something to do"


def test_a_model_that_does_nothing_to_its_logits_keeps_them() -> None:
    logits = torch.randn(5, 7)
    assert make_logit_transform(build_small_model("llama").config)(logits) is logits


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("head", HEADS)
def test_padding_at_the_right_changes_nothing_without_an_attention_mask(model_type: str, head: str) -> None:
    """The pad token is a token that is trained elsewhere: only the label tells padding."""
    model = build_small_model(model_type)
    rows = [make_tokens(1, length, seed=length) for length in (24, 9, 17)]
    padded = torch.full((3, 24), 3)
    labels = torch.full((3, 24), -100)
    for index, row in enumerate(rows):
        row[0, -1] = 3
        padded[index, : row.shape[1]], labels[index, : row.shape[1]] = row[0], make_labels(row)[0]
    tokens = int((labels[:, 1:] != -100).sum())
    alone = torch.stack(
        [compute_loss(model, model, one, make_labels(one), loss_head=head, tokens=tokens) for one in rows]
    ).sum()
    together = compute_loss(model, model, padded, labels, loss_head=head, tokens=tokens)
    torch.testing.assert_close(together, alone)
    assert_same_gradients(find_gradients(model, together), find_gradients(model, alone))


@pytest.mark.parametrize("head", HEADS)
def test_losses_of_micro_batches_add_up_to_the_mean_over_all_trained_tokens(head: str) -> None:
    model = build_small_model()
    ids = make_tokens(4, 16)
    labels = make_labels(ids)
    labels[0, :14] = -100
    tokens = int((labels[:, 1:] != -100).sum())
    parts = [
        compute_loss(model, model, ids[rows], labels[rows], loss_head=head, tokens=tokens)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    whole, _ = compute_own_mean(model, ids, labels)
    torch.testing.assert_close(parts[0] + parts[1], whole)
    assert_same_gradients(find_gradients(model, parts[0] + parts[1]), find_gradients(model, whole))


def test_all_heads_agree_under_autocast() -> None:
    model = build_small_model("gemma2", final_logit_softcapping=30.0)
    ids = make_tokens(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        full, *others = (compute_loss(model, model, ids, ids, loss_head=head, tokens=46) for head in HEADS)
    expected = find_gradients(model, full)
    for loss in others:
        assert loss.dtype == full.dtype == torch.float32
        torch.testing.assert_close(loss, full, rtol=1e-3, atol=0)
        for name, found in find_gradients(model, loss).items():
            assert (found - expected[name]).norm() < 0.03 * expected[name].norm(), name


def test_the_chunked_head_keeps_the_logits_of_no_more_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", 16)
    model, ids = build_small_model(), make_tokens(4, 33)
    largest = 0

    def note(_: nn.Module, __: Any, logits: Tensor) -> None:
        nonlocal largest
        largest = max(largest, logits.shape[:-1].numel())

    model.get_output_embeddings().register_forward_hook(note)
    compute_loss(model, model, ids, ids, loss_head="chunked", tokens=128).backward()
    assert largest == 16


class ScaledLogits(nn.Module):
    """An LM head's user that multiplies its logits, as an architecture may that fitune has never seen."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, **arguments: Any) -> Any:
        out = self.model(labels=labels, **arguments)
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        logits = 3.0 * out.logits
        out.loss = nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum") / 15
        return out


def test_an_architecture_with_an_unknown_treatment_of_its_logits_is_refused() -> None:
    base = build_small_model()
    model = ScaledLogits(base)
    with pytest.raises(RunError, match=r'LlamaForCausalLM itself .* set train.loss_head = "full"'):
        check_loss_head(model, base, loss_head="chunked", device=CPU)
    check_loss_head(model, base, loss_head="full", device=CPU)


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_the_model_in_the_mode_it_was_in(training: bool) -> None:
    model = build_small_model("gemma2").train(training)
    check_loss_head(model, model, loss_head="chunked", device=CPU)
    assert model.training is training
    assert all(one.grad is None for one in model.parameters())
