"""Puts short rows together into rows of `data.max_length` tokens, without attention from one into another.

Positions start again at 0 with each document, and a document's first token has no label. Attention goes document by
document (model/attention.py); where an architecture has no function for that, transformers builds a block-diagonal
causal mask from the positions (masking_utils.find_packed_sequence_indices).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn

from ...recipes.errors import RunError
from ..model.attention import list_document_inputs
from .batches import make_micro_batch
from .encoding import UNTRAINED
from .tokens import TokenizedRow, TokenizedRows

CHECKED_TOKENS = 16
"""Tokens of each of the two documents that check_packing compares."""
MOST_DIFFERENCE = 0.05
"""Share by which the logits of a document may differ when it is packed: bf16 rounding makes about 0.01."""


def pack_rows(tokenized: TokenizedRows) -> TokenizedRows:
    """The same documents in as few rows of at most `max_length` tokens as best-fit decreasing finds.

    The sources of a mixture are packed apart, so that each keeps its share.
    """
    sizes = [part.rows for part in tokenized.parts] or [len(tokenized)]
    stops = list(accumulate(sizes))
    packed = [
        _pack(tokenized.rows[stop - size : stop], tokenized.max_length) for size, stop in zip(sizes, stops, strict=True)
    ]
    parts = tuple(replace(part, rows=len(rows)) for part, rows in zip(tokenized.parts, packed, strict=False))
    return replace(tokenized, rows=tuple(chain.from_iterable(packed)), parts=parts)


def _pack(rows: Sequence[TokenizedRow], max_length: int) -> list[TokenizedRow]:
    bins: list[list[TokenizedRow]] = []
    room: list[tuple[int, int]] = []
    for row in sorted(rows, key=len, reverse=True):
        place = bisect_left(room, (len(row), -1))
        if place == len(room):
            bins.append([])
            left, index = max_length, len(bins) - 1
        else:
            left, index = room.pop(place)
        bins[index].append(row)
        insort(room, (left - len(row), index))
    return [_join(documents) for documents in bins]


def _join(rows: Sequence[TokenizedRow]) -> TokenizedRow:
    input_ids, labels = array("i"), array("i")
    for row in rows:
        input_ids.extend(row.input_ids)
        labels.append(UNTRAINED)
        labels.extend(row.labels[1:])
    return TokenizedRow(input_ids=input_ids, labels=labels, documents=tuple(len(row) for row in rows))


def check_packing(model: nn.Module, base: Any, *, device: torch.device) -> None:
    """Compare two packed documents with the same two apart; RunError where an architecture lets them see each other."""
    vocabulary = base.config.get_text_config().vocab_size
    ids = [array("i", [(start + step) % vocabulary for step in range(CHECKED_TOKENS)]) for start in (3, 40)]
    apart = [TokenizedRow(input_ids=one, labels=one) for one in ids]
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = []
        for rows in (apart, [_join(apart)]):
            batch = make_micro_batch(rows, pad_token_id=0, max_length=2 * CHECKED_TOKENS).to(device)
            starts = batch.document_starts if base.config._attn_implementation == "varlen" else None
            inputs = list_document_inputs(batch.position_ids, starts)
            logits.append(model(input_ids=batch.input_ids, use_cache=False, **inputs).logits.float())
    model.train(training)
    second, packed = logits[0][1], logits[1][0, CHECKED_TOKENS:]
    if (packed - second).norm() > MOST_DIFFERENCE * second.norm():
        raise RunError(f"data.packing: {type(base).__name__} lets packed rows see each other: set data.packing = false")
