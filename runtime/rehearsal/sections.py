"""Marks in a recording: where each layer begins, in forward and in backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from .model import RehearsalModel


class SectionWatch(Protocol):
    """Is told where sections begin.

    backward: whether backward is under way, which computes checkpointed layers again
    """

    backward: bool

    def enter(self, section: str, component: str) -> None:
        """A section begins, whose storages are of a component."""


@contextlib.contextmanager
def marked_sections(model: RehearsalModel, watch: SectionWatch, forward: str = "forward") -> Iterator[None]:
    """Tell the watch where each layer begins, in forward by hooks on the modules, in backward on their gradients.

    forward: the name of the forward's sections
    """
    kept = "activations" if forward == "forward" else "temporary"
    last = len(model.layers) - 1
    head = model.base.get_output_embeddings()

    def hidden_of(values: Any) -> Tensor | None:
        first = values[0] if isinstance(values, tuple) and values else values
        return first if isinstance(first, Tensor) else None

    def on_gradient(hidden: Tensor | None, section: str) -> None:
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _: watch.enter(section, "temporary"))

    def begin(layer: int, args: Any, kwargs: Any) -> None:
        if watch.backward:
            return
        watch.enter(f"{forward} {layer}", kept)
        if layer:
            on_gradient(hidden_of(args or kwargs.get("hidden_states")), f"backward {layer - 1}")
        else:
            on_gradient(hidden_of(args or kwargs.get("hidden_states")), "backward")

    def end(layer: int, output: Any) -> None:
        if not watch.backward and layer == last:
            on_gradient(hidden_of(output), f"backward {last}")
            watch.enter(forward, kept)

    def begin_head() -> None:
        if not watch.backward:
            watch.enter(forward, "loss_head")

    handles = [head.register_forward_pre_hook(lambda *_: begin_head())]
    for index, layer in enumerate(model.layers):
        handles.append(
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: begin(index, args, kwargs), with_kwargs=True
            )
        )
        handles.append(layer.register_forward_hook(lambda _, __, output, index=index: end(index, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
