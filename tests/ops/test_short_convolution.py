"""The causal convolution against its formula."""

import pytest
import torch

from hylo.ops.short_convolution import causal_convolution


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_formula(length: int, taps: int, bias: bool) -> None:
    x, weight = torch.randn(2, length, 5, dtype=torch.float64), torch.randn(5, taps, dtype=torch.float64)
    shift = torch.randn(5, dtype=torch.float64) if bias else None
    expected = torch.zeros_like(x)
    for t in range(length):
        for j in range(taps):
            source = t - taps + 1 + j
            if source >= 0:
                expected[:, t] += weight[:, j] * x[:, source]
        if bias:
            expected[:, t] += shift
    torch.testing.assert_close(causal_convolution(x, weight, shift), expected, rtol=0, atol=1e-12)


def test_identity_tap() -> None:
    """A converted layer starts with the newest tap at one: the input comes through unchanged."""
    x, weight = torch.randn(1, 7, 3), torch.zeros(3, 4)
    weight[:, -1] = 1
    assert torch.equal(causal_convolution(x, weight), x)


def test_causal() -> None:
    x, weight = torch.randn(1, 8, 3), torch.randn(3, 4)
    changed = x.clone()
    changed[:, 5:] += 1
    before, after = causal_convolution(x, weight), causal_convolution(changed, weight)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])
