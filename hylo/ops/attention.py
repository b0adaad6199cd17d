"""Softmax attention in the forms that hybrids need beyond one call of SDPA.

- `packed_attention`: causal within each document of a packed row.
- `PartialSoftmax`: attention over keys that come block by block, joined by their log-sum-exp (arXiv 2205.14135,
  section 3.1), so that a long past never has to be held as keys and values at once.
- `shared_head_attention`: one token's heads over one shared key head, the shape of absorbed MLA decoding.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hylo.ops.kernels import chosen_kernels
from hylo.ops.packing import each_document, spans

# Scores that the plain form holds at a time.
_SCORES = 2**24
# Keys that one thread block of a GPU reads when a single token attends; many blocks share a long past.
DECODE_BLOCK = 2048
# Mean tokens of a document from which SDPA, called for each, is faster than the kernel for all.
LONG_DOCUMENT = 8192


def packed_attention(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    cu_seqlens: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    plain: bool = False,
) -> Tensor:
    """Causal attention within each document: by one kernel for all where they are short, else one after the other.

    Args:
        attend: takes heads first and returns `[1, T, H, V]`, for one document.
        q: `[1, H, T, K]`.
        k, v: `[1, Hkv, T, K]` and `[1, Hkv, T, V]`.
        plain: whether `attend` does something that the kernel does not, such as a window or dropout.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    short = q.shape[2] < LONG_DOCUMENT * len(spans(cu_seqlens))
    if q.is_cuda and half and short and not plain and chosen_kernels() != "reference":
        return _varlen_attention(q, k, v, cu_seqlens, scale)
    return each_document(attend, cu_seqlens, q, k, v, dim=2)


def _widened(x: Tensor, size: int) -> Tensor:
    """With zeros up to `size` in the last dim. Nothing to add is no reason for a copy, which torch would make."""
    return x if x.shape[-1] == size else functional.pad(x, (0, size - x.shape[-1]))


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """`[1, T, H, V]`."""
    from torch.nn.attention.varlen import varlen_attn

    # The kernel wants one head size; zeros change neither scores nor the outputs kept.
    size, v_size = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    q, k, v = (_widened(x[0].transpose(0, 1), size) for x in (q, k, v))
    longest = max(end - begin for begin, end in spans(cu_seqlens))
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = k.shape[1] != q.shape[1]
    if "scale" not in known:
        q = q * (scale * size**0.5)
    else:
        options["scale"] = scale
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out[None, ..., :v_size]


@contextmanager
def fastest_sdpa(q: Tensor, length: int) -> Iterator[None]:
    """Inside the block, SDPA takes the faster kernel of Hopper where it is worth it.

    cuDNN makes a plan for each new length, so it is asked for round lengths alone, as windows of training are.

    Args:
        q: `[B, H, T, K]`.
        length: of the keys.
    """
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    if hopper and q.shape[2] == length and length % 1024 == 0 and chosen_kernels() != "reference":
        order = [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ]
        with sdpa_kernel(order, set_priority=True):
            yield
    else:
        yield


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores. Without gradients.

    Args:
        q: `[B, H, T, K]`.
        k, v: `[B, Hkv, S, K]` and `[B, Hkv, S, V]`, each head for H / Hkv query heads.
        causal: query t sees keys 0 to t; T must equal S.

    Returns:
        outputs `[B, H, T, V]`, and float32 log-sum-exps `[B, H, T]`.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and chosen_kernels() != "reference":
        # The flash kernel wants one head size; zeros change neither scores nor the outputs kept.
        size, v_size = max(q.shape[-1], v.shape[-1]), v.shape[-1]
        q, k, v = (_widened(x, size) for x in (q, k, v))
        if torch.cuda.get_device_capability(q.device)[0] == 9 and size <= 128 and size % 8 == 0:
            # The faster kernel on Hopper.
            out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, causal, False, scale=scale
            )[:2]
            return out[..., :v_size], lse.squeeze(-1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
        return out[..., :v_size], lse
    with torch.autocast(q.device.type, enabled=False):
        return _plain_attention_with_lse(q, k, v, scale, causal)


def _plain_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The definition, some queries at a time."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = max(1, _SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    outputs, lses = [], []
    for begin in range(0, q.shape[2], rows):
        part = q[:, :, begin : begin + rows]
        scores = (part.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
        if causal:
            above = torch.ones(part.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(begin + 1)
            scores = scores.masked_fill(above, -torch.inf)
        lses.append(scores.logsumexp(-1))
        outputs.append((scores.softmax(-1) @ v.to(wide)).to(q.dtype))
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


class PartialSoftmax:
    """Attention of some queries over blocks of keys, added one after the other."""

    def __init__(self) -> None:
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        """What `attention_with_lse` gave for a block: `[B, H, T, V]` and `[B, H, T]`."""
        if self._out is None or self._lse is None:
            self._out, self._lse = out.to(lse.dtype), lse
            return
        total = torch.logaddexp(self._lse, lse)
        self._out.mul_((self._lse - total).exp()[..., None])
        self._out.addcmul_(out.to(lse.dtype), (lse - total).exp()[..., None])
        self._lse = total

    def result(self, dtype: torch.dtype) -> Tensor:
        """`[B, T, H, V]`, over all blocks added."""
        assert self._out is not None
        return self._out.to(dtype).transpose(1, 2)


def shared_head_attention(
    query: Tensor, key: Tensor, v_size: int, *, scale: float, mask: Tensor | None = None, factor: Tensor | None = None
) -> Tensor:
    """All heads of one token over one shared key head, whose first `v_size` values are the value head.

    Args:
        query: `[B, H, K]`.
        key: `[B, S, K or more]`; what lies beyond K is not read.
        v_size: at most K.
        mask: additive or boolean, to broadcast with `[B, H, S]`.
        factor: of each head's scores, `[B, H, S]`.

    Returns:
        `[B, H, v_size]`.
    """
    size = query.shape[-1]
    aligned = size % 8 == 0 and v_size % 8 == 0 and key.stride(-2) % 8 == 0
    half = query.dtype in (torch.bfloat16, torch.float16)
    if (
        query.is_cuda
        and half
        and aligned
        and mask is None
        and factor is None
        and not torch.is_grad_enabled()
        and chosen_kernels() != "reference"
    ):
        return _split_attention(query, key[..., :size], v_size, scale)
    scores = torch.einsum("bhk,bsk->bhs", query, key[..., :size]).to(torch.promote_types(query.dtype, torch.float32))
    scores = scores * scale if factor is None else scores * scale * factor
    if mask is not None:
        # Not -inf: padding that sees nothing at all must not become NaN, which a zero weight would not hide.
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    return torch.einsum("bhs,bsv->bhv", scores.softmax(-1).to(query.dtype), key[..., :v_size])


def _split_attention(query: Tensor, key: Tensor, v_size: int, scale: float) -> Tensor:
    """The same, the past cut into blocks that are read in parallel and joined by their log-sum-exps."""
    length = key.shape[1]
    outputs, lses = [], []
    whole = length // DECODE_BLOCK
    for begin, blocks, size in ((0, whole, DECODE_BLOCK), (whole * DECODE_BLOCK, 1, length - whole * DECODE_BLOCK)):
        if not blocks or not size:
            continue
        # Blocks stand where heads do, heads where queries do, [B, blocks, size or H, K]: views, whatever the batch.
        part = key[:, begin : begin + blocks * size].unflatten(1, (blocks, size))
        asked = query[:, None].expand(-1, blocks, -1, -1)
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            asked, part, part[..., :v_size], None, True, scale=scale
        )[:2]
        outputs.append(out)
        # The kernel pads the log-sum-exps of its queries.
        lses.append(lse[:, :, : query.shape[1]])
    out, lse = torch.cat(outputs, dim=1), torch.cat(lses, dim=1)
    weights = lse.softmax(dim=1)[..., None]
    return (out * weights).sum(dim=1).to(query.dtype)
