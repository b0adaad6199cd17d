"""Linear attention with one decay a head, the recurrence of Mamba-2 (arXiv 2405.21060, section 3).

Per head, with a state S of shape `[K, V]`:

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t

`recurrent_gated_linear_attention` is that definition, `chunk_gated_linear_attention` the same in chunks;
`gated_linear_attention` is what the layer calls, computed by fla where `hylo.ops.kernels` says so.
"""

import torch
from torch import Tensor

from hylo.ops.gated_delta_rule import SHORT
from hylo.ops.kernels import use_fla, will_differentiate
from hylo.ops.linear_recurrence import Chunks, causal_differences, head_first, initial_state, into_chunks
from hylo.ops.packing import each_document


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    state: Tensor | None = None,
    return_state: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence above.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: log decay, `[B, T, H]`, at most 0.
        state: S before the first token, `[B, H, K, V]` float32; zeros by default.
        return_state: whether the last state is wanted; it is not returned for packed documents.
        cu_seqlens: offsets of documents, none of which sees another; B must be 1 and `state` None.

    Returns:
        outputs `[B, T, H, V]` in the dtype of v, and the state after the last token or None.
    """
    if use_fla(v, gated_backward=will_differentiate(q, k, v, g)):
        from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

        keep = return_state and cu_seqlens is None
        short = q.shape[1] <= SHORT and cu_seqlens is None and not will_differentiate(q, k, v, g)
        return (fused_recurrent_simple_gla if short else chunk_simple_gla)(
            q,
            k,
            v,
            g=g,
            scale=1.0,
            initial_state=state,
            output_final_state=keep,
            # The layout that the kernels prefer; cached states are [K, V].
            state_v_first=not keep and state is None,
            cu_seqlens=cu_seqlens,
        )
    if cu_seqlens is not None:
        return each_document(lambda *x: chunk_gated_linear_attention(*x)[0], cu_seqlens, q, k, v, g), None
    rule = recurrent_gated_linear_attention if q.shape[1] == 1 else chunk_gated_linear_attention
    return rule(q, k, v, g, state=state)


def recurrent_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: one step a token. Arguments and results as `gated_linear_attention`."""
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g = head_first(q, k, v, g)
        state = initial_state(state, k, v)
        outputs = []
        for t in range(q.shape[2]):
            state = state * g[:, :, t, None, None].exp() + k[:, :, t, :, None] * v[:, :, t, None, :]
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
        return torch.stack(outputs, dim=1).to(dtype), state


def chunk_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, state: Tensor | None = None, chunk_size: int = 64
) -> tuple[Tensor, Tensor]:
    """The same function, `chunk_size` tokens at a time (section 6, the block decomposition)."""
    dtype, length = v.dtype, q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g = head_first(q, k, v, g)
        state = initial_state(state, k, v)
        q, k, v, g = into_chunks(chunk_size, q, k, v, g)
        decay = g.cumsum(-1)
        out, state = Chunks(
            queries=q * decay.exp()[..., None],
            scores=(q @ k.transpose(-1, -2)) * causal_differences(decay),
            keys=k * (decay[..., -1:] - decay).exp()[..., None],
            writes=v,
            state_writes=None,
            decay=decay[..., -1:].exp(),
        ).scan(state)
        return out[:, :, :length].transpose(1, 2).to(dtype), state
