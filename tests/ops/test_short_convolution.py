"""The causal convolution against its formula."""

import pytest
import torch

from hylo.ops.short_convolution import causal_convolution, short_convolution


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


@pytest.mark.parametrize("bias", [False, True])
def test_short_convolution_ends_in_silu(bias: bool) -> None:
    x, weight = torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    shift = torch.randn(5, dtype=torch.float64) if bias else None
    y = causal_convolution(x, weight, shift)
    torch.testing.assert_close(short_convolution(x, weight, shift), y / (1 + (-y).exp()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", [3, 5, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_past_inputs_are_those_of_a_longer_sequence(cut: int, bias: bool) -> None:
    x, weight = torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    shift = torch.randn(5, dtype=torch.float64) if bias else None
    whole = short_convolution(x, weight, shift)
    after = short_convolution(x[:, cut:], weight, shift, past=x[:, cut - 3 : cut])
    torch.testing.assert_close(after, whole[:, cut:], rtol=0, atol=1e-12)


def test_no_past_is_a_past_of_zeros() -> None:
    x, weight, shift = torch.randn(2, 5, 3), torch.randn(3, 4), torch.randn(3)
    with_zeros = short_convolution(x, weight, shift, past=torch.zeros(2, 3, 3))
    assert torch.equal(short_convolution(x, weight, shift), with_zeros)


def test_past_and_packed_documents_exclude_each_other() -> None:
    x, weight = torch.randn(1, 5, 3), torch.randn(3, 4)
    with pytest.raises(ValueError, match="not both"):
        short_convolution(x, weight, past=x[:, :3], cu_seqlens=torch.tensor([0, 2, 5]))


def test_half_precision_is_summed_in_float32() -> None:
    """The output is the float64 one, rounded once."""
    x, weight = torch.randn(1, 50, 8).bfloat16(), torch.randn(8, 4).bfloat16()
    expected = causal_convolution(x.double(), weight.double())
    result = causal_convolution(x, weight)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=1e-6)
