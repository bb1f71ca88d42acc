"""Step times on this machine's CPU: measured on a few layers, and kept in fitune's cache."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...planner.clock import Clock, estimate_width
from ...planner.model_shape import ModelShape
from ...planner.speed import PhaseTime, StepTime
from ...planner.step_cost import estimate_model_flops
from ...planner.strategy import DataFacts, Rates, Strategy
from ...recipes.errors import FituneError
from ..machine.cpu_rates import name_cpu
from ..model.embedded import cache_folder
from ..rundir import write_whole
from ..versions import find_versions
from .evaluation import UNTRACEABLE
from .timed_step import StepSeconds
from .timing_process import TimingProcess

MEASURED_TOKENS = 1024
"""Tokens of a measured micro-batch; a larger one takes as much longer as it has more rows. So many are a chunk of the
loss, whose logits no cache holds."""
MOST_SECONDS = 2.0
"""Of a measured micro-batch's products at the probed rate: a model for which one row takes longer is timed by closed
forms."""
LEAST_SECONDS = 2.0
"""Of training by closed forms: measuring the steps of a shorter run takes longer than it is worth."""
MOST_WAITING = 0.1
"""Share of a measurement that a thread waited for a processor: one beside more other work is not kept."""
STEPS_KEPT = 1000
"""In the cache."""


class CpuClock:
    """Times steps of one model on rows like the dataset's.

    steps: of the run, None where their number is not known
    quick: closed forms, for what cannot be measured or is over sooner
    measure: times a step: time_step_on_cpu, or as it does
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        shape: ModelShape,
        data: DataFacts,
        rates: Rates,
        *,
        steps: int | None,
        quick: Clock,
        measure: Callable[..., StepSeconds] | None = None,
    ) -> None:
        self._config, self._shape, self._data, self._rates = config, shape, data, rates
        self._steps, self._quick = steps, quick
        self._measure = TimingProcess() if measure is None else measure
        self._measured: dict[str, StepSeconds] = {}

    def __call__(self, strategy: Strategy) -> StepTime:
        """One optimizer step."""
        time = self._quick(strategy)
        if self._steps is not None and self._steps * time.seconds < LEAST_SECONDS:
            return time
        width = estimate_width(self._data, strategy)
        rows = max(1, min(strategy.micro_batch_size, MEASURED_TOKENS // width))
        if self._estimate_seconds(strategy, rows * width) > MOST_SECONDS:
            return time
        try:
            seconds = self._find(strategy, rows, width)
        except (FituneError, ImportError, MemoryError, *UNTRACEABLE):
            return time
        return self._make_time(strategy, seconds, scale=strategy.micro_batch_size / rows, width=width)

    def _estimate_seconds(self, strategy: Strategy, tokens: int) -> float:
        """6 * tokens * parameters of the head and of two layers, over the rate of products."""
        block = max(block.parameters for block in self._shape.blocks)
        rates = self._rates
        rate = (rates.full_flops or rates.half_flops) if strategy.compute_dtype == "fp32" else rates.half_flops
        return 6 * tokens * (self._shape.head.weight_parameters + 2 * block) / rate

    def _find(self, strategy: Strategy, rows: int, width: int) -> StepSeconds:
        """From the cache, else measured."""
        alike = strategy.model_copy(
            update={
                "micro_batch_size": rows,
                "gradient_accumulation_steps": min(2, strategy.gradient_accumulation_steps),
                "learning_rate": 1e-5,
                "expandable_segments": False,
            }
        )
        documents = max(1, round(width / (self._data.document_tokens or width)))
        asked = [name_cpu(), find_versions(), self._config, alike.model_dump(mode="json"), rows, width, documents]
        key = sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
        if key not in self._measured:
            kept = _load(_find_path()).get(key)
            self._measured[key] = kept or self._measure(
                self._config, alike, rows=rows, length=width, documents_per_row=documents
            )
            if kept is None and self._measured[key].waiting <= MOST_WAITING:
                _keep(key, self._measured[key])
        return self._measured[key]

    def _make_time(self, strategy: Strategy, seconds: StepSeconds, *, scale: float, width: int) -> StepTime:
        """scale: rows of a micro-batch over those of the measured one"""
        later = strategy.gradient_accumulation_steps - 1
        phases = {
            "forward": scale * (seconds.forward + later * seconds.next_forward),
            "backward": scale * (seconds.backward + later * seconds.next_backward),
            "clip": seconds.clip,
            "optimizer": seconds.optimizer,
        }
        rows, lengths = strategy.micro_batch_size * (1 + later), self._data.row_tokens or (width,)
        tokens = max(1, round(rows * sum(lengths) / len(lengths)))
        return StepTime(
            phases=tuple(
                PhaseTime(name=name, device_seconds=one, host_seconds=0.0, seconds=one)
                for name, one in phases.items()
                if one or name in ("forward", "backward")
            ),
            tokens=tokens,
            flops=estimate_model_flops(self._shape, strategy, self._data.document_tokens or width) * tokens,
            estimator="measured" if seconds.waiting <= MOST_WAITING else "measured_beside_others",
            evaluation_seconds=scale * seconds.evaluation,
            token_seconds=seconds.token,
        )


def _find_path() -> Path:
    return cache_folder() / "cpu_steps.json"


def _keep(key: str, seconds: StepSeconds) -> None:
    """Add a measured step to those in the cache."""
    path = _find_path()
    known = list({**_load(path), key: seconds}.items())[-STEPS_KEPT:]
    with contextlib.suppress(OSError):  # it is measured again then
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({name: one.model_dump() for name, one in known}, indent=1) + "\n")


def _load(path: Path) -> dict[str, StepSeconds]:
    """What was measured before; nothing where the file is missing or not ours."""
    try:
        return {name: StepSeconds.model_validate(one) for name, one in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, ValidationError):
        return {}
