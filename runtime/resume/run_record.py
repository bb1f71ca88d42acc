"""run.json: what a run is made of, and its sessions. It goes on only with the same recipe, model, data and template."""

from __future__ import annotations

import difflib
import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from ...planner.strategy import Value
from ...recipes.errors import RunError
from ..rundir import REPORT_NAME

if TYPE_CHECKING:
    from ..data.tokens import TokenizedRows
    from ..planning import Job

RECORD_NAME = "run.json"
BLOCKS = 256
"""Digests of a dataset, each of as many rows: enough to say about where two differ."""
ENDS = ("finished",)
MAY_CHANGE = {"budget.max_hours", "budget.price_per_hour"}
"""Keys of the recipe that a run that is resumed may have another value of."""
REPLAN_MAY_CHANGE = {
    *MAY_CHANGE,
    *(f"budget.{key}" for key in ("gpu", "memory", "gpus", "host_memory", "disk")),
    *(
        f"train.{key}"
        for key in ("micro_batch_size", "gradient_checkpointing", "save_attention", "loss_head", "compile")
    ),
    "method.fused_adapters",
    *(f"train.{key}" for key in ("kernels", "activation_offload", "expandable_segments", "optimizer_in_backward")),
}
"""Keys that `--replan` may find changed as well: none of them changes what is computed, rounding excepted."""


class Rows(Value):
    """Tokenised rows, told apart by digests.

    rows, tokens, trained_tokens: how many
    blocks: SHA-256 of each of up to 256 equal blocks of rows, the first 16 hexadecimal digits
    """

    rows: int
    tokens: int
    trained_tokens: int
    blocks: tuple[str, ...]


class Session(Value):
    """One time that the run was started.

    started_unix_time: when
    from_step:         optimizer steps that were done before
    lost_steps:        steps that had been done after the checkpoint and are done again
    replanned:         whether a new plan was made for it
    """

    started_unix_time: float
    from_step: int = Field(ge=0)
    lost_steps: int = Field(default=0, ge=0)
    replanned: bool = False


class Failure(Value):
    """Why the last session ended, where it was out of memory.

    phase:        in which it did
    budget_bytes: what a new plan may need at most
    """

    phase: str
    budget_bytes: int = Field(gt=0)


class RunRecord(Value):
    """What a run is made of.

    recipe:        the recipe with its defaults
    config_sha256: digest of the model's config
    train, eval, forgetting: the rows; None without held-out rows, or rows of another task
    template:      the chat template, None without one
    sessions:      in order
    failure:       of the last session, None where there was none that is known
    """

    format_version: Literal[1] = 1
    recipe: dict[str, Any]
    config_sha256: str
    train: Rows
    eval: Rows | None
    forgetting: Rows | None = None
    template: str | None
    sessions: tuple[Session, ...] = ()
    failure: Failure | None = None


def make_record(job: Job) -> RunRecord:
    """The record of a run that has not started."""
    data = job.data
    return RunRecord(
        recipe=job.recipe_file.resolved,
        config_sha256=job.source.config_sha256,
        train=_digest_rows(data.train),
        eval=None if data.eval is None else _digest_rows(data.eval),
        forgetting=None if data.forgetting is None else _digest_rows(data.forgetting),
        template=_find_template(data.tokenizer),
    )


def _find_template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return template if template is None or isinstance(template, str) else json.dumps(template, sort_keys=True)


def _digest_rows(tokenized: TokenizedRows) -> Rows:
    rows = tokenized.rows
    size = max(1, -(-len(rows) // BLOCKS))
    blocks = []
    for start in range(0, len(rows), size):
        digest = hashlib.sha256()
        for row in rows[start : start + size]:
            for numbers in (row.input_ids, row.labels, row.documents or ()):
                digest.update(array("q", [len(numbers), *numbers]).tobytes())
        blocks.append(digest.hexdigest()[:16])
    return Rows(
        rows=len(rows),
        tokens=tokenized.total_tokens,
        trained_tokens=tokenized.trained_tokens,
        blocks=tuple(blocks),
    )


def list_changes(then: RunRecord, now: RunRecord, *, replan: bool) -> list[str]:
    """What of a run is not as it was, each in words with both values; empty where it can go on."""
    may_change = REPLAN_MAY_CHANGE if replan else MAY_CHANGE
    before, after = dict(_flatten(then.recipe)), dict(_flatten(now.recipe))
    changes = [
        f"{key} was {_show(before.get(key))}, now {_show(after.get(key))}"
        for key in sorted({*before, *after} - may_change)
        if before.get(key) != after.get(key)
    ]
    if then.config_sha256 != now.config_sha256:
        changes.append(f"the model's config was {then.config_sha256[:12]}, now {now.config_sha256[:12]}")
    if then.template != now.template:
        changes.append(f"the chat template changed:\n{_show_difference(then.template, now.template)}")
    changes += _compare_rows("training rows", then.train, now.train)
    changes += _compare_rows("held-out rows", then.eval, now.eval)
    changes += _compare_rows("rows of another task", then.forgetting, now.forgetting)
    return changes


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _show(value: object) -> str:
    return "unset" if value is None else json.dumps(value)


def _show_difference(then: str | None, now: str | None) -> str:
    lines = difflib.unified_diff((then or "").splitlines(), (now or "").splitlines(), "then", "now", lineterm="", n=1)
    return "\n".join(f"  {line}" for line in lines)


def _compare_rows(what: str, then: Rows | None, now: Rows | None) -> list[str]:
    if then == now:
        return []
    if then is None or now is None:
        return [f"there are {'now' if then is None else 'no more'} {what}"]
    if then.rows != now.rows:
        return [f"{what}: there were {then.rows:,} with {then.tokens:,} tokens, now {now.rows:,} with {now.tokens:,}"]
    size = max(1, -(-then.rows // BLOCKS))
    block = next((n for n, pair in enumerate(zip(then.blocks, now.blocks, strict=False)) if pair[0] != pair[1]), 0)
    first, last = block * size + 1, min((block + 1) * size, then.rows)
    where = f"row {first:,}" if first == last else f"rows {first:,} to {last:,}"
    return [f"{what}: {where} of {then.rows:,}, tokenised, changed"]


def load_record(run: Path) -> RunRecord | None:
    """The record of a run directory, None without one; RunError where it cannot be read."""
    try:
        return RunRecord.model_validate_json((run / RECORD_NAME).read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{run / RECORD_NAME}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise RunError(
            f"{run / RECORD_NAME}: damaged: {where}{first['msg']}: name another output.dir, or remove it"
        ) from error


def is_unfinished(run: Path) -> bool:
    """Whether a directory holds a run that can go on: one without a report, or whose report says that it was ended
    before its time."""
    if not (run / RECORD_NAME).is_file():
        return False
    try:
        status = json.loads((run / REPORT_NAME).read_bytes()).get("status")
    except FileNotFoundError:
        return True
    except (OSError, ValueError, AttributeError):
        return False
    return status not in ENDS
