"""Mamba-2 in its grouped form against its formulas."""

import pytest
import torch
from layers import QWEN, convolved, mix, one_layer, parameters_of, rms_norm, weights
from torch import Tensor
from torch.nn import functional

from hylo import HyLoModel

# On a base of 4 heads of 8: as it is, one group a head, one group for all.
GEOMETRIES: dict[str, dict[str, int]] = {
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "one a head": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 5, "conv_size": 3},
    "one for all": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 6},
}


def formula(model: HyLoModel, x: Tensor, heads: int, groups: int, size: int) -> Tensor:
    """Rows z, x, B, C, dt; h_t = exp(dt A) h + dt B x^T, y_t = C^T h_t + D x_t, out_proj(RMSNorm(y * SiLU(z)))."""
    p = weights(model)
    inner, group = heads * size, groups * size
    rows = functional.linear(x, p["in_proj"], p.get("in_proj.bias"))
    z, xBC, dt = rows[..., :inner], rows[..., inner : 2 * inner + 2 * group], rows[..., 2 * inner + 2 * group :]
    xBC = convolved(xBC, p["conv1d"], p["conv1d.bias"])
    dt = functional.softplus(dt + p["dt_bias"])
    A = -p["A_log"].exp()
    out = torch.zeros_like(z)
    for b in range(x.shape[0]):
        for head in range(heads):
            # Neighbouring heads share a group.
            first = head // (heads // groups) * size
            own = slice(head * size, (head + 1) * size)
            h = x.new_zeros(size, size)
            for t in range(x.shape[1]):
                token, step = xBC[b, t], dt[b, t, head]
                value, B = token[first : first + size], token[group + first : group + first + size]
                C = token[2 * group + own.start : 2 * group + own.stop]
                h = (step * A[head]).exp() * h + step * torch.outer(B, value)
                y = h.T @ C + p["D"][head] * value
                gated = y * functional.silu(z[b, t, own])
                out[b, t, own] = rms_norm(gated, p["norm"][own], 1e-5)
    return functional.linear(out, p["out_proj"], p.get("out_proj.bias"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("length", [1, 2, 70])
@torch.no_grad()
def test_formula(geometry: str, bias: bool, length: int) -> None:
    sizes = GEOMETRIES[geometry]
    model = one_layer("mamba2", attention_bias=bias, mixer_geometry={"mamba2": sizes})
    assert ("in_proj.bias" in weights(model)) == bias
    x = torch.randn(2, length, 32, dtype=torch.float64)
    expected = formula(model, x, sizes["num_heads"], sizes["num_kv_heads"], sizes["head_dim"])
    torch.testing.assert_close(mix(model, x), expected, rtol=0, atol=1e-10)


def test_published_shapes() -> None:
    shapes = parameters_of("mamba2", {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128}, **QWEN)
    assert shapes == {
        # z, x, B, C and dt.
        "in_proj.weight": (2048 + 1024 + 1024 + 2048 + 16, 2048),
        "conv1d.weight": (2048 + 2 * 1024, 1, 4),
        "conv1d.bias": (2048 + 2 * 1024,),
        "dt_bias": (16,),
        "A_log": (16,),
        "D": (16,),
        "norm.weight": (2048,),
        "out_proj.weight": (2048, 2048),
    }
