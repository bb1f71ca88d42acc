"""Updates in backward of a rehearsed step: where they come among its events, and of what."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..training.in_backward import UpdatesInBackward
from .model import RehearsalModel, make_tensor_spec
from .watch import StorageWatch


class _Recorder:
    """In the place of an optimizer: notes what it is asked to update. A replay makes its states and buffers."""

    _step_supports_amp_scaling = True

    def __init__(self, parameters: list[nn.Parameter], watch: StorageWatch) -> None:
        self.param_groups = [{"params": parameters}]
        self._watch = watch

    def step(self) -> None:
        """The parameters that it knows of have gradients, which are freed next."""
        (group,) = self.param_groups
        parameters = [one for one in group["params"] if one.grad is not None]
        for one in parameters:
            self._watch.label(cast(torch.Tensor, one.grad), "gradients")
        self._watch.note_update(tuple(map(make_tensor_spec, parameters)))


def record_updates(model: RehearsalModel, watch: StorageWatch) -> UpdatesInBackward:
    """The runtime's updates in backward on a model of fakes."""
    trainable = [one for one in model.model.parameters() if one.requires_grad]
    recorder: Any = _Recorder(trainable, watch)
    return UpdatesInBackward(recorder, model.model, model.layers)
