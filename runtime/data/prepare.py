"""A recipe's rows as tokens: source by source, templates applied, packed where asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...recipes.data_table import DataTable
from ...recipes.errors import DataError
from .mixture import Part
from .rows import Row
from .sources import LoadedRows, Resolve, SourceRows
from .streaming import StreamedRows
from .templates import ensure_chat_template, read_chat_template
from .token_cache import find_key, load_tokens, save_tokens
from .tokens import Counts, RowTokenizer, TokenizedRow, TokenizedRows, TokenSettings, check_not_empty, find_pad_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TokenizedData:
    """The recipe's rows, ready to train on.

    tokenizer:   with a chat template, the default one where the model has none
    default_template: whether that default was needed
    train, eval, forgetting: tokenised rows; None without held-out rows, or rows of another task
    unpacked:    the training rows before they were packed; `train` itself where nothing is packed
    eval_rows:   the held-out rows as text
    stream:      where the training rows come from with data.streaming; `train` are the first of them then
    """

    tokenizer: PreTrainedTokenizerBase
    default_template: bool
    train: TokenizedRows
    eval: TokenizedRows | None
    forgetting: TokenizedRows | None
    unpacked: TokenizedRows
    eval_rows: tuple[Row, ...]
    stream: StreamedRows | None = None

    @property
    def longest_row_tokens(self) -> int:
        """Of everything that the model sees: training, held-out rows, rows of another task."""
        return max(one.longest_row_tokens for one in (self.train, self.eval, self.forgetting) if one is not None)


def make_settings(table: DataTable) -> TokenSettings:
    """What of `[data]` decides over a row's tokens."""
    return TokenSettings(max_length=table.max_length, overlong=table.overlong, train_on=table.train_on)


def tokenize_data(
    table: DataTable, loaded: LoadedRows, tokenizer: PreTrainedTokenizerBase, resolve: Resolve
) -> TokenizedData:
    """The rows of `[data]` as tokens; a tokenizer without a chat template gets the default one."""
    if table.chat_template is not None:
        read_chat_template(tokenizer, resolve(table.chat_template), name=table.chat_template)
    default_template = ensure_chat_template(tokenizer)
    settings = make_settings(table)
    train = tokenize_sources(loaded.train, tokenizer, settings)
    packed, stream = train, None
    if table.streaming:
        stream = StreamedRows(table=table, resolve=resolve, tokenizer=tokenizer, settings=settings)
    if table.packing:
        from .packing import pack_rows

        packed = pack_rows(train)
    held_out, other = (
        tokenize_sources(sources, tokenizer, settings) if sources else None
        for sources in (loaded.eval, loaded.forgetting)
    )
    return TokenizedData(
        tokenizer=tokenizer,
        default_template=default_template,
        train=packed,
        eval=held_out,
        forgetting=other,
        unpacked=train,
        eval_rows=tuple(loaded.eval_rows),
        stream=stream,
    )


def tokenize_sources(
    sources: Sequence[SourceRows], tokenizer: PreTrainedTokenizerBase, settings: TokenSettings
) -> TokenizedRows:
    """The sequences of all sources, with what each contributes."""
    rows, parts, counts = list[TokenizedRow](), list[Part](), Counts()
    for source in sources:
        kept, found = _tokenize_source(source, tokenizer, settings)
        counts += found
        try:
            check_not_empty(len(kept), found, settings)
        except DataError as error:
            raise DataError(f"{source.name}: {error}") from error
        rows += kept
        parts.append(Part(name=source.name, rows=len(kept), weight=source.weight))
    return TokenizedRows(
        rows=tuple(rows),
        pad_token_id=find_pad_token_id(tokenizer),
        max_length=settings.max_length,
        parts=tuple(parts),
        counts=counts,
    )


def _tokenize_source(
    source: SourceRows, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings
) -> tuple[list[TokenizedRow], Counts]:
    """The sequences of one source, out of the cache where they are there, and what became of its rows."""
    key = find_key(source.rows, tokenizer, settings)
    cached = None if key is None else load_tokens(key)
    if cached is not None:
        return cached
    making = RowTokenizer(tokenizer, settings)
    kept = [one for row in source.rows for one in making.tokenize(row)]
    if key is not None and kept:
        save_tokens(key, kept, making.counts)
    return kept, making.counts
