"""Least squares with an L2 penalty, from sums over batches."""

import torch
from torch import Tensor

from hylo.errors import HyLoError


class RidgeRegression:
    """Least squares with an L2 penalty, from sums over batches."""

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None

    def add(self, features: Tensor, targets: Tensor, weight: float = 1.0) -> None:
        """`[N, F]` and `[N, D]`, which count `weight` times.

        Products in float32 whatever autocast says: squared features need the digits.
        """
        with torch.autocast(features.device.type, enabled=False):
            features, targets = features.float(), targets.float()
            gram, cross = (features.T @ x for x in (features, targets))
            gram, cross = gram.double() * weight, cross.double() * weight
        self._gram = gram if self._gram is None else self._gram + gram
        self._cross = cross if self._cross is None else self._cross + cross

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
