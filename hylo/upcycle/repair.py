"""An MLP that makes up for what its layer's new mixer lacks.

What a mixer misses of attention is in part a function of the token that reads, which the MLP above it sees too. So on
top of the base's `down_proj` comes the ridge solution D of

    min_D  sum_t |D m_t - e_t|^2 / |h_t|^2 + lambda |D|^2,

m_t the MLP's values before `down_proj`, e_t what the layer adds to the stream in the teacher and not in the student,
h_t the stream that the MLP reads: the next norm divides by its size.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from hylo.modeling import HyLoDecoderLayer
from hylo.upcycle.ridge import RidgeRegression
from hylo.upcycle.trace import reaching


@torch.no_grad()
def repair_mlp(
    layer: HyLoDecoderLayer, text: Iterable[tuple[Tensor, Tensor, Tensor, Tensor, float]], penalty: float
) -> None:
    """Adds D to the `down_proj` of a student's layer.

    Args:
        text: batch by batch the layer's input and what its mixer makes of it, what the teacher's layer adds to its own
            input, `[B, T, d]` each, which tokens are real, `[B, T]`, and how often the batch counts.
        penalty: lambda, relative to the mean square of a value before `down_proj`.

    Raises HyLoError where values are not finite.
    """
    down = layer.mlp.get_submodule("down_proj")
    weight = down.get_parameter("weight")
    regression = RidgeRegression()
    for hidden, mixed, added, real, counts in text:
        values = reaching(down, partial(layer.after_mixing, hidden, mixed))
        lacks = added.float() - mixed.float() - down(values).float()
        size = (hidden.float() + mixed.float()).square().mean(-1, keepdim=True).clamp_min(1e-30).sqrt()
        regression.add((values.float() / size)[real], (lacks / size)[real], counts)
    weight += regression.solve(penalty).to(weight.dtype)
