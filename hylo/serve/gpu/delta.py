"""The delta rules of Gated DeltaNet and Kimi Delta Attention by the kernels that vLLM carries, of any head sizes.

Keys may have up to 256 values a head. States are `[H, V, K]` float32, in vLLM's slots; slot 0 is padding and is left.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from vllm.third_party.flash_linear_attention.ops import chunk_gated_delta_rule
from vllm.third_party.flash_linear_attention.ops.fused_sigmoid_gating import (
    fused_sigmoid_gating_delta_rule_update_kernel as delta_rule_of_one_token,
)
from vllm.third_party.flash_linear_attention.ops.kda import chunk_kda_with_fused_gate
from vllm.triton_utils import triton
from vllm.triton_utils.allocation import set_triton_allocator

from hylo.serve.gpu.groups import groups, most_prompts

# Of one token of a request: value channels, beside 256 of a key, and warps of a program. vLLM's own 32 and 4 take 1.3
# to 1.7 times as long (benchmarks/decode_kernels.py --shapes).
VALUES, WARPS = 16, 1


def convolve_one(inputs: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, slots: Tensor) -> Tensor:
    """The short convolution with SiLU of one token of each request, `[B, C]`; moves `past` on.

    Args:
        past: `[slots, W - 1, C]`.
        slots: of each request, `[B]`.
    """
    # The kernel writes over its input, which here is part of a larger tensor.
    return causal_conv1d_update(
        inputs.contiguous(), past.transpose(1, 2), weight, bias, activation="silu", conv_state_indices=slots
    )


def convolve_many(inputs: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, metadata: Any) -> Tensor:
    """The same of some tokens of each prompt, `[T, C]`, end to end."""
    return causal_conv1d_fn(
        inputs.transpose(0, 1),
        weight,
        bias,
        conv_states=past.transpose(1, 2),
        query_start_loc=metadata.query_start_loc_p,
        cache_indices=metadata.state_indices_tensor_p,
        has_initial_state=metadata.has_initial_states_p,
        activation="silu",
        metadata=metadata,
    ).transpose(0, 1)


def initial_states(state: Tensor, metadata: Any, prompts: slice) -> Tensor:
    """Of each of these prompts, zeros where it begins, `[N, H, V, K]`."""
    held = state[metadata.state_indices_tensor_p[prompts]]
    # In place: of many prompts the states are large.
    return held.masked_fill_(~metadata.has_initial_states_p[prompts, None, None, None], 0)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
) -> Tensor:
    """One token of each request, `[B, H, K or V]`, contiguous; moves `state` on.

    Args:
        decays: `[B, H]`, or `[B, H, K]` for one a key channel.
        b: `[B, H]`, before the sigmoid.

    Returns:
        `[B, H, V]`.
    """
    batch, heads, key_size = q.shape
    value_size = v.shape[-1]
    # One batch of B sequences of one token, as vLLM's own layers call it: the kernel is compiled anew for each size of
    # batch, and not for each number of sequences.
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out = torch.empty_like(v)
    keys = triton.next_power_of_2(key_size)
    # As much of the state for each program, whatever the keys' size: it is held in registers.
    values = min(max(1, VALUES * 256 // keys), triton.next_power_of_2(value_size))
    delta_rule_of_one_token[(1, triton.cdiv(value_size, values), batch * heads)](
        A_log=A_log,
        a=decays.contiguous(),
        b=b.contiguous(),
        dt_bias=dt_bias,
        # Of softplus.
        beta=1.0,
        threshold=20.0,
        q=q,
        k=k,
        v=v,
        o=out,
        h0=state,
        ht=state,
        cu_seqlens=offsets,
        ssm_state_indices=slots,
        num_accepted_tokens=None,
        scale=key_size**-0.5,
        N=batch,
        T=batch,
        B=1,
        H=heads,
        HV=heads,
        K=key_size,
        V=value_size,
        BK=keys,
        BV=values,
        stride_init_state_token=state.stride(0),
        stride_final_state_token=state.stride(0),
        stride_indices_seq=slots.stride(0),
        stride_indices_tok=1,
        INPLACE_FINAL_STATE=True,
        USE_QK_L2NORM_IN_KERNEL=True,
        IS_KDA=decays.dim() == 3,
        num_warps=WARPS,
        num_stages=3,
    )
    return out


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    metadata: Any,
) -> Tensor:
    """Some tokens of each prompt, `[T, H, K or V]`, end to end; leaves in `state` what follows the last of each.

    The outputs may take the place of v.
    """
    # Some of the kernels take scratch memory, which shall be torch's.
    set_triton_allocator(q.device)
    made = []
    for group in groups(metadata, most_prompts(state.shape[1:])):
        mine = group.tokens
        common: dict[str, Any] = {
            "q": q[None, mine],
            "k": k[None, mine],
            "v": v[None, mine],
            "beta": b[None, mine].float().sigmoid(),
            "initial_state": initial_states(state, metadata, group.prompts),
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": True,
            "cu_seqlens": group.offsets,
        }
        if decays.dim() == 3:
            out, last = chunk_kda_with_fused_gate(raw_g=decays[None, mine], A_log=A_log, g_bias=dt_bias, **common)
        else:
            g = -A_log.exp() * functional.softplus(decays[None, mine].float() + dt_bias)
            out, last = chunk_gated_delta_rule(g=g, **common)
        state[metadata.state_indices_tensor_p[group.prompts]] = last.to(state.dtype)
        made.append(out[0])
    return made[0] if len(made) == 1 else torch.cat(made)
