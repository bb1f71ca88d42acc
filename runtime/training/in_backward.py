"""The optimizer's update as a part of backward: gradients are used and freed while others are not there yet.

As PyTorch's "optimizer step in backward" tutorial does it, but a layer at a time instead of a parameter at a time, so
that one fused call serves a layer. https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .optimizers import step_if_finite


class UpdatesInBackward:
    """Updates a layer's parameters as soon as backward has completed the last of their gradients, and frees these.

    For steps of one micro-batch whose gradients are not clipped: the norm of all gradients is known when the last layer
    has been updated. Where the gradients of a layer are not finite, it and all that backward comes to later
    stay as they are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._optimizer = optimizer
        self._groups = group_parameters(model, layers)
        self._missing = [len(group) for group in self._groups]
        self._norm: Tensor | None = None
        for number, group in enumerate(self._groups):
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(partial(self._count, number))

    def _count(self, number: int, _: Tensor) -> None:
        """A gradient is complete. Autograd adds up all of a parameter's uses before, tied embeddings' too."""
        self._missing[number] -= 1
        if not self._missing[number]:
            self._update(self._groups[number])

    def finish(self) -> Tensor:
        """After backward: update what is left, of layers with parameters that took no part, and return the L2 norm of
        all gradients [], in float32."""
        left = [parameter for group in self._groups for parameter in group if parameter.grad is not None]
        if left:
            self._update(left)
        norm = self._norm
        assert norm is not None, "a step has gradients"
        self._missing, self._norm = [len(group) for group in self._groups], None
        return norm

    def _update(self, group: Sequence[nn.Parameter]) -> None:
        gradients = [parameter.grad for parameter in group if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True).float()
        self._norm = norm if self._norm is None else torch.hypot(self._norm, norm)
        del gradients
        with narrowed(self._optimizer, group):
            step_if_finite(self._optimizer, self._norm)
        for parameter in group:
            parameter.grad = None


def group_parameters(model: nn.Module, layers: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """The trainable parameters that are updated together: each layer's, and each other module's own ones."""
    seen: set[nn.Parameter] = set()
    groups = []
    own = (list(module.parameters(recurse=False)) for module in model.modules())
    for parameters in (*(list(layer.parameters()) for layer in layers), *own):
        group = [one for one in dict.fromkeys(parameters) if one.requires_grad and one not in seen]
        seen.update(group)
        groups += [group] if group else []
    return groups


@contextlib.contextmanager
def narrowed(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the optimizer knows of no parameters but these."""
    groups, kept = optimizer.param_groups, set(parameters)
    narrow = [{**group, "params": [one for one in group["params"] if one in kept]} for group in groups]
    optimizer.param_groups = [group for group in narrow if group["params"]]
    try:
        yield
    finally:
        optimizer.param_groups = groups
