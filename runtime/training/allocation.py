"""How CUDA's caching allocator is set up."""

from __future__ import annotations

import os

import torch


def use_expandable_segments() -> None:
    """Let the allocator's segments grow, so that as a rule less is reserved and unused; other settings stay.

    Has to come before the first allocation on a GPU. Not tested on one yet.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf
    """
    settings = [_read_settings(), "expandable_segments:True"]
    torch._C._accelerator_setAllocatorSettings(",".join(one for one in settings if one))


def _read_settings() -> str:
    """The allocator's settings; those of the environment where torch does not tell them."""
    read = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return str(read()) if read is not None else next((os.environ[name] for name in names if name in os.environ), "")


def limit_allocator(budget_bytes: int, beside_bytes: int) -> None:
    """Keep the allocator within the budget: at the limit it releases cached segments and tries again before it fails.

    So a run that was planned too tightly never takes what others hold. Not tested on a GPU yet.

    budget_bytes: what the run may use of the card
    beside_bytes: of which so much is not the allocator's: context, kernels, managed memory
    """
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(budget_bytes - beside_bytes, 1) / total))
