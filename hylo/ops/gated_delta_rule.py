"""The gated delta rule (arXiv 2412.06464, equation 10), recurrent and chunked, in plain torch.

Per head, with a state S of shape `[K, V]`:

    S_t = exp(g_t) S_{t-1} + k_t u_t^T,   u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t),   o_t = scale * S_t^T q_t

`recurrent_gated_delta_rule` is that definition, one token at a time. `chunk_gated_delta_rule` computes the same in
chunks (section 3.3, the extended WY form). Both keep the dtype of the wider of float32 and the input, so that float64
inputs give a float64 reference.
"""

import torch
from torch import Tensor


def _prepare(*tensors: Tensor) -> list[Tensor]:
    """`[B, T, H, ...]` to `[B, H, T, ...]`, in float32 or wider."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [tensor.transpose(1, 2).to(dtype) for tensor in tensors]


def _initial_state(state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, _, key_dim = k.shape
    if state is None:
        return k.new_zeros(batch, heads, key_dim, v.shape[-1])
    return state.to(k.dtype)


def recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, scale: float | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: one step a token. Used for decoding, and as the reference of every other form.

    Args:
        q, k: `[B, T, H, K]`; normalise k (and q) before, the rule assumes |k| <= 1.
        v: `[B, T, H, V]`.
        g: log decay, `[B, T, H]`, at most 0.
        beta: write strength in [0, 1], `[B, T, H]`.
        scale: factor on q; K ** -0.5 by default.
        state: S before the first token, `[B, H, K, V]`; zeros by default.

    Returns:
        outputs `[B, T, H, V]` in the dtype of v, and the state after the last token, `[B, H, K, V]`.
    """
    dtype = v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g, beta = _prepare(q, k, v, g, beta)
        state = _initial_state(state, k, v)
        outputs = []
        for t in range(q.shape[2]):
            state = state * g[:, :, t, None, None].exp()
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
    """The same function, `chunk_size` tokens at a time. Arguments and results as `recurrent_gated_delta_rule`.

    With c_i the sum of g up to token i of the chunk and S its initial state, the writes U of a chunk solve the unit
    lower triangular system (I + A) U = beta * (V - exp(c) K S), A_ij = beta_i exp(c_i - c_j) k_i.k_j for j < i.
    """
    dtype, length = v.dtype, q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g, beta = _prepare(q, k, v, g, beta)
        state = _initial_state(state, k, v)
        # Padding tokens write nothing (k = v = beta = 0) and decay nothing (g = 0).
        padding = -length % chunk_size
        if padding:
            q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
            g, beta = (torch.nn.functional.pad(x, (0, padding)) for x in (g, beta))
        q, k, v, g, beta = (x.unflatten(2, (-1, chunk_size)) for x in (q * scale, k, v, g, beta))

        decay = g.cumsum(-1)
        lower = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).tril()
        # exp(c_i - c_j) for j <= i; masked before the exponential, where the difference may be large and positive.
        between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~lower, -torch.inf).exp()
        overlap = (beta[..., None] * (k @ k.transpose(-1, -2)) * between).tril(-1)
        system = overlap + torch.eye(chunk_size, dtype=q.dtype, device=q.device)
        from_state = k * decay.exp()[..., None]
        solved = torch.linalg.solve_triangular(
            system, beta[..., None] * torch.cat([v, from_state], dim=-1), upper=False, unitriangular=True
        )
        writes_from_values, writes_from_state = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
        scores = (q @ k.transpose(-1, -2)) * between
        q_decayed = q * decay.exp()[..., None]
        k_to_end = k * (decay[..., -1:] - decay).exp()[..., None]
        total_decay = decay[..., -1].exp()[..., None, None]

        outputs = []
        for n in range(q.shape[2]):
            writes = writes_from_values[:, :, n] - writes_from_state[:, :, n] @ state
            outputs.append(q_decayed[:, :, n] @ state + scores[:, :, n] @ writes)
            state = state * total_decay[:, :, n] + k_to_end[:, :, n].transpose(-1, -2) @ writes
        out = torch.cat(outputs, dim=2)[:, :, :length].transpose(1, 2)
        return out.to(dtype), state
