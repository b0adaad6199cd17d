"""What a hybrid asks of vLLM's settings; checked, and filled in, before the engine starts."""

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.serve.architecture import keeps_latents, mla_geometry, why_expanded
from hylo.serve.pages import page_tokens, pages_of_a_request
from hylo.serve.parallel import check_parallel
from hylo.serve.states import largest_state, linear_mixers, state_shapes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")


def _check_prefix_caching(config: HyLoConfig) -> None:
    """Raises HyLoError where vLLM could not copy the states: it knows one shape of them a model."""
    linear = linear_mixers(config)
    if len({state_shapes(config, mixer, 1) for mixer in linear}) > 1:
        raise HyLoError(f"prefix caching: the states of {', '.join(linear)} differ in size; leave it out")


def _fill_pages(config: HyLoConfig, vllm_config: "VllmConfig") -> None:
    """Chooses the size of pages by the longest request, where the user gave none and no prefixes are kept."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    state = largest_state(config, vllm_config.parallel_config.tensor_parallel_size, model.dtype)
    if state is None or cache.user_specified_block_size or cache.enable_prefix_caching:
        return
    geometry, mixers = mla_geometry(config), config.token_mixers or []
    latent = (geometry.kv_lora_rank + geometry.qk_rope_head_dim) * model.dtype.itemsize
    least = -(-state.nbytes(model.dtype) // latent)
    pages = pages_of_a_request(mixers.count("mla"), [mixers.count(name) for name in linear_mixers(config)])
    cache.block_size = page_tokens(model.max_model_len, least, *pages)
    # Else vLLM begins anew with its own.
    cache.user_specified_block_size = True


class HyLoSettings(VerifyAndUpdateConfig):
    """The entry for hybrids in `MODELS_CONFIG_MAP`."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        config: HyLoConfig = vllm_config.model_config.hf_config
        check_parallel(config, vllm_config.parallel_config.tensor_parallel_size)
        if vllm_config.speculative_config is not None:
            raise HyLoError("speculative decoding: a hybrid's states cannot be taken back; leave it out")
        if vllm_config.cache_config.enable_prefix_caching:
            _check_prefix_caching(config)
        kind = (config.rope_parameters or {}).get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise HyLoError(f"rope_type {kind!r}: frequencies that change with the length are not served")
        reason = why_expanded(config)
        if reason is not None:
            logger.info("MLA layers keep keys and values, not latents: %s", reason)
        if keeps_latents(config):
            cached = vllm_config.cache_config.cache_dtype
            if cached not in ("auto", "bfloat16", "float16"):
                raise HyLoError(f"kv-cache-dtype {cached}: latents are kept in bfloat16 or float16; leave it out")
            from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum

            vllm_config.attention_config.mla_prefill_backend = MLAPrefillBackendEnum.CUSTOM
            _fill_pages(config, vllm_config)
