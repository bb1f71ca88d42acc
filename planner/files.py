"""The files that a run leaves: safetensors to the byte, the small files beside them estimated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from .arithmetic import trainable_dtype
from .memory import Memory, Phase
from .strategy import DTYPE_BYTES, Dtype, Strategy

MAX_SHARD_BYTES = 50 * 10**9
"""transformers' save_pretrained starts another file where one would become larger ("50GB")."""
LOG_BYTES = 16 * 2**20
"""Plan, recipe, report, metrics and samples, which the monitor thins: a day of them is no more. An estimate."""
CARD_BYTES = 16 * 2**10
"""Model card, configs and chat template of one folder. An estimate."""
TOKENIZER_ENTRY_BYTES = 140
"""A vocabulary entry with its merge in a tokenizer.json: an estimate, used where the tokenizer is not here."""
SAFETENSORS_NAMES: dict[Dtype, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""In the order in which tensors of these dtypes lie in a file."""


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
    dtype: Dtype
    storage: int | None = None

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """elements * bytes of the dtype."""
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The weights that a run writes, bytes.

    trained_bytes: of the adapter or the full model
    merged_bytes:  of the merged model, 0 without one
    """

    trained_bytes: int
    merged_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of one run.

    weights:      of the result
    beside_bytes: tokenizer, configs and card in each folder of weights, bytes, estimated
    checkpoints:  how many lie beside the result, each as large as it; 0 or more
    """

    weights: WeightFiles
    beside_bytes: int
    checkpoints: int = 0

    @property
    def saved_bytes(self) -> int:
        """The result and its checkpoints, with what lies beside their weights."""
        return (1 + self.checkpoints) * (self.weights.trained_bytes + self.beside_bytes)

    @property
    def merged_bytes(self) -> int:
        """The merged model's folder; 0 without one."""
        return self.weights.merged_bytes + self.beside_bytes if self.weights.merged_bytes else 0

    @property
    def total_bytes(self) -> int:
        """Everything in the run's directory."""
        return self.saved_bytes + self.merged_bytes + LOG_BYTES


FilesOf = Callable[[Strategy], WeightFiles | None]
"""The weights that a run of a strategy writes; None where they are not known exactly."""


def estimate_safetensors_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Size of the file that safetensors writes: 8 bytes of length, a JSON header padded to 8 bytes, the data.

    Tensors lie in the order of their dtypes, then of their names; the header names each with dtype, shape and offsets.
    Source: https://github.com/huggingface/safetensors, `prepare` of tensor.rs.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    order = list(SAFETENSORS_NAMES)
    for one in sorted(tensors, key=lambda one: (order.index(one.dtype), one.name)):
        start, end = end, end + one.bytes
        header[one.name] = {
            "dtype": SAFETENSORS_NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end


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


def count_checkpoints(save_every: int | None, steps: int | None) -> int:
    """Checkpoints of a run: one every `save_every` steps, but none after the last, whose weights are the result.

    steps: of the whole run, None where they are not known; then none are counted
    """
    return 0 if save_every is None or steps is None or steps < 1 else (steps - 1) // save_every


def lay_files(memory: Memory, files: RunFiles) -> Memory:
    """The memory with its disk figures from `files`: what saving and merging add, and everything in all."""
    adds = {"save": files.saved_bytes, "merge": files.merged_bytes}

    def lay(phase: Phase) -> Phase:
        return phase.model_copy(update={"disk_bytes": adds.get(phase.name, 0)})

    return memory.model_copy(
        update={"phases": tuple(lay(phase) for phase in memory.phases), "disk_bytes": files.total_bytes}
    )
