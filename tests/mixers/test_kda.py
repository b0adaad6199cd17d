"""Kimi Delta Attention against its formulas."""

import pytest
import torch
from layers import convolved, delta_rule, mix, one_layer, rms_norm, weights
from torch import Tensor
from torch.nn import functional

from hylo import HyLoModel

GEOMETRIES: dict[str, dict[str, int]] = {
    "aligned": {"num_heads": 4, "head_k_dim": 8, "head_v_dim": 8, "gate_rank": 8},
    "3 heads of 16 and 32": {"num_heads": 3, "head_k_dim": 16, "head_v_dim": 32, "gate_rank": 5},
}


def formula(model: HyLoModel, x: Tensor, heads: int) -> Tensor:
    """y = W_o (RMSNorm(o) * sigmoid(W_g2 W_g1 x + b_g)), with a decay a key channel from W_f2 W_f1 x."""
    p = weights(model)
    q = functional.linear(x, p["q_proj"], p.get("q_proj.bias"))
    k, v = x @ p["k_proj"].T, x @ p["v_proj"].T
    q, k, v = (
        convolved(y, p[f"{name}_conv1d"]).unflatten(-1, (heads, -1)) for name, y in (("q", q), ("k", k), ("v", v))
    )
    step = functional.softplus(x @ p["f_proj.0"].T @ p["f_proj.1"].T + p["dt_bias"]).unflatten(-1, (heads, -1))
    decay = (-p["A_log"].exp()[:, None] * step).exp()
    out = delta_rule(q, k, v, decay, (x @ p["b_proj"].T).sigmoid())
    gate = (x @ p["g_proj.0"].T @ p["g_proj.1"].T + p["g_proj.1.bias"]).sigmoid().unflatten(-1, (heads, -1))
    y = rms_norm(out, p["o_norm"], 1e-5) * gate
    return functional.linear(y.flatten(2), p["o_proj"], p.get("o_proj.bias"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("length", [1, 2, 40])
@torch.no_grad()
def test_formula(geometry: str, bias: bool, length: int) -> None:
    sizes = GEOMETRIES[geometry]
    model = one_layer("kda", attention_bias=bias, mixer_geometry={"kda": sizes})
    assert ("q_proj.bias" in weights(model)) == bias
    x = torch.randn(2, length, 32, dtype=torch.float64)
    torch.testing.assert_close(mix(model, x), formula(model, x, sizes["num_heads"]), rtol=0, atol=1e-10)
