"""What a step's batch looks like to linear layers: vLLM's metadata, with prompts of one token as steps of decoding.

vLLM replays the graph of a decoding step wherever each request has one token, and its metadata leave a prompt's first
token out of such a step: the graph would move on the states of whoever ran in that row before. Here the states of such
a request are set to zero, and the token is decoded.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.mamba2_attn import (
    Mamba2AttentionBackend,
    Mamba2AttentionMetadata,
    Mamba2AttentionMetadataBuilder,
)
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadataBuilder
from vllm.v1.attention.backends.short_conv_attn import (
    ShortConvAttentionBackend,
    ShortConvAttentionMetadata,
    ShortConvAttentionMetadataBuilder,
)


class FirstTokens(BaseMambaAttentionMetadataBuilder):
    """Put before one of vLLM's builders, whose metadata have a field `begun`: which requests begin with one token."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self.layers = [layers[name] for name in layer_names]

    def _compute_common_metadata(self, common_attn_metadata: Any, **options: Any) -> Any:
        common = common_attn_metadata
        begins = common.is_prefilling & (common.seq_lens_cpu_upper_bound == 1)
        if not begins.any():
            return super()._compute_common_metadata(common, **options)
        begun = begins.nonzero().flatten().to(self.device)
        self._begin(common.block_table_tensor, begun)
        common = common.replace(is_prefilling=common.is_prefilling & ~begins)
        return replace(super()._compute_common_metadata(common, **options), begun=begun)

    def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor) -> Any:
        """As vLLM calls it for each further group of layers, with what it built for the first."""
        if metadata.begun is not None:
            self._begin(blk_table, metadata.begun)
        return super().update_block_table(metadata, blk_table, slot_mapping)

    def _begin(self, block_table: Tensor, rows: Tensor) -> None:
        slots = block_table[rows, 0].long()
        for layer in self.layers:
            for state in layer.kv_cache:
                state[slots] = 0


@dataclass
class ConvolvedMetadata(ShortConvAttentionMetadata):
    """Which tokens are whose, where each request's slot is, and what the convolution's kernel asks."""

    begun: Tensor | None = None


class ConvolvedBuilder(FirstTokens, ShortConvAttentionMetadataBuilder):
    metadata_cls = ConvolvedMetadata


class ConvolvedBackend(ShortConvAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[ConvolvedBuilder]:
        return ConvolvedBuilder


@dataclass
class ChunkedMetadata(Mamba2AttentionMetadata):
    """The same, and how the chunks of Mamba-2's kernels lie."""

    begun: Tensor | None = None


class ChunkedBuilder(FirstTokens, Mamba2AttentionMetadataBuilder):
    metadata_cls = ChunkedMetadata


class ChunkedBackend(Mamba2AttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[ChunkedBuilder]:
        return ChunkedBuilder
