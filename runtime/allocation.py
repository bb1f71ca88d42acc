"""How CUDA's caching allocator is set up."""

from __future__ import annotations

import torch


def use_expandable_segments() -> None:
    """Let the allocator's segments grow, so that as a rule less is reserved and unused; other settings stay.

    Has to come before the first allocation on a GPU. Not tested on one yet.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf
    """
    settings = [torch._C._accelerator_getAllocatorSettings(), "expandable_segments:True"]
    torch._C._accelerator_setAllocatorSettings(",".join(one for one in settings if one))
