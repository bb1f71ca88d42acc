"""The files that a run leaves: safetensors to the byte, the small files beside them estimated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from ..recipes.schema import OutputTable
from .arithmetic import trainable_dtype
from .memory import Memory, Phase
from .strategy import Dtype, Strategy

MAX_SHARD_BYTES = 50 * 10**9
"""transformers' save_pretrained starts another file where one would become larger ("50GB")."""
CARD_BYTES = 16 * 2**10
"""Model card, configs and chat template of one folder. An estimate."""
TOKENIZER_ENTRY_BYTES = 140
"""A vocabulary entry with its merge in a tokenizer.json: an estimate, used where the tokenizer is not here."""
StoredDtype = Literal["int64", "fp32", "bf16", "fp16", "uint8"]
SAFETENSORS_DTYPES: dict[StoredDtype, tuple[str, int]] = {
    "int64": ("I64", 8),
    "fp32": ("F32", 4),
    "bf16": ("BF16", 2),
    "fp16": ("F16", 2),
    "uint8": ("U8", 1),
}
"""Name in a file and bytes an element, in the order in which tensors of these dtypes lie in it."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file.

    name:    its key
    shape:   its dimensions, outermost first; () for a scalar
    dtype:   of its elements
    storage: a number that the tensors cut from one have in common, None for a tensor on its own
    """

    name: str
    shape: tuple[int, ...]
    dtype: StoredDtype
    storage: int | None = None

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """elements * bytes of the dtype."""
        return self.elements * SAFETENSORS_DTYPES[self.dtype][1]


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The weights that a run writes, bytes.

    trained_bytes:    of the adapter or the full model
    merged_bytes:     of the merged model, 0 without one
    checkpoint_bytes: of one checkpoint: what is trained, and the optimizer's states
    """

    trained_bytes: int
    merged_bytes: int
    checkpoint_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of one run.

    weights:      of the result
    beside_bytes: tokenizer, configs and card in each folder of weights, bytes, estimated
    checkpoints:  how many checkpoints stay; 0 or more
    at_once:      how many there are at most at one time, one that is being written included; 0 or more
    log_bytes:    of everything beside weights, checkpoints and what lies beside them
    """

    weights: WeightFiles
    beside_bytes: int
    checkpoints: int = 0
    at_once: int = 0
    log_bytes: int = 0

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint, with what lies beside its weights."""
        return self.weights.checkpoint_bytes + self.beside_bytes

    @property
    def saved_bytes(self) -> int:
        """The result and the checkpoints that stay, with what lies beside their weights."""
        return self.weights.trained_bytes + self.beside_bytes + self.checkpoints * self.checkpoint_bytes

    @property
    def merged_bytes(self) -> int:
        """The merged model's folder; 0 without one."""
        return self.weights.merged_bytes + self.beside_bytes if self.weights.merged_bytes else 0

    @property
    def total_bytes(self) -> int:
        """Everything in the run's directory at its most: with the result, or while the last checkpoint is written."""
        return max(self.saved_bytes + self.merged_bytes, self.at_once * self.checkpoint_bytes) + self.log_bytes


FilesOf = Callable[[Strategy], WeightFiles | None]
"""The weights that a run of a strategy writes; None where they are not known exactly."""


def make_safetensors_header(tensors: Iterable[StoredTensor]) -> tuple[bytes, list[StoredTensor]]:
    """What a safetensors file begins with, and its tensors in the order in which their data follows.

    8 bytes of length and a JSON header padded to 8 bytes, which names each tensor with dtype, shape and offsets;
    tensors lie in the order of their dtypes, then of their names.
    Source: https://github.com/huggingface/safetensors, `prepare` of tensor.rs.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    dtypes = list(SAFETENSORS_DTYPES)
    ordered = sorted(tensors, key=lambda one: (dtypes.index(one.dtype), one.name))
    for one in ordered:
        start, end = end, end + one.bytes
        header[one.name] = {
            "dtype": SAFETENSORS_DTYPES[one.dtype][0],
            "shape": list(one.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered


def estimate_safetensors_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Size of the file that safetensors writes: the header and the data."""
    header, ordered = make_safetensors_header(tensors)
    return len(header) + sum(one.bytes for one in ordered)


def split_shards(tensors: Iterable[StoredTensor], max_shard_bytes: int) -> list[list[StoredTensor]]:
    """Tensors file by file, as transformers splits them: in their order; one that is too large has its own file.

    Those with one storage stay together.
    Source: huggingface_hub.serialization._base.split_state_dict_into_shards_factory.
    """
    shards: list[list[StoredTensor]] = []
    current: list[StoredTensor] = []
    size = 0
    for group in _group_by_storage(tensors):
        group_bytes = sum(one.bytes for one in group)
        if group_bytes > max_shard_bytes:
            shards.append(group)
            continue
        if size + group_bytes > max_shard_bytes:
            shards.append(current)
            current, size = [], 0
        current = current + group
        size += group_bytes
    return [*shards, current] if current else shards


def _group_by_storage(tensors: Iterable[StoredTensor]) -> list[list[StoredTensor]]:
    groups: dict[int | str, list[StoredTensor]] = {}
    for one in tensors:
        groups.setdefault(one.name if one.storage is None else one.storage, []).append(one)
    return list(groups.values())


def estimate_model_bytes(
    tensors: Sequence[StoredTensor], *, parameters: int, max_shard_bytes: int = MAX_SHARD_BYTES
) -> int:
    """Size of a model's weights as save_pretrained writes them: one file, or shards and their index.

    parameters: of the model, tied ones once, as the index names them
    """
    shards = split_shards(tensors, max_shard_bytes)
    total = sum(estimate_safetensors_bytes(shard) for shard in shards)
    if len(shards) == 1:
        return total
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_parameters": parameters, "total_size": sum(one.bytes for one in tensors)},
        "weight_map": {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard},
    }
    return total + len(json.dumps(index, indent=2, sort_keys=True)) + 1


def estimate_beside_weights(vocab_size: int, tokenizer_bytes: int | None) -> int:
    """Tokenizer, configs and card of one folder.

    tokenizer_bytes: the tokenizer's files where they are here, None where they are not
    """
    return CARD_BYTES + (TOKENIZER_ENTRY_BYTES * vocab_size if tokenizer_bytes is None else tokenizer_bytes)


def merged_dtype(strategy: Strategy) -> Dtype:
    """The dtype of the base that adapters are merged into: bf16 for qlora, else the weights'."""
    return "bf16" if strategy.method == "qlora" else strategy.weights_dtype


def saved_dtype(strategy: Strategy) -> Dtype:
    """The dtype of what is saved: of the adapters, or of a full model's weights."""
    return trainable_dtype(strategy)


def count_checkpoints(output: OutputTable, steps: int | None, evaluations: int = 0) -> tuple[int, int]:
    """(checkpoints that stay, the most at one time: one more is there while the oldest is being replaced).

    steps:       of the whole run, None where they are not known
    evaluations: between the steps: with keep_best each may write one
    """
    if output.save_every == "never":
        return 0, 0
    kept = output.keep_checkpoints + output.keep_best
    if output.save_every == "auto" or steps is None:
        return kept, kept + 1
    # None after the last step, whose weights are the result.
    written = max(steps - 1, 0) // output.save_every + (evaluations if output.keep_best else 0)
    return min(written, kept), min(written, kept + 1)


def list_checkpoint_counts(output: OutputTable, steps: int | None, evaluations: int = 0) -> tuple[tuple[int, int], ...]:
    """What may be planned for, most first: with save_every = "auto" a small disk holds only the last one, or none."""
    counts = count_checkpoints(output, steps, evaluations)
    if output.save_every != "auto":
        return (counts,)
    least = 1 + output.keep_best
    return tuple(dict.fromkeys((counts, (least, least + 1)))) + (() if output.keep_best else ((0, 0),))


def count_kept(output: OutputTable, planned: int) -> int:
    """How many of the last checkpoints stay beside the best, where a plan has `planned` that stay."""
    return planned - output.keep_best if output.save_every == "auto" else output.keep_checkpoints


def lay_files(memory: Memory, files: RunFiles) -> Memory:
    """The memory with its disk figures from `files`: what saving and merging add, and everything in all."""
    adds = {"save": files.saved_bytes, "merge": files.merged_bytes}

    def lay(phase: Phase) -> Phase:
        return Phase(
            name=phase.name,
            peak_allocated_bytes=phase.peak_allocated_bytes,
            host_bytes=phase.host_bytes,
            disk_bytes=adds.get(phase.name, 0),
        )

    return memory.model_copy(
        update={
            "phases": tuple(lay(phase) for phase in memory.phases),
            "disk_bytes": files.total_bytes,
            "log_bytes": files.log_bytes,
            "checkpoints": files.checkpoints,
            "checkpoint_bytes": files.checkpoint_bytes if files.at_once else 0,
        }
    )
