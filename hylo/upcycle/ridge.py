"""Least squares with an L2 penalty, from sums over batches."""

import torch
from torch import Tensor

from hylo.errors import HyLoError


class RidgeRegression:
    """Least squares with an L2 penalty, from sums over batches."""

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None
        self._squares = 0.0
        self._count = 0.0

    def add(self, features: Tensor, targets: Tensor, weight: float = 1.0) -> None:
        """`[N, F]` and `[N, D]`, which count `weight` times.

        Products in float32 whatever autocast says: squared features need the digits.
        """
        with torch.autocast(features.device.type, enabled=False):
            features, targets = features.float(), targets.float()
            gram, cross = (features.T @ x for x in (features, targets))
            gram, cross = gram.double() * weight, cross.double() * weight
            self._squares += targets.double().square().sum().item() * weight
            self._count += len(features) * weight
        self._gram = gram if self._gram is None else self._gram + gram
        self._cross = cross if self._cross is None else self._cross + cross

    def __add__(self, other: "RidgeRegression") -> "RidgeRegression":
        """The sums of both texts."""
        if other._gram is None or other._cross is None:
            return self
        if self._gram is None or self._cross is None:
            return other
        both = RidgeRegression()
        both._gram, both._cross = self._gram + other._gram, self._cross + other._cross
        both._squares, both._count = self._squares + other._squares, self._count + other._count
        return both

    def solve(self, penalty: float) -> Tensor:
        """W `[D, F]`, float64; the penalty is relative to the mean square of the features.

        Raises HyLoError where features or targets are not finite, or all features are zero.
        """
        assert self._gram is not None and self._cross is not None
        if not torch.isfinite(self._gram).all() or not torch.isfinite(self._cross).all() or not self._gram.any():
            raise HyLoError("calibration: a layer's values are not finite or all zero; are the base's weights sound?")
        size = self._gram.shape[0]
        ridge = penalty * self._gram.diagonal().mean() * torch.eye(size, dtype=torch.float64, device=self._gram.device)
        return torch.linalg.solve(self._gram + ridge, self._cross).T

    def error(self, solution: Tensor) -> float:
        """The squared error that W `[D, F]` leaves, as a share of the targets' squares."""
        assert self._gram is not None and self._cross is not None
        explained = 2 * (solution.T * self._cross).sum() - (solution @ self._gram * solution).sum()
        return 1 - explained.item() / max(self._squares, 1e-30)

    @property
    def mean_square(self) -> Tensor:
        """Of the features, `[F, F]`, float64."""
        assert self._gram is not None
        return self._gram / self._count
