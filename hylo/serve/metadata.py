"""What a step's batch looks like to linear layers: vLLM's metadata, with prompts of one token as steps of decoding.

vLLM replays the graph of a decoding step wherever each request has one token, and its metadata leave a prompt's first
token out of such a step: the graph would move on the states of whoever ran in that row before. Here the states of such
a request are set to zero, and the token is decoded.
"""

from typing import Any

import torch
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionBackend, Mamba2AttentionMetadataBuilder
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadataBuilder
from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionBackend, ShortConvAttentionMetadataBuilder


class FirstTokens(BaseMambaAttentionMetadataBuilder):
    """Put before one of vLLM's builders."""

    # Each group of layers has slots of its own, and begins them itself.
    supports_update_block_table = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self.layers = [layers[name] for name in layer_names]

    def _compute_common_metadata(self, common_attn_metadata: Any, **options: Any) -> Any:
        common = common_attn_metadata
        begun = common.is_prefilling & (common.seq_lens_cpu_upper_bound == 1)
        if begun.any():
            slots = common.block_table_tensor[begun.nonzero().flatten().to(self.device), 0].long()
            for layer in self.layers:
                for state in layer.kv_cache:
                    state[slots] = 0
            common = common.replace(is_prefilling=common.is_prefilling & ~begun)
        return super()._compute_common_metadata(common, **options)


class ConvolvedBuilder(FirstTokens, ShortConvAttentionMetadataBuilder):
    pass


class ConvolvedBackend(ShortConvAttentionBackend):
    """Which tokens are whose, where each request's slot is, and what the convolution's kernel asks."""

    @staticmethod
    def get_builder_cls() -> type[ConvolvedBuilder]:
        return ConvolvedBuilder


class ChunkedBuilder(FirstTokens, Mamba2AttentionMetadataBuilder):
    pass


class ChunkedBackend(Mamba2AttentionBackend):
    """The same, and how the chunks of Mamba-2's kernels lie."""

    @staticmethod
    def get_builder_cls() -> type[ChunkedBuilder]:
        return ChunkedBuilder
