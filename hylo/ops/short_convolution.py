"""Causal depthwise convolution over time."""

from torch import Tensor
from torch.nn import functional


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_t = sum_j weight_j * x_{t - W + 1 + j} (+ bias), per channel; the last tap meets the newest input.

    Args:
        x: `[B, T, C]`; zeros are assumed before it.
        weight: `[C, W]`.
        bias: `[C]`.

    Returns:
        `[B, T, C]`.
    """
    x = functional.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    return functional.conv1d(x, weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
