from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import make_gpu, make_inputs

from fitune.planner.catalog import CatalogGpu, CatalogModel, find_gpu, find_model, list_gpus, list_models
from fitune.planner.families import FAMILIES
from fitune.planner.plan import make_plan
from fitune.planner.shape import find_untrainable_quantization, make_shape
from fitune.recipes.errors import DeviceError, PlanError

EVERY_MODEL = pytest.mark.parametrize("model", list_models(), ids=lambda model: model.name)
EVERY_GPU = pytest.mark.parametrize("gpu", list_gpus(), ids=lambda gpu: gpu.name)


def test_the_catalog_has_the_models_and_cards_that_it_promises() -> None:
    assert len(list_models()) >= 34
    assert len(list_gpus()) >= 40
    assert {model.config["model_type"] for model in list_models()} >= set(FAMILIES) - {"granitemoe"}


@EVERY_MODEL
def test_a_models_config_gives_its_published_parameter_count(model: CatalogModel) -> None:
    assert make_shape(model.config).parameters == model.parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen3-8b", 8_190_735_360),
        ("mistral-7b-v0.3", 7_248_023_552),
        ("smollm2-135m-instruct", 134_515_008),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("falcon3-10b-base", 10_305_653_760),
        ("gemma-2-2b", 2_614_341_888),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_a_well_known_models_count_is_the_known_one(name: str, parameters: int) -> None:
    model = find_model(name)
    assert model is not None
    assert make_shape(model.config).parameters == parameters


@EVERY_MODEL
def test_a_model_is_found_by_its_name_and_by_its_hub_id_in_any_case(model: CatalogModel) -> None:
    assert find_model(model.name.upper()) == model
    found = find_model(model.hub_id.lower())
    assert found is not None
    assert found.hub_id == model.hub_id


def test_names_and_hub_ids_are_unique() -> None:
    assert len({model.name for model in list_models()}) == len(list_models())
    assert len({model.hub_id for model in list_models()}) == len(list_models())


def test_an_unknown_model_is_no_model_of_the_catalog() -> None:
    assert find_model("llama-9-1b") is None
    assert find_model("") is None


@EVERY_MODEL
def test_a_catalog_model_is_stored_in_a_form_that_can_be_trained(model: CatalogModel) -> None:
    assert find_untrainable_quantization(model.config) is None


@EVERY_GPU
def test_a_card_is_found_by_all_its_names(gpu: CatalogGpu) -> None:
    for name in (gpu.name, *gpu.aliases):
        assert find_gpu(name) == gpu
        assert find_gpu(f"NVIDIA {name}") == gpu


@EVERY_GPU
def test_a_card_computes_in_bf16_from_capability_8_up(gpu: CatalogGpu) -> None:
    assert gpu.bf16 == (float(gpu.compute_capability) >= 8)


@EVERY_GPU
def test_a_cards_figures_are_in_the_units_they_say(gpu: CatalogGpu) -> None:
    assert 2**33 * 0.99 <= gpu.memory_bytes <= 2**38
    assert 10 <= gpu.tensor_tflops <= 3000
    assert 150 <= gpu.bandwidth_gb_per_second <= 10_000


@pytest.mark.parametrize(
    ("written", "name", "memory_mib"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 80GB", 81559),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 24564),
        ("rtx4090", "RTX 4090", 24564),
        ("geforce-rtx-3090", "RTX 3090", 24576),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", 81920),
        ("Tesla T4", "T4", 15360),
        ("h200", "H200", 143771),
    ],
)
def test_a_card_is_found_however_it_is_written(written: str, name: str, memory_mib: int) -> None:
    gpu = find_gpu(written)
    assert (gpu.name, gpu.memory_bytes) == (name, memory_mib * 2**20)


@given(
    gpu=st.sampled_from(list_gpus()),
    separators=st.lists(st.sampled_from(["", " ", "-", "_", " / "]), min_size=8, max_size=8),
    upper=st.booleans(),
)
def test_case_spaces_and_punctuation_do_not_matter(gpu: CatalogGpu, separators: list[str], upper: bool) -> None:
    words = gpu.name.split()
    written = "".join(word + separator for word, separator in zip(words, separators, strict=False))
    assert find_gpu(written.upper() if upper else written.lower()) == gpu


def test_an_unknown_card_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(DeviceError, match=r'"RTX 4091" is not in the GPU catalog; did you mean "RTX 4090"'):
        find_gpu("RTX 4091")


def test_a_name_like_no_card_is_refused_with_all_of_them() -> None:
    with pytest.raises(DeviceError, match=r"it has B200, .*RTX 2070"):
        find_gpu("banana")


UNTRAINABLE = ["gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "aqlm", "hqq", "quanto", "torchao", "gguf"]


@pytest.mark.parametrize("method", UNTRAINABLE)
def test_a_checkpoint_quantised_for_inference_is_refused_with_what_to_use_instead(method: str) -> None:
    config = _llama_8b() | {"quantization_config": {"quant_method": method, "bits": 4}}
    reason = find_untrainable_quantization(config)
    assert reason is not None
    assert method in reason
    assert "such as llama-3.1-8b" in reason


def test_eight_bit_weights_are_refused() -> None:
    config = _llama_8b() | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    assert "bitsandbytes 8-bit" in (find_untrainable_quantization(config) or "")


def test_four_bit_bitsandbytes_weights_can_be_trained() -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert find_untrainable_quantization(_llama_8b() | {"quantization_config": stored}) is None


@pytest.mark.parametrize("within", ["", "text_config"])
def test_four_bit_weights_are_trained_by_qlora_alone(within: str) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = _llama_8b() | {"quantization_config": stored}
    config = config if not within else {"model_type": "gemma3", within: config | {"model_type": "llama"}}
    assert make_shape(config).is_stored_in_4bit
    plan = make_plan(make_inputs({}, make_gpu("H100 80GB"), config=config))
    assert plan.strategy.method == "qlora"
    for kind in ("full", "lora"):
        with pytest.raises(
            PlanError, match=r'model.id: llama-3.2-1b: its weights are stored in 4 bits: only .*"qlora"'
        ):
            make_plan(make_inputs({"method": {"kind": kind}}, make_gpu("H100 80GB"), config=config))


@pytest.mark.parametrize("stored", [{}, "gptq", {"bits": 4}])
def test_a_quantisation_that_does_not_say_what_it_is_is_refused(stored: object) -> None:
    assert "unknown method" in (find_untrainable_quantization(_llama_8b() | {"quantization_config": stored}) or "")


def test_the_quantisation_of_a_text_model_inside_another_counts() -> None:
    text = {"model_type": "mistral", "quantization_config": {"quant_method": "fp8"}}
    reason = find_untrainable_quantization({"model_type": "mistral3", "text_config": text})
    assert reason is not None
    assert "fp8" in reason


def test_a_model_like_none_of_the_catalog_is_sent_to_its_original() -> None:
    reason = find_untrainable_quantization({"model_type": "llama", "quantization_config": {"quant_method": "awq"}})
    assert reason is not None
    assert "the original checkpoint" in reason
    assert "such as" not in reason


def _llama_8b() -> dict[str, object]:
    model = find_model("llama-3.1-8b")
    assert model is not None
    return dict(model.config)
