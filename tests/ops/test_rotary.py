"""Rotary embedding against transformers' own, and by complex numbers."""

import pytest
import torch
from differentiate import with_gradients
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hylo.ops.rotary import rotate


def angles(rows: int, length: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.randn(rows, length, size // 2, dtype=torch.float64)
    return torch.cat([half, half], dim=-1).cos(), torch.cat([half, half], dim=-1).sin()


@pytest.mark.parametrize("rows", [1, 3])
def test_whole_heads_are_as_in_transformers(rows: int) -> None:
    q, k = torch.randn(3, 7, 4, 8, dtype=torch.float64), torch.randn(3, 7, 2, 8, dtype=torch.float64)
    cos, sin = angles(rows, 7, 8)
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for x, value in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotate(x, cos, sin), value.transpose(1, 2), rtol=0, atol=1e-12)


def test_the_last_values_turn_as_complex_numbers_and_the_others_stay() -> None:
    x = torch.randn(2, 5, 3, 10, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(1, 5, 6)
    pairs = torch.complex(x[..., 4:7], x[..., 7:]) * torch.complex(cos, sin)[:, :, None, :3]
    expected = torch.cat([x[..., :4], pairs.real, pairs.imag], dim=-1)
    inputs = {"x": x}
    torch.testing.assert_close(
        with_gradients([rotate(x, cos, sin)], inputs), with_gradients([expected], inputs), rtol=0, atol=1e-12
    )


def test_half_precision_is_rounded_once() -> None:
    x = torch.randn(2, 5, 3, 8).bfloat16()
    cos, sin = (part.float() for part in angles(1, 5, 8))
    result = rotate(x, cos, sin)
    assert result.dtype == torch.bfloat16
    exact = rotate(x.double(), cos.double(), sin.double())
    torch.testing.assert_close(result.double(), exact, rtol=2**-8, atol=1e-6)
