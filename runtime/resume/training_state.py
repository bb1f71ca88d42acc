"""Everything beside the weights that decides how a run goes on: optimizer states, schedule, scaler, random generators.

Tensors go into one safetensors file under `<what>/<parameter>`, such as `exp_avg/model.norm.weight`; the rest is JSON.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...planner.arithmetic import STATE8_BLOCK, STATE8_MIN_ELEMENTS
from ...planner.files import StoredDtype, StoredTensor
from ...planner.strategy import Strategy, Value
from ...recipes.errors import RunError
from .tensor_file import STORED_DTYPES, TORCH_DTYPES, read_into

RNG_TENSORS: dict[str, tuple[int, StoredDtype]] = {
    "rng/torch": (5056, "uint8"),
    "rng/cuda": (16, "uint8"),
    "rng/numpy": (624, "int64"),
    "rng/python": (625, "int64"),
}
"""Elements and dtype of the random generators' states: of torch, of CUDA (seed and offset; zeros on a CPU, so that a
checkpoint is as large), of numpy and of Python."""
CONSTANT_STATES = ("qmap1", "qmap2")
"""bitsandbytes' tables of 8-bit values, which its optimizers make anew."""


class ScalarState(Value):
    """What of a training state is no tensor.

    scheduler:      of torch's LambdaLR: steps done, learning rates
    scaler:         of the gradient scaler, empty where it is not used
    update_counts:  of bitsandbytes: updates of each parameter
    numpy_position: of numpy's generator in its block of 624 numbers
    python_gaussian, numpy_gaussian: a normal number that the generator made in advance, or None
    """

    scheduler: dict[str, Any]
    scaler: dict[str, int | float]
    update_counts: dict[str, int]
    numpy_position: int = Field(ge=0, le=624)
    python_gaussian: float | None
    numpy_gaussian: float | None


def list_state_tensors(name: str, shape: tuple[int, ...], dtype: StoredDtype, strategy: Strategy) -> list[StoredTensor]:
    """The optimizer's states of one parameter, by each optimizer's own rules.

    torch's AdamW keeps two moments in the parameter's dtype, its Adafactor a row and a column in the gradient's (fp32
    where updates are rounded stochastically), bitsandbytes two in fp32, or in 8 bits with a constant for 256 elements.
    """
    scalar: list[tuple[str, tuple[int, ...], StoredDtype]] = [("step", (), "fp32")]
    if strategy.optimizer == "adamw":
        states = [*scalar, ("exp_avg", shape, dtype), ("exp_avg_sq", shape, dtype)]
    elif strategy.optimizer == "adafactor":
        wide: StoredDtype = "fp32" if strategy.rounding == "stochastic" else dtype
        if len(shape) > 1:
            rows, columns = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
            states = [*scalar, ("row_var", rows, wide), ("col_var", columns, wide)]
        else:
            states = [*scalar, ("variance", shape, wide)]
    else:
        elements = StoredTensor(name=name, shape=shape, dtype=dtype).elements
        narrow = "8bit" in strategy.optimizer and elements >= STATE8_MIN_ELEMENTS
        states = [(key, shape, "uint8" if narrow else "fp32") for key in ("state1", "state2")]
        if narrow:
            blocks = (-(-elements // STATE8_BLOCK),)
            states += [(key, blocks, "fp32") for key in ("absmax1", "absmax2")]
    return [StoredTensor(name=f"{key}/{name}", shape=size, dtype=kind) for key, size, kind in states]


def list_rng_tensors() -> list[StoredTensor]:
    """The states of the random generators."""
    return [StoredTensor(name=name, shape=(size,), dtype=dtype) for name, (size, dtype) in RNG_TENSORS.items()]


def capture_scalars(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, scaler: Any) -> ScalarState:
    """The part of the state for JSON."""
    _, _, position, has_gaussian, gaussian = np.random.get_state(legacy=True)
    return ScalarState(
        scheduler={key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"},
        scaler=scaler.state_dict(),
        update_counts={
            name: state["step"] for name, state in _walk_states(model, optimizer) if isinstance(state["step"], int)
        },
        numpy_position=int(position),
        python_gaussian=random.getstate()[2],
        numpy_gaussian=float(gaussian) if has_gaussian else None,
    )


def capture_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state's tensors: the optimizer's own, not copies, and the random generators'."""
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.synchronize()  # managed memory is read without asking the GPU
    numpy_state: Any = np.random.get_state(legacy=True)
    return _collect_states(model, optimizer) | {
        "rng/torch": torch.get_rng_state(),
        "rng/cuda": torch.cuda.get_rng_state() if on_gpu else torch.zeros(16, dtype=torch.uint8),
        "rng/numpy": torch.from_numpy(numpy_state[1].astype(np.int64)),
        "rng/python": torch.tensor(random.getstate()[1], dtype=torch.int64),
    }


def restore(
    path: Path,
    scalars: ScalarState,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    scaler: Any,
    strategy: Strategy,
) -> None:
    """Put optimizer, schedule, scaler and random generators into the state of a checkpoint; RunError where it is of
    another model or optimizer."""
    _prepare_states(model, optimizer, _find_updated(path), strategy)
    rng = {one.name: torch.empty(one.shape, dtype=TORCH_DTYPES[one.dtype]) for one in list_rng_tensors()}
    read_into(path, _collect_states(model, optimizer) | rng)
    try:
        for name, state in _walk_states(model, optimizer):
            if name in scalars.update_counts:
                state["step"] = scalars.update_counts[name]
        scheduler.load_state_dict({**scalars.scheduler, "lr_lambdas": [None] * len(scheduler.lr_lambdas)})
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if scalars.scaler:
            scaler.load_state_dict(scalars.scaler)
        _set_random_states(rng, scalars)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{path}: the training state cannot be used: {error}") from error


def _walk_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, state) of every parameter that was updated."""
    for name, parameter in model.named_parameters():
        if optimizer.state.get(parameter):
            yield name, optimizer.state[parameter]


def _collect_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}/{name}": value
        for name, state in _walk_states(model, optimizer)
        for key, value in state.items()
        if isinstance(value, Tensor) and key not in CONSTANT_STATES
    }


def _find_updated(path: Path) -> set[str]:
    """The parameters that have states in a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name.partition("/")[2] for name in file.keys() if name not in RNG_TENSORS}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error


def _prepare_states(model: nn.Module, optimizer: Any, updated: Iterable[str], strategy: Strategy) -> None:
    """Make the states of the updated parameters, to be filled; bitsandbytes makes its own, in managed memory where they
    are paged."""
    parameters = dict(model.named_parameters())
    places = {
        id(parameter): (group, number, index)
        for number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    }
    for name in set(updated) & set(parameters):
        parameter = parameters[name]
        if id(parameter) not in places:
            continue
        if hasattr(optimizer, "init_state"):
            group, number, index = places[id(parameter)]
            optimizer.init_state(group, parameter, number, index)
        else:
            optimizer.state[parameter] = _make_states(name, parameter, strategy)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _make_states(name: str, parameter: Tensor, strategy: Strategy) -> dict[str, Tensor]:
    """Empty states of a torch optimizer; Adafactor counts its steps on the CPU, the fused AdamW on the device."""
    states = {}
    for one in list_state_tensors(name, tuple(parameter.shape), STORED_DTYPES[parameter.dtype], strategy):
        key = one.name.partition("/")[0]
        on_cpu = key == "step" and strategy.optimizer == "adafactor"
        device = torch.device("cpu") if on_cpu else parameter.device
        states[key] = torch.empty(one.shape, dtype=TORCH_DTYPES[one.dtype], device=device)
    return states


def _set_random_states(rng: dict[str, Tensor], scalars: ScalarState) -> None:
    random.setstate((3, tuple(rng["rng/python"].tolist()), scalars.python_gaussian))
    gaussian = scalars.numpy_gaussian
    words = rng["rng/numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, scalars.numpy_position, int(gaussian is not None), gaussian or 0.0))
    torch.set_rng_state(rng["rng/torch"])
    if torch.cuda.is_initialized():
        torch.cuda.set_rng_state(rng["rng/cuda"])
