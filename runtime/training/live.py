"""What a person sees while a run goes on: one live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ...planner.speed import Speed
from ...recipes.units import GiB, format_seconds

LINES_WITHOUT_TERMINAL = 10
"""Lines of a run where there is no terminal to redraw."""


class LiveLine:
    """Step, loss, speed beside the plan's, memory now / predicted / budget, time left; a context manager.

    predicted: the plan's speed, None where it has none
    """

    def __init__(
        self,
        console: Console,
        *,
        steps: int,
        predicted_bytes: int,
        budget_bytes: int,
        predicted: Speed | None = None,
    ) -> None:
        self._console, self._steps, self._predicted = console, steps, predicted
        self._predicted_bytes, self._budget_bytes = predicted_bytes, budget_bytes
        self._live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def update(
        self,
        step: int,
        *,
        loss: float,
        tokens_per_second: float,
        memory_bytes: int,
        seconds_left: float,
        joules_per_1000_tokens: float | None = None,
    ) -> None:
        """Show one finished step; on a narrow terminal with less beside what was measured, on one line."""
        full, beside, alone = self._describe_speed(tokens_per_second)
        whole, short, now = self._describe_memory(memory_bytes)
        with_energy = full + self._describe_energy(joules_per_1000_tokens)
        shown = ((with_energy, whole), (with_energy, short), (full, short), (beside, short), (alone, now))
        lines = [
            Text.assemble(
                (f"step {step:>{len(str(self._steps))}}/{self._steps}", "bold"),
                f"  loss {loss:6.3f}  {speed}  {memory}  {format_seconds(seconds_left)} left",
            )
            for speed, memory in shown
        ]
        if self._live is not None:
            fitting = (one for one in lines if one.cell_len <= self._console.width)
            self._live.update(next(fitting, lines[-1]), refresh=True)
        elif step == self._steps or step == 1 or step % max(1, self._steps // LINES_WITHOUT_TERMINAL) == 0:
            self._console.print(lines[0], soft_wrap=True)

    def _describe_speed(self, tokens_per_second: float) -> tuple[str, str, str]:
        """Such as `7,415 tokens/s of 7,832 planned, MFU 38% of 40%`; and shorter ones."""
        planned, alone = self._predicted, f"{tokens_per_second:,.0f} tokens/s"
        if planned is None:
            return alone, alone, alone
        reached = planned.model_flops_utilization * tokens_per_second / planned.tokens_per_second
        beside = f"{alone} of {planned.tokens_per_second:,.0f}"
        return f"{beside} planned, MFU {reached:.0%} of {planned.model_flops_utilization:.0%}", beside, alone

    def _describe_energy(self, joules: float | None) -> str:
        """Such as `, 59 J of 61 per 1,000 tokens`; nothing without a GPU that tells its power."""
        planned = None if self._predicted is None else self._predicted.joules_per_1000_tokens
        if joules is None:
            return ""
        return f", {joules:.3g} J" + ("" if planned is None else f" of {planned:.3g}") + " per 1,000 tokens"

    def _describe_memory(self, now_bytes: int) -> tuple[str, str, str]:
        """Such as `memory 1.2 now, 1.3 predicted, 1.5 GiB budget`; and shorter ones."""
        now, predicted, budget = (size / GiB for size in (now_bytes, self._predicted_bytes, self._budget_bytes))
        whole = f"memory {now:.1f} now, {predicted:.1f} predicted, {budget:.1f} GiB budget"
        return whole, f"memory {now:.1f} of {budget:.1f} GiB", f"memory {now:.1f} GiB"
