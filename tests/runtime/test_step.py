from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build_small_model, make_strategy, make_tokens, save_small_model
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fitune.planner.strategy import Strategy
from fitune.runtime.model.build import build_model
from fitune.runtime.training.losses import compute_loss
from fitune.runtime.training.optimizers import make_optimizer
from fitune.runtime.training.step import (
    MicroBatch,
    StepResult,
    autocast,
    make_scaler,
    training_step,
)

CPU = torch.device("cpu")


class Trained:
    """A small model with what a step needs."""

    def __init__(self, *, learning_rate: float = 1e-3, max_norm: float = 1.0, **changes: Any) -> None:
        self.strategy: Strategy = make_strategy(**changes)
        self.model = build_small_model().train()
        self.optimizer = make_optimizer(
            "adamw", self.model, learning_rate=learning_rate, weight_decay=0.0, rounding="nearest"
        )
        self.scaler = make_scaler(self.strategy, CPU)
        self.max_norm = max_norm
        self.phases: list[str] = []

    def step(self, *micro_batches: MicroBatch) -> StepResult:
        return training_step(
            self.model,
            self.model,
            micro_batches,
            tokens=sum(int((one.labels[:, 1:] != -100).sum()) for one in micro_batches),
            strategy=self.strategy,
            optimizer=self.optimizer,
            scaler=self.scaler,
            clip=lambda: nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm),
            enter_phase=self.phases.append,
        )

    def copy_weights(self) -> list[Tensor]:
        return [one.detach().clone() for one in self.model.parameters()]


def make_batch(rows: slice = slice(0, 4)) -> MicroBatch:
    ids = make_tokens(4, 20)
    labels = ids.clone()
    labels[0, :15] = -100
    return MicroBatch(input_ids=ids[rows], labels=labels[rows])


def test_a_step_goes_through_its_phases_once_a_micro_batch() -> None:
    trained = Trained()
    trained.step(make_batch(slice(0, 2)), make_batch(slice(2, 4)))
    assert trained.phases == ["forward", "backward", "forward", "backward", "clip", "optimizer"]


def test_a_step_reports_the_loss_and_norm_from_before_its_update() -> None:
    trained, batch = Trained(), make_batch()
    own = trained.model(input_ids=batch.input_ids, labels=batch.labels).loss
    own.backward()
    norm = nn.utils.get_total_norm(one.grad for one in trained.model.parameters())
    trained.optimizer.zero_grad()
    result = trained.step(batch)
    assert result.applied
    assert result.loss == pytest.approx(own.item(), rel=1e-6)
    assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-5)


def test_a_step_leaves_no_gradient() -> None:
    trained = Trained()
    trained.step(make_batch())
    assert all(one.grad is None for one in trained.model.parameters())


@pytest.mark.parametrize("head", ["full", "chunked"])
def test_how_a_global_batch_is_split_changes_nothing(head: str) -> None:
    """The first row has fewer trained tokens than the others: a mean of means would differ."""
    results = []
    for split in ([slice(0, 4)], [slice(0, 2), slice(2, 4)], [slice(0, 1), slice(1, 4)]):
        trained = Trained(loss_head=head, learning_rate=1e-2)
        losses = [trained.step(*(make_batch(rows) for rows in split)).loss for _ in range(3)]
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)


def test_gradients_are_clipped_to_the_norm() -> None:
    """SGD shows the gradient that reaches the weights: the step is the learning rate times it."""
    trained = Trained(max_norm=0.01)
    trained.optimizer = torch.optim.SGD(trained.model.parameters(), lr=1.0)
    before = trained.copy_weights()
    result = trained.step(make_batch())
    moved = nn.utils.get_total_norm(one - was for one, was in zip(trained.model.parameters(), before, strict=True))
    assert result.gradient_norm > 0.1
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_steps_lower_the_loss() -> None:
    trained = Trained(learning_rate=1e-2)
    losses = [trained.step(make_batch()).loss for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    trained = Trained()
    weight = trained.model.get_output_embeddings().weight
    weight.data[0, 0] = float("nan")
    before = trained.copy_weights()
    result = trained.step(make_batch())
    assert not result.applied
    for one, was in zip(trained.model.parameters(), before, strict=True):
        torch.testing.assert_close(one.detach(), was, rtol=0, atol=0, equal_nan=True)


class ReadsOfValues(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: values that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", ["full", "chunked", "fused"])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_host_reads_loss_and_norm_of_a_step_and_nothing_before(head: str, micro_batches: int) -> None:
    trained, batch, reads = Trained(loss_head=head), make_batch(), ReadsOfValues()
    meanwhile: list[int] = []
    with reads:
        training_step(
            trained.model,
            trained.model,
            [batch] * micro_batches,
            tokens=65 * micro_batches,
            strategy=trained.strategy,
            optimizer=trained.optimizer,
            scaler=trained.scaler,
            clip=lambda: nn.utils.clip_grad_norm_(trained.model.parameters(), 1.0),
            meanwhile=lambda: meanwhile.append(reads.reads),
        )
        trained.scaler.update()
    assert meanwhile == [0], "the device has all of its work before the host waits for it"
    assert reads.reads <= 2


def test_an_optimizer_that_cannot_decide_on_the_device_waits_for_the_norm() -> None:
    for finite in (True, False):
        trained = Trained()
        trained.optimizer = torch.optim.SGD(trained.model.parameters(), lr=1e-2)
        if not finite:
            next(trained.model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
        before = trained.copy_weights()
        result = trained.step(make_batch())
        changed = [not torch.equal(*pair) for pair in zip(trained.model.parameters(), before, strict=True)]
        assert result.applied == finite == all(changed) == any(changed)


def test_an_fp16_step_whose_gradients_overflow_is_skipped_and_the_next_ones_train() -> None:
    trained = Trained(compute_dtype="fp16", learning_rate=1e-2)
    assert trained.scaler.is_enabled()
    trained.scaler.scale(torch.zeros(()))
    trained.scaler.update(2.0**30)
    before = trained.copy_weights()
    result = trained.step(make_batch())
    assert not result.applied and result.loss == pytest.approx(result.loss)
    assert all(torch.equal(one, was) for one, was in zip(trained.model.parameters(), before, strict=True))
    assert trained.scaler.get_scale() == 2.0**29
    trained.scaler.update(2.0**10)
    results = [trained.step(make_batch()) for _ in range(10)]
    assert all(one.applied for one in results)
    assert results[-1].loss < 0.5 * result.loss
    assert trained.scaler.get_scale() == 2.0**10


def test_fp16_gradients_are_clipped_and_reported_unscaled() -> None:
    exact, scaled = Trained().step(make_batch()), Trained(compute_dtype="fp16")
    scaled.scaler.scale(torch.zeros(()))
    scaled.scaler.update(2.0**10)
    result = scaled.step(make_batch())
    assert result.loss == pytest.approx(exact.loss, rel=0.01)
    assert result.gradient_norm == pytest.approx(exact.gradient_norm, rel=0.02)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_step_keeps_no_copies_of_the_adapters_inputs(tmp_path: Path, method: str) -> None:
    """peft's default keeps one for each adapter of a layer; q, k and v then have three of the same hidden states."""
    strategy = make_strategy(method, weights_dtype="bf16", compute_dtype="bf16", loss_head="chunked")
    built = build_model(save_small_model(tmp_path), strategy, CPU)
    ids = make_tokens(4, 64)

    def count_kept_bytes(run: Callable[[], object]) -> int:
        storages: dict[int, UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run()
        return sum(one.nbytes() for one in storages.values())

    def run_with_copies() -> None:
        with autocast(strategy, CPU):
            compute_loss(built.model, built.base, ids, ids, loss_head="chunked", tokens=252).backward()

    def run_step() -> None:
        training_step(
            built.model,
            built.base,
            [MicroBatch(input_ids=ids, labels=ids)],
            tokens=252,
            strategy=strategy,
            optimizer=make_optimizer("adamw", built.model, learning_rate=1e-3, weight_decay=0.0, rounding="nearest"),
            scaler=make_scaler(strategy, CPU),
            clip=lambda: 0.0,
        )

    assert count_kept_bytes(run_step) < 0.9 * count_kept_bytes(run_with_copies)


@pytest.mark.parametrize(
    ("compute_dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_matrix_work_runs_in_the_compute_dtype(compute_dtype: str, expected: torch.dtype) -> None:
    layer = nn.Linear(4, 4)
    with autocast(make_strategy(compute_dtype=compute_dtype), CPU):
        assert layer(torch.ones(1, 4)).dtype is expected
    assert layer(torch.ones(1, 4)).dtype is torch.float32


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_a_scaler_is_for_fp16_only(compute_dtype: str) -> None:
    assert not make_scaler(make_strategy(compute_dtype=compute_dtype), CPU).is_enabled()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_checkpointed_layer_is_computed_again_without_copies_too(tmp_path: Path, method: str) -> None:
    strategy = make_strategy(method, weights_dtype="bf16", compute_dtype="bf16", checkpointed_layers=2)
    built = build_model(save_small_model(tmp_path), strategy, CPU)
    casts: list[torch.dtype] = []
    for name, module in built.model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda _, args: casts.append(args[0].dtype))
    ids = make_tokens(2, 16)
    training_step(
        built.model,
        built.base,
        [MicroBatch(input_ids=ids, labels=ids)],
        tokens=30,
        strategy=strategy,
        optimizer=make_optimizer("adamw", built.model, learning_rate=1e-3, weight_decay=0.0, rounding="nearest"),
        scaler=make_scaler(strategy, CPU),
        clip=lambda: 0.0,
    )
    assert len(casts) >= 2 * 2 * 6
    assert set(casts) == {torch.bfloat16}
