"""Parts of a run's report, from what the run did."""

from __future__ import annotations

from .checkpoint_content import History
from .loop import Progress
from .report import Loss, Sample, Speed
from .rows import Row


def make_loss(progress: Progress, history: History, after: float | None) -> Loss:
    """Losses of training and of the held-out rows."""
    return Loss(before=history.before, after=after, first=progress.first_loss, last=progress.last_loss)


def make_speed(progress: Progress, total_seconds: float, energy_joules: float | None) -> Speed:
    """Speed over all sessions; energy of the last one."""
    return Speed(
        steps=progress.step,
        tokens=progress.tokens,
        train_seconds=progress.train_seconds,
        total_seconds=total_seconds,
        tokens_per_second=progress.tokens / progress.train_seconds if progress.train_seconds else None,
        energy_joules=energy_joules,
    )


def make_sample(question: Row | None, before: str | None, after: str | None) -> Sample | None:
    """One held-out question with both answers, None where one is missing."""
    if question is None or question.messages is None or before is None or after is None:
        return None
    asked = next((one.content for one in reversed(question.messages) if one.role == "user"), "")
    return Sample(question=asked, before=before, after=after)
