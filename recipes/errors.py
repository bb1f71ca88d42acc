"""Every error that fitune raises on purpose; the command line turns them into messages in one place.

FituneError                   exit code 1, one clear message, never a traceback
├── RecipeError               a recipe that cannot be read or is invalid: all its problems at once
├── ModelError                a model that does not exist, cannot be reached, or cannot be trained
│   └── TraceError            a model that can be built and whose step cannot be rehearsed
├── DataError                 a dataset that is missing, empty, or has a bad row (file and line)
├── PlanError                 a plan file that is malformed or stale
├── DeviceError               hardware that was asked for and is not there
└── RunError                  a run that cannot start, or that ended early
    ├── CheckpointError       a checkpoint that is damaged, or of another run
    ├── DiskError             a file of the run that cannot be written: disk full, read-only, no permission
    └── OutOfMemoryError      the run left its plan: phase, component, and what to do
"""

from __future__ import annotations

from dataclasses import dataclass


class FituneError(Exception):
    """The root of fitune's own errors. `str(error)` is the message that a user sees."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a recipe.

    where:    file, or file and dotted key, such as `recipe.toml: method.kind`
    what:     what is wrong, with the value, such as `"qlra" is not one of auto, full, lora, qlora`
    hint:     the nearest match or the remedy, such as `did you mean "qlora"?`; None if there is none
    """

    where: str
    what: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" ({self.hint})" if self.hint else "")


class RecipeError(FituneError):
    """A recipe with problems; the message lists all of them, one a line."""

    def __init__(self, problems: list[Problem]) -> None:
        assert problems, "a RecipeError names at least one problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


class ModelError(FituneError):
    """A model that does not exist, cannot be reached offline, or whose architecture cannot be handled."""


class TraceError(ModelError):
    """A model that transformers builds and whose step cannot be rehearsed: the closed forms remain."""


class DataError(FituneError):
    """A dataset that is missing, empty or has a row that cannot be used."""


class PlanError(FituneError):
    """A plan that is malformed, or stale: the recipe, the model or the device is no longer the one it was made for."""


class DeviceError(FituneError):
    """Hardware that the recipe asks for and that is not there."""


class RunError(FituneError):
    """A run that cannot start or that ended early."""


class CheckpointError(RunError):
    """A checkpoint that is damaged, or that belongs to another run."""


class DiskError(RunError):
    """A file of the run that cannot be written."""


class OutOfMemoryError(RunError):
    """Memory ran out; the message names the phase, compares measured with planned and proposes what to change."""
