"""Gated norms against their formulas."""

import pytest
import torch
from differentiate import with_gradients

from hylo.ops.gated_norm import Activation, gate_then_norm, norm_then_gate

EPS = 0.1


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_norm_then_gate(activation: Activation) -> None:
    x, gate = torch.randn(2, 2, 5, 3, 8, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    inputs = {"x": x.requires_grad_(), "gate": gate.requires_grad_(), "weight": weight.requires_grad_()}
    opened = 1 / (1 + (-gate).exp()) * (gate if activation == "silu" else 1)
    formula = x / (x.pow(2).sum(-1, keepdim=True) / 8 + EPS).sqrt() * weight * opened
    result = norm_then_gate(**inputs, eps=EPS, activation=activation)
    expected = with_gradients([formula], inputs)
    torch.testing.assert_close(with_gradients([result], inputs), expected, rtol=0, atol=1e-10)


def test_gate_then_norm_has_a_group_a_head() -> None:
    x, gate = torch.randn(2, 2, 5, 3, 8, dtype=torch.float64)
    weight = torch.randn(24, dtype=torch.float64)
    inputs = {"x": x.requires_grad_(), "gate": gate.requires_grad_(), "weight": weight.requires_grad_()}
    gated = x * gate / (1 + (-gate).exp())
    heads = [
        gated[:, :, h] / (gated[:, :, h].pow(2).sum(-1, keepdim=True) / 8 + EPS).sqrt() * weight[8 * h : 8 * h + 8]
        for h in range(3)
    ]
    expected = with_gradients([torch.stack(heads, dim=2)], inputs)
    result = gate_then_norm(**inputs, eps=EPS)
    torch.testing.assert_close(with_gradients([result], inputs), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", [norm_then_gate, gate_then_norm])
def test_half_precision_is_computed_in_float32(norm: object) -> None:
    x, gate = torch.randn(2, 2, 5, 1, 8).bfloat16()
    weight = torch.randn(8)
    result = norm(x, gate, weight, 1e-5)
    assert result.dtype == torch.bfloat16
    expected = norm(x.double(), gate.double(), weight.double(), 1e-5)
    torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=1e-6)
