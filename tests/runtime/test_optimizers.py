from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fitune.planner.arithmetic import ROUNDED_ELEMENTS
from fitune.runtime.training.in_backward import UpdatesInBackward
from fitune.runtime.training.optimizers import make_optimizer
from fitune.runtime.training.rounding import round_stochastically

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

    monkeypatch.setattr("fitune.runtime.training.optimizers.round_stochastically", cut)

    def train(chunk_elements: int) -> Tensor:
        monkeypatch.setitem(ROUNDED_ELEMENTS, "cpu", chunk_elements)
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


@pytest.fixture(scope="module")
def graphs() -> Iterator[Any]:
    """Counts of torch.compile, whose generated code runs."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("Inductor needs a C++ compiler")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def update_once(
    weight: Tensor,
    gradient: Tensor,
    *,
    compiled: bool,
    seed: int = 0,
    found_inf: float | None = None,
    steps: int = 1,
    learning_rate: float = 0.01,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight and its states after updates with one gradient."""
    model = nn.Module()
    model.weight = nn.Parameter(weight.clone())
    optimizer: Any = make_optimizer(
        "adamw", model, learning_rate=learning_rate, weight_decay=0.1, rounding="stochastic", compiled=compiled
    )
    torch.manual_seed(seed)
    for number in range(steps):
        model.weight.grad = gradient.clone()
        if found_inf is not None and number == steps - 1:
            optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
    return model.weight.detach(), optimizer.state[model.weight]


def make_update(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return weight, gradient


def test_a_compiled_update_in_fp32_is_torchs_own(graphs: Any) -> None:
    weight, gradient = make_update(32, 48, dtype=torch.float32)
    found, expected = (update_once(weight, gradient, compiled=on, steps=3) for on in (True, False))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)
    assert found[1]["step"] == 3


def test_a_compiled_update_of_bf16_weights_is_the_exact_one_on_average(graphs: Any) -> None:
    """Each element lies beside the exact value; 4,096 equal ones have a mean within 4 standard deviations of it."""
    weight, gradient = make_update(1, 48)
    rows, exact = (4096, 48), update_once(weight.float(), gradient.float(), compiled=False)
    found = update_once(weight.expand(rows).clone(), gradient.expand(rows).clone(), compiled=True)
    for key in ("weight", "exp_avg", "exp_avg_sq"):
        values, value = (one[0] if key == "weight" else one[1][key] for one in (found, exact))
        step = torch.exp2(torch.floor(torch.log2(value.abs())) - 7)
        assert values.dtype == torch.bfloat16
        assert ((values.float() - value).abs() <= 1.01 * step).all()
        assert ((values.double().mean(dim=0) - value).abs() < 4 * step / (2 * math.sqrt(4096)) + 1e-4 * step).all()


def test_weight_and_moments_are_rounded_independently_in_a_compiled_update(graphs: Any) -> None:
    weight, gradient = torch.full((64, 64), 1.0).bfloat16(), torch.full((64, 64), 0.7).bfloat16()
    updated, state = update_once(weight, gradient, compiled=True)
    drawn = torch.stack([updated.flatten(), state["exp_avg"].flatten(), state["exp_avg_sq"].flatten()])
    assert all(len(one.unique()) == 2 for one in drawn)
    assert torch.corrcoef(drawn.double()).triu(1).abs().max() < 0.08, "5 standard deviations of 4,096 pairs"


def test_a_seed_decides_what_a_compiled_update_draws(graphs: Any) -> None:
    weight, gradient = make_update(64, 64)
    first, again, other = (update_once(weight, gradient, compiled=True, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_changes_where_gradients_are_not_finite(compiled: bool, graphs: Any) -> None:
    weight, gradient = make_update(32, 48)
    expected = update_once(weight, gradient, compiled=compiled)
    found = update_once(weight, gradient, compiled=compiled, steps=2, found_inf=1.0)
    assert found[1]["step"] == expected[1]["step"] == 1
    if compiled:  # which draws once for a tensor, so that the first update is the same
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(found[1][key], expected[1][key]) for key in ("exp_avg", "exp_avg_sq"))
    overflowed = gradient.clone()
    overflowed[3, 5] = float("inf")
    unchanged, state = update_once(weight, overflowed, compiled=compiled, found_inf=1.0)
    assert torch.equal(unchanged, weight) and state["step"] == 0 and not state["exp_avg"].any()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_learning_rate_of_0_changes_no_weight_whether_or_not_it_has_gradients(compiled: bool, graphs: Any) -> None:
    """A warmup starts with it, and most rows of an embedding have no gradients."""
    weight, gradient = make_update(32, 48)
    gradient[::2] = 0
    assert torch.equal(update_once(weight, gradient, compiled=compiled, learning_rate=0.0)[0], weight)


def test_many_shapes_learning_rates_and_decays_are_compiled_a_few_times(graphs: Any) -> None:
    before = graphs["unique_graphs"]
    sizes = [(16 * rows, columns) for rows in range(2, 12) for columns in (16, 48, 80)]
    model = nn.ParameterList(nn.Parameter(torch.ones(size).bfloat16()) for size in (*sizes, (64,), (77,), (1,)))
    optimizer = make_optimizer(
        "adamw", model, learning_rate=0.1, weight_decay=0.1, rounding="stochastic", compiled=True
    )
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
        for parameter in model:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert graphs["unique_graphs"] - before <= 4
    assert all((parameter < 0.95).all() for parameter in model)


def test_a_compiled_update_takes_no_memory_beside_what_it_updates(graphs: Any) -> None:
    weight, gradient = make_update(256, 256)
    model = nn.Module()
    model.weight = nn.Parameter(weight)
    optimizer = make_optimizer(
        "adamw", model, learning_rate=0.1, weight_decay=0.1, rounding="stochastic", compiled=True
    )
    for _ in range(2):
        model.weight.grad = gradient
        optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    taken = sum(max(0, one.self_cpu_memory_usage) for one in profile.events())
    assert taken < weight.numel()


@pytest.mark.parametrize("in_backward", [False, True])
def test_bf16_weights_learn_by_compiled_updates_as_by_eager_ones(in_backward: bool, graphs: Any) -> None:
    ends = []
    for compiled in (False, True):
        model = Regression(torch.bfloat16)
        torch.manual_seed(1)
        optimizer = make_optimizer(
            "adamw", model.model, learning_rate=1.5e-3, weight_decay=0.0, rounding="stochastic", compiled=compiled
        )
        updates = UpdatesInBackward(optimizer, model.model, []) if in_backward else None
        for _ in range(150):
            model.compute_loss().backward()
            if updates is None:
                optimizer.step()
                optimizer.zero_grad()
            else:
                updates.finish()
        ends.append(model.compute_loss().item())
    assert ends[1] == pytest.approx(ends[0], rel=0.03)
