"""The optimizer in backward does what a step without clipping does, and holds the gradients of one layer at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build_small_model, make_strategy, make_tokens, save_small_model
from small_runs import plan_recipe, read_losses, run_recipe_file, write_recipe
from torch import Tensor, nn

from fitune.recipes.errors import RunError
from fitune.runtime.model.build import build_model
from fitune.runtime.model.parts import find_layers
from fitune.runtime.training.in_backward import UpdatesInBackward, group_parameters
from fitune.runtime.training.optimizers import make_optimizer
from fitune.runtime.training.step import MicroBatch, StepResult, make_scaler, training_step

CPU = torch.device("cpu")
STEPS = 4
OPTIMIZERS = ("adamw", "adamw_8bit", "adamw_32bit", "paged_adamw_8bit", "paged_adamw", "adafactor")
IN_BACKWARD = {"max_grad_norm": "off", "optimizer_in_backward": True, "micro_batch_size": 4}


class Trained:
    """A model that is trained with or without the optimizer in backward, and never clipped."""

    def __init__(self, model: Any, *, rate: float = 1e-3, **changes: Any) -> None:
        self.strategy = make_strategy(**changes)
        self.model = model
        self.optimizer = make_optimizer(
            self.strategy.optimizer, model, learning_rate=rate, weight_decay=0.1, rounding=self.strategy.rounding
        )
        self.updates = None
        if self.strategy.optimizer_in_backward:
            self.updates = UpdatesInBackward(self.optimizer, model, list(find_layers(model)))

    def step(self, seed: int = 0) -> StepResult:
        ids = make_tokens(3, 20, seed=seed)
        return training_step(
            self.model,
            self.model,
            [MicroBatch(input_ids=ids, labels=ids)],
            tokens=57,
            strategy=self.strategy,
            optimizer=self.optimizer,
            scaler=make_scaler(self.strategy, CPU),
            clip=lambda: nn.utils.get_total_norm([one.grad for one in self.model.parameters() if one.grad is not None]),
            updates=self.updates,
        )

    def run(self) -> tuple[list[StepResult], list[Tensor], list[Tensor]]:
        """Results, weights and states after some steps."""
        torch.manual_seed(0)
        results = [self.step(seed) for seed in range(STEPS)]
        states = [self.optimizer.state[one] for one in self.model.parameters()]
        tensors = [value for state in states for _, value in sorted(state.items()) if isinstance(value, Tensor)]
        return results, [one.detach() for one in self.model.parameters()], tensors


def compare(one: Trained, other: Trained) -> None:
    """Bit for bit; norms of 16-bit gradients are 16-bit ones, which add up differently."""
    rounding = 1e-5 if one.strategy.weights_dtype == "fp32" else 1e-2
    (results, weights, states), (expected, expected_weights, expected_states) = other.run(), one.run()
    assert all(one.applied for one in results) and results[-1].loss != results[0].loss
    for found, wanted in zip(results, expected, strict=True):
        assert found.loss == wanted.loss
        assert found.gradient_norm == pytest.approx(wanted.gradient_norm, rel=rounding)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)
    torch.testing.assert_close(states, expected_states, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tied", [True, False])
def test_losses_weights_and_states_are_those_of_the_step_that_does_not_clip(name: str, tied: bool) -> None:
    made = (build_small_model(tie_word_embeddings=tied).train() for _ in range(2))
    one, other = (
        Trained(model, optimizer=name, optimizer_in_backward=on) for model, on in zip(made, (False, True), strict=True)
    )
    compare(one, other)


@pytest.mark.parametrize("head", ["full", "chunked", "fused"])
@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "mixtral"])
def test_they_are_on_other_families_and_with_every_loss_head(model_type: str, head: str) -> None:
    """gemma2 and gpt2 tie their heads; an expert of a mixture may see no token."""
    made = (build_small_model(model_type).train() for _ in range(2))
    one, other = (
        Trained(model, loss_head=head, optimizer_in_backward=on) for model, on in zip(made, (False, True), strict=True)
    )
    compare(one, other)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers are compiled to AOTAutograd's graphs, run eagerly."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointed", [0, 1, 2])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_they_are_with_checkpointed_and_compiled_layers(
    tmp_path: Path, graphs: None, dtype: str, compiled: bool, checkpointed: int
) -> None:
    folder = save_small_model(tmp_path / "model")

    def build(**changes: Any) -> Trained:
        changes |= {"weights_dtype": dtype, "compute_dtype": dtype}
        built = build_model(folder, make_strategy(**changes), CPU)
        return Trained(built.base, **changes)

    changes = {"checkpointed_layers": checkpointed, "compile": compiled}
    compare(build(**changes), build(**changes, optimizer_in_backward=True))


@pytest.mark.parametrize("name", ["adamw", "adamw_32bit", "adafactor"])
def test_bf16_weights_that_are_rounded_stochastically_learn_as_well(name: str) -> None:
    """Other weights draw each random number, so that only the outcome is alike."""
    ends = []
    for on in (False, True):
        model = build_small_model().train().bfloat16()
        changes = {"weights_dtype": "bf16", "compute_dtype": "bf16", "rounding": "stochastic", "optimizer": name}
        trained = Trained(model, rate=1e-2, **changes, optimizer_in_backward=on)
        torch.manual_seed(0)
        ends.append([trained.step().loss for _ in range(12)])
    assert ends[1][0] == ends[0][0]
    assert ends[0][-1] < 0.6 * ends[0][0]
    assert ends[1][-1] == pytest.approx(ends[0][-1], rel=0.15)


def list_gradients(model: nn.Module) -> set[str]:
    return {name for name, one in model.named_parameters() if one.grad is not None}


def test_no_more_than_one_layers_gradients_are_there_at_a_time() -> None:
    model = build_small_model(num_hidden_layers=4, tie_word_embeddings=False).train()
    trained, seen = Trained(model, optimizer_in_backward=True), []
    real = trained.optimizer.step

    def look(*_: Any) -> None:
        seen.append(list_gradients(model))
        real()

    trained.optimizer.step = look  # type: ignore[method-assign]
    trained.step()
    places = [{re.sub(r"(layers\.\d+).*", r"\1", name) for name in names} for names in seen]
    expected = ["lm_head.weight", "model.norm.weight", *(f"model.layers.{n}" for n in (3, 2, 1, 0))]
    assert places == [{name} for name in (*expected, "model.embed_tokens.weight")]
    assert sum(map(len, seen)) == len(list(model.parameters()))
    assert not list_gradients(model)


def test_a_tied_weight_is_updated_once_when_both_its_uses_are_known() -> None:
    model = build_small_model(tie_word_embeddings=True).train()
    calls: list[int] = []
    model.get_input_embeddings().weight.register_post_accumulate_grad_hook(lambda one: calls.append(one.numel()))
    Trained(model, optimizer_in_backward=True).step()
    assert len(calls) == 1


def test_each_parameter_is_in_one_group_and_frozen_ones_in_none() -> None:
    model = build_small_model(tie_word_embeddings=True)
    model.get_input_embeddings().requires_grad_(False)
    groups = group_parameters(model, list(find_layers(model)))
    found = [one for group in groups for one in group]
    assert len(found) == len(set(found)) and set(found) == {one for one in model.parameters() if one.requires_grad}
    assert sorted(map(len, groups)) == [1, 9, 9]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_loss_that_is_not_finite_changes_nothing(name: str, rounding: str) -> None:
    dtype = "bf16" if rounding == "stochastic" else "fp32"
    model = build_small_model().train().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    changes = {"weights_dtype": dtype, "compute_dtype": dtype, "rounding": rounding, "optimizer": name}
    trained = Trained(model, **changes, optimizer_in_backward=True)
    trained.step()
    model.get_input_embeddings().weight.data[:] *= float("nan")
    before = [one.detach().clone() for one in model.parameters()]
    assert not trained.step().applied
    for one, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(one.detach(), was, rtol=0, atol=0, equal_nan=True)


def test_gradients_that_overflow_on_the_way_leave_that_layer_and_all_later_ones_as_they_are() -> None:
    """What backward came to before has been updated: the one thing that a step with all gradients does better."""
    model = build_small_model(num_hidden_layers=4, tie_word_embeddings=False).train()
    trained = Trained(model, optimizer_in_backward=True)
    find_layers(model)[2].mlp.down_proj.weight.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[union-attr]
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    result = trained.step()
    assert not result.applied and result.gradient_norm == pytest.approx(float("inf"), nan_ok=True)
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert changed == {name for name in before if re.match(r"lm_head|model\.norm|model\.layers\.3", name)}
    trained.step()
    assert all(torch.isfinite(one).all() for one in model.parameters())


def test_a_run_ends_as_one_with_the_optimizer_after_backward(tmp_path: Path) -> None:
    """Schedule, weight decay and evaluation included."""
    model = save_small_model(tmp_path / "model")
    train = IN_BACKWARD | {"weight_decay": 0.1, "warmup": 0.3, "eval_every": 2}
    recipes = [
        write_recipe(tmp_path / name, model, train=train | {"optimizer_in_backward": on})
        for name, on in (("after", False), ("during", True))
    ]
    (after, _), (during, report) = map(run_recipe_file, recipes)
    assert plan_recipe(recipes[1])[1].strategy.optimizer_in_backward
    assert read_losses(during) == read_losses(after)
    assert report.skipped_steps == 0
    names = {one.name for one in report.measured.phases}
    assert "backward" in names and not names & {"clip", "optimizer"}
    assert (during / "model/model.safetensors").read_bytes() == (after / "model/model.safetensors").read_bytes()


def test_a_run_that_is_not_finite_stops_without_saving_its_weights(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, model, train=IN_BACKWARD | {"warmup": 0.0, "max_steps": 40})
    with pytest.raises(RunError, match="the run stopped without saving its weights"):
        run_recipe_file(recipe, learning_rate=1e30)
    assert not list((tmp_path / "run").rglob("model.safetensors"))
