"""What the softmax mixers, attention and MLA, share: one way to attend."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from hylo.ops.attention import PartialSoftmax, attention_with_lse, fastest_sdpa, packed_attention

# Keys and values that a chunk of a long prompt sees at a time.
KEY_BLOCK = 16384


class SoftmaxMixer(Protocol):
    """What transformers' attention functions read from a module, and what is read here."""

    config: Any
    scaling: float
    training: bool


def attend(
    mixer: SoftmaxMixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Causal attention by the implementation that the config names (`attn_implementation`).

    Args:
        q: `[B, H, T, K]`.
        k, v: `[B, Hkv, S, K]` and `[B, Hkv, S, V]`.
        mask: what the implementation wants; None where all of the past is seen.
        cu_seqlens: offsets of documents, none of which sees another; B must be 1.

    Returns:
        `[B, T, H, V]`.
    """
    interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
        mixer.config._attn_implementation, eager_attention_forward
    )
    dropout = getattr(mixer, "attention_dropout", 0.0) if mixer.training else 0.0
    window = getattr(mixer, "sliding_window", None)

    def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        with fastest_sdpa(q, k.shape[2]):
            output, _ = interface(
                mixer, q, k, v, mask, dropout=dropout, scaling=mixer.scaling, sliding_window=window, **kwargs
            )
        return output

    if cu_seqlens is None:
        return whole(q, k, v, mask)
    eager = mixer.config._attn_implementation == "eager"

    def document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        masked = eager or (window is not None and q.shape[2] > window)
        return whole(q, k, v, _causal_mask(q, window) if masked else None)

    plain = mixer.config._attn_implementation != "sdpa" or window is not None or dropout > 0
    return packed_attention(document, cu_seqlens, q, k, v, scale=mixer.scaling, plain=plain)


def attend_in_blocks(
    mixer: SoftmaxMixer,
    q: Tensor,
    total: int,
    keys_and_values: Callable[[slice, int, int], tuple[Tensor, Tensor]],
    padding: list[int] | None = None,
) -> Tensor:
    """Causal attention of the last tokens of a sequence over all of it, `KEY_BLOCK` keys at a time. No gradients.

    Args:
        q: `[B, H, T, K]`, for the last T of `total` tokens.
        keys_and_values: makes those of some rows, of the tokens from `begin` to `end`:
            `[rows, Hkv, end - begin, K or V]`.
        padding: how many tokens of padding each row begins with; their outputs are zero.

    Returns:
        `[B, T, H, V]`.
    """
    if not padding or not any(padding):
        return _attend_in_blocks(mixer, q, total, partial(keys_and_values, slice(None)), 0)
    rows = []
    for row, begin in enumerate(padding):
        here = slice(row, row + 1)
        # Queries that are padding themselves see nothing, and nothing sees them.
        skipped = min(max(0, begin - (total - q.shape[2])), q.shape[2])
        if skipped == q.shape[2]:
            v_size = keys_and_values(here, total - 1, total)[1].shape[-1]
            rows.append(q.new_zeros(1, q.shape[2], q.shape[1], v_size))
            continue
        heads = _attend_in_blocks(mixer, q[here, :, skipped:], total, partial(keys_and_values, here), begin)
        rows.append(torch.nn.functional.pad(heads, (0, 0, 0, 0, skipped, 0)))
    return torch.cat(rows)


def _attend_in_blocks(
    mixer: SoftmaxMixer,
    q: Tensor,
    total: int,
    keys_and_values: Callable[[int, int], tuple[Tensor, Tensor]],
    first: int,
) -> Tensor:
    """The same for rows whose tokens before `first` are padding."""
    past = total - q.shape[2]
    softmax = PartialSoftmax()
    softmax.add(*attention_with_lse(q, *keys_and_values(past, total), scale=mixer.scaling, causal=True))
    for begin in range(first, past, KEY_BLOCK):
        k, v = keys_and_values(begin, min(begin + KEY_BLOCK, past))
        softmax.add(*attention_with_lse(q, k, v, scale=mixer.scaling, causal=False))
    return softmax.result(q.dtype)


def _causal_mask(q: Tensor, window: int | None) -> Tensor:
    """Additive `[1, 1, T, T]`: token t sees t and, where there is a window, the window - 1 tokens before it."""
    position = torch.arange(q.shape[2], device=q.device)
    distance = position[:, None] - position[None]
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, torch.finfo(q.dtype).min)[None, None]
