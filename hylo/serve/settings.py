"""What a hybrid asks of vLLM's settings; checked, and filled in, before the engine starts."""

from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.serve.architecture import keeps_latents, why_expanded
from hylo.serve.pages import page_tokens, pages_of_a_request
from hylo.serve.parallel import check_parallel
from hylo.serve.states import linear_mixers, page_tokens_of_a_state, state_shapes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Of what vLLM carries: beyond these taps its convolution leaves some out, beyond these keys its delta rules end.
MOST_TAPS, MOST_KEYS = 4, 256

logger = init_logger(f"vllm.{__name__}")


def _check_prefix_caching(config: HyLoConfig) -> None:
    """Raises HyLoError where vLLM could not copy the states: it knows one shape of them a model."""
    linear = linear_mixers(config)
    if not linear:
        raise HyLoError(
            "prefix caching: no layer of this model is linear, which vLLM's caching for hybrids expects; leave it out"
        )
    if len({state_shapes(config, mixer, 1) for mixer in linear}) > 1:
        raise HyLoError(f"prefix caching: the states of {', '.join(linear)} differ in size; leave it out")


def check_kernels(config: HyLoConfig) -> None:
    """Raises HyLoError where the kernels for GPUs do not take a linear mixer's sizes: some compute on."""
    for mixer in linear_mixers(config):
        sizes: Any = config.geometry(mixer)
        if sizes.conv_size > MOST_TAPS:
            raise HyLoError(f"{mixer}: conv_size is {sizes.conv_size}; vLLM's kernels take 2 to {MOST_TAPS} on a GPU")
        keys = state_shapes(config, mixer, 1).recurrent[2]
        if keys > MOST_KEYS:
            raise HyLoError(f"{mixer}: keys of {keys} values; vLLM's kernels take {MOST_KEYS} at most on a GPU")


def check_dtypes(dtype: torch.dtype, cache: Any, latents: bool) -> None:
    """Raises HyLoError where a cache could not be kept so: latents are of 16 bits, all but states of the model's dtype.

    Args:
        cache: vLLM's `cache_dtype`, `mamba_cache_dtype` and `mamba_ssm_cache_dtype`.
        latents: whether any are kept.
    """
    name = str(dtype).removeprefix("torch.")
    if latents and dtype not in (torch.bfloat16, torch.float16):
        raise HyLoError(
            f"dtype {name}: latents are served in bfloat16 or float16; VLLM_MLA_DISABLE=1 keeps keys and values instead"
        )
    for flag, asked, kept in (
        ("kv-cache-dtype", cache.cache_dtype, name),
        ("mamba-cache-dtype", cache.mamba_cache_dtype, name),
        ("mamba-ssm-cache-dtype", cache.mamba_ssm_cache_dtype, "float32"),
    ):
        if asked not in ("auto", kept):
            raise HyLoError(f"{flag} {asked}: of a hybrid it is {kept}; leave it out")


def check_options(vllm_config: "VllmConfig") -> None:
    """Raises HyLoError where vLLM is asked for what hybrids do not have: some of it would be served, and wrong."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    connected = vllm_config.kv_transfer_config is not None or vllm_config.cache_config.kv_offloading_size is not None
    for asked, reason in (
        (vllm_config.speculative_config is not None, "speculative decoding: a hybrid's states cannot be taken back"),
        (model.quantization is not None, f"quantization {model.quantization}: hybrids are served as they were saved"),
        (
            max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
            "context parallel: a hybrid's cache is not shared by position; tensor parallel shares its heads",
        ),
        (connected, "KV connectors and offloading: a hybrid's states stay on their device"),
        (envs.VLLM_BATCH_INVARIANT, "VLLM_BATCH_INVARIANT: a hybrid's sums depend on what else is in a step"),
        (envs.VLLM_USE_V2_MODEL_RUNNER, "VLLM_USE_V2_MODEL_RUNNER: hybrids are served by vLLM's first runner"),
    ):
        if asked:
            raise HyLoError(f"{reason}; leave it out")


def _fill_pages(config: HyLoConfig, vllm_config: "VllmConfig") -> None:
    """Chooses the size of pages by the longest request, where the user gave none and no prefixes are kept."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    least = page_tokens_of_a_state(config, vllm_config.parallel_config.tensor_parallel_size, model.dtype)
    if least is None or cache.user_specified_block_size or cache.enable_prefix_caching:
        return
    mixers = config.token_mixers or []
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
        check_options(vllm_config)
        check_dtypes(vllm_config.model_config.dtype, vllm_config.cache_config, keeps_latents(config))
        if current_platform.is_cuda():
            check_kernels(config)
        if vllm_config.cache_config.enable_prefix_caching:
            _check_prefix_caching(config)
        kind = (config.rope_parameters or {}).get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise HyLoError(f"rope_type {kind!r}: frequencies that change with the length are not served")
        reason = why_expanded(config)
        if reason is not None:
            logger.info("MLA layers keep keys and values, not latents: %s", reason)
        if keeps_latents(config):
            from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum

            vllm_config.attention_config.mla_prefill_backend = MLAPrefillBackendEnum.CUSTOM
            _fill_pages(config, vllm_config)
