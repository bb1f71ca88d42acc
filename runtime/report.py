"""RunReport: what a run measured; with its plan, predicted against measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from ..planner.memory import STEP_PHASES
from ..planner.plan import Plan
from ..planner.strategy import Value
from ..recipes.errors import RunError
from ..recipes.problems import find_nearest
from .data.report import DataReport
from .rundir import PLAN_NAME, REPORT_NAME
from .training.forgetting import Forgetting

Status = Literal["finished", "interrupted", "terminated", "out_of_time"]


class MeasuredPhase(Value):
    """A phase as it was measured.

    name:              load, forward, backward, clip, optimizer, evaluate, save or merge
    seconds:           time spent in it
    peak_allocated_bytes: highest sum of live tensors on the GPU, None on a CPU
    peak_device_bytes: highest of the device, sampled; on a CPU the process's resident peak
    """

    name: str
    seconds: float
    peak_allocated_bytes: int | None = None
    peak_device_bytes: int | None = None


class PhasePeaks(Value):
    """A phase's peak, predicted beside measured: live tensors on a GPU, the process's resident memory on a CPU.

    name:            load, forward, backward, clip, optimizer, evaluate, save or merge
    predicted_bytes: by the plan
    measured_bytes:  by the run, None where nothing was
    """

    name: str
    predicted_bytes: int
    measured_bytes: int | None


class PartSeconds(Value):
    """The time of a part of the run, predicted beside measured.

    name:              load, evaluate, train, save or merge
    predicted_seconds: by the plan
    measured_seconds:  by the run's last session, None where nothing was
    """

    name: str
    predicted_seconds: float
    measured_seconds: float | None


class MeasuredMemory(Value):
    """What a run really took, bytes.

    peak_allocated_bytes, peak_reserved_bytes: PyTorch's allocator, None on a CPU
    peak_device_bytes: NVML; on a CPU the process's resident peak
    peak_host_bytes:   the process's resident peak
    disk_bytes:        files of the run
    """

    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_device_bytes: int | None
    peak_host_bytes: int
    disk_bytes: int
    phases: tuple[MeasuredPhase, ...]


class Loss(Value):
    """Mean cross-entropy a token.

    before, after:  on the held-out rows, None without any
    first, last:    of the first and the last training step
    """

    before: float | None
    after: float | None
    first: float | None
    last: float | None


class Sample(Value):
    """One held-out question, answered before and after."""

    question: str
    before: str
    after: str


class Speed(Value):
    """How fast it went.

    steps:             optimizer steps done
    tokens:            tokens computed, padding excepted
    train_seconds:     in training steps
    first_step_seconds: of them in the first step of each session, which compiles, loads kernels and fills caches
    total_seconds:     from loading the model to the last file
    tokens_per_second: of the other steps, padding excepted; of all where there are no others, None without any
    step_seconds:      mean time of one of them, None without one
    energy_joules:     of the GPU, None without one
    joules_per_1000_tokens: of the GPU in training steps, None without one
    """

    steps: int
    tokens: int
    train_seconds: float
    first_step_seconds: float = 0.0
    total_seconds: float
    tokens_per_second: float | None
    step_seconds: float | None = None
    energy_joules: float | None = None
    joules_per_1000_tokens: float | None = None


class RunReport(Value):
    """What happened: the document that a run writes last.

    status:    finished; interrupted by Ctrl-C, terminated by SIGTERM; out_of_time by budget.max_hours
    measured:  memory as measured, in the last session; the prediction is in plan.json beside it
    events:    of the monitor: what left the plan
    output:    folders with what was trained, by name
    skipped_steps: steps without an update, since loss or gradients were not finite
    resumed_from:  the steps after which the run was taken up again, one for each time
    lost_steps:    steps that were done again since they came after the last checkpoint
    best_step:     after it the held-out loss was the best, None where it was measured at the end only
    checkpoints:   that lay beside the result when it was written
    forgetting: rows of another task, before and after; None without any, or where a signal ended the run
    data:      the data check that the run began with; None in a report of an earlier version
    """

    format_version: Literal[1] = 1
    recipe: str
    recipe_sha256: str
    status: Status
    started_unix_time: float
    loss: Loss
    sample: Sample | None
    measured: MeasuredMemory
    speed: Speed
    events: tuple[dict[str, Any], ...] = ()
    output: dict[str, str]
    versions: dict[str, str]
    skipped_steps: int = Field(default=0, ge=0)
    resumed_from: tuple[int, ...] = ()
    lost_steps: int = Field(default=0, ge=0)
    best_step: int | None = None
    checkpoints: int = Field(default=0, ge=0)
    forgetting: Forgetting | None = None
    data: DataReport | None = None


def load_report(run: Path) -> tuple[Plan, RunReport]:
    """The plan and the report of a run directory; RunError where there is none or it cannot be read."""
    if not run.is_dir():
        raise RunError(f"{run}: {'a file, not a run directory' if run.exists() else _make_no_such_run(run)}")
    if not (run / REPORT_NAME).is_file():
        raise RunError(f"{run}: no {REPORT_NAME} in it: the run has not finished, or this is not a run directory")
    return _load_document(Plan, run / PLAN_NAME, "a plan"), _load_document(RunReport, run / REPORT_NAME, "a report")


def _make_no_such_run(run: Path) -> str:
    """There is none of that name; the nearest one beside it, or the last one in the folder runs, is offered."""
    beside, here = ([one.parent for one in sorted(at.glob(f"*/{REPORT_NAME}"))] for at in (run.parent, Path("runs")))
    last = max(here, key=lambda one: (one / REPORT_NAME).stat().st_mtime, default=None)
    meant = find_nearest(str(run), map(str, (*beside, *here))) or last
    return "there is no such run directory" + (f" (did you mean {meant}?)" if meant else "")


Document = TypeVar("Document", bound=Value)


def _load_document(kind: type[Document], path: Path, what: str) -> Document:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise RunError(f"{path}: not {what} of this version of fitune: {where}{first['msg']}") from error


def make_report_json(plan: Plan, report: RunReport) -> str:
    """One JSON object: the report, with what was predicted: memory, in all and by phase, and speed."""
    document = report.model_dump(mode="json")
    if report.forgetting is not None:
        figures = ("perplexity_before", "perplexity_after", "rise", "warning")
        document["forgetting"] |= {name: getattr(report.forgetting, name) for name in figures}
    document["predicted"] = plan.memory.model_dump(mode="json")
    document["predicted_speed"] = None if plan.speed is None else plan.speed.model_dump(mode="json")
    document["parts"] = [one.model_dump(mode="json") for one in list_part_seconds(plan, report)]
    document["phases"] = [one.model_dump(mode="json") for one in list_phase_peaks(plan, report)]
    return json.dumps(document, allow_nan=False)


def is_whole(plan: Plan, report: RunReport) -> bool:
    """Whether the last session did all of the plan, from the first step to the last."""
    return report.status == "finished" and not report.resumed_from and report.speed.steps == plan.data.steps


def list_part_seconds(plan: Plan, report: RunReport) -> list[PartSeconds]:
    """Each part of the run that the plan knows, predicted and measured; compiling is a part of the first step.

    Of a run that was not done in one go only loading is what was planned.
    """
    planned: dict[str, float] = {}
    for part in plan.speed.parts if plan.speed is not None else ():
        if part.name != "load" and not is_whole(plan, report):
            continue
        name = "train" if part.name == "compile" else part.name
        planned[name] = planned.get(name, 0.0) + part.seconds
    measured = {phase.name: phase.seconds for phase in report.measured.phases}
    measured["train"] = sum(measured.pop(name, 0.0) for name in STEP_PHASES)
    return [
        PartSeconds(name=name, predicted_seconds=seconds, measured_seconds=measured.get(name))
        for name, seconds in planned.items()
    ]


def list_phase_peaks(plan: Plan, report: RunReport) -> list[PhasePeaks]:
    """Each phase of the run that the plan knows, predicted and measured."""
    is_cpu = plan.device.kind == "cpu"
    process_bytes = plan.memory.peak_device_bytes - plan.memory.peak_allocated_bytes if is_cpu else 0
    predicted = {
        phase.name: phase.host_bytes if is_cpu and phase.host_bytes else phase.peak_allocated_bytes + process_bytes
        for phase in plan.memory.phases
    }
    return [
        PhasePeaks(
            name=phase.name,
            predicted_bytes=predicted[phase.name],
            measured_bytes=phase.peak_device_bytes if is_cpu else phase.peak_allocated_bytes,
        )
        for phase in report.measured.phases
        if phase.name in predicted
    ]


def predict_file_bytes(plan: Plan, report: RunReport) -> int | None:
    """The files beside the result, with as many checkpoints as there were; None for a run that wrote no result."""
    memory = plan.memory
    saved = sum(phase.disk_bytes or 0 for phase in memory.phases if phase.name == "save" or "merged" in report.output)
    if not saved:
        return None
    return saved + memory.log_bytes - (memory.checkpoints - report.checkpoints) * memory.checkpoint_bytes
