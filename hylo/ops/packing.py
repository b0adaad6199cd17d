"""Packed batches: documents end to end in one row, with the offsets at which they begin and end."""

import weakref
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def document_offsets(position_ids: Tensor) -> Tensor:
    """`cu_seqlens` of a packed batch: where positions begin again, a document begins.

    Args:
        position_ids: `[B, T]`.

    Returns:
        `[N + 1]` int32 offsets into the B * T tokens laid end to end, from 0 to B * T.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    begins = starts.flatten().nonzero().flatten()
    end = begins.new_tensor([position_ids.numel()])
    return torch.cat([begins, end]).to(torch.int32)


_last_read: tuple[weakref.ref[Tensor], int, list[int]] | None = None


def offsets_of(cu_seqlens: Tensor) -> list[int]:
    """The offsets as numbers. Read once for all layers of a model: reading from a GPU waits for all it has to do."""
    global _last_read
    if cu_seqlens.is_inference():
        # It counts no versions, so nothing would tell that it changed.
        return cu_seqlens.tolist()
    if _last_read is None or _last_read[0]() is not cu_seqlens or _last_read[1] != cu_seqlens._version:
        _last_read = weakref.ref(cu_seqlens), cu_seqlens._version, cu_seqlens.tolist()
    return _last_read[2]


def spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """Begin and end of each document that has tokens."""
    return [(begin, end) for begin, end in pairwise(offsets_of(cu_seqlens)) if end > begin]


_last_starts: tuple[weakref.ref[Tensor], int, Tensor] | None = None


def document_starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """Where the document of each of `length` tokens begins, `[T]` int32. Made once for all layers of a model."""
    global _last_starts
    if (
        _last_starts is None
        or cu_seqlens.is_inference()
        or _last_starts[0]() is not cu_seqlens
        or _last_starts[1] != cu_seqlens._version
        or len(_last_starts[2]) != length
    ):
        begins = cu_seqlens[:-1].to(torch.int32)
        starts = torch.repeat_interleave(begins, cu_seqlens.diff(), output_size=length)
        if cu_seqlens.is_inference():
            return starts
        _last_starts = weakref.ref(cu_seqlens), cu_seqlens._version, starts
    return _last_starts[2]


def each_document(compute: Callable[..., Tensor], cu_seqlens: Tensor, *tensors: Tensor, dim: int = 1) -> Tensor:
    """`compute` on each document's slices of `tensors` along `dim`, its results joined along dim 1.

    The plain definition of every operation on packed batches.
    """
    results = [
        compute(*(tensor.narrow(dim, begin, end - begin) for tensor in tensors)) for begin, end in spans(cu_seqlens)
    ]
    return torch.cat(results, dim=1)


def left_padding(attention_mask: Tensor | None) -> list[int] | None:
    """How many tokens of padding each row begins with; None where there is no mask, or padding elsewhere.

    Args:
        attention_mask: `[B, S]`, zero where padding.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    real = attention_mask.bool()
    if bool((real[:, 1:] < real[:, :-1]).any()):
        return None
    return (~real).sum(-1).tolist()
