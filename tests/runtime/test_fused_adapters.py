"""Fused adapters compute what peft's do, in fewer bytes, and leave all else of the adapters to peft."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from small_models import build_small_model, make_strategy, make_tokens, save_small_model
from small_runs import read_losses, run_recipe_file, write_recipe
from small_steps import build_adapted, train_rows
from test_rehearsal import CONV1D, FUSED, LLAMA, MIXTURE, list_sizes, predict, trace
from test_rehearsal import make_strategy as make_planned
from torch import Tensor, nn

from fitune.recipes.errors import RunError
from fitune.runtime.model import fused_adapters
from fitune.runtime.model.build import BuiltModel, build_model
from fitune.runtime.model.embedded import load_embedded_model
from fitune.runtime.model.fused_adapters import FusedLinear, FusedLinear4bit, fuse_adapters
from fitune.runtime.rehearsal.time import list_works
from fitune.runtime.training.losses import compute_loss
from fitune.runtime.training.step import autocast, uncast_adapter_inputs

CPU = torch.device("cpu")
LAYERS = 3
FAMILIES = ("llama", "qwen2", "gpt2", "gemma2", "phi3", "mixtral", "starcoder2")
"""With and without biases, one projection for queries, keys and values, GPT-2's transposed weights, experts."""
HALF = {"weights_dtype": "bf16", "compute_dtype": "bf16"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model_type in FAMILIES:
        save_small_model(folder / model_type, model_type, num_hidden_layers=LAYERS)
    return folder


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Layers are compiled to AOTAutograd's graphs, run eagerly."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def differentiate(built: BuiltModel, *, dtype: str = "fp32", micro_batches: int = 1) -> dict[str, Tensor]:
    """Loss and gradients of a step."""
    losses = []
    for number in range(micro_batches):
        ids = make_tokens(3, 20, seed=number)
        with autocast(make_strategy(compute_dtype=dtype), CPU), uncast_adapter_inputs(built.model):
            loss = compute_loss(built.model, built.base, ids, ids, loss_head="full", tokens=57)
        loss.backward()
        losses.append(loss.detach())
    found = {name: one.grad for name, one in built.model.named_parameters() if one.grad is not None}
    return {"loss": torch.stack(losses), **found}


def find_fused(built: BuiltModel) -> list[Any]:
    return [one for one in built.model.modules() if isinstance(one, FusedLinear | FusedLinear4bit)]


def off_by(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 2 * LAYERS
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [0, 2])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_outputs_and_gradients_are_those_of_peft(models: Path, model_type: str, method: str, checkpointed: int) -> None:
    changes = {"checkpointed_layers": checkpointed, "attention": "eager" if model_type == "gemma2" else "sdpa"}
    expected = differentiate(build_adapted(models / model_type, method, **changes), micro_batches=2)
    built = build_adapted(models / model_type, method, fused_adapters=True, **changes)
    assert_alike(differentiate(built, micro_batches=2), expected)
    assert len(find_fused(built)) == (len(expected) - 1) // 2


@pytest.mark.parametrize("adapter_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_in_bf16_they_are_no_further_from_fp32_than_those_of_peft(
    models: Path, method: str, adapter_dtype: str
) -> None:
    """A low-rank product is rounded once less; the rest is the order of sums."""
    exact = differentiate(build_adapted(models / "llama", method))
    found = []
    for fused in (False, True):
        built = build_adapted(models / "llama", method, fused_adapters=fused, adapter_dtype=adapter_dtype, **HALF)
        gradients = differentiate(built, dtype="bf16")
        assert {one.dtype for one in built.trainable} == {torch.float32 if adapter_dtype == "fp32" else torch.bfloat16}
        found.append(sum(off_by(gradients[name], exact[name]) for name in exact) / len(exact))
    assert 0 < found[1] < 1.1 * found[0]


@pytest.mark.parametrize("checkpointed", [0, 1, LAYERS])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_compiled_layers_compute_the_same_in_one_graph_each(
    models: Path, method: str, checkpointed: int, graphs: Any
) -> None:
    expected = differentiate(build_adapted(models / "qwen2", method))
    built = build_adapted(models / "qwen2", method, fused_adapters=True, compile=True, checkpointed_layers=checkpointed)
    assert_alike(differentiate(built), expected)
    assert graphs["stats"]["unique_graphs"] > 0 and not graphs["graph_break"]


def test_layers_that_read_the_same_input_are_computed_together(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    compute = fused_adapters._compute

    def note(layers: tuple[Any, ...], *rest: Any) -> list[Tensor]:
        counts.append(len(layers))
        return compute(layers, *rest)

    monkeypatch.setattr(fused_adapters, "_compute", note)
    differentiate(build_adapted(models / "llama", fused_adapters=True))
    assert counts == [3, 1, 2, 1] * LAYERS
    counts.clear()
    differentiate(build_adapted(models / "llama", fused_adapters=True, adapter_targets=("v_proj", "q_proj", "lm_head")))
    assert counts == [2] * LAYERS + [1]


def test_a_layer_called_with_another_input_than_its_neighbour_is_computed_for_its_own(models: Path) -> None:
    plain, fused = (
        build_adapted(models / "llama", fused_adapters=on).base.model.layers[0].self_attn for on in (False, True)
    )
    one, other = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    for attention in (fused, plain):
        found = [attention.q_proj(one), attention.k_proj(other), attention.q_proj(other), attention.v_proj(other)]
        if attention is fused:
            expected = found
    torch.testing.assert_close(found, expected)


def test_evaluation_and_adapters_that_are_off_are_pefts(models: Path) -> None:
    plain, fused = (build_adapted(models / "llama", fused_adapters=on) for on in (False, True))
    ids = make_tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(fused.model(input_ids=ids).logits, plain.model(input_ids=ids).logits)
    assert isinstance(plain.model, PeftModel) and isinstance(fused.model, PeftModel)
    with plain.model.disable_adapter(), fused.model.disable_adapter():
        assert torch.equal(fused.model(input_ids=ids).logits, plain.model(input_ids=ids).logits)


def test_what_is_saved_and_merged_is_pefts(models: Path) -> None:
    plain, fused = (build_adapted(models / "qwen2", fused_adapters=on) for on in (False, True))
    states = [get_peft_model_state_dict(one.model) for one in (plain, fused)]
    assert states[0].keys() == states[1].keys()
    merged = [one.model.merge_and_unload() for one in (plain, fused)]  # type: ignore[operator]
    assert merged[0].state_dict().keys() == merged[1].state_dict().keys()
    for name, tensor in merged[0].state_dict().items():
        assert torch.equal(merged[1].state_dict()[name], tensor)


@pytest.mark.parametrize(
    "settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"fan_in_fan_out": False}]
)
def test_adapters_that_do_more_than_two_products_stay_pefts(settings: dict[str, Any]) -> None:
    model: Any = build_small_model("qwen2")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **settings)
    adapted = get_peft_model(model, config)
    fuse_adapters(model, make_strategy("lora", fused_adapters=True))
    fused = find_fused(BuiltModel(model=adapted, base=model))
    assert len(fused) == (4 if settings == {"fan_in_fan_out": False} else 0)


def test_scales_of_the_adapters_own_config_hold() -> None:
    """rsLoRA divides alpha by the root of the rank; ranks and scales may differ between layers."""
    model: Any = build_small_model("llama")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"k_proj": 2},
        alpha_pattern={"v_proj": 3},
        init_lora_weights=False,
    )
    config.target_modules = {"q_proj", "k_proj", "v_proj"}
    adapted = get_peft_model(model, config)
    expected = differentiate(BuiltModel(model=adapted, base=model))
    adapted.zero_grad()
    fuse_adapters(model, make_strategy("lora", fused_adapters=True))
    assert_alike(differentiate(BuiltModel(model=adapted, base=model)), expected)


def test_weights_in_another_dtype_than_is_computed_in_stay_pefts(models: Path) -> None:
    assert not find_fused(build_adapted(models / "llama", fused_adapters=True, compute_dtype="bf16"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("config", [LLAMA, FUSED, CONV1D, MIXTURE], ids=["llama", "phi3", "gpt2", "mixtral"])
def test_a_rehearsed_step_computes_as_much_and_moves_and_keeps_less(
    config: dict[str, Any], method: str, compiled: bool
) -> None:
    if compiled and config is MIXTURE:
        pytest.skip("experts are not compiled")
    works, memories = [], []
    for fused in (False, True):
        strategy = make_planned(method, fused_adapters=fused, compile=compiled, loss_head="fused")
        works.append([work for _, work in list_works(trace(config, strategy))])
        memories.append(predict(config, strategy))
    flops = [sum(one.flops * one.times for one in group if one.kind == "matrix") for group in works]
    moved = [sum(one.bytes * one.times for one in group if one.kind == "memory") for group in works]
    assert flops[1] == pytest.approx(flops[0])
    assert moved[1] < (0.97 if config is MIXTURE else 0.85) * moved[0], "a mixture's experts have no adapters"
    assert memories[1].peak_allocated_bytes <= 1.005 * memories[0].peak_allocated_bytes


@pytest.mark.parametrize(
    "changes", [{}, {"compile": True}, {"checkpointed_layers": 9, "gradient_accumulation_steps": 3}]
)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_repeated_layers_with_fused_adapters_give_the_whole_models_trace(method: str, changes: dict[str, Any]) -> None:
    config = LLAMA | {"num_hidden_layers": 16}
    strategy = make_planned(method, fused_adapters=True, loss_head="fused", **changes)
    trace(config, strategy)
    short, whole = trace(config, strategy), trace(config, strategy, cut=False)
    assert len(short.model.layers) < len(whole.model.layers)
    assert sorted(list_sizes(short)) == sorted(list_sizes(whole))


def test_a_run_learns_the_same_with_them(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    losses = []
    for fused in (True, False):
        recipe = write_recipe(tmp_path / str(fused), model, method={"kind": "lora", "rank": 4})
        losses.append(read_losses(run_recipe_file(recipe, fused_adapters=fused)[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.95 * losses[0][0]


def test_an_adapter_that_cannot_be_fused_is_not_continued_with_a_plan_for_fused_ones(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=names, lora_dropout=0.1, task_type="CAUSAL_LM")
    get_peft_model(build_small_model(), config).save_pretrained(tmp_path / "old")  # type: ignore[arg-type]
    method = {"kind": "lora", "rank": 4, "adapter": str(tmp_path / "old")}
    recipe = write_recipe(tmp_path / "run", model, method=method)
    with pytest.raises(
        RunError, match=r"method\.adapter: .*old was made with dropout.* method\.fused_adapters = false"
    ):
        run_recipe_file(recipe, fused_adapters=True)


@pytest.mark.slow
def test_a_real_models_loss_curve_in_bf16_stays_within_one_percent_over_sixty_steps() -> None:
    """Averaged over 20 steps each: single steps on random tokens differ by up to 2 % with the order of sums."""
    rows = torch.randint(1000, 20000, (8, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for fused in (False, True):
        strategy = make_strategy("lora", learning_rate=2e-4, fused_adapters=fused, loss_head="fused", **HALF)
        torch.manual_seed(0)
        losses = train_rows(build_model(load_embedded_model(), strategy, CPU), strategy, 60, rows)
        found.append([sum(losses[start : start + 20]) / 20 for start in range(0, 60, 20)])
    assert found[0][-1] < 0.9 * found[0][0]
    assert found[1] == pytest.approx(found[0], rel=0.01)
