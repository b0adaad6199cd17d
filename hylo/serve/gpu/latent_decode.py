"""Attention of one new token over cached latents: one program reads a piece of the past for up to 32 heads.

vLLM's own kernels take sixteen heads a program and 32 tokens at a time, so most models read each latent twice; and join
the pieces of a request one after another, which at a batch of one takes longer than to attend.
"""

import math
from typing import Any

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton

from hylo.serve.gpu.shared_memory import block_tokens, shared_by_programs

# Query heads of a program: more would not fit in registers at the ranks that there are.
HEADS_A_PROGRAM = 32
# Tokens at a time, fewer where a GPU's programs share less; warps of a program, and reads in flight.
BLOCK, WARPS, STAGES = 128, 4, 2
# Pieces that are joined at a time.
TILE = 32

_LOG2_E: Any = tl.constexpr(math.log2(math.e))
_LN_2: Any = tl.constexpr(math.log(2))


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query,
    cache,
    pages,
    lengths,
    parts,
    scale,
    query_stride,
    head_stride,
    page_stride,
    token_stride,
    table_stride,
    part_stride,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    HEADS_UP: tl.constexpr,
    RANK_UP: tl.constexpr,
    ROPE_UP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + request)
    piece = tl.cdiv(length, SPLITS)
    begin = split * piece
    end = tl.minimum(begin + piece, length)
    if begin >= end:
        return

    heads = group * HEADS_UP + tl.arange(0, HEADS_UP)
    channels = tl.arange(0, RANK_UP)
    turning = tl.arange(0, ROPE_UP)
    query += request * query_stride + heads[:, None] * head_stride
    there = heads[:, None] < HEADS
    q = tl.load(query + channels[None, :], mask=there & (channels[None, :] < RANK), other=0.0)
    q_rope = tl.load(query + RANK + turning[None, :], mask=there & (turning[None, :] < ROPE), other=0.0)
    factor = scale * _LOG2_E

    highest = tl.full([HEADS_UP], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_UP], tl.float32)
    mixed = tl.zeros([HEADS_UP, RANK_UP], tl.float32)
    pages += request * table_stride
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK)
        inside = token < end
        page = tl.load(pages + token // PAGE, mask=inside, other=0).to(tl.int64)
        row = cache + (page * page_stride + (token % PAGE) * token_stride)[:, None]
        latent = tl.load(row + channels[None, :], mask=inside[:, None] & (channels[None, :] < RANK), other=0.0)
        rope = tl.load(row + RANK + turning[None, :], mask=inside[:, None] & (turning[None, :] < ROPE), other=0.0)
        score = tl.dot(q, tl.trans(latent))
        score = tl.dot(q_rope, tl.trans(rope), score) * factor
        score = tl.where(inside[None, :], score, float("-inf"))
        above = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - above[:, None])
        shrunk = tl.exp2(highest - above)
        total = total * shrunk + tl.sum(weight, 1)
        mixed = tl.dot(weight.to(latent.dtype), latent, mixed * shrunk[:, None])
        highest = above

    parts += request * part_stride + (heads * SPLITS + split) * (RANK + 1)
    tl.store(parts[:, None] + channels[None, :], mixed / total[:, None], mask=there & (channels[None, :] < RANK))
    tl.store(parts + RANK, highest * _LN_2 + tl.log(total), mask=heads < HEADS)


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    parts,
    lengths,
    out,
    lse,
    part_stride,
    out_stride,
    head_stride,
    lse_stride,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    RANK_UP: tl.constexpr,
    TILE: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(lengths + request)
    count = tl.cdiv(length, tl.maximum(tl.cdiv(length, SPLITS), 1))
    channels = tl.arange(0, RANK_UP)
    parts += request * part_stride + head * SPLITS * (RANK + 1)
    highest = -float("inf")
    total = 0.0
    mixed = tl.zeros([RANK_UP], tl.float32)
    for start in range(0, count, TILE):
        piece = start + tl.arange(0, TILE)
        row = parts + piece * (RANK + 1)
        there = piece < count
        log = tl.load(row + RANK, mask=there, other=-float("inf"))
        above = tl.maximum(highest, tl.max(log, 0))
        weight = tl.exp(log - above)
        shrunk = tl.exp(highest - above)
        means = tl.load(row[:, None] + channels[None, :], mask=there[:, None] & (channels[None, :] < RANK), other=0.0)
        total = total * shrunk + tl.sum(weight, 0)
        mixed = mixed * shrunk + tl.sum(weight[:, None] * means, 0)
        highest = above
    # Rows that fill up a batch have no tokens.
    mixed = tl.where(count > 0, mixed / total, 0.0)
    to = out + request * out_stride + head * head_stride
    tl.store(to + channels, mixed.to(out.dtype.element_ty), mask=channels < RANK)
    tl.store(lse + request * lse_stride + head, (highest + tl.log(total)).to(lse.dtype.element_ty))


def attend_pieces(query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor, parts: Tensor, scale: float) -> None:
    """Each head over each piece of its request's past.

    Args:
        query: `[B, H, r + rope]`, keys' up-projection absorbed.
        cache: `[pages, page, r + rope]`; the last dimension is contiguous.
        pages: of each request, `[B, most]`.
        lengths: tokens of each request, `[B]`.
        parts: `[B, H, splits, r + 1]` float32, written where a piece has tokens: its mean of latents by the weights
            of the softmax, and the log-sum-exp of its scores. A piece is a part of ceil(length / splits) tokens.
    """
    batch, heads, splits, rank = parts.shape[0], parts.shape[1], parts.shape[2], parts.shape[3] - 1
    rope = query.shape[-1] - rank
    # No matrix product has fewer rows, or sums fewer channels, than sixteen.
    heads_up = max(16, min(HEADS_A_PROGRAM, triton.next_power_of_2(heads)))
    rank_up, rope_up = (max(16, triton.next_power_of_2(size)) for size in (rank, rope))
    block = block_tokens(BLOCK, heads_up, rank_up + rope_up, shared_by_programs(query.device))
    _attend[(batch, triton.cdiv(heads, heads_up), splits)](
        query,
        cache,
        pages,
        lengths,
        parts,
        scale,
        query.stride(0),
        query.stride(1),
        cache.stride(0),
        cache.stride(1),
        pages.stride(0),
        parts.stride(0),
        HEADS=heads,
        RANK=rank,
        ROPE=rope,
        PAGE=cache.shape[1],
        SPLITS=splits,
        HEADS_UP=heads_up,
        RANK_UP=rank_up,
        ROPE_UP=rope_up,
        BLOCK=block,
        STAGES=STAGES,
        num_warps=WARPS,
    )


def join_pieces(parts: Tensor, lengths: Tensor, out: Tensor, lse: Tensor) -> None:
    """What `attend_pieces` left, to `[B, H, r]` and log-sum-exps `[B, H]`; zeros where a request has no token."""
    batch, heads, splits, rank = parts.shape[0], parts.shape[1], parts.shape[2], parts.shape[3] - 1
    _join[(batch, heads)](
        parts,
        lengths,
        out,
        lse,
        parts.stride(0),
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        RANK=rank,
        SPLITS=splits,
        RANK_UP=triton.next_power_of_2(rank),
        TILE=min(TILE, triton.next_power_of_2(splits)),
    )


def attend_pieces_reference(
    query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor, parts: Tensor, scale: float
) -> None:
    """The same, piece by piece, in the parts' dtype."""
    splits, rank = parts.shape[2], parts.shape[3] - 1
    for i, length in enumerate(lengths.tolist()):
        latents = cache[pages[i].long()].flatten(0, 1)[:length].to(parts.dtype)
        piece = -(-length // splits)
        for split in range(splits):
            held = latents[split * piece : (split + 1) * piece]
            if len(held):
                scores = query[i].to(parts.dtype) @ held.T * scale
                parts[i, :, split, :rank] = scores.softmax(-1) @ held[:, :rank]
                parts[i, :, split, rank] = torch.logsumexp(scores, -1)
