"""Weights that FSDP2 keeps in shards, for operations that read them outside the module that owns them.

FSDP2 gathers the weights of a module around its forward pass. The loss reads the heads after that, when they are shards
again (DTensor), or whole where FSDP2 left them so. Whole weights are plain tensors: nothing is done, and FSDP2 reduces
their gradients itself. For shards the operation gathers the weight and reduces its gradient, by the mean over ranks as
FSDP2 does for every other weight.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def whole(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight on every rank, in `dtype`, without a gradient. Every rank of its mesh has to call."""
    weight = weight.detach().to(dtype)
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def ranks_of(weight: Tensor) -> int:
    """Over how many ranks the gradient of a weight is averaged here: 1 unless it is in shards."""
    return weight.device_mesh.size() if isinstance(weight, DTensor) else 1


def sum_into_shards(gradient: Tensor, weight: Tensor) -> Tensor:
    """The sum over ranks of their gradients of a whole weight, in the weight's shards; as it is for a plain weight."""
    if not isinstance(weight, DTensor):
        return gradient
    mesh = weight.device_mesh
    partial = DTensor.from_local(gradient, mesh, [Partial()] * mesh.ndim, run_check=False)
    return partial.redistribute(placements=weight.placements)
