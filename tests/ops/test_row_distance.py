"""Lengths of differences of rows."""

import pytest
import torch
from differentiate import with_gradients

from hylo.ops.row_distance import row_distances


def test_formula_with_gradients() -> None:
    x, y = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    inputs = {"x": x.requires_grad_()}
    expected = with_gradients([((x - y) ** 2).sum(-1) ** 0.5], inputs)
    torch.testing.assert_close(with_gradients([row_distances(x, y)], inputs), expected, rtol=0, atol=1e-12)


def test_rows_that_are_the_same_have_no_gradient() -> None:
    x = torch.randn(4, 7, requires_grad=True)
    row_distances(x, x.detach()).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_y_is_given() -> None:
    y = torch.randn(4, 7, requires_grad=True)
    row_distances(torch.randn(4, 7, requires_grad=True), y).sum().backward()
    assert y.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_in_float32(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 50, 64).to(dtype)
    result = row_distances(x, y)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), (x.double() - y.double()).norm(dim=-1), rtol=1e-5, atol=1e-6)
