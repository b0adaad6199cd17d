"""The length of the difference of two rows: a kernel on a GPU, plain torch as its reference and elsewhere."""

import torch
from torch import Tensor

from hylo.ops.kernels import fuses


def row_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_t - y_t|_2 over the last dim, in float32 or wider; y has no gradient, and x none where both are the same.

    Args:
        x, y: `[..., D]`, of one shape.

    Returns:
        `[...]`.
    """
    if fuses(x, "triton"):
        from hylo.ops import row_distance_triton

        return row_distance_triton.row_distances(x, y)
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return torch.linalg.vector_norm(x.to(wide) - y.detach().to(wide), dim=-1)
