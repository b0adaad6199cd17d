"""Results with their gradients, to hold two ways of computing the same side by side."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def with_gradients(results: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The results by number, and by name the gradient of every input through all of them, weighted at random.

    The weights depend on the shapes alone, so that two calls compare.
    """
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    loss = torch.stack([(x * w).sum() for x, w in zip(results, weights, strict=True)]).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    values = {str(i): result.detach() for i, result in enumerate(results)}
    return values | dict(zip(inputs, gradients, strict=True))
