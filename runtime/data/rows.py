"""Rows to train on, in one of five formats, with file and line in every error.

| format | columns | trained on |
|---|---|---|
| messages | `messages`: `{role, content}` each, the last from the assistant | every answer of the assistant |
| sharegpt | `conversations`: `{from, value}` each, the last from the assistant | every answer of the assistant |
| completion | `prompt`, `completion`: raw text, without a chat template | the completion |
| instruction | `instruction`, `context` (may be empty), `output` | the output |
| text | `text` | everything |

ALIASES are other names of the columns. An instruction with its context, an empty line between them, is one message of
the user. Columns that no format knows are not read, and counted; what would change the meaning of a row is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...recipes.errors import DataError
from .readers import Record

ALIASES: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "instruction": ("instruction", "question", "query"),
    "context": ("context", "input"),
    "output": ("output", "response", "answer"),
    "system": ("system", "system_prompt"),
    "text": ("text", "content"),
}
"""The names under which each column is found, the first its own."""
FORMATS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""The columns that tell a format, the first format that has all of its own."""
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
TOOLS = ("tools", "functions", "tool_calls", "function_call")
"""Keys of a row or message that call tools: without them a row would teach something else."""
MESSAGE_KEYS = {"role", "content", "from", "value", "weight"}
SHOWN_BAD_ROWS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation.

    role:     system, user or assistant
    content:  its text
    trained:  whether an answer is trained on: OpenAI's `weight`, 0 or 1
    """

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a dataset in exactly one of three forms: a conversation, a prompt with its completion, or text.

    where:       file and line, such as `train.jsonl:17`
    messages:    the conversation, the assistant's turn last; of the formats messages, sharegpt and instruction
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

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that is written in the row, in order; two rows with the same texts and roles are duplicates."""
        if self.messages is not None:
            return tuple(part for one in self.messages for part in (one.role, one.content))
        return tuple(part for part in (self.prompt, self.completion, self.text) if part is not None)


class BadRow(Exception):
    """What is wrong with one row, without its place."""


@dataclass(kw_only=True)
class RowParser:
    """Makes rows out of the records of one source.

    row_format: of every row; "auto" until the first readable record's columns have told it
    columns:    the names that columns have in this dataset, by their own names
    detected:   whether the format was told by the columns
    unread:     how many rows have each column or message key that is not read
    """

    row_format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    detected: bool = False
    unread: Counter[str] = field(default_factory=Counter)

    def parse(self, records: Iterable[Record]) -> Iterator[Row]:
        """Rows one by one; DataError, once the records are at their end, lists the first bad ones."""
        problems, bad = list[str](), 0
        for record in records:
            try:
                yield self.parse_one(record)
            except BadRow as problem:
                bad += 1
                if bad <= SHOWN_BAD_ROWS:
                    problems.append(f"{record.where}: {problem}")
        if bad > SHOWN_BAD_ROWS:
            more = bad - SHOWN_BAD_ROWS
            problems.append(f"and {more:,} more bad row{'' if more == 1 else 's'}")
        if problems and self.detected:
            problems[0] += f" (format {self.row_format}, taken from the first row's columns)"
        if problems:
            raise DataError("\n".join(problems))

    def parse_one(self, record: Record) -> Row:
        """The row of one record; BadRow says what is wrong with it."""
        values = self._read_columns(record)
        if self.row_format == "auto":
            self.row_format, self.detected = detect_format(values, chosen=self.columns), True
        columns = _Columns(values, self.columns)
        row = PARSERS[self.row_format](columns, record.where)
        self.unread.update(columns.list_unread())
        return row

    def _read_columns(self, record: Record) -> Mapping[str, object]:
        """The record's values by column, mapped columns under their own names."""
        if record.problem is not None:
            raise BadRow(record.problem)
        value = record.value
        if not isinstance(value, Mapping):
            raise BadRow(f'must be an object such as {{"instruction": ..., "output": ...}}, is {name_type(value)}')
        for own, theirs in self.columns.items():
            if theirs not in value:
                raise BadRow(f'no "{theirs}" (data.columns.{own}), only {", ".join(map(str, value)) or "nothing"}')
        if not self.columns:
            return value
        mapped = {own: value[theirs] for own, theirs in self.columns.items()}
        return mapped | {
            key: one for key, one in value.items() if key not in mapped and key not in self.columns.values()
        }


def parse_rows(
    records: Iterable[Record], row_format: str = "auto", columns: Mapping[str, str] | None = None
) -> list[Row]:
    """Rows out of records; `auto` takes the format that the first readable record's columns tell."""
    return list(RowParser(row_format=row_format, columns=columns or {}).parse(records))


def detect_format(columns: Mapping[str, object], *, chosen: Iterable[str] = ()) -> str:
    """The format that these columns tell, by preference one with a column of `chosen`; BadRow where there is none."""
    found = [one for one, needed in FORMATS.items() if all(_is_there(columns, key) for key in needed)]
    found = [one for one in found if set(FORMATS[one]) & set(chosen)] or found
    if not found and "instruction" in columns:
        found = ["instruction"]
    if not found:
        raise BadRow(
            f"the columns {', '.join(map(str, columns)) or 'are none and'} belong to no format: instruction "
            "(instruction, context or input, output), messages (messages), sharegpt (conversations), completion "
            "(prompt, completion), text (text); data.columns says which of your columns is which"
        )
    return found[0]


def _is_there(columns: Mapping[str, object], key: str) -> bool:
    return any(alias in columns for alias in ALIASES[key])


class _Columns:
    """The values of one record, asked for by their own names and found under their aliases."""

    def __init__(self, values: Mapping[str, object], mapped: Mapping[str, str]) -> None:
        self.values, self.mapped = values, mapped
        self.read = set[str]()
        self.unread_keys = set[str]()

    def find(self, key: str) -> tuple[str, object]:
        """(the name in the dataset, the value); of several aliases the one that is not empty, None where none is."""
        names = [key] if key in self.mapped else [alias for alias in ALIASES[key] if alias in self.values]
        self.read.update(names)
        filled = [one for one in names if not is_blank(self.values[one])]
        if len(filled) > 1:
            raise BadRow(f'has both "{filled[0]}" and "{filled[1]}": one of them must be empty')
        name = next(iter(filled or names), key)
        return self.mapped.get(name, name), self.values.get(name)

    def require(self, key: str) -> tuple[str, object]:
        """As `find`; a bad row where the column is missing under each of its names."""
        name, value = self.find(key)
        if not self.read & {key, *ALIASES[key]}:
            raise BadRow(f'no "{name}", only {", ".join(map(str, self.values)) or "nothing"}')
        return name, value

    def text(self, key: str, *, optional: bool = False, blank: bool = False) -> str:
        """A column's text; `optional` takes a missing or null one as empty, `blank` allows only white space."""
        if optional and self.find(key)[1] is None:
            return ""
        name, value = self.require(key)
        return check_text(name, value, blank=blank or optional)

    def list_unread(self) -> set[str]:
        return {str(one) for one in self.values if one not in self.read} | self.unread_keys


def check_text(name: str, value: object, *, blank: bool = False) -> str:
    """The value, where it is text that UTF-8 can write, and not empty unless it may be."""
    if not isinstance(value, str):
        raise BadRow(f'"{name}" must be text, is {name_type(value)}')
    if not blank and not value.strip():
        raise BadRow(f'"{name}" is empty')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f'"{name}" is not valid Unicode: half a surrogate pair at character {error.start + 1}') from error
    return value


def is_blank(value: object) -> bool:
    """Null, text of nothing but white space, or an empty list or object."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def _parse_instruction(columns: _Columns, where: str) -> Row:
    instruction, output = columns.text("instruction"), columns.text("output")
    context = columns.text("context", optional=True)
    user = Message(role="user", content=f"{instruction}\n\n{context}" if context.strip() else instruction)
    return Row(where=where, messages=(*_parse_system(columns), user, Message(role="assistant", content=output)))


def _parse_system(columns: _Columns) -> tuple[Message, ...]:
    system = columns.text("system", optional=True)
    return (Message(role="system", content=system),) if system.strip() else ()


def _parse_conversation(columns: _Columns, where: str, key: str) -> Row:
    _refuse_tools(columns.values)
    name, listed = columns.require(key)
    if not isinstance(listed, Sequence) or isinstance(listed, str | bytes):
        raise BadRow(f'"{name}" must be a list of {{"role", "content"}}, is {name_type(listed)}')
    messages = tuple(_parse_message(value, number, columns) for number, value in enumerate(listed, start=1))
    if not messages:
        raise BadRow(f'"{name}" is empty')
    if messages[0].role != "system":
        messages = (*_parse_system(columns), *messages)
    if messages[0].role == "assistant":
        raise BadRow('the first message is from "assistant", must be from "user" or "system"')
    if messages[-1].role != "assistant":
        raise BadRow(f'the last message is from "{messages[-1].role}", must be from "assistant"')
    if any(message.role == "system" for message in messages[1:]):
        raise BadRow('only the first message may be from "system"')
    return Row(where=where, messages=messages)


def _parse_message(value: object, number: int, columns: _Columns) -> Message:
    try:
        if not isinstance(value, Mapping):
            raise BadRow(f'must be {{"role": ..., "content": ...}}, is {name_type(value)}')
        _refuse_tools(value)
        is_sharegpt = "from" in value and "role" not in value
        role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
        for key in (role_key, content_key):
            if key not in value:
                raise BadRow(f'no "{key}", only {", ".join(map(str, value)) or "nothing"}')
        written = check_text(role_key, value[role_key])
        role = ROLES.get(written.lower())
        if role is None:
            raise BadRow(f'role "{written}" is not one of {", ".join(dict.fromkeys(ROLES.values()))}')
        content = check_text(content_key, _join_parts(value[content_key]), blank=role != "assistant")
        columns.unread_keys.update(f"messages: {key}" for key in value if key not in MESSAGE_KEYS)
        return Message(role=role, content=content, trained=_parse_weight(value))
    except BadRow as problem:
        raise BadRow(f"message {number}: {problem}") from problem


def _join_parts(content: object) -> object:
    """OpenAI's list of `{"type": "text", "text": ...}` parts as one text; everything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise BadRow(f'a part of "content" is not of type "text": {str(kind)[:40]!r}')
    return "".join(part["text"] for part in content)


def _parse_weight(message: Mapping[str, object]) -> bool:
    weight = message.get("weight")
    if weight is None or (weight in (0, 1) and isinstance(weight, int | float)):
        return weight is None or bool(weight)
    raise BadRow(f'"weight" must be 0 or 1, is {str(weight)[:40]}')


def _refuse_tools(values: Mapping[str, object]) -> None:
    used = next((key for key in TOOLS if not is_blank(values.get(key))), None)
    if used is not None:
        raise BadRow(f'"{used}" are not supported: calls of tools are not trained')


def _parse_completion(columns: _Columns, where: str) -> Row:
    prompt, completion = columns.text("prompt", blank=True), columns.text("completion")
    return Row(where=where, prompt=prompt, completion=completion)


PARSERS: Mapping[str, Callable[[_Columns, str], Row]] = {
    "messages": lambda columns, where: _parse_conversation(columns, where, "messages"),
    "sharegpt": lambda columns, where: _parse_conversation(columns, where, "conversations"),
    "completion": _parse_completion,
    "instruction": _parse_instruction,
    "text": lambda columns, where: Row(where=where, text=columns.text("text")),
}


def name_type(value: object) -> str:
    """A JSON value's type in words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
