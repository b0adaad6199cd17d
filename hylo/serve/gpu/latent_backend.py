"""Attention over latents on vLLM's Triton MLA backend, with what it lacks for small latents and grouped KV heads.

Decoding reads one latent a token for all heads. What differs:
- metadata take any size of latent;
- prompts are expanded to the base's KV heads, not to one a query head, and attended to by FlashAttention as any grouped
  attention is; cached tokens are gathered by our own kernel;
- decoding cuts the past into as many pieces as fill the GPU at the batch's size, not at a batch of one, and attends to
  each, and joins them, by our own kernels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata
from vllm.platforms import current_platform
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum, register_mla_prefill_backend
from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend, TritonMLAImpl, TritonMLAMetadataBuilder
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states
from vllm.v1.attention.ops.triton_merge_attn_states import mask_empty_context
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from hylo.serve.gpu.gather import gather_latents
from hylo.serve.gpu.latent_decode import HEADS_A_PROGRAM, attend_pieces, join_pieces

# Cached tokens that are expanded to keys and values at a time.
CONTEXT_TOKENS = 65536
# A piece of the past that is worth a program of its own.
LEAST_SPLIT = 512


def register_prefill() -> None:
    """Puts `GroupedPrefill` where vLLM looks for a prefill backend from outside. May be called again."""
    register_mla_prefill_backend(MLAPrefillBackendEnum.CUSTOM, f"{__name__}.{GroupedPrefill.__name__}")


def decode_splits(batch: int, heads: int, longest: int, processors: int) -> int:
    """Into how many pieces decoding cuts each past: a power of two.

    Enough for four programs a processor over the whole batch, none shorter than `LEAST_SPLIT` tokens.
    """
    programs = batch * -(-heads // HEADS_A_PROGRAM)
    wanted = max(1, 4 * processors // programs)
    useful = max(1, longest // LEAST_SPLIT)
    return 2 ** (min(wanted, useful).bit_length() - 1)


class GroupedPrefill(MLAPrefillBackend):
    """FlashAttention over grouped keys and values, of any sizes; stateless but for vLLM's metadata."""

    @staticmethod
    def get_name() -> str:
        return "HYLO_GROUPED"

    def run_prefill_new_tokens(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        return_softmax_lse: bool,
        out: Tensor | None = None,
        output_scale: Tensor | None = None,
    ) -> Any:
        """`[T, H, K]`, `[T, Hkv, K]` and `[T, Hkv, V]` to `[T, H, V]`, and log-sum-exps `[H, T]` where asked."""
        offsets = self._prefill_metadata.query_start_loc
        return self._attend(q, k, v, offsets, self._prefill_metadata.max_query_len, True, return_softmax_lse)

    def run_prefill_context_chunk(self, chunk_idx: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same over one piece of the past, all of which every query sees."""
        context = self._prefill_metadata.chunked_context
        assert context is not None
        return self._attend(q, k, v, context.cu_seq_lens[chunk_idx], context.max_seq_lens[chunk_idx], False, True)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, k_offsets: Tensor, longest_k: int, causal: bool, return_lse: bool
    ) -> Any:
        # The kernel wants one head size, a multiple of 8; zeros change neither scores nor the values kept.
        value_size = v.shape[-1]
        size = -(-max(q.shape[-1], value_size) // 8) * 8
        q, k, v = (functional.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x for x in (q, k, v))
        result = flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=self._prefill_metadata.query_start_loc,
            cu_seqlens_k=k_offsets,
            max_seqlen_q=self._prefill_metadata.max_query_len,
            max_seqlen_k=longest_k,
            softmax_scale=self.scale,
            causal=causal,
            return_softmax_lse=return_lse,
            fa_version=get_flash_attn_version(head_size=size),
        )
        if not return_lse:
            return result[..., :value_size]
        return result[0][..., :value_size], result[1]


@dataclass
class LatentMetadata(MLACommonMetadata):
    """vLLM's, for any size of latent: the Triton kernels take every one."""

    def __post_init__(self) -> None:
        pass


class LatentMetadataBuilder(TritonMLAMetadataBuilder):
    """vLLM's, without its alignment of pieces to pages, which for hybrids hold thousands of tokens."""

    @staticmethod
    def determine_chunked_prefill_workspace_size(vllm_config: Any) -> int:
        return CONTEXT_TOKENS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.metadata_cls = LatentMetadata
        # Pieces are aligned to this, and our gather begins at any token.
        self.page_size = 1

    def _reserve_attn_logits_workspace(self) -> None:
        """Room for the largest batch times the splits that it is cut into, before vLLM locks its workspace."""
        if not is_workspace_manager_initialized():
            return
        processors, longest = current_platform.num_compute_units(), self.model_config.max_model_len
        rows = max(
            batch * decode_splits(batch, self.num_heads, longest, processors)
            for batch in range(1, self.vllm_config.scheduler_config.max_num_seqs + 1)
        )
        shape = (rows, self.num_heads, 1, self.mla_dims.kv_lora_rank + 1)
        current_workspace_manager().get_simultaneous((shape, torch.float32))


class LatentImpl(TritonMLAImpl):
    """Reads and expands latents. `kv_b_proj.weight` holds the KV heads, `[Hkv (nope + v), r]`."""

    def expanded(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Latents `[S, r]` and rotated rotary keys `[S, rope]` to keys `[S, Hkv, nope + rope]` and values."""
        heads = functional.linear(latent, self.kv_b_proj.weight)
        heads = heads.unflatten(-1, (-1, self.qk_nope_head_dim + self.v_head_dim))
        nope, value = heads.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        key = torch.cat([nope, rope[:, None].expand(-1, heads.shape[1], -1)], dim=-1)
        return key, value.contiguous()

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: Any,
        k_scale: Tensor,
        output: Tensor,
        output_scale: Tensor | None = None,
    ) -> None:
        """New tokens of prompts over themselves, then over each piece of what is cached of them.

        Args:
            q: `[T, H, nope + rope]`.
            kv_c_normed, k_pe: `[T, r]` and `[T, 1, rope]`.
            output: `[T, H * v]`, filled.
        """
        prefill = attn_metadata.prefill
        backend, context = prefill.prefill_backend, prefill.chunked_context
        key, value = self.expanded(kv_c_normed, k_pe[:, 0])
        if context is None:
            output.copy_(backend.run_prefill_new_tokens(q, key, value, False).flatten(1))
            return
        out, lse = backend.run_prefill_new_tokens(q, key, value, True)
        out = out.contiguous()
        for i, rows in enumerate(context.seq_tot):
            held = context.workspace[:rows]
            gather_latents(
                kv_c_and_k_pe_cache,
                prefill.block_table,
                context.token_to_seq[i],
                context.cu_seq_lens[i],
                context.starts[i],
                held,
            )
            latent, rope = held.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
            past, past_lse = backend.run_prefill_context_chunk(i, q, *self.expanded(latent, rope))
            past = past.contiguous()
            if context.has_empty_context[i]:
                mask_empty_context(past_lse, past, prefill.query_start_loc, context.cu_seq_lens[i])
            merged, merged_lse = torch.empty_like(out), torch.empty_like(lse)
            merge_attn_states(
                output=merged,
                output_lse=merged_lse,
                prefix_output=past,
                prefix_lse=past_lse,
                suffix_output=out,
                suffix_lse=lse,
            )
            out, lse = merged, merged_lse
        output.copy_(out.flatten(1))

    def forward_mqa(
        self, q: Any, kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[Tensor, Tensor | None]:
        """One token of each request: `[B, H, r]`, before `W_v`, and log-sum-exps `[B, H]`."""
        query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        batch, heads, _ = query.shape
        out = query.new_empty(batch, heads, self.kv_lora_rank)
        lse = query.new_empty(batch, heads)
        splits = decode_splits(batch, heads, attn_metadata.max_seq_len, self._sm_count)
        shape = (batch, heads, splits, self.kv_lora_rank + 1)
        if is_workspace_manager_initialized():
            (parts,) = current_workspace_manager().get_simultaneous((shape, torch.float32))
        else:
            parts = torch.empty(shape, dtype=torch.float32, device=query.device)
        decoded = attn_metadata.decode
        attend_pieces(query, kv_c_and_k_pe_cache, decoded.block_table, decoded.seq_lens, parts, self.scale)
        join_pieces(parts, decoded.seq_lens, out, lse)
        return out, lse


class LatentBackend(TritonMLABackend):
    """What `MLAAttention` is given."""

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        return LatentImpl

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder
