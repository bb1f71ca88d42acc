"""safetensors files written one tensor at a time: no copy of a whole model in RAM, and their digest on the way.

The format is https://github.com/huggingface/safetensors#format; `safetensors` itself reads them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...planner.files import StoredDtype, StoredTensor, make_safetensors_header
from ...recipes.errors import RunError

STORED_DTYPES: dict[torch.dtype, StoredDtype] = {
    torch.int64: "int64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "uint8",
}
TORCH_DTYPES = {stored: dtype for dtype, stored in STORED_DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write the tensors into a new safetensors file, synced to the disk; its SHA-256 in hexadecimal."""
    header, ordered = make_safetensors_header(
        StoredTensor(name=name, shape=tuple(one.shape), dtype=STORED_DTYPES[one.dtype]) for name, one in tensors.items()
    )
    digest = hashlib.sha256(header)
    with path.open("xb") as file:
        file.write(header)
        for stored in ordered:
            data = _find_bytes(tensors[stored.name])
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _find_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in order, copied only where it is not on the CPU or not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    elements: Any = flat.view(torch.uint8).numpy()
    return memoryview(elements)


@torch.no_grad()
def read_into(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets` in place, one tensor at a time; RunError where the file holds others, or of another form."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = set(file.keys())
            if names != set(targets):
                differing = min(names ^ set(targets))
                raise RunError(f"{path}: has {'a' if differing in names else 'no'} tensor {differing}")
            for name, target in targets.items():
                _fill(target, file.get_tensor(name), f"{path}: {name}")
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error


def _fill(target: Tensor, stored: Tensor, where: str) -> None:
    if (stored.dtype, stored.shape) != (target.dtype, target.shape):
        found, wanted = (f"{one.dtype} {list(one.shape)}" for one in (stored, target))
        raise RunError(f"{where} is {found}, and {wanted} is needed")
    target.copy_(stored)
