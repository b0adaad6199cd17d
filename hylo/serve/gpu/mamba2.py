"""The recurrence of Mamba-2 by the kernels that vLLM carries, x and B repeated to the heads that they serve."""

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update
from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen

from hylo.serve.gpu.delta import initial_states
from hylo.serve.gpu.groups import groups, most_prompts


def decode(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
    output: Tensor,
) -> None:
    """One token of each request; moves `state` on, fills `output`.

    Args:
        x, B, C, output: `[N, H, hd]`.
        dt: `[N, H]`, before softplus.
        A, D, dt_bias: `[H]` float32.
        state: `[slots, H, hd, hd]`.
        slots: `[N]`.
    """
    size = x.shape[-1]
    selective_state_update(
        state,
        x,
        dt[..., None].expand(-1, -1, size),
        A[:, None, None].expand(-1, size, state.shape[-1]),
        B,
        C,
        D[:, None].expand(-1, size),
        dt_bias[:, None].expand(-1, size),
        dt_softplus=True,
        state_batch_indices=slots,
        out=output,
    )


def prefill(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    metadata: Any,
    output: Tensor,
) -> None:
    """Some tokens of each prompt, `[T, H, hd]`, end to end; leaves in `state` what follows the last of each."""
    for group in groups(metadata, most_prompts(state.shape[1:])):
        mine = group.tokens
        last = mamba_chunk_scan_combined_varlen(
            x[mine],
            dt[mine],
            A,
            B[mine],
            C[mine],
            chunk_size=metadata.chunk_size,
            cu_seqlens=group.offsets,
            cu_chunk_seqlens=group.chunk_offsets,
            last_chunk_indices=group.last_chunks,
            seq_idx=group.chunk_prompts,
            out=output[mine],
            D=D,
            dt_bias=dt_bias,
            initial_states=initial_states(state, metadata, group.prompts),
            dt_softplus=True,
            state_dtype=state.dtype,
        )
        state[metadata.state_indices_tensor_p[group.prompts]] = last
