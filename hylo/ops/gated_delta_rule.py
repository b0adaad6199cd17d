"""The gated delta rule (arXiv 2412.06464, equation 10): fla's kernels, and the definition in plain torch.

Per head, with a state S of shape `[K, V]`:

    S_t = exp(g_t) S_{t-1} + k_t u_t^T,   u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t),   o_t = scale * S_t^T q_t

`recurrent_gated_delta_rule` is that definition, one token at a time. `chunk_gated_delta_rule` computes the same in
chunks (section 3.3, the extended WY form). Both keep the dtype of the wider of float32 and the input, so that float64
inputs give a float64 reference. `gated_delta_net` is what the layer calls: gates and normalisation included, computed
by fla where `hylo.ops.kernels` says so.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hylo.ops.kernels import use_fla, will_differentiate
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

# Up to here, without gradients, fla's recurrent kernel is faster than its chunked one.
SHORT = 64


def gated_delta_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    state: Tensor | None = None,
    return_state: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The rule with |q| = |k| = 1, g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b), scale = K ** -0.5.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        a, b: `[B, T, H]`.
        A_log, dt_bias: `[H]`.
        state: S before the first token, `[B, H, K, V]` float32; zeros by default.
        return_state: whether the last state is wanted; it is not returned for packed documents.
        cu_seqlens: offsets of documents, none of which sees another; B must be 1 and `state` None.

    Returns:
        outputs `[B, T, H, V]` in the dtype of v, and the state after the last token or None.
    """
    differentiated = will_differentiate(q, k, v, a, b, A_log, dt_bias)
    if use_fla(v, gated_backward=differentiated, delta_keys=k.shape[-1]):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as chunked
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule as recurrent

        return by_fla(
            recurrent,
            chunked,
            *(q, k, v, a, b, A_log, dt_bias),
            state=state,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
        )
    g, beta = softplus_decay(a, A_log, dt_bias), b.to(torch.promote_types(b.dtype, torch.float32)).sigmoid()
    q, k = l2_normalize(q), l2_normalize(k)
    if cu_seqlens is not None:
        return each_document(lambda *x: chunk_gated_delta_rule(*x)[0], cu_seqlens, q, k, v, g, beta), None
    rule = recurrent_gated_delta_rule if q.shape[1] == 1 else chunk_gated_delta_rule
    return rule(q, k, v, g, beta, state=state)


def by_fla(
    recurrent: Callable[..., tuple[Tensor, Tensor | None]],
    chunked: Callable[..., tuple[Tensor, Tensor | None]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One of fla's delta rules, gates and norms in its kernels; the recurrent form for a few tokens."""
    keep = return_state and cu_seqlens is None
    differentiated = will_differentiate(q, k, v, decays, b, A_log, dt_bias)
    short = q.shape[1] <= SHORT and cu_seqlens is None and not differentiated
    return (recurrent if short else chunked)(
        q=q,
        k=k,
        v=v,
        g=decays,
        beta=b,
        A_log=A_log,
        dt_bias=dt_bias,
        initial_state=state,
        output_final_state=keep,
        # The layout that the kernels prefer; cached states are [K, V].
        state_v_first=not keep and state is None,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        cu_seqlens=cu_seqlens,
    )


def recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, scale: float | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: one step a token. Used for decoding, and as the reference of every other form.

    Args:
        q, k: `[B, T, H, K]`; normalise k (and q) before, the rule assumes |k| <= 1.
        v: `[B, T, H, V]`.
        g: log decay, at most 0: one a head, `[B, T, H]`, or one a key channel, `[B, T, H, K]`.
        beta: write strength in [0, 1], `[B, T, H]`.
        scale: factor on q; K ** -0.5 by default.
        state: S before the first token, `[B, H, K, V]`; zeros by default.

    Returns:
        outputs `[B, T, H, V]` in the dtype of v, and the state after the last token, `[B, H, K, V]`.
    """
    dtype = v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        if g.dim() == 3:
            g = g[..., None]
        q, k, v, g, beta = head_first(q, k, v, g, beta)
        state = initial_state(state, k, v)
        outputs = []
        for t in range(q.shape[2]):
            state = state * g[:, :, t, :, None].exp()
            read = torch.einsum("bhkv,bhk->bhv", state, k[:, :, t])
            write = beta[:, :, t, None] * (v[:, :, t] - read)
            state = state + k[:, :, t, :, None] * write[:, :, None, :]
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t] * scale))
        return torch.stack(outputs, dim=1).to(dtype), state


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same function with one decay a head, `chunk_size` tokens at a time.

    With c_i the sum of g up to token i of the chunk and S its initial state, the writes U of a chunk solve the unit
    lower triangular system (I + A) U = beta * (V - exp(c) K S), A_ij = beta_i exp(c_i - c_j) k_i.k_j for j < i.
    """
    dtype, length = v.dtype, q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g, beta = head_first(q, k, v, g, beta)
        state = initial_state(state, k, v)
        q, k, v, g, beta = into_chunks(chunk_size, q * scale, k, v, g, beta)
        decay = g.cumsum(-1)
        between = causal_differences(decay)
        overlap = (beta[..., None] * (k @ k.transpose(-1, -2)) * between).tril(-1)
        from_state = k * decay.exp()[..., None]
        solved = solve_writes(overlap, beta[..., None] * torch.cat([v, from_state], dim=-1))
        writes, state_writes = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
        out, state = Chunks(
            queries=q * decay.exp()[..., None],
            scores=(q @ k.transpose(-1, -2)) * between,
            keys=k * (decay[..., -1:] - decay).exp()[..., None],
            writes=writes,
            state_writes=state_writes,
            decay=decay[..., -1:].exp(),
        ).scan(state)
        return out[:, :, :length].transpose(1, 2).to(dtype), state
