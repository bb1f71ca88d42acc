"""The tensors that a run writes, named and shaped by transformers and peft themselves on a model without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...planner.files import (
    FilesOf,
    StoredTensor,
    WeightFiles,
    estimate_model_bytes,
    estimate_safetensors_bytes,
    merged_dtype,
    saved_dtype,
)
from ...planner.strategy import Dtype, Strategy
from ...recipes.errors import ModelError
from ..resume.training_state import list_rng_tensors, list_state_tensors
from .build import add_adapters
from .meta_shape import build_meta_model

WRITTEN_ALIKE: Mapping[str, Any] = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "checkpointed_layers": 0,
    "loss_head": "full",
    "compile": False,
    "kernels": "torch",
    "fused_adapters": False,
    "float8": False,
    "learning_rate": 1.0,
}
"""What a strategy may differ in without another byte in its files: a search asks for many of them."""


def make_files_of(config: Mapping[str, Any], *, merge: bool) -> FilesOf:
    """The weights that a run of a strategy on the model of `config` writes, to the byte.

    None for a model that transformers cannot build, and for one that is read with its own code.
    """
    build = cache(lambda: build_meta_model(config))
    list_base = cache(lambda: list_model_tensors(build()))
    list_adapters = _make_adapter_lister(config)

    @cache
    def base_bytes(dtype: Dtype) -> int:
        parameters, tensors = list_base()
        return estimate_model_bytes(store_tensors(tensors, dtype), parameters=parameters)

    @cache
    def weigh(strategy: Strategy) -> WeightFiles | None:
        try:
            if strategy.method == "full":
                names = tuple(list_state(build()).items())
                states = estimate_training_state_bytes(build().named_parameters(), strategy)
                saved = estimate_safetensors_bytes(store_tensors(names, saved_dtype(strategy)))
                trained = base_bytes(saved_dtype(strategy))
                return WeightFiles(trained_bytes=trained, merged_bytes=0, checkpoint_bytes=saved + states)
            adapters, parameters = list_adapters(strategy)
            trained = estimate_safetensors_bytes(store_tensors(adapters, saved_dtype(strategy)))
            states = estimate_training_state_bytes(parameters, strategy)
            merged_bytes = base_bytes(merged_dtype(strategy)) if merge else 0
        except ModelError:
            return None
        return WeightFiles(trained_bytes=trained, merged_bytes=merged_bytes, checkpoint_bytes=trained + states)

    return lambda strategy: weigh(strategy.model_copy(update=WRITTEN_ALIKE))


def estimate_training_state_bytes(parameters: Iterable[tuple[str, Tensor]], strategy: Strategy) -> int:
    """Size of training_state.safetensors where all of the (name, parameter) are trained and were updated."""
    dtype = saved_dtype(strategy)
    states = [
        state for name, one in parameters for state in list_state_tensors(name, tuple(one.shape), dtype, strategy)
    ]
    return estimate_safetensors_bytes([*states, *list_rng_tensors()])


def list_model_tensors(model: Any) -> tuple[int, tuple[tuple[str, Tensor], ...]]:
    """(parameters, tensors in the order of the files) of what `save_pretrained` writes of a model on meta.

    Tied weights are there once, and a mixture's fused experts are taken apart again, as transformers does.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tensors = revert_weight_conversion(model, list_state(model))
    return model.num_parameters(), tuple(tensors.items())


def list_state(model: Any) -> dict[str, Tensor]:
    """The tensors of a transformers model under the names that it has in memory, tied ones once: a checkpoint's."""
    tensors = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    _drop_tied(model, tensors)
    return tensors


def _drop_tied(model: Any, tensors: dict[str, Tensor]) -> None:
    """Leave one name of each shared parameter: the one that the model does not declare as tied to another."""
    owners: dict[int, str] = {}
    declared = set(model.all_tied_weights_keys)
    for name in sorted(tensors, key=lambda name: name in declared):
        shared = id(model.get_parameter_or_buffer(name))
        if shared in owners:
            del tensors[name]
        owners.setdefault(shared, name)


Named = tuple[tuple[str, Tensor], ...]


def _make_adapter_lister(config: Mapping[str, Any]) -> Callable[[Strategy], tuple[Named, Named]]:
    """The adapters of a strategy; built once for a rank and its targets, whatever the dtypes."""
    built: dict[tuple[int | None, str | tuple[str, ...] | None], tuple[Named, Named]] = {}

    def list_adapters(strategy: Strategy) -> tuple[Named, Named]:
        key = strategy.adapter_rank, strategy.adapter_targets
        if key not in built:
            built[key] = list_adapter_tensors(build_meta_model(config), strategy)
        return built[key]

    return list_adapters


def list_adapter_tensors(base: Any, strategy: Strategy) -> tuple[Named, Named]:
    """The tensors of an adapter on `base`, a model on meta, under the names that peft gives them in a file, and under
    those that they have as parameters."""
    from peft import get_peft_model_state_dict

    try:
        with torch.device("meta"):
            model = add_adapters(base, strategy, alpha=None, adapter=None)
    except (RuntimeError, NotImplementedError) as error:
        raise ModelError(f"config.json: peft cannot attach adapters: {error}") from error
    parameters = tuple((name, one) for name, one in model.named_parameters() if one.requires_grad)
    return tuple(get_peft_model_state_dict(model).items()), parameters


def store_tensors(tensors: tuple[tuple[str, Tensor], ...], dtype: Dtype) -> list[StoredTensor]:
    """The tensors as they are stored in one dtype."""
    return [
        StoredTensor(name=name, shape=tuple(one.shape), dtype=dtype, storage=one.untyped_storage()._cdata)
        for name, one in tensors
    ]
