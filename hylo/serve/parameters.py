"""Parameters that are no linear map's, cut over the ranks by their first dimension."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.utils import set_weight_attrs


class Weight(nn.Module):
    """One parameter under the name `weight`, where a checkpoint has a module."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


# Rows of a joined map come in multiples of this: what is no multiple of eight falls back to kernels of half the speed.
ROWS = 64


def in_whole_tiles(sizes: Sequence[int]) -> list[int]:
    """The rows of maps to be joined, and of one more where each rank's part is not of whole tiles, to fill it up.

    The outputs of the one more mean nothing.
    """
    ranks = get_tensor_model_parallel_world_size()
    spare = -sum(size // ranks for size in sizes) % ROWS * ranks
    return [*sizes, spare] if spare else [*sizes]


def joined_parameter(sizes: Sequence[int], *tail: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Several tensors below one another, of each this rank's part.

    Args:
        sizes: rows of each tensor over all ranks; `weight_loader(parameter, tensor, which)` takes them one by one.
        tail: the other dimensions.

    Returns:
        zeros, `[sum of sizes / ranks, *tail]`.
    """
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    parts = [size // ranks for size in sizes]
    parameter = nn.Parameter(torch.zeros(sum(parts), *tail, dtype=dtype), requires_grad=False)

    def load(parameter: nn.Parameter, tensor: Tensor, which: int = 0) -> None:
        begin, size = sum(parts[:which]), parts[which]
        mine = tensor.reshape(sizes[which], *tail)[rank * size : (rank + 1) * size]
        parameter.data[begin : begin + size].copy_(mine)

    set_weight_attrs(parameter, {"weight_loader": load})
    return parameter
