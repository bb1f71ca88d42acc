"""The recipe's table of data: what the model is trained on and judged by."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from .fields import MAX_COUNT, Prompt, Table, Text

DataFormat = Literal["auto", "instruction", "messages", "sharegpt", "completion", "text"]


class Columns(Table):
    """The names that columns have in a dataset; unset: their own, or a common alias."""

    messages: Text | None = None
    """A conversation: a list of {role, content}."""
    conversations: Text | None = None
    """A conversation in ShareGPT's form: a list of {from, value}."""
    prompt: Text | None = None
    """Raw text before a completion."""
    completion: Text | None = None
    """Raw text to train on."""
    instruction: Text | None = None
    """What the user asks."""
    context: Text | None = None
    """What the user adds to the instruction."""
    output: Text | None = None
    """The answer."""
    system: Text | None = None
    """The system prompt."""
    text: Text | None = None
    """Text to train on as a whole."""


class DataSource(Table):
    """One dataset of a mixture."""

    path: Text
    """Its rows: a file, a folder, a pattern such as "data/*.jsonl"; else a hub id."""
    weight: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Its share of the rows drawn, relative to the other sources, above 0; unset for all: every row once an epoch."""
    format: DataFormat = "auto"
    """Form of its rows; auto: as in `data.format`."""
    columns: Columns | None = None
    """The names of its columns; unset: as in `data.columns`."""
    subset: Text | None = None
    """Configuration of a hub dataset; unset: its default."""
    split: Text | None = None
    """Split of a dataset that has several; unset: train, and validation or test for `data.eval`."""


Sources = Annotated[tuple[DataSource, ...], Field(strict=False, min_length=1)]


class DataTable(Table):
    """What the model is trained on and judged by."""

    train: Text | Sources
    """Training rows: a file, a folder, a pattern such as "data/*.jsonl", else a hub id; or a list of such sources."""
    eval: Text | Annotated[float, Field(gt=0, lt=1)] | Sources | None = None
    """Held-out rows, written as in `train`; or the fraction of the training rows to hold out, above 0 and below 1."""
    forgetting: Text | Sources | None = None
    """Rows of another task, written as in `train`: their loss before and after shows what training made it forget."""
    max_forgotten: Annotated[float, Field(gt=0, le=1e6)] = 0.1
    """Share by which the perplexity of these rows may rise before the run warns, above 0."""
    format: DataFormat = "auto"
    """Form of the rows; auto: seen from the first row's keys."""
    columns: Columns | None = None
    """The names of the columns in the dataset, such as { prompt = "question", completion = "answer" }."""
    max_length: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 2048
    """Longest row in tokens, 2 or more: a row's first token is not predicted, so that one alone teaches nothing."""
    overlong: Literal["truncate", "split", "drop"] = "truncate"
    """What becomes of a longer row: cut at the right; split, a conversation between its turns; or left out."""
    max_truncated: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the rows that may be cut, 0 to 1; a run with more of them is refused."""
    max_leaked: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the held-out rows that may be among the training rows, 0 to 1; a run with more of them is refused."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """What is trained: the assistant's answers (of completions the completion), the last answer, or every token."""
    packing: bool = False
    """Whether short rows are put together into rows of max_length."""
    streaming: bool = False
    """Whether rows are read and tokenised in the run, for sets larger than memory; needs train.max_steps."""
    system: Prompt | None = None
    """System prompt for rows that have none."""
    chat_template: Text | None = None
    """File with a Jinja chat template that replaces the tokenizer's own, and is saved with the result."""

    @field_validator("train")
    @classmethod
    def _check_weights(cls, train: str | tuple[DataSource, ...]) -> str | tuple[DataSource, ...]:
        weights = [] if isinstance(train, str) else [source.weight for source in train]
        if None in weights and any(weights):
            raise ValueError("give every source a weight, or none")
        return train

    @field_validator("streaming")
    @classmethod
    def _check_streaming(cls, streaming: bool, info: ValidationInfo) -> bool:
        if not streaming:
            return streaming
        if info.data.get("packing"):
            raise ValueError("excludes data.packing: how many rows fit together is not known before all are read")
        if info.data.get("overlong") == "split":
            raise ValueError('excludes data.overlong = "split": allowed are truncate, drop')
        if isinstance(info.data.get("eval"), float):
            raise ValueError("excludes a fraction in data.eval: name a file of held-out rows")
        train = info.data.get("train")
        if isinstance(train, tuple) and len(train) > 1 and train[0].weight is None:
            raise ValueError("of several sources needs their weights: how many rows they have is not known")
        return streaming

    @field_validator("eval", "forgetting")
    @classmethod
    def _check_unweighted(cls, written: str | float | tuple[DataSource, ...] | None) -> object:
        if isinstance(written, tuple) and any(source.weight is not None for source in written):
            raise ValueError("held-out sources have no weight: every row is evaluated once")
        return written
