"""A smoke test of torch and bitsandbytes in a process of its own, so that a crash or a hang of theirs is a finding."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

MAX_RELATIVE_ERROR = 0.25
"""NF4 changes the output of a linear layer with normally distributed weights by some 10 %."""


@dataclass(frozen=True, kw_only=True)
class SmokeTest:
    """What torch and bitsandbytes did.

    torch_version:       None where torch could not be imported
    torch_cuda:          the CUDA that torch is built for, None for a CPU build
    device:              where torch would train: `cuda` or `cpu`
    torch_error:         why torch does not work, None where it does
    bitsandbytes_error:  why a 4-bit layer does not train on the device, None where it does
    """

    torch_version: str | None = None
    torch_cuda: str | None = None
    device: str = "cpu"
    torch_error: str | None = None
    bitsandbytes_error: str | None = None


def run_smoke_test(*, timeout_seconds: float = 120.0) -> SmokeTest:
    """Imports torch and trains a 4-bit layer for one step, both in a child process."""
    ended = None
    command = [sys.executable, "-m", __name__]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        printed, complaint = child.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        printed, complaint = child.communicate()
        ended = f"no answer within {timeout_seconds:g} s"
    if ended is None and child.returncode != 0:
        ended = _describe_end(child.returncode, complaint)
    steps = _parse_steps(printed)
    if "torch" not in steps:
        return SmokeTest(torch_error=ended or "no answer", bitsandbytes_error="not tried without torch")
    return SmokeTest(**steps["torch"], bitsandbytes_error=None if "bitsandbytes" in steps else ended or "no answer")


def _parse_steps(printed: str) -> dict[str, dict[str, Any]]:
    """The JSON lines of `main`, by step; what libraries print between them is passed over."""
    steps: dict[str, dict[str, Any]] = {}
    for line in printed.splitlines():
        if line.startswith('{"step":'):
            row = json.loads(line)
            steps[row.pop("step")] = row
    return steps


def _describe_end(code: int, complaint: str) -> str:
    """Why the child ended: the signal that killed it, or the last line of its traceback."""
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with exit code {code}"


def check_torch() -> dict[str, Any]:
    """Versions of torch and its CUDA, and the device that it would train on."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.ones(8, device=device).sum().item()
    return {"torch_version": torch.__version__, "torch_cuda": torch.version.cuda, "device": device}


def check_bitsandbytes(device: str) -> dict[str, Any]:
    """Quantises a linear layer to NF4, runs it forward and backward, and compares with the layer before."""
    import torch
    from bitsandbytes import nn

    four_bit: Any = nn
    torch.manual_seed(0)
    dense = torch.nn.Linear(128, 128, bias=False)
    layer = four_bit.Linear4bit(128, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    dense, layer = dense.to(device), layer.to(device)
    rows = torch.randn(4, 128, device=device)
    results = []
    for linear in (dense, layer):
        inputs = rows.clone().requires_grad_()
        outputs = linear(inputs)
        outputs.square().sum().backward()
        results.append((outputs.detach(), inputs.grad))
    errors = [float((ours - exact).norm() / exact.norm()) for exact, ours in zip(*results, strict=True)]
    if not max(errors) < MAX_RELATIVE_ERROR:
        raise RuntimeError(
            f"a 4-bit layer computes wrongly: output off by {errors[0]:.0%}, gradient by {errors[1]:.0%}"
        )
    return {}


def main() -> None:
    """The child process: one JSON line a step."""
    torch = check_torch()
    print(json.dumps({"step": "torch"} | torch), flush=True)
    print(json.dumps({"step": "bitsandbytes"} | check_bitsandbytes(torch["device"])), flush=True)


if __name__ == "__main__":
    main()
