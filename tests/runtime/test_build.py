from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from small_models import VOCABULARY, build_small_model, make_strategy, make_tokens, save_small_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fitune.recipes.errors import ModelError
from fitune.runtime.model.build import BuiltModel, build_model
from fitune.runtime.model.parts import find_layers
from fitune.runtime.training.losses import check_loss_head, compute_loss
from fitune.runtime.training.step import TORCH_DTYPES, autocast

CPU = torch.device("cpu")
LLAMA_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("llama"))


def build(folder: Path, method: str = "full", adapter: Path | None = None, **changes: Any) -> BuiltModel:
    torch.manual_seed(0)
    return build_model(folder, make_strategy(method, **changes), CPU, adapter=adapter)


def shake_adapters(built: BuiltModel) -> None:
    """Give lora_B, which starts at zero, values, so that every part of the model matters."""
    torch.manual_seed(1)
    for name, parameter in built.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)


def find_gradients(
    built: BuiltModel, method: str = "full", compute_dtype: str = "fp32", head: str = "full"
) -> dict[str, Tensor]:
    strategy = make_strategy(method, compute_dtype=compute_dtype)
    ids = make_tokens(2, 24)
    with autocast(strategy, CPU):
        loss = compute_loss(built.model, built.base, ids, ids, loss_head=head, tokens=46)
    loss.backward()
    found = {name: one.grad for name, one in built.model.named_parameters() if one.grad is not None}
    built.model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_full_fine_tuning_trains_every_weight_in_the_plans_dtype(llama: Path, dtype: str) -> None:
    built = build(llama, weights_dtype=dtype)
    assert built.model is built.base and built.model.training
    assert {one.dtype for one in built.trainable} == {TORCH_DTYPES[dtype]}
    assert len(built.trainable) == len(list(built.model.parameters()))


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("adapter_dtype", ["fp32", "bf16"])
def test_adapters_alone_are_trained_and_in_their_own_dtype(llama: Path, method: str, adapter_dtype: str) -> None:
    built = build(llama, method, weights_dtype="bf16", compute_dtype="bf16", adapter_dtype=adapter_dtype)
    trainable = {name for name, one in built.model.named_parameters() if one.requires_grad}
    assert len(trainable) == 2 * 2 * len(LLAMA_LINEARS) and all("lora_" in name for name in trainable)
    assert {one.dtype for one in built.trainable} == {TORCH_DTYPES[adapter_dtype]}
    assert sum(one.numel() for one in built.trainable) == 2 * 4 * (64 * 4 + 64 + 32 + 64 + 32 + 3 * 64 + 3 * 128)
    assert built.model.training and built.base.training


@pytest.mark.parametrize("head", ["full", "chunked"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_loss_head_can_be_checked_whatever_the_dtypes(llama: Path, method: str, head: str) -> None:
    built = build(llama, method, weights_dtype="bf16", compute_dtype="bf16")
    with autocast(make_strategy(method, compute_dtype="bf16"), CPU):
        check_loss_head(built.model, built.base, loss_head=head, device=CPU)


def test_alpha_is_the_recipes_or_twice_the_rank(llama: Path) -> None:
    assert build(llama, "lora").model.peft_config["default"].lora_alpha == 8
    built = build_model(llama, make_strategy("lora"), CPU, alpha=4)
    layer = next(one for one in built.model.modules() if isinstance(one, LoraLayer))
    assert layer.scaling == {"default": 1.0}


def test_dropout_is_the_strategys(llama: Path) -> None:
    built = build(llama, "lora", adapter_dropout=0.25)
    dropped = {one.p for one in built.model.modules() if isinstance(one, nn.Dropout) and one.p}
    assert dropped == {0.25}


def test_named_targets_get_adapters_and_no_others(llama: Path) -> None:
    built = build(llama, "lora", adapter_targets=("q_proj", "v_proj"))
    adapted = {name.split(".")[-1] for name, one in built.model.named_modules() if isinstance(one, LoraLayer)}
    assert adapted == {"q_proj", "v_proj"}


def test_targets_that_the_model_does_not_have_are_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match="nonsense"):
        build(llama, "lora", adapter_targets=("nonsense",))


@pytest.mark.parametrize(("model_type", "adapted"), [("gpt2", {"c_attn", "c_proj", "c_fc"}), ("llama", LLAMA_LINEARS)])
def test_all_linear_means_every_linear_layer_but_the_head(tmp_path: Path, model_type: str, adapted: set[str]) -> None:
    built = build(save_small_model(tmp_path, model_type), "lora")
    found = {name.split(".")[-1] for name, one in built.model.named_modules() if isinstance(one, LoraLayer)}
    assert found == adapted


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_all_linear_leaves_the_experts_of_a_mixture_alone(tmp_path: Path, model_type: str, method: str) -> None:
    built = build(save_small_model(tmp_path, model_type), method)
    adapted = {name for name, one in built.model.named_modules() if isinstance(one, LoraLayer)}
    assert adapted and not any("expert" in name or "gate" in name for name in adapted)
    assert find_gradients(built, method).keys() >= {
        name for name, _ in built.model.named_parameters() if "lora_B" in name
    }


@pytest.mark.parametrize("double", [True, False])
def test_qlora_quantises_every_linear_layer_but_the_head(llama: Path, double: bool) -> None:
    built = build(llama, "qlora", weights_dtype="bf16", compute_dtype="bf16", double_quantization=double)
    linears = {name: one for name, one in built.base.named_modules() if isinstance(one, nn.Linear)}
    quantized = {name for name, one in linears.items() if isinstance(one, bnb.nn.Linear4bit)}
    base_layers = {name for name in linears if "lora_" not in name}
    assert quantized == {name for name in base_layers if "lm_head" not in name} and len(quantized) == 14
    for name in quantized:
        state = linears[name].weight.quant_state
        assert (state.quant_type, state.nested, linears[name].compute_dtype) == ("nf4", double, torch.bfloat16)
    rest = {name: one for name, one in built.base.named_parameters() if not isinstance(one, bnb.nn.Params4bit)}
    assert {one.dtype for name, one in rest.items() if "lora_" not in name} == {torch.bfloat16}


@pytest.mark.parametrize(("compute_dtype", "checkpointing"), [("bf16", False), ("fp32", True)])
def test_an_evaluation_changes_no_gradient_of_a_4_bit_model(
    llama: Path, compute_dtype: str, checkpointing: bool
) -> None:
    """bitsandbytes repacks 4-bit weights in an evaluation on some CPUs, and adapters then get no gradients."""
    built = build(
        llama,
        "qlora",
        weights_dtype=compute_dtype,
        compute_dtype=compute_dtype,
        checkpointed_layers=2 if checkpointing else 0,
    )
    shake_adapters(built)
    before = find_gradients(built, "qlora", compute_dtype)
    assert {name for name in before if "lora_B" in name} == {
        name for name, _ in built.model.named_parameters() if "lora_B" in name
    }
    built.model.eval()
    with torch.no_grad(), autocast(make_strategy("qlora", compute_dtype=compute_dtype), CPU):
        for length in (1, 24):
            built.model(input_ids=make_tokens(1, length))
    built.model.train()
    after = find_gradients(built, "qlora", compute_dtype)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(one.abs().max() > 0 for one in after.values())


@pytest.mark.parametrize(
    ("method", "head"), [("full", "full"), ("full", "chunked"), ("lora", "full"), ("qlora", "chunked")]
)
def test_checkpointing_changes_no_gradient(llama: Path, method: str, head: str) -> None:
    kept, recomputed = build(llama, method), build(llama, method, checkpointed_layers=2)
    for one in (kept, recomputed):
        shake_adapters(one)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    find_layers(recomputed.base)[0].mlp.register_forward_pre_hook(count)
    assert_same_gradients(find_gradients(recomputed, method, head=head), find_gradients(kept, method, head=head))
    assert calls == 2


def test_an_existing_adapter_goes_on_from_its_values(llama: Path, tmp_path: Path) -> None:
    first = build(llama, "lora", adapter_targets=("q_proj", "v_proj"), adapter_rank=2)
    shake_adapters(first)
    first.model.save_pretrained(tmp_path / "adapter")
    again = build(llama, "lora", adapter=tmp_path / "adapter", adapter_dtype="bf16", compute_dtype="bf16")
    values = {name: one for name, one in again.model.named_parameters() if one.requires_grad}
    assert len(values) == 8 and again.model.training
    for name, one in first.model.named_parameters():
        if "lora_" in name:
            assert torch.equal(values[name], one.bfloat16())


def test_a_folder_without_an_adapter_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"method\.adapter: .*: no adapter_config\.json"):
        build(llama, "lora", adapter=tmp_path)


@pytest.mark.parametrize("size", [{"hidden_size": 32}, {"num_hidden_layers": 1}, {"model_type": "gpt2"}])
def test_an_adapter_of_another_model_is_refused(llama: Path, tmp_path: Path, size: dict[str, Any]) -> None:
    other = build(save_small_model(tmp_path / "other", **size), "lora")
    other.model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"method\.adapter: .*adapter: (it was made for another model|peft cannot)"):
        build(llama, "lora", adapter=tmp_path / "adapter")


def test_a_damaged_adapter_is_refused(llama: Path, tmp_path: Path) -> None:
    build(llama, "lora").model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match=r"method\.adapter"):
        build(llama, "lora", adapter=tmp_path)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_the_strategys(llama: Path, attention: str) -> None:
    assert build(llama, attention=attention).base.config._attn_implementation == attention


def test_attention_that_is_not_installed_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"(?i)flash"):
        build(llama, attention="flash_attention_2")


def test_weights_that_are_missing_in_the_file_are_refused(tmp_path: Path) -> None:
    """transformers would make them up at random, and only warn."""
    model = build_small_model()
    weights = {name: one for name, one in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp"):
        build(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    model = build_small_model()
    model.save_pretrained(tmp_path)
    model.config.intermediate_size = 96
    model.config.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"mlp\.\w+\.weight is stored as \[.*128.*\], its config\.json says \[.*96.*\]"
    ):
        build(tmp_path)


def test_a_damaged_weights_file_is_refused(tmp_path: Path) -> None:
    save_small_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match=r"cannot load"):
        build(tmp_path)


def test_the_layers_of_a_model_are_its_decoder_layers(tmp_path: Path) -> None:
    for model_type in ("llama", "gpt2", "opt", "mixtral"):
        assert len(find_layers(build_small_model(model_type, num_hidden_layers=3))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_compiled_layers_give_the_gradients_of_plain_ones(llama: Path, method: str) -> None:
    plain, compiled = build(llama, method), build(llama, method, compile=True)
    for one in (plain, compiled):
        shake_adapters(one)
    assert_same_gradients(find_gradients(compiled, method), find_gradients(plain, method))


def test_the_loaded_model_computes_what_transformers_computes(llama: Path) -> None:
    built = build(llama)
    built.model.eval()
    expected = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = make_tokens(1, 12)
    assert built.base.config.vocab_size == VOCABULARY
    torch.testing.assert_close(built.model(ids).logits, expected(ids).logits)


def test_a_fresh_adapter_changes_nothing(llama: Path) -> None:
    built = build(llama, "lora")
    assert isinstance(built.model, PeftModel)
    expected = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = make_tokens(1, 12)
    torch.testing.assert_close(built.model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_that_are_stored_in_4_bits_are_for_qlora_alone(llama: Path, tmp_path: Path, method: str) -> None:
    stored = build_model(llama, make_strategy("qlora"), CPU).model.unload()
    stored.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r'stored in 4 bits: only method\.kind = "qlora"'):
        build(tmp_path, method)
    assert find_gradients(build(tmp_path, "qlora"), "qlora")
