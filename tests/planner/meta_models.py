"""The models that the shapes are compared with: built by transformers on the meta device, without memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

Linears = Counter[tuple[str, int, int, bool]]


def build_meta_model(config: Mapping[str, object]) -> PreTrainedModel:
    rest = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "torch_dtype")}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest))


def count_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def find_linears(model: PreTrainedModel) -> Linears:
    """(path inside its layer, inputs, outputs, bias) of every linear layer but the LM head, with its count."""
    found: Linears = Counter()
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            continue
        if isinstance(module, torch.nn.Linear):
            found[_cut(name), module.in_features, module.out_features, module.bias is not None] += 1
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            found[_cut(name), inputs, outputs, True] += 1
    return found


def find_windows(model: PreTrainedModel) -> Counter[int | None]:
    """The sliding window of every layer's attention, None for full attention."""
    windows: Counter[int | None] = Counter()
    for layer in model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().h:
        attention = next(module for name, module in layer.named_children() if name.startswith(("self_attn", "att")))
        window = getattr(attention, "sliding_window", None)
        if not hasattr(attention, "sliding_window") and model.config.model_type in _SAME_WINDOW_EVERYWHERE:
            window = model.config.sliding_window
        windows[window or None] += 1
    return windows


_SAME_WINDOW_EVERYWHERE = ("mistral", "mixtral", "phi3", "starcoder2")


def _cut(name: str) -> str:
    """`model.layers.0.self_attn.q_proj` without everything up to the layer's number."""
    parts = name.split(".")
    number = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[number + 1 :])
