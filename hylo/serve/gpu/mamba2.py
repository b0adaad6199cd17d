"""The recurrence of Mamba-2 by the kernels that vLLM carries, x and B repeated to the heads that they serve."""

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update
from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen

from hylo.serve.gpu.delta import initial_states


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
    last = mamba_chunk_scan_combined_varlen(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=metadata.chunk_size,
        cu_seqlens=metadata.query_start_loc_p,
        cu_chunk_seqlens=metadata.cu_chunk_seqlen_p,
        last_chunk_indices=metadata.last_chunk_indices_p,
        seq_idx=metadata.seq_idx_p,
        out=output,
        D=D,
        dt_bias=dt_bias,
        initial_states=initial_states(state, metadata),
        dt_softplus=True,
        state_dtype=state.dtype,
    )
    state[metadata.state_indices_tensor_p] = last
