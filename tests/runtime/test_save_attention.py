"""Checkpointed layers that keep attention's output compute what others do, and attention once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from small_models import make_tokens, save_small_model
from small_runs import plan_recipe, read_losses, run_recipe_file, write_recipe
from small_steps import build_adapted
from test_rehearsal import LLAMA, predict, trace
from test_rehearsal import make_strategy as make_planned
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from fitune.runtime.model.attention import choose_kept
from fitune.runtime.model.build import BuiltModel
from fitune.runtime.rehearsal.time import PHASES, list_works
from fitune.runtime.training.losses import compute_loss
from fitune.runtime.training.step import uncast_adapter_inputs

CPU = torch.device("cpu")
LAYERS = 3


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model_type in ("llama", "qwen3", "mixtral"):
        save_small_model(folder / model_type, model_type, num_hidden_layers=LAYERS)
    return folder


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[int]]]:
    """Layers are compiled to AOTAutograd's graphs, run eagerly; how often each graph, by pass, computes attention,
    as an operation or, where it is computed again, as an argument of one that restores random numbers."""
    found: dict[str, list[int]] = {"forward": [], "backward": []}

    def note(name: str, module: Any, _: Any) -> Any:
        found[name].append(sum(kernel in (node.target, *node.args[:2]) for node in module.graph.nodes))
        return make_boxed_func(module.forward)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backend = aot_autograd(fw_compiler=partial(note, "forward"), bw_compiler=partial(note, "backward"))
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def train(
    built: BuiltModel, *, seed: int = 0, packed: bool = False, watched: bool = True
) -> tuple[dict[str, Tensor], int]:
    """Loss and gradients of a step, and how often attention was computed; layers do not compile while watched."""
    ids, calls = make_tokens(3, 20, seed=seed), Calls()
    documents: dict[str, Tensor] = {}
    if packed:
        starts = torch.tensor([0, 7, 20, 40, 52, 60], dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in starts.diff().tolist()]).view(3, 20)
        documents = {"position_ids": positions, "document_starts": starts}
    torch.manual_seed(1)
    with calls if watched else nullcontext(), uncast_adapter_inputs(built.model):
        loss = compute_loss(built.model, built.base, ids, ids, loss_head="full", tokens=57, **documents)
        loss.backward()
    found = {name: one.grad for name, one in built.model.named_parameters() if one.grad is not None}
    built.model.zero_grad(set_to_none=True)
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    return {"loss": loss.detach(), **found}, calls.found[attention]


@pytest.mark.parametrize(("checkpointed", "computed"), [(LAYERS, 2 * LAYERS), (2, LAYERS + 2)])
@pytest.mark.parametrize(
    ("model_type", "method", "changes"),
    [
        ("llama", "full", {}),
        ("llama", "lora", {"adapter_dropout": 0.2}),
        ("llama", "full", {"weights_dtype": "bf16", "compute_dtype": "bf16"}),
        ("llama", "qlora", {}),
        ("qwen3", "full", {}),
        ("mixtral", "full", {}),
    ],
)
def test_gradients_are_those_of_plain_checkpoints_and_attention_is_computed_once(
    models: Path, model_type: str, method: str, changes: dict[str, Any], checkpointed: int, computed: int
) -> None:
    changes = {"checkpointed_layers": checkpointed, **changes}
    plain, saving = (build_adapted(models / model_type, method, save_attention=on, **changes) for on in (False, True))
    for seed in (0, 1):
        (expected, before), (found, after) = train(plain, seed=seed), train(saving, seed=seed)
        assert (before, after) == (computed, LAYERS)
        assert found.keys() == expected.keys() and len(found) > 2 * LAYERS
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def test_packed_rows_attend_each_document_once(models: Path) -> None:
    changes = {"checkpointed_layers": LAYERS, "attention": "varlen", "packing": True}
    plain, saving = (build_adapted(models / "llama", "full", save_attention=on, **changes) for on in (False, True))
    (expected, before), (found, after) = train(plain, packed=True), train(saving, packed=True)
    assert (before, after) == (2 * 5 * LAYERS, 5 * LAYERS)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_compiled_layers_keep_it_too(models: Path, graphs: dict[str, list[int]], method: str) -> None:
    results = []
    for on, again in ((False, 1), (True, 0)):
        built = build_adapted(models / "llama", method, checkpointed_layers=LAYERS, compile=True, save_attention=on)
        results.append(train(built, watched=False)[0])
        assert graphs["forward"] and set(graphs["forward"]) == {1}
        assert graphs["backward"] and set(graphs["backward"]) == {again}
        graphs["forward"].clear()
        graphs["backward"].clear()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_a_run_has_the_losses_of_one_that_computes_attention_again(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    losses = []
    for name, on in (("again", False), ("kept", True)):
        train = {"gradient_checkpointing": True, "save_attention": on}
        recipe = write_recipe(tmp_path / name, model, method={"kind": "lora"}, train=train)
        assert plan_recipe(recipe)[1].strategy.save_attention == on
        losses.append(read_losses(run_recipe_file(recipe)[0]))
    assert losses[0] == losses[1]


def test_every_kernel_of_fused_attention_is_known() -> None:
    aten = torch.ops.aten
    kernels = (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._flash_attention_forward.default,
    )
    assert {choose_kept(None, one) for one in kernels} == {CheckpointPolicy.MUST_SAVE}
    others = (aten.mm.default, aten._scaled_dot_product_flash_attention_backward.default, torch.cond)
    assert {choose_kept(None, one) for one in others} == {CheckpointPolicy.PREFER_RECOMPUTE}


@pytest.mark.parametrize("changes", [{}, {"compile": True}, {"attention": "varlen", "packing": True}])
def test_a_rehearsal_keeps_output_and_log_sum_exp_of_each_layer(changes: dict[str, Any]) -> None:
    layers, tokens, heads, width = 9, 2 * 1024, 8, 32
    plain, saving = (
        predict(LLAMA, make_planned(checkpointed_layers=99, save_attention=on, **changes), length=1024)
        for on in (False, True)
    )
    more = saving.components.activations - plain.components.activations
    assert more == pytest.approx(layers * tokens * heads * (2 * width + 4), rel=0.01)


@pytest.mark.parametrize(("layers", "compiled"), [(7, False), (7, True), (99, False)])
def test_a_rehearsal_computes_attention_of_the_kept_layers_once(compiled: bool, layers: int) -> None:
    config, counts = LLAMA | {"num_hidden_layers": 16}, []
    for on in (False, True):
        traced = trace(config, make_planned(checkpointed_layers=layers, save_attention=on, compile=compiled))
        works = [(phase, work) for phase, work in list_works(traced) if work.kind == "attention" and not work.backward]
        counts.append([sum(work.times for phase, work in works if phase == name) for name in PHASES])
    assert counts == [[16, min(layers, 16)], [16, 0]]


def test_masked_attention_is_kept_too() -> None:
    """Rows longer than the window: the memory-efficient kernel reads a mask."""
    config = {**LLAMA, "model_type": "mistral", "sliding_window": 128}
    for on, again in ((False, 9), (True, 0)):
        traced = trace(config, make_planned(checkpointed_layers=99, save_attention=on), length=512)
        works = [one for phase, one in list_works(traced) if phase == "backward" and one.kind == "attention"]
        assert sum(one.times for one in works if not one.backward) == again
        assert all(one.is_masked for one in works)
