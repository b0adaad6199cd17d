"""Muon (Keller Jordan, 2024) for the linear maps of mixers, AdamW for all else, as one optimizer.

A matrix W moves against its momentum with all singular values made about 1:

    M = mu M + (1 - mu) G,   U = G + mu (M - G),   W -= lr * 0.2 sqrt(max(rows, columns)) * orthogonal(U)

The factor makes an update as large as AdamW's by its root mean square (arXiv 2502.16982), so that one learning rate
serves both. `torch.optim.Muon` computes the same, a matrix at a time, and not on shards.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from hylo.distill.stage1 import replaced_layers
from hylo.modeling import HyLoForCausalLM

MOMENTUM = 0.95
# Of the quintic iteration, whose slope at zero they make steep, and how often it is done.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonal(matrices: Tensor) -> Tensor:
    """`[N, A, B]` with singular values made about 1, by Newton-Schulz in bfloat16."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    # The spectral norm is at most 1 then.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonAdamW(Optimizer):
    """Steps groups with `muon` by Muon, the others by AdamW."""

    def __init__(self, groups: Iterable[dict[str, Any]], learning_rate: float, betas: tuple[float, float]) -> None:
        # `fused` tells those who load a state where its steps belong.
        defaults = {"lr": learning_rate, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, "muon": False, "fused": True}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                (self._muon if group["muon"] else self._adamw)(parameters, group)

    def _muon(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        # Those of one size are multiplied together. Every rank does so with whole matrices, and keeps its own part.
        for shape, same in groupby(sorted(parameters, key=lambda one: tuple(one.shape)), lambda one: one.shape):
            members, updates = list(same), []
            for parameter in members:
                state, gradient = self.state[parameter], parameter.grad
                assert gradient is not None
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                state["momentum"].lerp_(gradient, 1 - MOMENTUM)
                update = gradient.lerp(state["momentum"], MOMENTUM)
                updates.append(update.full_tensor() if isinstance(update, DTensor) else update)
            scale = group["lr"] * 0.2 * max(shape) ** 0.5
            for parameter, update in zip(members, orthogonal(torch.stack(updates)), strict=True):
                own: Tensor = update.to(parameter.dtype)
                if isinstance(parameter, DTensor):
                    own = distribute_tensor(own, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(own, alpha=-scale)

    def _adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,  # type: ignore[arg-type]
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def muon_for(
    student: HyLoForCausalLM, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> MuonAdamW:
    """For what trains of a student: the linear maps of replaced mixers by Muon. What is no matrix does not decay."""
    layers = [student.model.decoder_layers[i] for i in replaced_layers(student)]
    maps = [one for layer in layers for one in layer.mixer.modules() if isinstance(one, nn.Linear)]
    ours = {id(one.weight) for one in maps}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in student.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in ours, parameter.ndim > 1), []).append(parameter)
    return MuonAdamW(
        [
            {"params": members, "muon": muon, "weight_decay": weight_decay if decays else 0.0}
            for (muon, decays), members in groups.items()
        ],
        learning_rate,
        betas,
    )
