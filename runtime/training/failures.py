"""What ends a run and is neither the recipe's fault nor memory: the GPU itself, or torch.compile."""

from __future__ import annotations

import subprocess

import torch

COMPILERS = ("torch._dynamo", "torch._inductor", "triton")
"""Packages whose exceptions are about compiled layers."""


def explain_failure(error: BaseException, *, compiled: bool, phase: str, step: int) -> str | None:
    """A message for people; None where the error is neither the GPU's nor torch.compile's.

    compiled: whether layers are compiled, so that a command that failed is Triton's C compiler
    """
    what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, torch.AcceleratorError):
        return (
            f"the GPU failed in phase {phase} after {step} steps: {what}; `fitune doctor` says whether it still works, "
            "--resume goes on from the last checkpoint"
        )
    is_compiler = type(error).__module__.startswith(COMPILERS)
    if compiled and (is_compiler or isinstance(error, subprocess.CalledProcessError)):
        return f"train.compile: torch.compile failed in phase {phase}: {what}: set train.compile = false"
    return None
