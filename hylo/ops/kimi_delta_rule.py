"""Kimi Delta Attention (arXiv 2510.26692, equation 1): the gated delta rule with one decay a key channel.

Per head, with a state S of shape `[K, V]` and a log decay g_t of K values:

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,   o_t = scale * S_t^T q_t

`recurrent_gated_delta_rule` takes such decays and is the definition; `chunk_kimi_delta_rule` computes the same in
chunks; `kimi_delta_attention` is what the layer calls, computed by fla where `hylo.ops.kernels` says so.
"""

import torch
from torch import Tensor

from hylo.ops.gated_delta_rule import by_fla, recurrent_gated_delta_rule
from hylo.ops.kernels import use_fla
from hylo.ops.linear_recurrence import (
    Chunks,
    causal_differences,
    head_first,
    initial_state,
    into_chunks,
    l2_normalize,
    softplus_decay,
    solve_writes,
)
from hylo.ops.packing import each_document


def kimi_delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    state: Tensor | None = None,
    return_state: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The rule with |q| = |k| = 1, g = -exp(A_log) softplus(f + dt_bias), beta = sigmoid(b), scale = K ** -0.5.

    Args:
        q, k, f: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        b: `[B, T, H]`.
        A_log: `[H]`.
        dt_bias: `[H * K]`.
        state: S before the first token, `[B, H, K, V]` float32; zeros by default.
        return_state: whether the last state is wanted; it is not returned for packed documents.
        cu_seqlens: offsets of documents, none of which sees another; B must be 1 and `state` None.

    Returns:
        outputs `[B, T, H, V]` in the dtype of v, and the state after the last token or None.
    """
    if use_fla(v, delta_keys=k.shape[-1]):
        from fla.ops.kda import chunk_kda, fused_recurrent_kda

        return by_fla(
            fused_recurrent_kda,
            chunk_kda,
            *(q, k, v, f, b, A_log, dt_bias),
            state=state,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
        )
    g = softplus_decay(f, A_log[:, None], dt_bias.view(f.shape[-2:]))
    beta = b.to(torch.promote_types(b.dtype, torch.float32)).sigmoid()
    q, k = l2_normalize(q), l2_normalize(k)
    if cu_seqlens is not None:
        return each_document(lambda *x: chunk_kimi_delta_rule(*x)[0], cu_seqlens, q, k, v, g, beta), None
    rule = recurrent_gated_delta_rule if q.shape[1] == 1 else chunk_kimi_delta_rule
    return rule(q, k, v, g, beta, state=state)


def chunk_kimi_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """`recurrent_gated_delta_rule` for g `[B, T, H, K]`, `chunk_size` tokens at a time.

    As `chunk_gated_delta_rule`, with products of keys (and of queries with keys) weighted channel by channel:
    A_ij = beta_i sum_k k_ik exp(c_ik - c_jk) k_jk. The weights of all pairs in a chunk are held at once, hence the
    small chunks: decays of a channel may lie too far apart to be split into factors.
    """
    dtype, length = v.dtype, q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g, beta = head_first(q, k, v, g, beta)
        state = initial_state(state, k, v)
        q, k, v, g, beta = into_chunks(chunk_size, q * scale, k, v, g, beta)
        decay = g.cumsum(3)
        weighted_keys = causal_differences(decay) * k.unsqueeze(3)
        overlap = (beta[..., None] * torch.einsum("...ik,...ijk->...ij", k, weighted_keys)).tril(-1)
        from_state = k * decay.exp()
        solved = solve_writes(overlap, beta[..., None] * torch.cat([v, from_state], dim=-1))
        writes, state_writes = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
        out, state = Chunks(
            queries=q * decay.exp(),
            scores=torch.einsum("...ik,...ijk->...ij", q, weighted_keys),
            keys=k * (decay[..., -1:, :] - decay).exp(),
            writes=writes,
            state_writes=state_writes,
            decay=decay[..., -1, :].exp(),
        ).scan(state)
        return out[:, :, :length].transpose(1, 2).to(dtype), state
