"""Attention in blocks and by a shared head against one softmax."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import hylo.ops.attention
from hylo.ops.attention import PartialSoftmax, attention_with_lse, shared_head_attention

B, H, HKV, K, V = 2, 4, 2, 6, 5
SCALE = 0.7


def queries_keys_values(queries: int, keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((B, H, queries, K), (B, HKV, keys, K), (B, HKV, keys, V))
    q, k, v = (3 * torch.randn(shape, dtype=dtype) for shape in shapes)
    return q, k, v


def expected_lse(q: Tensor, k: Tensor, *, causal: bool) -> Tensor:
    scores = SCALE * torch.einsum("bgqtk,bgsk->bgqts", q.unflatten(1, (HKV, -1)), k).flatten(1, 2)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.exp().sum(-1).log()


# All rows at once; a few at a time, the last time fewer; one at a time.
@pytest.mark.parametrize("scores", [2**24, 4 * B * H * 11, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_its_log_sum_exp(monkeypatch: pytest.MonkeyPatch, causal: bool, scores: int) -> None:
    monkeypatch.setattr(hylo.ops.attention, "_SCORES", scores)
    q, k, v = queries_keys_values(11, 11)
    out, lse = attention_with_lse(q, k, v, scale=SCALE, causal=causal)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse(q, k, causal=causal), rtol=0, atol=1e-12)


def test_low_precision_goes_through_float32() -> None:
    q, k, v = queries_keys_values(9, 9, torch.bfloat16)
    out, lse = attention_with_lse(q, k, v, scale=SCALE, causal=True)
    expected, wide_lse = attention_with_lse(q.double(), k.double(), v.double(), scale=SCALE, causal=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(lse.double(), wide_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("blocks", [[13], [1, 12], [5, 5, 3], [1] * 13])
@pytest.mark.parametrize("backwards", [False, True])
def test_blocks_join_to_one_softmax(blocks: list[int], backwards: bool) -> None:
    """Whatever the blocks and their order, and however far apart their scores."""
    q, k, v = queries_keys_values(4, 13)
    k[:, :, :3] *= 40
    softmax = PartialSoftmax()
    parts = list(zip(k.split(blocks, dim=2), v.split(blocks, dim=2), strict=True))
    for keys, values in reversed(parts) if backwards else parts:
        softmax.add(*attention_with_lse(q, keys, values, scale=SCALE, causal=False))
    expected = functional.scaled_dot_product_attention(q, k, v, scale=SCALE, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(softmax.result(torch.float64), expected, rtol=0, atol=1e-12)
    assert softmax.result(torch.bfloat16).dtype == torch.bfloat16


# Keys may be wider than queries: what lies beyond is not read.
@pytest.mark.parametrize("beyond", [0, 3])
@pytest.mark.parametrize("kind", ["plain", "boolean mask", "additive mask", "factor", "mask and factor"])
def test_shared_head_is_attention_of_all_heads_over_one(kind: str, beyond: int) -> None:
    length = 7
    query, key = torch.randn(B, H, K, dtype=torch.float64), torch.randn(B, length, K + beyond, dtype=torch.float64)
    seen = torch.rand(B, 1, length) > 0.4
    seen[..., -1] = True
    mask: Tensor | None = seen if "mask" in kind else None
    if kind == "additive mask":
        mask = torch.zeros(B, 1, length, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    factor = torch.rand(B, H, length, dtype=torch.float64) if "factor" in kind else None
    result = shared_head_attention(query, key, V, scale=SCALE, mask=mask, factor=factor)

    keys = key[:, None, :, :K].expand(B, H, length, K)
    # A factor of the scores is a factor of the keys.
    keys = keys if factor is None else keys * factor[..., None]
    expected = functional.scaled_dot_product_attention(
        query[:, :, None],
        keys,
        key[:, None, :, :V].expand(B, H, length, V),
        attn_mask=seen[:, :, None] if mask is not None else None,
        scale=SCALE,
    )[:, :, 0]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
