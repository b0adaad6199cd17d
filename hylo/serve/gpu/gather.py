"""Latents of cached tokens, from vLLM's pages to rows: a Triton kernel, and what it must compute in plain torch.

vLLM's own gather knows two sizes of latents; this one takes any, and may begin at any token of a page.
"""

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton


def gather_latents(
    cache: Tensor, block_table: Tensor, token_to_seq: Tensor, cu_seqlens: Tensor, starts: Tensor, output: Tensor
) -> None:
    """Fills `output`, `[N, r + rope]`, with the latents of N tokens of several sequences, end to end.

    Args:
        cache: `[blocks, block size, r + rope]`; the last dim is contiguous, pages may lie apart.
        block_table: of each sequence, `[sequences, blocks]`.
        token_to_seq: whose each row is, `[>= N]`.
        cu_seqlens: where each sequence's rows begin, `[sequences + 1]`.
        starts: the position of each sequence's first row, `[sequences]`.
    """
    rows, size = output.shape
    if rows == 0:
        return
    block = 16
    _gather[(triton.cdiv(rows, block),)](
        cache,
        block_table,
        token_to_seq,
        cu_seqlens,
        starts,
        output,
        rows,
        cache.shape[1],
        cache.stride(0),
        cache.stride(1),
        block_table.stride(0),
        output.stride(0),
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        BLOCK=block,
    )


def gather_latents_reference(
    cache: Tensor, block_table: Tensor, token_to_seq: Tensor, cu_seqlens: Tensor, starts: Tensor, output: Tensor
) -> None:
    """The definition."""
    rows, block_size = output.shape[0], cache.shape[1]
    sequence = token_to_seq[:rows].long()
    position = starts.long()[sequence] + torch.arange(rows, device=output.device) - cu_seqlens.long()[sequence]
    page = block_table[sequence, position // block_size].long()
    output.copy_(cache[page, position % block_size])


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    cache,
    block_table,
    token_to_seq,
    cu_seqlens,
    starts,
    output,
    rows,
    block_size,
    page_stride,
    token_stride,
    table_stride,
    output_stride,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    inside = row < rows
    sequence = tl.load(token_to_seq + row, mask=inside, other=0)
    begin = tl.load(cu_seqlens + sequence, mask=inside, other=0)
    position = tl.load(starts + sequence, mask=inside, other=0) + row - begin
    page = tl.load(block_table + sequence * table_stride + position // block_size, mask=inside, other=0)
    # A cache of gigabytes: offsets need 64 bits.
    source = page.to(tl.int64) * page_stride + (position % block_size).to(tl.int64) * token_stride
    mask = inside[:, None] & (column < SIZE)[None, :]
    values = tl.load(cache + source[:, None] + column[None, :], mask=mask)
    tl.store(output + row.to(tl.int64)[:, None] * output_stride + column[None, :], values, mask=mask)
