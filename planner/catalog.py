"""Well-known models and NVIDIA cards, so that plans work offline."""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..recipes.errors import DeviceError
from ..recipes.schema import BudgetTable
from ..recipes.units import MiB
from .rates import FLOAT8_CAPABILITY, make_gpu_rates
from .strategy import Device, Value

DRIVER_SHARE = 0.02
TRITON_CAPABILITY = (7, 0)
"""The oldest compute capability that Triton, and so torch.compile, generates code for."""
_DATA = Path(__file__).parent / "data"


class CatalogModel(Value):
    """A model of the catalog.

    name:        fitune's name for it, such as `llama-3.1-8b`
    hub_id:      where its checkpoint is, such as `meta-llama/Llama-3.1-8B`
    gated:       whether the hub asks for a licence to be accepted and a token
    instruct:    whether it was tuned to chat, and so brings a chat template
    license:     of its weights, as the hub names it
    parameters:  published exact count, tied weights once
    config:      the values of its config.json that decide shape and behaviour
    """

    name: str
    hub_id: str
    gated: bool
    instruct: bool
    license: str
    parameters: int = Field(gt=0)
    config: dict[str, Any]


class CatalogGpu(Value):
    """A card of the catalog.

    name:                      such as `H100 80GB`
    aliases:                   other names of it, NVML's among them
    memory_mib:                all of its memory, in MiB
    memory_source:             `nvml`: as NVML reports it; `nominal`: as the vendor names it, 1 GB read as 1 GiB
    compute_capability:        such as `9.0`
    bf16:                      whether it computes in bf16 in hardware (capability 8.0 and up)
    tensor_tflops:             dense 16-bit matrix rate with fp32 sums, in 10**12 operations a second: bf16, or fp16
                               where there is no bf16
    fp32_tflops:               rate of fp32 without tensor cores, in 10**12 operations a second; None where not known
    bandwidth_gb_per_second:   of its memory, in 10**9 bytes a second
    host_gb_per_second:        nominal rate of PCIe (or NVLink-C2C) each way, in 10**9 bytes a second; None as above
    board_watts:               power limit of the board; None where it is not known or shared
    source:                    the vendor's document that says so
    """

    name: str
    aliases: tuple[str, ...] = ()
    memory_mib: int = Field(gt=0)
    memory_source: Literal["nvml", "nominal"]
    compute_capability: str = Field(pattern=r"^\d+\.\d$")
    bf16: bool
    tensor_tflops: float = Field(gt=0)
    fp32_tflops: float | None = Field(gt=0)
    bandwidth_gb_per_second: float = Field(gt=0)
    host_gb_per_second: float | None = Field(gt=0)
    board_watts: float | None = Field(gt=0)
    source: str

    @property
    def usable_bytes(self) -> int:
        """What a process can have at most: the driver keeps 0.6 to 1.7 % of the named memory (H100, A100, RTX 4090, RTX
        3090, T4), here 2 %."""
        return int(self.memory_bytes * (1 - DRIVER_SHARE))

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability as numbers, such as (9, 0)."""
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * MiB


@cache
def list_models() -> tuple[CatalogModel, ...]:
    return tuple(
        CatalogModel.model_validate_json(json.dumps({"name": name, **entry}))
        for name, entry in _load_json("models.json").items()
    )


@cache
def list_gpus() -> tuple[CatalogGpu, ...]:
    return tuple(
        CatalogGpu.model_validate_json(json.dumps({"name": name, **entry}))
        for name, entry in _load_json("gpus.json").items()
    )


def find_model(name: str) -> CatalogModel | None:
    """The model of this name or hub id; letter case does not matter."""
    wanted = name.strip().lower()
    return next((model for model in list_models() if wanted in (model.name, model.hub_id.lower())), None)


def find_gpu(name: str) -> CatalogGpu:
    """The card of this name; letter case, spaces, punctuation, NVIDIA, GeForce and Tesla do not matter."""
    cards = _gpus_by_key()
    card = cards.get(_make_gpu_key(name))
    if card is None:
        raise DeviceError(f'budget.gpu: "{name}" is not in the GPU catalog; {_describe_nearest_gpus(name, cards)}')
    return card


def make_catalog_device(gpu: CatalogGpu, budget: BudgetTable) -> Device:
    """A card as the device of a plan; RAM and disk are known where the budget says them."""
    return Device(
        name=gpu.name,
        kind="cuda",
        memory_bytes=gpu.memory_bytes,
        budget_bytes=budget.memory_bytes or gpu.usable_bytes,
        bf16=gpu.bf16,
        compiles=gpu.capability >= TRITON_CAPABILITY,
        has_float8=gpu.capability >= FLOAT8_CAPABILITY,
        gpus=budget.gpus,
        host_memory_bytes=budget.host_memory_bytes,
        disk_bytes=budget.disk_bytes,
        budget_source="memory of the card" if budget.memory is None else "budget.memory",
        rates=make_gpu_rates(gpu),
    )


def _load_json(file: str) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = json.loads((_DATA / file).read_text(encoding="utf-8"))
    return entries


@cache
def _gpus_by_key() -> dict[str, CatalogGpu]:
    return {_make_gpu_key(name): gpu for gpu in list_gpus() for name in (gpu.name, *gpu.aliases)}


def _make_gpu_key(name: str) -> str:
    """`NVIDIA GeForce RTX 4090` and `rtx-4090` become `rtx4090`."""
    words = re.sub(r"nvidia|geforce|tesla", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", words)


def _describe_nearest_gpus(name: str, cards: dict[str, CatalogGpu]) -> str:
    nearest = get_close_matches(_make_gpu_key(name), cards, n=6, cutoff=0.5)
    names = list(dict.fromkeys(cards[key].name for key in nearest))[:3]
    if names:
        return "did you mean " + " or ".join(f'"{found}"' for found in names) + "?"
    return "it has " + ", ".join(gpu.name for gpu in list_gpus())
