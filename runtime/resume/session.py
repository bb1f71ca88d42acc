"""The start of a run, or of its next session: what is in the directory, whether it is the same run, and from which
step it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...planner.plan import Plan
from ...recipes.errors import RunError
from ..redaction import redact
from ..rundir import (
    METRICS_NAME,
    PLAN_NAME,
    REPORT_NAME,
    SAMPLES_NAME,
    RunDirectory,
    name_disk_errors,
    write_whole,
)
from .checkpoints import Checkpoint, CheckpointStore
from .content import RunState, load_state
from .run_record import RECORD_NAME, Failure, RunRecord, Session, list_changes, load_record, make_record

if TYPE_CHECKING:
    from ..planning import Job


@dataclass(frozen=True, kw_only=True)
class Start:
    """From where a session goes on.

    record:     the run's, with this session in it
    checkpoint: to go on from, None for the first step
    state:      in it
    """

    record: RunRecord
    checkpoint: Checkpoint | None = None
    state: RunState | None = None

    @property
    def resumed(self) -> tuple[Session, ...]:
        """The sessions after the first one."""
        return self.record.sessions[1:]


def open_session(
    job: Job, plan: Plan, directory: RunDirectory, *, now: float, replanned: bool, say: Callable[[str], None]
) -> Start:
    """Take a run up: RunError where the directory's run is another one, with the differences."""
    then, record = load_record(directory.path), make_record(job)
    found = None
    if then is not None:
        check_same(then, record, directory.path, replan=replanned)
        found = CheckpointStore(directory).find_last_good(load_state, say)
        if found is None:
            say("there is no checkpoint to go on from: the run starts again")
        record = record.model_copy(update={"sessions": then.sessions})
    elif directory.resume:
        raise RunError(f"{directory.path}: no {RECORD_NAME} in it: there is nothing to resume")
    step = 0 if found is None else found[0].step
    (directory.path / REPORT_NAME).unlink(missing_ok=True)
    with name_disk_errors(directory.path):
        last_step = trim_metrics(directory.path / METRICS_NAME, None if found is None else step)
        cut_torn_line(directory.path / SAMPLES_NAME)
    session = Session(
        started_unix_time=now,
        from_step=step,
        lost_steps=max(last_step - step, 0),
        replanned=replanned and then is not None,
    )
    record = record.model_copy(update={"sessions": (*record.sessions, session)})
    directory.write_json(RECORD_NAME, record.model_dump(mode="json"))
    directory.write_json(PLAN_NAME, plan.model_dump(mode="json"))
    directory.write_text("recipe.toml", redact(job.recipe_file.path.read_text(encoding="utf-8-sig")))
    if found is None:
        return Start(record=record)
    return Start(record=record, checkpoint=found[0], state=found[1])


def check_same(then: RunRecord, now: RunRecord, path: Path, *, replan: bool) -> None:
    """RunError with every difference where a directory's run is not the one that is to go on."""
    changes = list_changes(then, now, replan=replan)
    if changes:
        raise RunError(
            f"output.dir: {path} holds an unfinished run of another recipe, dataset or template:\n"
            + "\n".join(f"  {change}" for change in changes)
            + "\ngo on with those of the run, or name another output.dir"
        )


def record_failure(directory: RunDirectory, record: RunRecord, failure: Failure) -> None:
    """Take down why this session ended."""
    directory.write_json(RECORD_NAME, record.model_copy(update={"failure": failure}).model_dump(mode="json"))


def trim_metrics(path: Path, last_step: int | None) -> int:
    """Cut the lines after a checkpoint, which are written again; returns the last step that was there.

    last_step: of the lines that stay, None for no line
    """
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    steps = [_find_step(line) for line in lines]
    kept = [
        line
        for line, step in zip(lines, steps, strict=True)
        if step is not None and last_step is not None and step <= last_step
    ]
    if kept != lines:
        write_whole(path, "".join(kept))
    return max((step for step in steps if step is not None), default=0)


def cut_torn_line(path: Path) -> None:
    """Cut a last line that was not finished."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        end = file.seek(0, 2)
        start = max(end - 2**16, 0)
        file.seek(start)
        newline = file.read().rfind(b"\n")
        if newline >= 0 and start + newline + 1 < end:
            file.truncate(start + newline + 1)


def _find_step(line: str) -> int | None:
    try:
        found: Any = json.loads(line)
    except ValueError:
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else None
