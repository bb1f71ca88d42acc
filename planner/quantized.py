"""Checkpoints that are stored quantised: which of them can be trained, and what to use instead of the others."""

from __future__ import annotations

from collections.abc import Mapping

from .catalog import list_models

ONLY_QLORA = 'its weights are stored in 4 bits: only method.kind = "qlora" trains them'
"""What is said of such a checkpoint where another method is asked for, by the plan and by the run."""
_DECIDING_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")


def find_untrainable_quantization(config: Mapping[str, object]) -> str | None:
    """Why this config's stored quantisation cannot be trained and what to use instead, None where it can.

    bitsandbytes' 4-bit weights can be trained through adapters (QLoRA); GPTQ, AWQ, compressed-tensors, fp8, mxfp4 and
    the rest keep weights in forms for inference.
    """
    method = _find_method(config)
    if method in (None, "bitsandbytes 4-bit"):
        return None
    return f"its weights are stored quantised ({method}), which cannot be trained; use {_describe_original(config)}"


def is_stored_in_4bit(config: Mapping[str, object]) -> bool:
    """Whether the checkpoint holds bitsandbytes' 4-bit weights."""
    return _find_method(config) == "bitsandbytes 4-bit"


def _find_method(config: Mapping[str, object]) -> str | None:
    text = config.get("text_config")
    places = (config, text) if isinstance(text, Mapping) else (config,)
    for place in places:
        for key in ("quantization_config", "compression_config"):
            quantization = place.get(key)
            if quantization is not None:
                return _name_method(quantization if isinstance(quantization, Mapping) else {})
    return None


def _name_method(quantization: Mapping[str, object]) -> str:
    if quantization.get("load_in_4bit") is True:
        return "bitsandbytes 4-bit"
    method = quantization.get("quant_method", "an unknown method")
    if quantization.get("load_in_8bit") is True or method == "bitsandbytes":
        return "bitsandbytes 8-bit"
    return str(method)


def _describe_original(config: Mapping[str, object]) -> str:
    """The checkpoint that it was made from: the catalog's of the same shape where there is one."""
    wanted = [config.get(key) for key in _DECIDING_KEYS]
    names = [model.name for model in list_models() if [model.config.get(key) for key in _DECIDING_KEYS] == wanted]
    suggestion = f", such as {' or '.join(names[:3])}" if names and None not in wanted else ""
    return f'the original checkpoint in bf16 or fp32{suggestion}; method.kind = "qlora" quantises it to 4 bits itself'
