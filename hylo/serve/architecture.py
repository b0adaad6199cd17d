"""What vLLM has to know of a hybrid before it makes one: head sizes, and whether MLA layers keep latents."""

from typing import Any

# Before the converter, which it imports in turn.
import vllm.config  # noqa: F401
from vllm import envs
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from hylo.config import HyLoConfig
from hylo.mixers.mla import MLAGeometry

# Of vLLM's attention kernels for the CPU.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

# Tokens that the kernels of Mamba-2 read at a time.
MAMBA2_CHUNK = 128


def mla_geometry(config: HyLoConfig) -> MLAGeometry:
    geometry = config.geometry("mla")
    assert isinstance(geometry, MLAGeometry)
    return geometry


def why_expanded(config: HyLoConfig) -> str | None:
    """Why MLA layers keep keys and values in place of latents; None where they keep latents, or where there are none.

    Either way the outputs are the same; the cache is that of attention with the base's KV heads.
    """
    mixers = set(config.token_mixers or [])
    if "mla" not in mixers:
        return None
    if not current_platform.is_cuda():
        return "vLLM has no kernels for latents on this device"
    if not current_platform.has_device_capability(80):
        return "prompts over latents are read by FlashAttention, which wants a GPU of compute capability 8.0"
    if envs.VLLM_MLA_DISABLE:
        return "VLLM_MLA_DISABLE is set"
    if mla_geometry(config).key_norm:
        return "key_norm: the kernels for latents know no scale that differs by head and token"
    if "attention" in mixers:
        return "kept attention beside MLA: vLLM's cache takes one size of page for both"
    return None


def keeps_latents(config: HyLoConfig) -> bool:
    """Whether the cache of this model holds latents."""
    return "mla" in (config.token_mixers or []) and why_expanded(config) is None


def attention_head_size(config: HyLoConfig) -> int:
    """The head size that attention layers, MLA expanded to attention among them, run and cache at.

    One size for all, the next that the kernels take: zeros beyond a head's own values change neither its scores nor
    the values read.
    """
    sizes = [config.head_dim] if "attention" in (config.token_mixers or []) else []
    if "mla" in (config.token_mixers or []):
        geometry = mla_geometry(config)
        sizes += [geometry.qk_head_dim, geometry.v_head_dim]
    widest = max(sizes, default=config.head_dim)
    if current_platform.is_cpu():
        return next((size for size in CPU_HEAD_SIZES if size >= widest), widest)
    return -(-widest // 8) * 8


class HyLoArchitecture(ModelArchConfigConvertorBase):
    """The entry for hybrids in `MODEL_ARCH_CONFIG_CONVERTORS`."""

    hf_text_config: HyLoConfig

    def is_deepseek_mla(self) -> bool:
        return keeps_latents(self.hf_text_config)

    def get_head_size(self) -> int:
        """Values that a token caches a KV head: half of them keys, half values, or all of them one latent."""
        if keeps_latents(self.hf_text_config):
            geometry = mla_geometry(self.hf_text_config)
            return geometry.kv_lora_rank + geometry.qk_rope_head_dim
        return attention_head_size(self.hf_text_config)

    def convert(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's own. What vLLM reads elsewhere become attributes: the sizes of MLA, where latents are kept."""
        config = self.hf_text_config
        config.mamba_chunk_size = MAMBA2_CHUNK
        if keeps_latents(config):
            geometry = mla_geometry(config)
            for name in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                setattr(config, name, getattr(geometry, name))
        return super().convert(*args, **kwargs)
