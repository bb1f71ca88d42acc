from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meta_models import build_meta_model, count_parameters, find_linears, find_windows
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from fitune.planner.catalog import CatalogModel, find_model, list_models
from fitune.planner.families import FAMILIES
from fitune.planner.shape import ModelShape, make_shape
from fitune.recipes.errors import ModelError

EVERY_FAMILY = pytest.mark.parametrize("model_type", sorted(FAMILIES))
LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


def make_small_config(model_type: str, **changes: object) -> dict[str, object]:
    """A config of a few thousand parameters, whatever the family calls its keys."""
    sizes: dict[str, object] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if model_type in ("gpt2", "opt", "gpt_neox") else 2,
        "intermediate_size": 48,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type in ("qwen3", "gemma", "gemma2", "gemma3_text"):
        sizes["head_dim"] = 8
    if FAMILIES[model_type].experts:
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2}
    if model_type in ("qwen2_moe", "qwen3_moe"):
        sizes |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    keys = FAMILIES[model_type].keys
    return {"model_type": model_type} | {keys.get(key, key): value for key, value in (sizes | changes).items()}


def describe_linears(shape: ModelShape) -> Counter[tuple[str, int, int, bool]]:
    found: Counter[tuple[str, int, int, bool]] = Counter()
    for linear, count in shape.linears:
        found[linear.path, linear.inputs, linear.outputs, linear.bias] += count
    return found


def describe_windows(shape: ModelShape) -> Counter[int | None]:
    windows: Counter[int | None] = Counter()
    for block in shape.blocks:
        windows[block.sliding_window] += block.repeats
    return windows


def check_against_transformers(config: dict[str, object]) -> None:
    shape, model = make_shape(config), build_meta_model(config)
    assert shape.parameters == count_parameters(model)
    assert describe_linears(shape) == find_linears(model)
    assert describe_windows(shape) == find_windows(model)
    assert sum(block.repeats for block in shape.blocks) == shape.layers


@EVERY_FAMILY
def test_missing_keys_mean_what_the_familys_config_class_says(model_type: str) -> None:
    layers = FAMILIES[model_type].keys.get("num_hidden_layers", "num_hidden_layers")
    check_against_transformers({"model_type": model_type, layers: 2})


@EVERY_FAMILY
def test_a_familys_default_depth_is_that_of_its_config_class(model_type: str) -> None:
    model = build_meta_model(make_small_config(model_type))
    assert make_shape({"model_type": model_type}).layers == type(model.config)().num_hidden_layers


@st.composite
def small_configs(draw: st.DrawFn, model_type: str) -> dict[str, object]:
    family = FAMILIES[model_type]
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.integers(1, 3)) if family.kv_heads else draw(st.integers(1, 5))
    changes: dict[str, object] = {
        "hidden_size": heads * draw(st.sampled_from([4, 8, 12])),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 5)),
        "intermediate_size": draw(st.integers(1, 70)),
        "vocab_size": draw(st.integers(3, 200)),
        "tie_word_embeddings": draw(st.booleans()),
        "num_key_value_heads": kv_heads if family.kv_heads else heads,
    }
    if family.head_dim and draw(st.booleans()):
        changes["head_dim"] = draw(st.sampled_from([2, 6, 16]))
    for key, default in family.defaults.items():
        if isinstance(default, bool) and key != "tie_word_embeddings":
            changes[key] = draw(st.booleans())
    if family.sliding:
        changes["sliding_window"] = draw(st.sampled_from([None, 5, 16]))
    if "max_window_layers" in family.defaults:
        changes["max_window_layers"] = draw(st.integers(0, 5))
    if family.experts:
        experts = draw(st.integers(1, 6))
        changes |= {"num_experts": experts, "num_experts_per_tok": draw(st.integers(1, experts))}
    if family.experts and family.experts.dense_layers:
        changes["mlp_only_layers"] = draw(st.lists(st.integers(0, 4), unique=True))
        changes["decoder_sparse_step"] = draw(st.integers(1, 3))
    return make_small_config(model_type, **changes)


@EVERY_FAMILY
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
@given(data=st.data())
def test_any_config_of_a_family_has_the_shape_that_transformers_builds(model_type: str, data: st.DataObject) -> None:
    check_against_transformers(data.draw(small_configs(model_type)))


@pytest.mark.parametrize("model", list_models(), ids=lambda model: model.name)
def test_a_catalog_model_has_the_shape_that_transformers_builds(model: CatalogModel) -> None:
    full = make_shape(model.config)
    layers = FAMILIES[model.config["model_type"]].keys.get("num_hidden_layers", "num_hidden_layers")
    short: dict[str, object] = {**model.config, layers: 3}
    for key in ("layer_types", "no_rope_layers"):
        if key in short:
            short[key] = model.config[key][:3]
    check_against_transformers(short)
    built = make_shape(short)
    assert {linear for linear, _ in built.linears} == {linear for linear, _ in full.linears}
    assert (built.embedding_parameters, built.other_parameters, built.head) == (
        full.embedding_parameters,
        full.other_parameters,
        full.head,
    )


def count_peft_parameters(config: dict[str, object], rank: int, targets: object) -> int:
    lora = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(build_meta_model(config), lora)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@EVERY_FAMILY
def test_adapters_on_all_linear_layers_are_as_many_as_pefts(model_type: str) -> None:
    config = make_small_config(model_type)
    shape = make_shape(config)
    expected = count_peft_parameters(config, 5, list(shape.lora_target_names("all-linear")))
    assert shape.lora_parameters(5) == shape.lora_parameters(5, "all-linear") == expected > 0


@pytest.mark.parametrize("model_type", sorted(name for name, family in FAMILIES.items() if not family.experts))
def test_all_linear_of_a_dense_model_is_pefts_all_linear(model_type: str) -> None:
    config = make_small_config(model_type)
    assert make_shape(config).lora_parameters(3) == count_peft_parameters(config, 3, "all-linear")


@EVERY_FAMILY
def test_adapters_on_named_layers_are_as_many_as_pefts(model_type: str) -> None:
    config = make_small_config(model_type)
    shape = make_shape(config)
    targets = [shape.linears[0][0].name, shape.linears[-1][0].path]
    assert shape.lora_parameters(4, targets) == count_peft_parameters(config, 4, targets)
    assert shape.lora_parameters(4, targets) == count_peft_parameters(config, 4, list(shape.lora_target_names(targets)))


@EVERY_FAMILY
def test_nf4_stores_what_bitsandbytes_converts(model_type: str) -> None:
    config = make_small_config(model_type)
    model = build_meta_model(config)
    kept = get_keys_to_not_convert(model)
    settings_4bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=settings_4bit)
    converted = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert make_shape(config).quantized_parameters == sum(m.in_features * m.out_features for m in converted) > 0


def test_the_lm_head_is_adapted_only_where_it_is_named() -> None:
    config = make_small_config("llama")
    shape, targets = make_shape(config), ["lm_head", "q_proj"]
    assert shape.lora_parameters(2, targets) == count_peft_parameters(config, 2, targets)
    assert shape.lora_parameters(2, ["lm_head"]) == 2 * (32 + 100)
    assert "lm_head" not in shape.lora_target_names("all-linear")


@pytest.mark.parametrize(("name", "expected"), [("gpt2-medium", 393_216), ("gpt2-large", 737_280)])
def test_the_lectures_gpt2_adapters_are_counted_right(name: str, expected: int) -> None:
    model = find_model(name)
    assert model is not None
    assert make_shape(model.config).lora_parameters(4, ["c_attn"]) == expected


@pytest.mark.parametrize(
    ("name", "rank", "expected"), [("gemma-2-2b", 256, 332_267_520), ("llama-3.1-8b", 16, 41_943_040)]
)
def test_adapters_on_all_linear_layers_are_as_many_as_measured(name: str, rank: int, expected: int) -> None:
    model = find_model(name)
    assert model is not None
    assert make_shape(model.config).lora_parameters(rank) == expected


def test_a_parent_tells_layers_of_one_name_apart() -> None:
    shape = make_shape(make_small_config("gpt2"))
    both, attention, mlp = (shape.lora_parameters(1, [t]) for t in ("c_proj", "attn.c_proj", "mlp.c_proj"))
    assert both == attention + mlp
    assert attention == 3 * (32 + 32)


def test_a_layer_named_twice_is_adapted_once() -> None:
    shape = make_shape(LLAMA_1B)
    assert shape.lora_parameters(8, ["q_proj", "self_attn.q_proj"]) == shape.lora_parameters(8, ["q_proj"])


@pytest.mark.parametrize("target", ["q_porj", "proj", "embed_tokens", "self_attn", "", "experts"])
def test_a_target_that_is_no_linear_layer_is_refused_with_the_ones_there_are(target: str) -> None:
    with pytest.raises(ModelError) as error:
        make_shape(LLAMA_1B).lora_parameters(8, ["k_proj", target])
    assert f'"{target}"' in str(error.value)
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in str(error.value)


def test_a_misspelt_target_gets_the_nearest_name() -> None:
    with pytest.raises(ModelError, match='did you mean "q_proj"'):
        make_shape(LLAMA_1B).lora_parameters(8, ["q_porj"])


def test_tied_weights_are_counted_once() -> None:
    tied, untied = make_shape(LLAMA_1B), make_shape(LLAMA_1B | {"tie_word_embeddings": False})
    assert tied.parameters == 1_235_814_400
    assert untied.parameters - tied.parameters == 128256 * 2048


def test_the_text_model_of_a_multimodal_config_is_used() -> None:
    text = make_small_config("gemma3_text")
    assert make_shape({"model_type": "gemma3", "vision_config": {"hidden_size": 99}, "text_config": text}) == (
        make_shape(text)
    )


def test_layers_that_differ_only_in_their_window_are_two_blocks() -> None:
    model = find_model("gemma-2-2b")
    assert model is not None
    assert [(b.repeats, b.sliding_window) for b in make_shape(model.config).blocks] == [(13, 4096), (13, None)]


def test_listed_layer_types_decide_the_windows() -> None:
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    config = make_small_config("gemma2", layer_types=kinds, sliding_window=7)
    check_against_transformers(config)
    assert describe_windows(make_shape(config)) == {None: 2, 7: 1}


FACTS: list[tuple[str, Callable[[ModelShape], object], object]] = [
    ("gpt2", lambda s: (s.embedding_dropout, s.attention_dropout, s.residual_dropout), (0.1, 0.1, 0.1)),
    ("opt", lambda s: (s.embedding_dropout, s.attention_dropout, s.residual_dropout), (0.0, 0.0, 0.1)),
    ("llama", lambda s: (s.embedding_dropout, s.attention_dropout, s.residual_dropout), (0.0, 0.0, 0.0)),
    ("gemma2", lambda s: (s.logit_softcap, s.attention_softcap, s.logit_scale), (30.0, 50.0, None)),
    ("gemma3_text", lambda s: (s.logit_softcap, s.attention_softcap), (None, None)),
    ("cohere", lambda s: (s.logit_scale, s.parallel_residual, s.norm), (0.0625, True, "rmsnorm")),
    ("gpt_neox", lambda s: (s.parallel_residual, s.gated_mlp, s.activation), (True, False, "gelu")),
    ("gemma2", lambda s: (s.gated_mlp, s.activation, s.norms_per_block), (True, "gelu_pytorch_tanh", 4)),
    ("qwen3", lambda s: (s.qk_norm, s.norm, s.head_dim), (True, "rmsnorm", 128)),
    ("phi", lambda s: (s.qk_norm, s.norms_per_block, s.head.bias), (False, 1, True)),
    ("phi3", lambda s: (s.gated_mlp, s.intermediate_size), (True, 8192)),
    ("qwen2_moe", lambda s: (s.experts, s.experts_per_token, s.shared_expert_intermediate_size), (60, 4, 5632)),
    ("mixtral", lambda s: (s.experts, s.experts_per_token, s.shared_expert_intermediate_size), (8, 2, None)),
    ("qwen3_moe", lambda s: s.intermediate_size, 768),
    ("llama", lambda s: (s.experts, s.experts_per_token), (None, None)),
    ("gpt2", lambda s: (s.max_positions, s.has_learned_positions, s.intermediate_size), (1024, True, 3072)),
    ("llama", lambda s: (s.max_positions, s.has_learned_positions), (2048, False)),
]


@pytest.mark.parametrize(("model_type", "read", "expected"), FACTS)
def test_a_family_says_how_it_computes(model_type: str, read: Callable[[ModelShape], object], expected: object) -> None:
    assert read(make_shape({"model_type": model_type})) == expected


def test_granites_divisor_becomes_a_scale() -> None:
    assert make_shape(make_small_config("granite", logits_scaling=8.0)).logit_scale == 0.125


BAD_VALUES = [0, -1, "4096", 4096.0, True, [4096], None]


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_size_that_is_no_size_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=rf"{key}: .* is not a whole number of 1 or more"):
        make_shape({**LLAMA_1B, key: value})


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", {"num_attention_heads": 5}, "num_attention_heads: 5 is not a divisor of hidden_size"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: 3 is not a divisor of num_attention_heads"),
        ("gpt2", {"n_embd": 30}, "n_head: 4 is not a divisor of n_embd"),
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers: 1000000 is not a number of layers up to 10,000"),
        ("llama", {"vocab_size": 10**30}, "vocab_size: 10+ is not a whole number of at most 2,147,483,647"),
        ("llama", {"tie_word_embeddings": "yes"}, 'tie_word_embeddings: "yes" is not true or false'),
        ("llama", {"attention_bias": 1}, "attention_bias: 1 is not true or false"),
        ("llama", {"hidden_act": 3}, "hidden_act: 3 is not a word"),
        ("gpt2", {"resid_pdrop": 1.5}, "resid_pdrop: 1.5 is not a number from 0"),
        ("gemma2", {"final_logit_softcapping": -30.0}, "final_logit_softcapping: -30.0 is not a number above 0"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types: .* is not a list of 3 kinds"),
        ("gemma2", {"layer_types": "full_attention"}, "layer_types: .* is not a list of words"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok: 9 is not at most num_local_experts"),
        ("qwen2_moe", {"mlp_only_layers": 1}, "mlp_only_layers: 1 is not a list of whole numbers"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim: 16 is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers: \[1\] is not supported; only \[\] is"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before: false is not supported; only true is"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(model_type: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_shape(make_small_config(model_type) | change)


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": 3}, {"model_type": "mamba"}])
def test_an_unsupported_model_type_is_refused_with_the_supported_ones(config: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"model_type.*supported are cohere, .*starcoder2"):
        make_shape(config)


def test_a_misspelt_model_type_gets_the_nearest_one() -> None:
    with pytest.raises(ModelError, match='did you mean "mixtral"'):
        make_shape({"model_type": "mixtrall"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@EVERY_FAMILY
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_config_raises_anything_but_a_model_error(model_type: str, data: st.DataObject) -> None:
    config = make_small_config(model_type)
    known = sorted({*config, *FAMILIES[model_type].defaults, "head_dim", "layer_types", "text_config"})
    for key in data.draw(st.lists(st.sampled_from(known), max_size=4)):
        config[key] = data.draw(JSON)
    try:
        assert make_shape(config).parameters > 0
    except ModelError as error:
        assert str(error)
