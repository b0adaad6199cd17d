"""Multi-Head Latent Attention against its formulas, and its decoding against its forward."""

import math
from typing import Any

import pytest
import torch
from layers import LLAMA_1B, LLAMA_3B, QWEN, mix, one_layer, parameters_of, rms_norm, weights
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import hylo.mixers.softmax
from hylo import HyLoModel
from hylo.cache import make_cache

VARIANTS = [
    "mla",
    "mla_low_rank_query",
    "mla_rope_pairs",
    "mla_all_rotary",
    "mla_query_norm",
    "mla_key_norm",
]
HEADS, GROUPS, HIDDEN = 4, 2, 32


def rotated(x: Tensor, position: int, pairs: list[float]) -> Tensor:
    """Pair i of `[..., rope]`, the values i and i + rope / 2, turned by position times its frequency."""
    as_complex = torch.complex(*x.chunk(2, dim=-1))
    turned = as_complex * torch.polar(torch.ones(len(pairs)).double(), position * torch.tensor(pairs).double())
    return torch.cat([turned.real, turned.imag], dim=-1)


def formula(model: HyLoModel, x: Tensor) -> Tensor:
    """Each head: its norm, rotation of the last values, softmax over the past, values read from the latent."""
    p, sizes = weights(model), model.config.geometry("mla")
    nope, rope, rank = sizes.qk_nope_head_dim, sizes.qk_rope_head_dim, sizes.kv_lora_rank
    eps, head_dim = model.config.rms_norm_eps, model.config.head_dim
    # Chosen pairs of a head of the base turn at their own frequencies.
    exponents = [2 * i / head_dim for i in sizes.rope_pairs] if sizes.rope_pairs else torch.arange(0, 1, 2 / rope)
    frequencies = [10_000.0 ** -float(exponent) for exponent in exponents]
    if sizes.q_lora_rank is None:
        queries = x @ p["q_proj"].T + p.get("q_proj.bias", 0)
    else:
        queries = x @ p["q_a_proj"].T @ p["q_b_proj"].T + p.get("q_b_proj.bias", 0)
    shared = x @ p["kv_a_proj_with_mqa"].T + p.get("kv_a_proj_with_mqa.bias", 0)
    per_kv_head = (shared[..., :rank] @ p["kv_b_proj"].T).unflatten(-1, (GROUPS, nope + sizes.v_head_dim))

    def turn(head: Tensor) -> Tensor:
        """`[B, T, nope + rope]`, the last rope values rotated."""
        tokens = [rotated(head[:, t, nope:], t, frequencies) for t in range(head.shape[1])]
        return torch.cat([head[..., :nope], torch.stack(tokens, dim=1)], dim=-1)

    outputs = []
    for h in range(HEADS):
        q = queries.unflatten(-1, (HEADS, -1))[:, :, h]
        own = per_kv_head[:, :, h // (HEADS // GROUPS)]
        k = torch.cat([own[..., :nope], shared[..., rank:]], dim=-1)
        # Before the rotation.
        q = rms_norm(q, p["q_norm"], eps) if "q_norm" in p else q
        k = rms_norm(k, p["k_norm"], eps) if "k_norm" in p else k
        scores = turn(q) @ turn(k).mT / math.sqrt(nope + rope)
        hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
        outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ own[..., nope:])
    return torch.cat(outputs, dim=-1) @ p["o_proj"].T + p.get("o_proj.bias", 0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 30])
@torch.no_grad()
def test_formula(variant: str, length: int) -> None:
    model = one_layer(variant)
    x = torch.randn(2, length, HIDDEN, dtype=torch.float64)
    # transformers makes cosines and norms in float32.
    torch.testing.assert_close(mix(model, x), formula(model, x), rtol=0, atol=1e-5)


def in_pieces(model: HyLoModel, x: Tensor, pieces: list[int]) -> Tensor:
    cache = make_cache(model.config)
    return torch.cat([mix(model, piece, cache) for piece in x.split(pieces, dim=1)], dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pieces", [[1] * 30, [20, *[1] * 10], [7, 7, 7, 7, 2], [29, 1]])
@torch.no_grad()
def test_decoding_and_chunks_are_the_forward(monkeypatch: pytest.MonkeyPatch, variant: str, pieces: list[int]) -> None:
    """Through the latent alone, and through its keys and values block by block."""
    monkeypatch.setattr(hylo.mixers.softmax, "KEY_BLOCK", 5)
    model = one_layer(variant).float()
    x = torch.randn(2, 30, HIDDEN)
    torch.testing.assert_close(in_pieces(model, x, pieces), mix(model, x), rtol=0, atol=1e-5)


class Adapted(nn.Module):
    """A linear map with an adapter beside it, that names the map's weight as its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.update = base, nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.update(x)


@pytest.mark.parametrize("how", ["adapted", "quantised"])
@torch.no_grad()
def test_decoding_runs_what_stands_for_the_projection(how: str) -> None:
    """Whatever module or weight it is: its plain weight would say too little."""
    model = one_layer("mla").float()
    mixer = model.layers[0].mixer
    if how == "adapted":
        mixer.kv_b_proj = Adapted(mixer.kv_b_proj)
    else:
        quantize_(model, Int8WeightOnlyConfig())
    x = torch.randn(2, 30, HIDDEN)
    torch.testing.assert_close(in_pieces(model, x, [20, *[1] * 10]), mix(model, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["mla", "mla_key_norm"])
@torch.no_grad()
def test_bfloat16_decoding_is_as_near_as_the_forward(variant: str) -> None:
    """A scale a head and token, cached in bfloat16, costs nothing that can be seen."""
    model = one_layer(variant)
    x = torch.randn(2, 200, HIDDEN).bfloat16()
    low = one_layer(variant).bfloat16()
    expected = mix(model, x.double())
    for pieces in ([200], [1] * 200, [64, 64, 64, 8]):
        error = (in_pieces(low, x, pieces).double() - expected).norm() / expected.norm()
        assert error < 1e-2, pieces


@pytest.mark.parametrize(("variant", "scales"), [("mla", 0), ("mla_key_norm", 2 * GROUPS)])
@torch.no_grad()
def test_cache_holds_the_latent_the_rotary_key_and_scales(variant: str, scales: int) -> None:
    model = one_layer(variant)
    cache = make_cache(model.config)
    mix(model, torch.randn(3, 6, HIDDEN, dtype=torch.float64), cache)
    assert cache.layers[0].keys.shape == (3, 1, 6, 10 + 4 + scales)
    assert cache.layers[0].values.shape == (3, 1, 6, 0)


@torch.no_grad()
def test_scales_keep_16_bits_in_bfloat16() -> None:
    """Those of the keys as the layer computes them; one bfloat16 would keep 8."""
    model = one_layer("mla_key_norm").bfloat16()
    mixer, cache, x = model.layers[0].mixer, make_cache(model.config), torch.randn(1, 50, HIDDEN).bfloat16()
    mix(model, x, cache)
    coarse, fine = cache.layers[0].keys[:, 0, :, 10 + 4 :].double().chunk(2, dim=-1)
    latent, rope = mixer.kv_a_proj_with_mqa(x).split([10, 4], dim=-1)
    nope = mixer.kv_b_proj(latent).unflatten(-1, (GROUPS, 4 + 8))[..., :4]
    squares = nope.double().square().sum(-1) + rope.double().square().sum(-1, keepdim=True)
    torch.testing.assert_close(coarse + fine, (squares / 8 + model.config.rms_norm_eps) ** -0.5, rtol=2**-16, atol=0)


@torch.no_grad()
def test_yarn_scales_cosines_and_not_the_softmax() -> None:
    """By 0.1 ln(s) + 1 (arXiv 2309.00071): 1.3466 for a factor of 32."""
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 32.0, "original_max_position_embeddings": 16}
    model = one_layer("mla", rope_parameters=yarn)
    cos, sin = model.mixing_context(torch.zeros(1, 1, HIDDEN)).positions["mla"]
    torch.testing.assert_close(cos, torch.full_like(cos, 0.1 * math.log(32) + 1))
    assert not sin.any()
    assert model.layers[0].mixer.scaling == (4 + 4) ** -0.5


@pytest.mark.parametrize(
    ("base", "rank", "q_rank", "half"), [(LLAMA_1B, 128, 1344, 32), (LLAMA_3B, 128, 1536, 64), (QWEN, 256, 1344, 64)]
)
def test_published_shapes(base: dict[str, Any], rank: int, q_rank: int, half: int) -> None:
    d, heads, kv_heads = base["hidden_size"], base["num_attention_heads"], base["num_key_value_heads"]
    sizes = {"kv_lora_rank": rank, "q_lora_rank": q_rank, "qk_rope_head_dim": half, "qk_nope_head_dim": half}
    norms = {"q_norm.weight": (2 * half,), "k_norm.weight": (2 * half,)} if base is QWEN else {}
    assert parameters_of("mla", sizes | {"v_head_dim": 2 * half, "key_norm": bool(norms)}, **base) == {
        "q_a_proj.weight": (q_rank, d),
        "q_b_proj.weight": (heads * 2 * half, q_rank),
        "kv_a_proj_with_mqa.weight": (rank + half, d),
        "kv_b_proj.weight": (kv_heads * 3 * half, rank),
        "o_proj.weight": (d, heads * 2 * half),
        **norms,
    }
