from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build_small_model, make_strategy, make_tokens, save_small_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fitune.planner import activations as act
from fitune.planner.shape import make_shape
from fitune.runtime.model.build import BuiltModel, build_model
from fitune.runtime.training.losses import compute_loss
from fitune.runtime.training.offload import OffloadHooks, offload_activations, offload_decoder
from fitune.runtime.training.optimizers import make_optimizer
from fitune.runtime.training.step import MicroBatch, autocast, make_scaler, training_step, uncast_adapter_inputs

CPU = torch.device("cpu")
ROWS, LENGTH = 4, 48


class CountingHooks(OffloadHooks):
    """The real hooks, which remember what they copied: its address, elements and storage."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, CPU)
        self.addresses: list[int] = []
        self.elements: list[int] = []
        self.copied_bytes = 0
        self.storages: list[weakref.ref[Any]] = []

    def store(self, flat: Tensor) -> tuple[Tensor, ...]:
        self.addresses.append(flat.untyped_storage().data_ptr())
        self.elements.append(flat.numel())
        self.copied_bytes += flat.nbytes
        self.storages.append(weakref.ref(flat.untyped_storage()))
        return super().store(flat)


class Decoder(nn.Module):
    """A decoder that computes what a test wants."""

    def __init__(self, compute: Any) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, hidden: Tensor) -> Tensor:
        return self.compute(hidden)  # type: ignore[no-any-return]


def build(folder: Path, method: str = "full", model_type: str = "llama", **changes: Any) -> tuple[BuiltModel, Any]:
    torch.manual_seed(0)
    strategy = make_strategy(method, activation_offload=True, **changes)
    return build_model(save_small_model(folder, model_type), strategy, CPU), strategy


def compute_gradients(built: BuiltModel, strategy: Any, hooks: OffloadHooks | None) -> list[Tensor]:
    """The gradients of a forward and backward, with activations kept by `hooks` or where they are."""
    torch.manual_seed(1)
    ids = make_tokens(ROWS, LENGTH)
    built.model.zero_grad()
    with autocast(strategy, CPU), uncast_adapter_inputs(built.model), offloading(built.base, hooks):
        loss = compute_loss(built.model, built.base, ids, ids, loss_head=strategy.loss_head, tokens=ids.numel())
    loss.backward()
    return [one.grad.clone() for one in built.trainable if one.grad is not None]


@contextmanager
def offloading(base: Any, hooks: OffloadHooks | None) -> Iterator[None]:
    if hooks is None:
        yield
    else:
        with offload_decoder(base.base_model, hooks):
            yield


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("method", "model_type", "changes"),
    [
        ("full", "llama", {}),
        ("full", "llama", {"compute_dtype": "bf16", "loss_head": "chunked"}),
        ("lora", "llama", {"weights_dtype": "bf16", "compute_dtype": "bf16"}),
        ("lora", "phi3", {"adapter_dropout": 0.1, "loss_head": "chunked"}),
        ("qlora", "llama", {"loss_head": "chunked"}),
        ("full", "gpt2", {}),
        ("lora", "gemma2", {"attention": "eager"}),
        ("full", "mixtral", {}),
    ],
)
def test_gradients_are_the_same_to_the_bit(
    tmp_path: Path, method: str, model_type: str, changes: dict[str, Any], checkpointing: bool
) -> None:
    built, strategy = build(tmp_path, method, model_type, checkpointed_layers=99 if checkpointing else 0, **changes)
    hooks = CountingHooks(built.base)
    offloaded = compute_gradients(built, strategy, hooks)
    plain = compute_gradients(built, strategy, None)
    assert hooks.copied_bytes > 0
    assert len(plain) == len(offloaded) == len(built.trainable)
    for one, other in zip(plain, offloaded, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_devices_own_copies_are_gone_when_the_forward_is_over(tmp_path: Path) -> None:
    built, strategy = build(tmp_path)
    hooks = CountingHooks(built.base)
    ids = make_tokens(ROWS, LENGTH)
    with offload_decoder(built.base.base_model, hooks):
        loss = compute_loss(built.model, built.base, ids, ids, loss_head="full", tokens=ids.numel())
    alive = {one() for one in hooks.storages} - {None}
    assert len(hooks.storages) > 20
    assert len(alive) <= 1, "the last hidden states, which the LM head reads"
    loss.backward()
    assert strategy.activation_offload


def test_weights_stay_where_they_are(tmp_path: Path) -> None:
    for method in ("full", "lora", "qlora"):
        built, strategy = build(tmp_path / method, method)
        hooks = CountingHooks(built.base)
        compute_gradients(built, strategy, hooks)
        tensors = (*built.model.parameters(), *built.model.buffers())
        assert not {one.untyped_storage().data_ptr() for one in tensors} & set(hooks.addresses)


def test_a_checkpointed_layer_offloads_its_input_only(tmp_path: Path) -> None:
    built, strategy = build(tmp_path, checkpointed_layers=2)
    hooks = CountingHooks(built.base)
    compute_gradients(built, strategy, hooks)
    hidden = ROWS * LENGTH * 64
    layers, final_norm = 2, 2
    assert hooks.elements.count(hidden) == layers + final_norm
    assert sum(hooks.elements) < (layers + final_norm + 1) * hidden, "and the positions' sines, once"


@pytest.mark.parametrize("head", ["full", "chunked"])
def test_the_loss_head_is_left_on_the_device(tmp_path: Path, head: str) -> None:
    built, strategy = build(tmp_path, loss_head=head)
    hooks, seen = CountingHooks(built.base), []

    def see(tensor: Tensor) -> Tensor:
        seen.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(see, lambda tensor: tensor):
        compute_gradients(built, strategy, hooks)
    assert max(hooks.elements) < ROWS * LENGTH * 400
    assert max(seen) >= ROWS * (LENGTH - 1) * 64, "the head saves its input, which our hooks do not see"


def test_what_several_operations_save_is_copied_once() -> None:
    factors = [torch.randn(64, 64, requires_grad=True) for _ in range(3)]
    decoder = Decoder(lambda hidden: sum(hidden * factor for factor in factors))
    hooks = CountingHooks(decoder)
    inputs = torch.randn(64, 64, requires_grad=True)
    with offload_decoder(decoder, hooks):
        out = decoder(inputs)
    out.sum().backward()
    assert len(hooks.elements) == 1 + len(factors)
    for factor in factors:
        torch.testing.assert_close(factor.grad, inputs.detach())


def test_a_broadcast_mask_is_not_written_out() -> None:
    mask = torch.randn(2, 1, 32, 32)
    decoder = Decoder(lambda scores: scores * mask.expand(2, 8, 32, 32))
    hooks = CountingHooks(decoder)
    scores = torch.randn(2, 8, 32, 32, requires_grad=True)
    with offload_decoder(decoder, hooks):
        out = decoder(scores)
    out.sum().backward()
    assert hooks.elements == [mask.numel()]
    torch.testing.assert_close(scores.grad, mask.expand(2, 8, 32, 32), rtol=0, atol=0)


def test_a_tensor_that_changes_in_place_is_copied_as_it_was_each_time() -> None:
    before, after = (torch.ones(64, 64, requires_grad=True) for _ in range(2))

    def compute(hidden: Tensor) -> Tensor:
        first = hidden * before
        hidden.add_(1)
        return first + hidden * after

    decoder = Decoder(compute)
    with offload_decoder(decoder, OffloadHooks(decoder, CPU)):
        out = decoder(torch.full((64, 64), 3.0))
    out.sum().backward()
    assert before.grad is not None and after.grad is not None
    assert (before.grad.unique().item(), after.grad.unique().item()) == (3.0, 4.0)


def test_memory_that_is_used_again_is_not_taken_for_what_was_there_before() -> None:
    factors = [torch.ones(64, 64, requires_grad=True) for _ in range(20)]

    def compute(hidden: Tensor) -> Tensor:
        total = torch.zeros(64, 64)
        for number, factor in enumerate(factors):
            total = total + torch.full((64, 64), float(number)) * factor
        return total + hidden

    decoder = Decoder(compute)
    with offload_decoder(decoder, OffloadHooks(decoder, CPU)):
        out = decoder(torch.zeros(64, 64))
    out.sum().backward()
    assert [one.grad.unique().item() for one in factors if one.grad is not None] == list(range(20))


@pytest.mark.parametrize("elements", [1024, 2**18, 2**18 + 1, 3 * 2**18 - 5])
def test_a_tensor_comes_back_from_its_blocks_whatever_its_size(elements: int) -> None:
    values = torch.randn(elements)
    decoder = Decoder(lambda hidden: hidden * values)
    hooks = OffloadHooks(decoder, CPU)
    hidden = torch.ones(elements, requires_grad=True)
    with offload_decoder(decoder, hooks):
        out = decoder(hidden)
    out.sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, values, rtol=0, atol=0)
    blocks = -(-4 * elements // act.OFFLOAD_BLOCK_BYTES)
    assert hooks.host_bytes == blocks * act.OFFLOAD_BLOCK_BYTES


def test_a_tensor_comes_back_as_it_lay_in_memory() -> None:
    decoder = Decoder(lambda hidden: hidden.transpose(1, 2).exp())
    with offload_decoder(decoder, OffloadHooks(decoder, CPU)):
        out: Any = decoder(torch.randn(2, 16, 8, 32, requires_grad=True))
    saved = out.grad_fn._saved_result
    assert saved.stride() == out.stride() and not saved.is_contiguous()
    torch.testing.assert_close(saved, out.detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("device", "asked", "takes"), [("cuda:0", True, True), ("cuda:0", False, False), ("cpu", True, False)]
)
def test_only_a_gpu_offloads_and_only_where_the_strategy_asks(device: str, asked: bool, takes: bool) -> None:
    """Hooks around the offload see what a small model's decoder saves only where the offload does not take it."""
    model, seen = build_small_model().train(), []

    def see(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    strategy = make_strategy(activation_offload=asked)
    with saved_tensors_hooks(see, lambda tensor: tensor), offload_activations(model, strategy, torch.device(device)):
        model.base_model(input_ids=make_tokens(1, 8))
    assert (not seen) == takes


def test_a_forward_that_fails_leaves_no_hooks_behind() -> None:
    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    decoder = Decoder(fail)
    hooks = CountingHooks(decoder)
    with pytest.raises(RuntimeError, match="out of memory"), offload_decoder(decoder, hooks):
        decoder(torch.zeros(1))
    decoder.compute = torch.exp
    decoder(torch.ones(64, 64, requires_grad=True))
    assert hooks.elements == []


def test_a_step_on_a_cpu_is_the_same_with_and_without() -> None:
    losses = []
    for offload in (False, True):
        model, strategy = build_small_model().train(), make_strategy(activation_offload=offload)
        optimizer = make_optimizer("adamw", model, learning_rate=1e-2, weight_decay=0.0, rounding="nearest")
        batch = MicroBatch(input_ids=make_tokens(2, 16), labels=make_tokens(2, 16))
        for _ in range(2):
            result = training_step(
                model,
                model,
                [batch],
                tokens=30,
                strategy=strategy,
                optimizer=optimizer,
                scaler=make_scaler(strategy, CPU),
                clip=lambda model=model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),  # type: ignore[misc]
            )
        losses.append(result.loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_planner_knows_how_much_goes_to_the_host(checkpointing: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6, "head_dim": 32}
    strategy = make_strategy(
        micro_batch_size=ROWS, checkpointed_layers=99 if checkpointing else 0, activation_offload=True
    )
    built = build_model(save_small_model(tmp_path, **sizes), strategy, CPU)
    hooks = CountingHooks(built.base)
    compute_gradients(built, strategy, hooks)
    step = act.StepShape(make_shape(built.base.config.to_dict()), strategy, LENGTH)
    assert act.estimate_kept_bytes(step) == pytest.approx(hooks.copied_bytes, rel=0.15)
    assert act.estimate_offload_bytes(step) >= hooks.host_bytes
