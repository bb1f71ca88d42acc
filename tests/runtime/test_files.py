from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_models import ARCHITECTURES, build_small_model, make_strategy

from fitune.planner.files import StoredTensor, count_checkpoints, estimate_model_bytes, estimate_safetensors_bytes
from fitune.planner.strategy import Dtype
from fitune.recipes.schema import OutputTable
from fitune.runtime.model.build import add_adapters
from fitune.runtime.model.files import list_model_tensors, make_files_of, store_tensors
from fitune.runtime.model.meta_shape import build_meta_model
from fitune.runtime.training.step import TORCH_DTYPES

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(lambda name: name != "__metadata__")
tensors = st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(sorted(TORCH_DTYPES)))


def measure_weights(folder: Path) -> int:
    return sum(one.stat().st_size for one in folder.iterdir() if "safetensors" in one.name)


@given(st.dictionaries(names, tensors, min_size=1, max_size=8))
def test_a_safetensors_file_has_the_size_that_is_computed(
    tmp_path_factory: pytest.TempPathFactory, stored: dict[str, tuple[list[int], Dtype]]
) -> None:
    path = tmp_path_factory.mktemp("file") / "one.safetensors"
    made = {name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for name, (shape, dtype) in stored.items()}
    save_file(made, path, metadata={"format": "pt"})
    computed = estimate_safetensors_bytes(
        StoredTensor(name=name, shape=tuple(shape), dtype=dtype) for name, (shape, dtype) in stored.items()
    )
    assert computed == path.stat().st_size


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_files_of_a_model_are_predicted_to_the_byte(architecture: str, tmp_path: Path) -> None:
    """In one file and in shards with their index; tied weights once, fused experts taken apart; the adapter too."""
    model: Any = build_small_model(architecture)
    config = model.config.to_dict()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size=60_000)
    parameters, listed = list_model_tensors(build_meta_model(config))
    sharded = estimate_model_bytes(store_tensors(listed, "fp32"), parameters=parameters, max_shard_bytes=60_000)
    assert sharded == measure_weights(tmp_path / "shards") > measure_weights(tmp_path / "whole")
    files_of = make_files_of(config, merge=True)
    full, lora = files_of(make_strategy("full")), files_of(make_strategy("lora"))
    assert full is not None and lora is not None
    add_adapters(model, make_strategy("lora"), alpha=None, adapter=None).save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    assert full.trained_bytes == lora.merged_bytes == measure_weights(tmp_path / "whole")
    assert lora.trained_bytes == measure_weights(tmp_path / "adapter")
    assert full.merged_bytes == 0


def test_files_follow_the_dtypes_of_the_strategy() -> None:
    files_of = make_files_of(build_small_model().config.to_dict(), merge=True)
    wide, narrow = (files_of(make_strategy("lora", adapter_dtype=dtype)) for dtype in ("fp32", "bf16"))
    qlora = files_of(make_strategy("qlora"))
    assert wide is not None and narrow is not None and qlora is not None
    assert 1.5 < wide.trained_bytes / narrow.trained_bytes < 2
    assert 1.9 < wide.merged_bytes / qlora.merged_bytes < 2, "a 4-bit base is merged in 16 bits"


def test_files_of_a_model_that_cannot_be_built_are_not_known() -> None:
    assert make_files_of({"model_type": "no such model"}, merge=False)(make_strategy("full")) is None


@pytest.mark.parametrize(
    ("output", "steps", "evaluations", "stay", "at_once"),
    [
        ({"save_every": 3}, 3, 0, 0, 0),
        ({"save_every": 3}, 9, 0, 2, 2),
        ({"save_every": 3}, 10, 0, 2, 3),
        ({"save_every": 3, "keep_checkpoints": 5}, 10, 0, 3, 3),
        ({"save_every": 3}, None, 0, 2, 3),
        ({"save_every": 100, "keep_best": True}, 9, 1, 1, 1),
        ({"save_every": 1, "keep_best": True}, 9, 4, 3, 4),
        ({}, 9, 0, 2, 3),
        ({"save_every": "never"}, 9, 0, 0, 0),
    ],
)
def test_checkpoints_that_stay_and_that_are_there_at_one_time(
    output: dict[str, Any], steps: int | None, evaluations: int, stay: int, at_once: int
) -> None:
    """None after the last step, whose weights are the result; a new one is whole before the oldest goes."""
    assert count_checkpoints(OutputTable(**output), steps, evaluations) == (stay, at_once)
