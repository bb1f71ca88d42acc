"""Trains small models with their own operations and with Liger's kernels, and prints the losses and how far they are
apart as JSON.

TRITON_INTERPRET=1 python tests/runtime/interpreted_liger.py llama qwen3:lora

Triton then runs its kernels in numpy, on the CPU. Its interpreter lacks three things that a GPU has: scalar arguments
that are floats, and libdevice's rsqrt and tanh. They are written here in Triton's own language. It cannot compute in
bf16.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from liger_kernel.ops import geglu, rms_norm
from small_models import build_small_model, make_strategy, make_tokens
from torch import nn
from triton.runtime import interpreter

from fitune.planner.strategy import Strategy
from fitune.runtime.model.build import add_adapters, prepare_training
from fitune.runtime.training.step import MicroBatch, make_scaler, training_step

STEPS = 2
convert = interpreter._implicit_cvt


def convert_scalars(argument: Any) -> Any:
    if isinstance(argument, float):
        handle = interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return convert(argument)


@triton.jit
def rsqrt(x):  # type: ignore[no-untyped-def]
    return tl.math.rsqrt(x)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


def complete_interpreter() -> None:
    interpreter._implicit_cvt = convert_scalars
    rms_norm.rsqrt, geglu.tanh = rsqrt, tanh


def train(base: Any, strategy: Strategy) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a few steps."""
    torch.manual_seed(1)
    model = base if strategy.method == "full" else add_adapters(base, strategy, alpha=None, adapter=None)
    prepare_training(base, strategy)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.05)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.01)
    cpu, found = torch.device("cpu"), []
    for step in range(STEPS):
        ids = make_tokens(2, 12, seed=step)
        found.append(
            training_step(
                model,
                base,
                [MicroBatch(input_ids=ids, labels=ids)],
                tokens=2 * 11,
                strategy=strategy,
                optimizer=optimizer,
                scaler=make_scaler(strategy, cpu),
                clip=lambda: nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]),
            )
        )
    return [one.loss for one in found], [one.gradient_norm for one in found]


def compare(family: str, method: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    base = build_small_model(family, **({"partial_rotary_factor": 0.5} if family == "phi3" else {}))
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    other, module = copy.deepcopy(base), sys.modules[type(base).__module__]
    names = dict(vars(module))
    adapted: dict[str, Any] = {} if method == "full" else {"checkpointed_layers": 1, "loss_head": "fused"}
    losses, norms = train(base, make_strategy(method, **adapted))
    liger_losses, liger_norms = train(other, make_strategy(method, kernels="liger", **adapted))
    return {
        "losses": losses,
        "liger_losses": liger_losses,
        "norms": norms,
        "liger_norms": liger_norms,
        "exchanged": sorted({type(one).__name__ for one in other.modules() if "forward" in vars(one)}),
        "untouched": names == vars(module) and not any("forward" in vars(one) for one in base.modules()),
    }


if __name__ == "__main__":
    complete_interpreter()
    cases = [word.partition(":")[::2] for word in sys.argv[1:]]
    print(json.dumps({f"{family}:{method or 'full'}": compare(family, method or "full") for family, method in cases}))
