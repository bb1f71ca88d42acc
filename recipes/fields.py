"""Types of a recipe's values, and what all of its tables have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from .units import parse_bytes

MAX_COUNT = 2**31 - 1

MethodKind = Literal["full", "lora", "qlora"]


def _check_prompt(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _check_text(text: str) -> str:
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError("contains a control character")
    return _check_prompt(text)


def _check_size(text: str) -> str:
    if parse_bytes(text) < 1:
        raise ValueError(f'"{text}" is less than one byte')
    return text


def _check_distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"names {', '.join(repeated)} more than once")
    return names


Prompt = Annotated[str, AfterValidator(_check_prompt)]
Text = Annotated[str, AfterValidator(_check_text)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Size = Annotated[
    Text,
    AfterValidator(_check_size),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([KMGTPkmgtp][iI]?)?[bB]\s*$",
            "examples": ["24GiB", "80GB"],
        }
    ),
]
# TOML has lists only: `strict=False` lets a list become a frozen tuple, and leaves its items strict.
Targets = Annotated[tuple[Text, ...], Field(strict=False, min_length=1), AfterValidator(_check_distinct)]
Methods = Annotated[tuple[MethodKind, ...], Field(strict=False, min_length=1), AfterValidator(_check_distinct)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Table(BaseModel):
    """What all tables of a recipe have in common."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )
