"""Parts of a transformers model, found whatever their names are."""

from __future__ import annotations

from typing import Any

from torch import nn


def find_decoder(base: Any) -> nn.Module:
    """The part of a transformers model that gives the last hidden states, without the LM head.

    Some models (llama4) name another prefix than their decoder's: then it is the part that has the layers.
    """
    decoder: nn.Module = base.base_model
    if decoder is not base:
        return decoder
    layers = find_layers(base)
    parts: list[nn.Module] = list(base.children())
    return next(part for part in parts if any(module is layers for module in part.modules()))


def find_layers(base: Any) -> nn.ModuleList:
    """The decoder layers: the longest ModuleList of the model."""
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    assert lists, "a causal language model has a list of layers"
    return max(lists, key=len)
