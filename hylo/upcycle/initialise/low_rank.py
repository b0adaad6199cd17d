"""The best low-rank factors of a matrix, and the roots of metrics in which they are the best."""

import torch
from torch import Tensor


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors (up `[m, rank]`, down `[rank, n]`) in the Frobenius norm, balanced in scale.

    With the leading eigenvectors U of M M^T (or V of M^T M, whichever is smaller) the product is U U^T M: exact at full
    rank, however well the eigenvalues were found. In float64; an order of magnitude faster than an SVD of large maps.
    """
    wide = matrix.double()
    if wide.shape[0] > wide.shape[1]:
        down, up = low_rank(wide.T, rank)
        return up.T.to(matrix.dtype).contiguous(), down.T.to(matrix.dtype).contiguous()
    _, vectors = torch.linalg.eigh(wide @ wide.T)
    # Ascending eigenvalues: the last vectors lead.
    up = vectors[:, -rank:].flip(1)
    down = up.T @ wide
    root = down.norm(dim=1).sqrt()
    # A direction without weight adds nothing, and would be divided by zero.
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    return (up * root).to(matrix.dtype), (down * inverse[:, None]).to(matrix.dtype)


def symmetric_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a positive semidefinite matrix, and that root's inverse; tiny eigenvalues are lifted."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp_min(1e-10 * values[-1].clamp_min(1e-30)).sqrt()
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
