"""Rows to train on, in one of four formats, with file and line in every error.

| format | columns | trained on |
|---|---|---|
| instruction | `instruction`, `context` or `input` (may be empty), `output` | the output |
| messages | `messages`: `{role, content}` each, the last from the assistant | every answer of the assistant |
| completion | `prompt`, `completion`: raw text, without a chat template | the completion |
| text | `text` | everything |

Other columns are not read. An instruction with its context, an empty line between them, is one message of the user.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..recipes.errors import DataError
from .records import Record, find_source, load_records

if TYPE_CHECKING:
    from ..recipes.schema import DataTable

ROLES = ("system", "user", "assistant")
TRAIN_SPLITS = ("train",)
EVAL_SPLITS = ("validation", "valid", "dev", "eval", "test")
SHOWN_BAD_ROWS = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation.

    role:     system, user or assistant
    content:  its text
    """

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a dataset in exactly one of three forms: a conversation, a prompt with its completion, or text.

    where:       file and line, such as `train.jsonl:17`
    messages:    the conversation, the assistant's turn last; of the formats instruction and messages
    prompt:      raw text that is given, not trained on; of the format completion
    completion:  raw text that follows the prompt
    text:        raw text, all of it trained on
    """

    where: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        assert [self.messages, self.completion, self.text].count(None) == 2, "a row has exactly one form"
        assert (self.prompt is None) == (self.completion is None), "prompt and completion come together"


def load_rows(table: DataTable, resolve: Callable[[str], Path], *, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """The rows of `[data]` to train on and to evaluate with (none where `data.eval` is unset).

    Each source of a mixture is seen `weight` times in an epoch: the whole part as copies, the rest as a seeded sample.
    A fraction in `data.eval` is held out of each source before its rows are repeated, so that none is in both.
    """
    if isinstance(table.train, str):
        sources = [(table.train, 1.0, table.format)]
    else:
        sources = [(one.path, one.weight, table.format if one.format == "auto" else one.format) for one in table.train]
    train, held_out = list[Row](), list[Row]()
    for written, weight, row_format in sources:
        rows = _load_written(written, resolve, row_format, TRAIN_SPLITS)
        if isinstance(table.eval, float):
            rows, part = split_rows(rows, table.eval, seed=seed)
            held_out += part
        train += repeat_rows(rows, weight, seed=seed)
    if isinstance(table.eval, str):
        held_out = _load_written(table.eval, resolve, table.format, EVAL_SPLITS)
    if table.system is not None:
        train, held_out = add_system(train, table.system), add_system(held_out, table.system)
    return train, held_out


def load_rows_from(
    source: Path | str, row_format: str = "auto", *, name: str | None = None, splits: Sequence[str] = TRAIN_SPLITS
) -> list[Row]:
    """The rows of a local file or folder (a Path) or of a dataset on the hub (its id, a str).

    Raises DataError that lists the first bad rows with file and line, or says that there are no rows.
    """
    name = name or (source if isinstance(source, str) else source.name)
    rows = parse_rows(load_records(source, name=name, splits=splits), row_format)
    if not rows:
        raise DataError(f"{name}: no rows")
    return rows


def parse_rows(records: Iterable[Record], row_format: str = "auto") -> list[Row]:
    """Rows out of records; `auto` takes the format that the first readable record's columns tell."""
    rows, problems, bad = list[Row](), list[str](), 0
    detected = ""
    for record in records:
        try:
            columns = _parse_columns(record)
            if row_format == "auto":
                row_format = _detect_format(columns)
                detected = ", taken from the first row's columns"
                log.info("%s: format %s%s", record.where, row_format, detected)
            rows.append(PARSERS[row_format](columns, record.where))
        except _BadRow as problem:
            bad += 1
            if bad <= SHOWN_BAD_ROWS:
                problems.append(f"{record.where}: {problem}")
    if bad > SHOWN_BAD_ROWS:
        problems.append(f"and {bad - SHOWN_BAD_ROWS} more bad rows")
    if detected:
        problems[:1] = [f"{problem} (format {row_format}{detected})" for problem in problems[:1]]
    if problems:
        raise DataError("\n".join(problems))
    return rows


def _detect_format(columns: Mapping[str, object]) -> str:
    """The format that these columns belong to; a bad row where they belong to none."""
    for row_format, needed in (
        ("messages", {"messages"}),
        ("instruction", {"instruction"}),
        ("completion", {"prompt", "completion"}),
        ("text", {"text"}),
    ):
        if needed <= columns.keys():
            return row_format
    raise _BadRow(
        f"the columns {', '.join(columns) or 'are none and'} belong to no format: instruction (instruction, context or "
        "input, output), messages (messages), completion (prompt, completion), text (text)"
    )


def split_rows(rows: Sequence[Row], fraction: float, *, seed: int) -> tuple[list[Row], list[Row]]:
    """(the rest, `fraction` of the rows), both in order: a seeded choice of at least one row and never all of them."""
    if len(rows) < 2:
        raise DataError(f"{rows[0].where}: is the only row, so none can be held out (data.eval = {fraction})")
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    chosen = set(random.Random(f"held out {seed}").sample(range(len(rows)), count))
    rest = [row for index, row in enumerate(rows) if index not in chosen]
    return rest, [rows[index] for index in sorted(chosen)]


def repeat_rows(rows: Sequence[Row], weight: float, *, seed: int) -> list[Row]:
    """`weight` times the rows, at least one: whole copies, and a seeded sample for the fraction."""
    count = max(1, round(weight * len(rows)))
    copies, rest = divmod(count, len(rows))
    sample = sorted(random.Random(f"mixture {seed}").sample(range(len(rows)), rest))
    return [*rows] * copies + [rows[index] for index in sample]


def add_system(rows: Sequence[Row], system: str) -> list[Row]:
    """Rows with a system prompt where they have none: a first message, or text before a completion's prompt.

    Text rows have no place for it; a dataset of nothing else is refused.
    """
    if rows and all(row.text is not None for row in rows):
        raise DataError(f"{rows[0].where}: format text has no place for a system prompt (data.system)")
    return [_with_system(row, system) for row in rows]


def _with_system(row: Row, system: str) -> Row:
    if row.messages is not None and row.messages[0].role != "system":
        return replace(row, messages=(Message(role="system", content=system), *row.messages))
    if row.prompt is not None:
        return replace(row, prompt=f"{system}\n\n{row.prompt}")
    return row


def _load_written(written: str, resolve: Callable[[str], Path], row_format: str, splits: Sequence[str]) -> list[Row]:
    return load_rows_from(find_source(written, resolve(written)), row_format, name=written, splits=splits)


class _BadRow(Exception):
    """What is wrong with one row, without its place."""


def _parse_columns(record: Record) -> Mapping[str, object]:
    if record.problem is not None:
        raise _BadRow(record.problem)
    if not isinstance(record.value, Mapping):
        raise _BadRow(f'must be an object such as {{"instruction": ..., "output": ...}}, is {_name_type(record.value)}')
    return record.value


def _parse_text(columns: Mapping[str, object], key: str, *, optional: bool = False, blank: bool = False) -> str:
    """The text of a column; `optional` takes a missing or null one as empty, `blank` allows nothing but white space."""
    value = columns.get(key)
    if value is None and optional:
        return ""
    if key not in columns:
        raise _BadRow(f'no "{key}", only {", ".join(columns) or "nothing"}')
    if not isinstance(value, str):
        raise _BadRow(f'"{key}" must be text, is {_name_type(value)}')
    if not value.strip() and not (blank or optional):
        raise _BadRow(f'"{key}" is empty')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRow(f'"{key}" is not valid Unicode: half a surrogate pair at character {error.start + 1}') from error
    return value


def _parse_instruction(columns: Mapping[str, object], where: str) -> Row:
    instruction, output = _parse_text(columns, "instruction"), _parse_text(columns, "output")
    given = [text for key in ("context", "input") if (text := _parse_text(columns, key, optional=True)).strip()]
    if len(given) == 2:
        raise _BadRow('has both "context" and "input": one of them must be empty')
    user = Message(role="user", content="\n\n".join([instruction, *given]))
    return Row(where=where, messages=(user, Message(role="assistant", content=output)))


def _parse_messages(columns: Mapping[str, object], where: str) -> Row:
    listed = columns.get("messages")
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise _BadRow(f'"messages" must be a list of {{"role", "content"}}, is {_name_type(listed)}')
    messages = tuple(_parse_message(value, number) for number, value in enumerate(listed, start=1))
    if not messages:
        raise _BadRow('"messages" is empty')
    if messages[0].role == "assistant":
        raise _BadRow('the first message is from "assistant", must be from "user" or "system"')
    if messages[-1].role != "assistant":
        raise _BadRow(f'the last message is from "{messages[-1].role}", must be from "assistant"')
    if any(message.role == "system" for message in messages[1:]):
        raise _BadRow('only the first message may be from "system"')
    return Row(where=where, messages=messages)


def _parse_message(value: object, number: int) -> Message:
    try:
        if not isinstance(value, Mapping):
            raise _BadRow(f'must be {{"role": ..., "content": ...}}, is {_name_type(value)}')
        if value.get("tool_calls"):
            raise _BadRow('"tool_calls" are not supported')
        role = _parse_text(value, "role")
        if role not in ROLES:
            raise _BadRow(f'role "{role}" is not one of {", ".join(ROLES)}')
        return Message(role=role, content=_parse_text(value, "content", blank=role != "assistant"))
    except _BadRow as problem:
        raise _BadRow(f"message {number}: {problem}") from problem


def _parse_completion(columns: Mapping[str, object], where: str) -> Row:
    prompt, completion = _parse_text(columns, "prompt", blank=True), _parse_text(columns, "completion")
    return Row(where=where, prompt=prompt, completion=completion)


PARSERS: Mapping[str, Callable[[Mapping[str, object], str], Row]] = {
    "instruction": _parse_instruction,
    "messages": _parse_messages,
    "completion": _parse_completion,
    "text": lambda columns, where: Row(where=where, text=_parse_text(columns, "text")),
}


def _name_type(value: object) -> str:
    """A JSON value's type in words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
