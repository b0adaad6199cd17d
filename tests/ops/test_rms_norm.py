"""RMS norms against their formula and transformers' own."""

import pytest
import torch
from differentiate import with_gradients
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hylo.mixers.norm import RMSNorm
from hylo.ops.rms_norm import add_then_norm, rms_norm

EPS = 0.1


def test_formula_with_gradients() -> None:
    x, residual = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    inputs = {name: value.requires_grad_() for name, value in {"x": x, "residual": residual}.items()}
    inputs["weight"] = torch.randn(8, dtype=torch.float64).requires_grad_()
    total = x + residual
    formula = inputs["weight"] * total / (total.pow(2).sum(-1, keepdim=True) / 8 + EPS).sqrt()
    # Both results reach the loss, as both are used in a layer.
    expected = with_gradients([formula, total], inputs)
    results = with_gradients(list(add_then_norm(x, residual, inputs["weight"], EPS)), inputs)
    torch.testing.assert_close(results, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_that_of_transformers_to_the_bit(dtype: torch.dtype) -> None:
    theirs, ours = LlamaRMSNorm(16, eps=1e-5).to(dtype), RMSNorm(16, eps=1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.normal_()
        ours.load_state_dict(theirs.state_dict())
    x, residual = torch.randn(2, 3, 7, 16).to(dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6 if dtype == torch.float32 else 0)
    normed, total = ours(x, residual=residual)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, ours(total))


def test_a_bfloat16_sum_joins_a_float32_stream() -> None:
    normed, total = add_then_norm(torch.randn(3, 8).bfloat16(), torch.randn(3, 8), torch.ones(8), EPS)
    assert normed.dtype == total.dtype == torch.float32
    assert torch.equal(normed, rms_norm(total, torch.ones(8), EPS))


def test_the_norm_may_be_narrower_than_the_stream() -> None:
    """As matrix products under autocast read it."""
    x, residual = torch.randn(3, 8).bfloat16(), torch.randn(3, 8)
    normed, total = add_then_norm(x, residual, torch.ones(8), EPS, torch.bfloat16)
    wide, _ = add_then_norm(x, residual, torch.ones(8), EPS)
    assert total.dtype == torch.float32
    assert torch.equal(normed, wide.bfloat16())
