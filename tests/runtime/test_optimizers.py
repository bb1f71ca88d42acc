from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fitune.runtime.training import optimizers
from fitune.runtime.training.optimizers import make_optimizer, round_stochastically

NAMES = ("adamw", "adamw_32bit", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor")
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


class Regression:
    """A linear map of 64 to 128 features, weights of about 1 to 2, that has to move by about 0.3 each."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        start = (1 + torch.rand(128, 64, generator=generator)).bfloat16().float()
        self.target = start + 0.3 * torch.randn(128, 64, generator=generator)
        self.inputs = torch.randn(256, 64, generator=generator)
        self.model = nn.Linear(64, 128, bias=False)
        self.model.weight = nn.Parameter(start.to(dtype))

    def compute_loss(self) -> Tensor:
        """The mean squared error of the outputs, computed in fp32."""
        return ((self.model.weight.float() - self.target) @ self.inputs.T).square().mean()

    def train(self, name: str, *, rounding: str, steps: int | None = None, learning_rate: float = 1.5e-3) -> float:
        """Train and return the share of the first loss that is left. Adafactor's steps grow with the weights."""
        torch.manual_seed(1)
        optimizer = make_optimizer(name, self.model, learning_rate=learning_rate, weight_decay=0.0, rounding=rounding)
        first = self.compute_loss().item()
        for _ in range(steps or (80 if name == "adafactor" else 150)):
            self.compute_loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        return self.compute_loss().item() / first


@pytest.mark.parametrize("name", NAMES)
def test_stochastic_rounding_learns_as_fp32_does_where_rounding_to_nearest_stalls(name: str) -> None:
    exact = Regression(torch.float32).train(name, rounding="nearest")
    nearest = Regression(torch.bfloat16).train(name, rounding="nearest")
    stochastic = Regression(torch.bfloat16).train(name, rounding="stochastic")
    assert 0.1 < exact < 0.6, "the test looks while there is still something to learn"
    assert stochastic == pytest.approx(exact, rel=0.03)
    assert nearest > 1.2 * exact


@pytest.mark.parametrize("name", NAMES)
def test_bf16_weights_stay_bf16_and_fp32_ones_are_updated_exactly_beside_them(name: str) -> None:
    """Some models keep a few tensors in fp32 whatever their dtype."""
    torch.manual_seed(0)
    gradient = torch.randn(64, 64)

    def update(rounding: str) -> Tensor:
        mixed = nn.ModuleList([nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False).bfloat16()])
        weight = mixed[0].weight
        weight.data.fill_(1.0)
        weight.grad, mixed[1].weight.grad = gradient.clone(), gradient.bfloat16()
        make_optimizer(name, mixed, learning_rate=1e-4, weight_decay=0.0, rounding=rounding).step()
        assert [one.weight.dtype for one in mixed] == [torch.float32, torch.bfloat16]
        return weight.detach()

    stochastic = update("stochastic")
    torch.testing.assert_close(stochastic, update("nearest"), rtol=1e-6, atol=0)
    assert not torch.equal(stochastic, stochastic.bfloat16().float())


@pytest.mark.parametrize("name", ["adamw", "adamw_32bit", "adamw_8bit", "paged_adamw_8bit"])
def test_a_tensor_updated_in_chunks_gets_the_update_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding is switched off, so that what is left must be equal to the last bit."""

    def cut(target: Tensor, exact: Tensor) -> None:
        target.copy_(exact)

    monkeypatch.setattr(optimizers, "round_stochastically", cut)

    def train(chunk_elements: int) -> Tensor:
        monkeypatch.setattr(optimizers, "CHUNK_ELEMENTS", chunk_elements)
        regression = Regression(torch.bfloat16)
        regression.train(name, rounding="stochastic", steps=4, learning_rate=0.05)
        return regression.model.weight.detach()

    whole, start = train(2**24), Regression(torch.bfloat16).model.weight
    assert not torch.equal(whole, start)
    for chunk_elements in (256, 3 * 256, 5000 // 256 * 256):
        assert torch.equal(train(chunk_elements), whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_weight_decay_shrinks_matrices_and_leaves_biases_and_norms(name: str, rounding: str) -> None:
    dtype = torch.bfloat16 if rounding == "stochastic" else torch.float32
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).to(dtype)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(name, model, learning_rate=0.5, weight_decay=0.5, rounding=rounding).step()
    shrunk = {key for key, one in model.named_parameters() if not torch.equal(one, torch.ones_like(one))}
    assert shrunk == {"0.weight"}
    assert model[0].weight.float().mean().item() == pytest.approx(0.75, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_only_trainable_parameters_are_updated(name: str, rounding: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(torch.bfloat16)
    model[0].requires_grad_(False)
    before = [one.detach().clone() for one in model.parameters()]
    optimizer = make_optimizer(name, model, learning_rate=0.1, weight_decay=0.0, rounding=rounding)
    model(torch.randn(4, 64, dtype=torch.bfloat16)).square().sum().backward()
    optimizer.step()
    changed = [not torch.equal(one, was) for one, was in zip(model.parameters(), before, strict=True)]
    assert changed == [False, False, True, True]


@pytest.mark.parametrize(
    ("name", "dtype", "bytes_per_element"),
    [
        ("adamw", torch.float32, 8),
        ("adamw", torch.bfloat16, 4),
        ("adamw_32bit", torch.bfloat16, 8),
        ("adamw_8bit", torch.bfloat16, 2 + 8 / 256),
    ],
)
def test_states_have_the_size_that_plans_count(name: str, dtype: torch.dtype, bytes_per_element: float) -> None:
    regression = Regression(dtype)
    torch.manual_seed(0)
    rounding = "stochastic" if dtype == torch.bfloat16 else "nearest"
    optimizer = make_optimizer(name, regression.model, learning_rate=0.1, weight_decay=0.0, rounding=rounding)
    regression.compute_loss().backward()
    optimizer.step()
    assert set(optimizer.state) == set(regression.model.parameters()), "nothing is kept for parts"
    (state,) = optimizer.state.values()
    kept = [one for key, one in state.items() if isinstance(one, Tensor) and one.numel() > 1 and "qmap" not in key]
    assert sum(one.nbytes for one in kept) == bytes_per_element * regression.model.weight.numel()


def test_rounding_is_right_on_average() -> None:
    """The mean of n draws of a value between two neighbours has a standard deviation of at most step / (2 sqrt(n))."""
    torch.manual_seed(0)
    exact = torch.tensor([1.0 + 1 / 1024, -3.3, 1e-3, 7.77e20, 1.5e-39])
    draws = exact.repeat(40_000, 1)
    target = torch.empty_like(draws, dtype=torch.bfloat16)
    round_stochastically(target, draws)
    step = torch.tensor([2.0**-7, 2.0**-6, 2.0**-17, 2.0**62, 2.0**-133])
    error = (target.double().mean(dim=0) - exact.double()).abs() / (step / (2 * math.sqrt(len(draws))))
    assert (error < 4).all(), error
    for column in target.T:
        assert len(column.unique()) == 2


def test_rounding_draws_anew_for_each_element() -> None:
    torch.manual_seed(0)
    target = torch.empty(1000, dtype=torch.bfloat16)
    round_stochastically(target, torch.full((1000,), 1 + 2.0**-8))
    assert 400 < (target == 1).sum() < 600


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_subnormal=False), min_size=1, max_size=50))
def test_rounding_gives_one_of_the_two_neighbours_and_keeps_what_is_not_finite(values: list[float]) -> None:
    exact = torch.tensor(values, dtype=torch.float32)
    target = torch.empty_like(exact, dtype=torch.bfloat16)
    round_stochastically(target, exact)
    down = (exact.view(torch.int32) & -65536).view(torch.float32)
    up = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)
    finite = torch.isfinite(exact)
    assert ((target.float() == down) | (target.float() == up))[finite].all()
    torch.testing.assert_close(target.float()[~finite], exact[~finite], equal_nan=True)


@settings(deadline=None)
@given(st.lists(st.floats(width=16), min_size=1, max_size=50))
def test_rounding_leaves_representable_values_alone(values: list[float]) -> None:
    exact = torch.tensor(values).bfloat16()
    target = torch.empty_like(exact)
    round_stochastically(target, exact.float())
    torch.testing.assert_close(target, exact, rtol=0, atol=0, equal_nan=True)
