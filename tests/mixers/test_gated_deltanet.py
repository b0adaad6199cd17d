"""Gated DeltaNet against its formulas."""

from typing import Any

import pytest
import torch
from layers import LLAMA_1B, LLAMA_3B, convolved, delta_rule, mix, one_layer, parameters_of, rms_norm, weights
from torch import Tensor
from torch.nn import functional

from hylo import HyLoModel

# On a base of 4 heads of 8: head-aligned, and sizes that divide nothing of it.
GEOMETRIES: dict[str, dict[str, int]] = {
    "aligned": {"num_heads": 4, "head_k_dim": 8, "head_v_dim": 8},
    "3 heads of 16 and 32": {"num_heads": 3, "head_k_dim": 16, "head_v_dim": 32},
    "width 2": {"num_heads": 5, "head_k_dim": 3, "head_v_dim": 2, "conv_size": 2},
}


def formula(model: HyLoModel, x: Tensor, heads: int) -> Tensor:
    """y = W_o (RMSNorm(o) * SiLU(W_g x)), o from the gated delta rule over convolved q, k and v."""
    p = weights(model)
    q = functional.linear(x, p["q_proj"], p.get("q_proj.bias"))
    k, v = x @ p["k_proj"].T, x @ p["v_proj"].T
    q, k, v = (
        convolved(y, p[f"{name}_conv1d"]).unflatten(-1, (heads, -1)) for name, y in (("q", q), ("k", k), ("v", v))
    )
    step = functional.softplus(x @ p["a_proj"].T + p["dt_bias"])
    decay = (-p["A_log"].exp() * step).exp()[..., None]
    out = delta_rule(q, k, v, decay, (x @ p["b_proj"].T).sigmoid())
    gate = functional.silu(x @ p["g_proj"].T).unflatten(-1, (heads, -1))
    y = rms_norm(out, p["o_norm"], 1e-5) * gate
    return functional.linear(y.flatten(2), p["o_proj"], p.get("o_proj.bias"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("length", [1, 2, 70])
@torch.no_grad()
def test_formula(geometry: str, bias: bool, length: int) -> None:
    sizes = GEOMETRIES[geometry]
    model = one_layer("gdn", attention_bias=bias, mixer_geometry={"gdn": sizes})
    assert ("q_proj.bias" in weights(model)) == bias
    x = torch.randn(2, length, 32, dtype=torch.float64)
    torch.testing.assert_close(mix(model, x), formula(model, x, sizes["num_heads"]), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("base", "heads", "parameters"),
    # q and k; v, gate and o; beta and alpha; A_log and dt_bias; the norm; the convolutions.
    [
        (LLAMA_1B, 6, (2 * 1536 + 3 * 3072) * 2048 + 12 * 2048 + 12 + 512 + 4 * (2 * 1536 + 3072)),
        (LLAMA_3B, 9, (2 * 2304 + 3 * 4608) * 3072 + 18 * 3072 + 18 + 512 + 4 * (2 * 2304 + 4608)),
    ],
)
def test_published_parameters(base: dict[str, Any], heads: int, parameters: int) -> None:
    shapes = parameters_of("gdn", {"num_heads": heads, "head_k_dim": 256, "head_v_dim": 512}, **base)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
