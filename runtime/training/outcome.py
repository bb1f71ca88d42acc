"""Parts of a run's report, from what the run did."""

from __future__ import annotations

from ..data.rows import Row
from ..machine.samples import MonitorSummary
from ..report import Loss, Sample, Speed
from ..resume.content import History
from .loop import Progress


def make_loss(progress: Progress, history: History, after: float | None) -> Loss:
    """Losses of training and of the held-out rows."""
    return Loss(before=history.before, after=after, first=progress.first_loss, last=progress.last_loss)


def make_speed(progress: Progress, total_seconds: float, summary: MonitorSummary) -> Speed:
    """Speed over all sessions, the first step of each left out; energy of the last one."""
    count, tokens, seconds = progress.steady
    return Speed(
        steps=progress.step,
        tokens=progress.tokens,
        train_seconds=progress.train_seconds,
        first_step_seconds=progress.first_seconds,
        total_seconds=total_seconds,
        tokens_per_second=tokens / seconds if seconds else None,
        step_seconds=seconds / count if count else None,
        energy_joules=summary.energy_joules,
        joules_per_1000_tokens=progress.count_joules(summary),
    )


def make_sample(question: Row | None, before: str | None, after: str | None) -> Sample | None:
    """One held-out question with both answers, None where one is missing."""
    if question is None or question.messages is None or before is None or after is None:
        return None
    asked = next((one.content for one in reversed(question.messages) if one.role == "user"), "")
    return Sample(question=asked, before=before, after=after)
