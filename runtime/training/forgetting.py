"""What training made a model forget: the loss of rows of another task, before and after."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.text import Text

from ...planner.strategy import Value

if TYPE_CHECKING:
    from ..data.prepare import TokenizedData


class Forgetting(Value):
    """What training made the model forget: rows of another task (data.forgetting), before and after.

    rows, trained_tokens: how many
    loss_before, loss_after: mean cross-entropy a token
    allowed:              data.max_forgotten: share by which the perplexity may rise
    """

    rows: int
    trained_tokens: int
    loss_before: float
    loss_after: float
    allowed: float

    @property
    def perplexity_before(self) -> float:
        """exp(loss_before)."""
        return _exp(self.loss_before)

    @property
    def perplexity_after(self) -> float:
        """exp(loss_after)."""
        return _exp(self.loss_after)

    @property
    def rise(self) -> float:
        """perplexity_after / perplexity_before - 1 = exp(loss_after - loss_before) - 1."""
        return _exp(self.loss_after - self.loss_before) - 1

    @property
    def warning(self) -> str | None:
        """What to do where the perplexity rose by more than is allowed, None where it did not."""
        if self.rise <= self.allowed:
            return None
        return (
            f"the perplexity of another task rose by {self.rise:.1%}, more than data.max_forgotten = {self.allowed:g}: "
            "the model forgets it (catastrophic forgetting). Mix rows of that task into data.train, other ones than "
            "these (multi-task training); a lower train.learning_rate, fewer steps or LoRA forget less"
        )


def make_forgetting(
    data: TokenizedData, before: float | None, after: float | None, *, allowed: float
) -> Forgetting | None:
    """The rows of another task before and after; None without any, or where one is missing."""
    if data.forgetting is None or before is None or after is None:
        return None
    return Forgetting(
        rows=len(data.forgetting),
        trained_tokens=data.forgetting.trained_tokens,
        loss_before=before,
        loss_after=after,
        allowed=allowed,
    )


def render_forgetting(found: Forgetting) -> Text:
    """The loss and perplexity of another task, before and after."""
    text = f"perplexity {found.perplexity_before:.2f} -> {found.perplexity_after:.2f} ({100 * found.rise:+.1f} %)"
    style = "bold red" if found.warning is not None else "bold green"
    return Text.assemble(f"another task   {found.loss_before:.3f} -> {found.loss_after:.3f}, ", (text, style))


def _exp(loss: float) -> float:
    """exp(loss), of a loss up to 700: beyond any model's, and a float ends at 709."""
    return math.exp(min(loss, 700.0))
