"""What serves a hybrid on a GPU, kernel by kernel, against the references. Run with HYLO_TEST_GPU=1 pytest tests/gpu.

Three prompts end to end, of which the second begins; slots and pages lie apart, as in vLLM's cache.
"""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hylo.ops.gated_delta_rule import gated_delta_net
from hylo.ops.gated_linear_attention import gated_linear_attention
from hylo.ops.kernels import kernels
from hylo.ops.kimi_delta_rule import kimi_delta_attention
from hylo.ops.short_convolution import short_convolution

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and HYLO_TEST_GPU=1")

DEVICE = "cuda"
# Relative to the largest value: bfloat16 in, bfloat16 out, and products of bfloat16 between.
TOLERANCE = 2e-2
OFFSETS = [0, 70, 75, 208]
SLOTS, BEGUN = [2, 5, 1], [True, False, True]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).bfloat16()


def slotted(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Six slots of that shape, with something else between them."""
    size = torch.Size(shape).numel()
    return torch.randn(6, size + 48, device=DEVICE).to(dtype)[:, :size].unflatten(1, shape)


def prompts(chunk: int = 64) -> Any:
    """Metadata as vLLM makes them of three prompts; `chunk` tokens are a chunk of Mamba-2's kernels."""
    from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

    ends, whose, last = [0], [], []
    for i, (begin, end) in enumerate(pairwise(OFFSETS)):
        cuts = [*range(begin + chunk, end, chunk), end]
        ends += cuts
        whose += [i] * len(cuts)
        last.append(len(whose) - 1)
    values = {
        "query_start_loc_p": OFFSETS,
        "state_indices_tensor_p": SLOTS,
        "cu_chunk_seqlen_p": ends,
        "seq_idx_p": whose,
        "last_chunk_indices_p": last,
    }
    tensors = {name: torch.tensor(each, dtype=torch.int32, device=DEVICE) for name, each in values.items()}
    offsets = torch.tensor(OFFSETS, dtype=torch.int32)
    nums, batch, chunks = compute_causal_conv1d_metadata(offsets, device=torch.device(DEVICE))
    return SimpleNamespace(
        has_initial_states_p=torch.tensor(BEGUN, device=DEVICE),
        chunk_size=chunk,
        nums_dict=nums,
        batch_ptr=batch,
        token_chunk_offset_ptr=chunks,
        **tensors,
    )


@pytest.fixture(params=[1, 2, 3])
def grouped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of which so many share a call of the recurrence."""
    from hylo.serve.gpu import delta, mamba2

    for module in (delta, mamba2):
        monkeypatch.setattr(module, "most_prompts", lambda shape: request.param)


def same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.float() - expected.float()).abs().max() < TOLERANCE * expected.float().abs().max()


@pytest.mark.parametrize("size", [192, 160, 14])
def test_latents_are_gathered(size: int) -> None:
    """Pieces that begin inside a page, and a sequence that has none."""
    from hylo.serve.gpu.gather import gather_latents, gather_latents_reference

    cache = torch.randn(20, 8 * size + 64, device=DEVICE).bfloat16()[:, : 8 * size].unflatten(1, (8, size))
    table = torch.stack([torch.randperm(20)[:6] for _ in range(3)]).int().to(DEVICE)
    starts = torch.tensor([5, 0, 17], dtype=torch.int32, device=DEVICE)
    offsets = torch.tensor([0, 13, 13, 33], dtype=torch.int32, device=DEVICE)
    whose = torch.tensor([0] * 13 + [2] * 20 + [0] * 7, dtype=torch.int32, device=DEVICE)
    found, expected = cache.new_zeros(33, size), cache.new_ones(33, size)
    gather_latents(cache, table, whose, offsets, starts, found)
    gather_latents_reference(cache, table, whose, offsets, starts, expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("heads", "rank", "rope", "page"), [(24, 128, 64, 48), (9, 64, 32, 224), (40, 256, 64, 16), (3, 8, 6, 16)]
)
@pytest.mark.parametrize("splits", [1, 4, 256])
def test_latents_are_attended_to(heads: int, rank: int, rope: int, page: int, splits: int) -> None:
    """Requests of one token and of many, more pieces than tokens, a row that fills up the batch."""
    from hylo.serve.gpu import latent_decode

    size, lengths = rank + rope, torch.tensor([1, 70, 500, 0], dtype=torch.int32, device=DEVICE)
    most = -(-500 // page)
    pages = torch.randperm(4 * most, device=DEVICE).view(4, most).int()
    cache = drawn(4 * most, page * size + 64)[:, : page * size].unflatten(1, (page, size))
    query = drawn(4, heads, size)
    parts, whole = (torch.zeros(4, heads, n, rank + 1, device=DEVICE) for n in (splits, 1))
    latent_decode.attend_pieces(query, cache, pages, lengths, parts, size**-0.5)
    expected = torch.zeros_like(parts)
    latent_decode.attend_pieces_reference(query, cache, pages, lengths, expected, size**-0.5)
    same(parts, expected)
    latent_decode.attend_pieces_reference(query, cache, pages, lengths, whole, size**-0.5)
    out, lse = drawn(4, heads, rank), drawn(4, heads)
    latent_decode.join_pieces(parts, lengths, out, lse)
    same(out, whole[:, :, 0, :rank])
    same(lse[:3], whole[:3, :, 0, rank])


@pytest.mark.parametrize("biased", [False, True])
def test_convolution(biased: bool) -> None:
    from hylo.serve.gpu import delta

    channels, width = 24, 4
    weight, bias = drawn(channels, width), drawn(channels) if biased else None
    past = slotted(width - 1, channels, dtype=torch.bfloat16)
    rows, slots = drawn(3, channels + 8)[:, :channels], torch.tensor(SLOTS, dtype=torch.int32, device=DEVICE)
    before = past[SLOTS].clone()
    found = delta.convolve_one(rows, weight, bias, past, slots)
    same(found, short_convolution(rows[:, None], weight, bias, past=before)[:, 0])
    same(past[SLOTS], torch.cat([before[:, 1:], rows[:, None]], dim=1))

    rows = drawn(OFFSETS[-1], channels + 8)[:, :channels]
    before = past[SLOTS].clone() * torch.tensor(BEGUN, device=DEVICE)[:, None, None]
    found = delta.convolve_many(rows, weight, bias, past, prompts())
    for i, (begin, end) in enumerate(pairwise(OFFSETS)):
        mine = rows[None, begin:end]
        same(found[begin:end], short_convolution(mine, weight, bias, past=before[i : i + 1])[0])
        same(past[SLOTS[i]], torch.cat([before[i], mine[0]])[1 - width :])


@pytest.mark.parametrize(
    ("rule", "key", "value"), [("gdn", 64, 64), ("gdn", 128, 128), ("gdn", 256, 512), ("kda", 64, 64)]
)
@pytest.mark.usefixtures("grouped")
def test_delta_rules(rule: str, key: int, value: int) -> None:
    from hylo.serve.gpu import delta

    heads = 2
    own = gated_delta_net if rule == "gdn" else kimi_delta_attention
    decayed = (heads,) if rule == "gdn" else (heads, key)
    A_log, dt_bias = torch.randn(heads, device=DEVICE) - 1, torch.randn(decayed, device=DEVICE).flatten()
    state = slotted(heads, value, key)

    def inputs(*lead: int) -> list[Tensor]:
        return [drawn(*lead, *shape) for shape in ((heads, key), (heads, key), (heads, value), decayed, (heads,))]

    def expected(rows: list[Tensor], before: Tensor | None) -> tuple[Tensor, Tensor]:
        old = None if before is None else before.transpose(-1, -2)
        with kernels("reference"):
            out, after = own(*(each.float() for each in rows), A_log, dt_bias, state=old)
        assert after is not None
        return out, after.transpose(-1, -2)

    rows, before = inputs(OFFSETS[-1]), state[SLOTS].clone()
    found = delta.prefill(*(each.clone() for each in rows), A_log, dt_bias, state, prompts())
    for i, (begin, end) in enumerate(pairwise(OFFSETS)):
        out, after = expected([each[None, begin:end] for each in rows], before[i : i + 1] if BEGUN[i] else None)
        same(found[begin:end], out[0])
        same(state[SLOTS[i]], after[0])

    # A row of padding has slot 0, which nothing moves.
    slots = torch.tensor([*SLOTS, 0], dtype=torch.int32, device=DEVICE)
    rows, before, padding = inputs(4), state[SLOTS].clone(), state[0].clone()
    found = delta.decode(*rows, A_log, dt_bias, state, slots)
    out, after = expected([each[:3, None] for each in rows], before)
    same(found[:3], out[:, 0])
    same(state[SLOTS], after)
    assert torch.equal(state[0], padding)


@pytest.mark.usefixtures("grouped")
def test_mamba2() -> None:
    from hylo.serve.gpu import mamba2

    heads, size = 4, 64
    A, D, dt_bias = -torch.randn(heads, device=DEVICE).exp(), *torch.randn(2, heads, device=DEVICE)
    state = slotted(heads, size, size)

    def expected(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        steps = functional.softplus(dt.float() + dt_bias)
        old = None if before is None else before.transpose(-1, -2)
        with kernels("reference"):
            out, after = gated_linear_attention(
                C.float(), B.float(), x.float() * steps[..., None], A * steps, state=old
            )
        assert after is not None
        return out + x.float() * D[:, None], after.transpose(-1, -2)

    def inputs(count: int) -> list[Tensor]:
        x, B, C = (drawn(count, heads, size) for _ in range(3))
        return [x, drawn(count, heads), B, C]

    (x, dt, B, C), before = inputs(OFFSETS[-1]), state[SLOTS].clone()
    found = torch.empty_like(x)
    mamba2.prefill(x, dt, A, B, C, D, dt_bias, state, prompts(), found)
    for i, (begin, end) in enumerate(pairwise(OFFSETS)):
        rows = (each[None, begin:end] for each in (x, dt, B, C))
        out, after = expected(*rows, before[i : i + 1] if BEGUN[i] else None)
        same(found[begin:end], out[0])
        same(state[SLOTS[i]], after[0])

    (x, dt, B, C), before = inputs(3), state[SLOTS].clone()
    found = torch.empty_like(x)
    slots = torch.tensor(SLOTS, dtype=torch.int32, device=DEVICE)
    mamba2.decode(x, dt, A, B, C, D, dt_bias, state, slots, found)
    out, after = expected(*(each[:, None] for each in (x, dt, B, C)), before)
    same(found, out[:, 0])
    same(state[SLOTS], after)
