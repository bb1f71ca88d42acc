"""Shapes read off a model that transformers builds agree with the planner's own, and exist for families it lacks."""

from __future__ import annotations

from typing import Any

import pytest
from small_configs import TINY

from fitune.planner.catalog import list_models
from fitune.planner.families import FAMILIES
from fitune.planner.shape import is_known_family, make_shape
from fitune.recipes.errors import ModelError
from fitune.runtime.model.meta_shape import make_shape_of_model

ONE_OF_EACH = {model.config["model_type"]: dict(model.config) for model in reversed(list_models())}


@pytest.mark.parametrize("model_type", ONE_OF_EACH)
def test_a_known_family_is_counted_alike(model_type: str) -> None:
    config = ONE_OF_EACH[model_type]
    ours, theirs = make_shape(config), make_shape_of_model(config)
    for shape in (ours, theirs):
        assert shape.lora_parameters(8, "all-linear") > 0
    assert (ours.parameters, ours.quantized_parameters, ours.tied, ours.has_sdpa) == (
        theirs.parameters,
        theirs.quantized_parameters,
        theirs.tied,
        theirs.has_sdpa,
    )
    assert ours.lora_parameters(8, "all-linear") == theirs.lora_parameters(8, "all-linear")


@pytest.mark.parametrize(
    "model_type", ["glm", "ernie4_5", "seed_oss", "apertus", "helium", "nemotron", "hunyuan_v1_dense"]
)
def test_a_family_without_closed_forms_has_a_shape_too(model_type: str) -> None:
    assert model_type not in FAMILIES
    config = {"model_type": model_type, **TINY}
    assert not is_known_family(config)
    shape = make_shape_of_model(config)
    assert (shape.layers, shape.hidden_size, shape.vocab_size) == (4, 64, 128)
    assert shape.parameters > shape.quantized_parameters > 0


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "no-such-family"},
        {"model_type": "glm", **TINY, "num_attention_heads": 0},
        {"model_type": "glm", **TINY, "hidden_size": "wide"},
        {"model_type": "t5"},
    ],
)
def test_what_cannot_be_built_is_one_error(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        make_shape_of_model(config)
