"""What the references of all linear mixers share: layouts, and the passage from chunk to chunk.

Every linear mixer keeps a state S of shape `[K, V]` a head and reads it by S^T q. Within a chunk that begins with S:

    writes  U = A - W S                                 (W = 0 where the rule writes v as it is)
    outputs O = Q S + P U
    state   S' = D S + K^T U

The mixers differ only in how A, W, Q, P, K and D follow from their inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def head_first(*tensors: Tensor) -> list[Tensor]:
    """`[B, T, H, ...]` to `[B, H, T, ...]`, in float32 or wider."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [tensor.transpose(1, 2).to(dtype) for tensor in tensors]


def initial_state(state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """The given state, or zeros, `[B, H, K, V]`; k and v are head first."""
    batch, heads, _, key_dim = k.shape
    if state is None:
        return k.new_zeros(batch, heads, key_dim, v.shape[-1])
    return state.to(k.dtype)


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dim, in float32 or wider: as fla's kernels do."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def softplus_decay(x: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Log decay -exp(A_log) softplus(x + dt_bias), in float32 or wider; the arguments must broadcast."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return -A_log.to(x.dtype).exp() * functional.softplus(x + dt_bias)


def into_chunks(chunk_size: int, *tensors: Tensor) -> list[Tensor]:
    """`[B, H, T, ...]` to `[B, H, N, C, ...]`, padded with zeros: such tokens write nothing and decay nothing."""
    padding = -tensors[0].shape[2] % chunk_size
    chunks = []
    for tensor in tensors:
        if padding:
            tensor = functional.pad(tensor, (0, 0) * (tensor.dim() - 3) + (0, padding))
        chunks.append(tensor.unflatten(2, (-1, chunk_size)))
    return chunks


def causal_differences(decay: Tensor) -> Tensor:
    """exp(c_i - c_j) where j <= i, else 0.

    Args:
        decay: c, log decays summed from the chunk's begin, `[B, H, N, C]`, or `[B, H, N, C, K]`.

    Returns:
        `[B, H, N, C, C]`, or `[B, H, N, C, C, K]`; masked before the exponential, which overflows above the diagonal.
    """
    size = decay.shape[3]
    above = torch.ones(size, size, dtype=torch.bool, device=decay.device).triu(1)
    if decay.dim() == 5:
        above = above[..., None]
    return (decay.unsqueeze(4) - decay.unsqueeze(3)).masked_fill(above, -torch.inf).exp()


def solve_writes(overlap: Tensor, right: Tensor) -> Tensor:
    """X of (I + overlap) X = right, overlap strictly lower triangular: `[..., C, C]` and `[..., C, R]`."""
    system = overlap + torch.eye(overlap.shape[-1], dtype=overlap.dtype, device=overlap.device)
    return torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)


@dataclass(frozen=True)
class Chunks:
    """The matrices above for every chunk.

    Attributes:
        queries: Q, `[B, H, N, C, K]`.
        scores: P, `[B, H, N, C, C]`.
        keys: K, `[B, H, N, C, K]`.
        writes: A, `[B, H, N, C, V]`.
        state_writes: W, `[B, H, N, C, K]`, or None for zero.
        decay: D, `[B, H, N, K or 1]`.
    """

    queries: Tensor
    scores: Tensor
    keys: Tensor
    writes: Tensor
    state_writes: Tensor | None
    decay: Tensor

    def scan(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `[B, H, N * C, V]` and the last state, from the first state `[B, H, K, V]`."""
        outputs = []
        for n in range(self.queries.shape[2]):
            writes = self.writes[:, :, n]
            if self.state_writes is not None:
                writes = writes - self.state_writes[:, :, n] @ state
            outputs.append(self.queries[:, :, n] @ state + self.scores[:, :, n] @ writes)
            state = state * self.decay[:, :, n, :, None] + self.keys[:, :, n].transpose(-1, -2) @ writes
        return torch.cat(outputs, dim=2), state
