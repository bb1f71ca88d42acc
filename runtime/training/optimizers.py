"""Optimizers by their recipe names, for bf16 weights with updates that are rounded stochastically."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ...planner.arithmetic import ROUNDED_ELEMENTS
from .compiled_adamw import compile_update, fold
from .rounding import round_stochastically


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    rounding: str,
    compiled: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of a strategy over the model's trainable parameters.

    name:         adamw, adamw_32bit, adamw_8bit, paged_adamw, paged_adamw_8bit or adafactor
    weight_decay: applied to matrices only, not to biases and norms, as transformers' Trainer does
    rounding:     nearest or stochastic
    compiled:     whether the update of a stochastically rounding adamw is compiled; others have kernels of their own
    """
    groups = _parameter_groups(model, weight_decay)
    stochastic = rounding == "stochastic"
    if name == "adamw":
        if stochastic:
            return StochasticAdamW(groups, lr=learning_rate, compiled=compiled)
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    if name == "adafactor":
        optimizer = StochasticAdafactor if stochastic else torch.optim.Adafactor
        return optimizer(groups, lr=learning_rate)
    return _make_bitsandbytes(name, groups, learning_rate, stochastic)


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Update, unless the gradients' norm is not finite. Fused kernels decide that on the device, as gradient scaling
    has them do; before other optimizers the host waits for the norm."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        vars(optimizer)["found_inf"] = (~torch.isfinite(norm)).float()
        optimizer.step()
        del vars(optimizer)["found_inf"]
    elif math.isfinite(float(norm)):
        optimizer.step()


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _make_bitsandbytes(name: str, groups: list[dict[str, Any]], lr: float, stochastic: bool) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    plain = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "adamw_32bit": bnb.optim.AdamW32bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw": bnb.optim.PagedAdamW32bit,
    }[name]
    kind = type(f"Stochastic{plain.__name__}", (_StochasticRounding, plain), {}) if stochastic else plain
    return kind(groups, lr=lr)  # type: ignore[no-any-return]


def _list_parts(parameter: Tensor) -> Iterator[slice]:
    """The parts of a weight that are updated one after the other."""
    elements, most = parameter.numel(), ROUNDED_ELEMENTS["cpu" if parameter.device.type == "cpu" else "cuda"]
    for start in range(0, elements, most):
        yield slice(start, min(start + most, elements))


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW for bf16 weights with bf16 moments: fp32 arithmetic, weights and moments rounded stochastically.

    Keeps 4 bytes of state a parameter, as torch.optim.AdamW does for bf16 weights; its second moment, too, would
    otherwise stop decaying (0.1 % a step is less than bf16 resolves).

    compiled:  one kernel updates a tensor, and keeps nothing of it in fp32
    found_inf: 1.0 where the update is to change nothing; a tensor on the device, set and removed by the caller
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        compiled: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._update_all = self._update_compiled if compiled else self._update_in_chunks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "fitune's step computes the gradients itself"
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update_all(group, parameters)

    def _find_state(self, parameter: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """(weight and moments, gradient, counter of steps); moments and counter are made at first."""
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        assert gradient is not None, "the caller looked"
        return [parameter.data, state["exp_avg"], state["exp_avg_sq"]], gradient, state["step"]

    def _update_compiled(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        update, device = compile_update(), parameters[0].device
        rate, decay = (torch.full((), group["lr"] * factor, device=device) for factor in (1.0, group["weight_decay"]))
        found_inf = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        for parameter in parameters:
            kept, gradient, counter = self._find_state(parameter)
            folded = [fold(tensor) for tensor in kept]
            update(
                folded,
                fold(gradient.contiguous()),
                counter,
                rate,
                decay,
                found_inf,
                betas=group["betas"],
                eps=group["eps"],
            )

    def _update_in_chunks(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            tensors, gradient, counter = self._find_state(parameter)
            kept, gradient, before = [tensor.view(-1) for tensor in tensors], gradient.reshape(-1), counter.clone()
            for part in _list_parts(parameter):
                counter.copy_(before)
                self._update_part(group, [tensor[part] for tensor in kept], gradient[part], counter)

    def _update_part(self, group: dict[str, Any], kept: Sequence[Tensor], gradient: Tensor, counter: Tensor) -> None:
        """Of the weight and its moments; their copies in fp32 are gone before those of the next part are made."""
        exact = [tensor.float() for tensor in kept]
        adamw(
            [exact[0]],
            [gradient.float()],
            [exact[1]],
            [exact[2]],
            [],
            [counter],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            found_inf=self.found_inf,
        )
        for tensor, value in zip(kept, exact, strict=True):
            round_stochastically(tensor, value)


class _StochasticRounding:
    """Mixed into a bitsandbytes optimizer: each update runs on fp32 copies of parts of a bf16 weight."""

    state: dict[Any, dict[str, Any]]

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        if p.dtype != torch.bfloat16:
            super().update_step(group, p, gindex, pindex)  # type: ignore[misc]
            return
        state = self.state[p]
        p.data = p.data.contiguous()
        assert p.grad is not None, "bitsandbytes updates parameters with gradients only"
        gradient, step = p.grad.reshape(-1), state["step"]
        for part in _list_parts(p):
            piece = nn.Parameter(p.data.view(-1)[part].float(), requires_grad=False)
            piece.grad = gradient[part].float()
            self.state[piece] = _slice_state(state, part, step)
            super().update_step(group, piece, gindex, pindex)  # type: ignore[misc]
            del self.state[piece]
            round_stochastically(p.data.view(-1)[part], piece.data)
        state["step"] = step + 1


def _slice_state(state: dict[str, Any], part: slice, step: int) -> dict[str, Any]:
    """The part of a bitsandbytes state that belongs to elements `part`, whose start is a multiple of its 256-blocks."""
    blocks = slice(part.start // 256, -(-part.stop // 256))
    sliced = {"state1": part, "state2": part, "absmax1": blocks, "absmax2": blocks}
    return {
        key: value.view(-1)[sliced[key]] if key in sliced and isinstance(value, Tensor) else value
        for key, value in {**state, "step": step}.items()
    }


class StochasticAdafactor(torch.optim.Adafactor):
    """Adafactor for bf16 weights: one tensor at a time in fp32, rounded stochastically.

    Rows and columns need the whole tensor, so the temporary is 8 bytes an element of the largest one.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "fitune's step computes the gradients itself"
        groups = self.param_groups
        for group in groups:
            for parameter in [p for p in group["params"] if p.grad is not None]:
                weight, gradient = parameter.data, parameter.grad
                parameter.data, parameter.grad = weight.float(), gradient.float()
                self.param_groups = [{**group, "params": [parameter]}]
                super().step()  # type: ignore[no-untyped-call]
                round_stochastically(weight, parameter.data)
                parameter.data, parameter.grad = weight, gradient
        self.param_groups = groups
