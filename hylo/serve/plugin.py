"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`."""

ARCHITECTURE = "HyLoForCausalLM"


def register() -> None:
    """Makes vLLM know hybrids: their config, their model class, the shape of their cache. May be called again."""
    # vLLM is imported here, where a process of its own asks, and the package registers its config by being imported.
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from hylo import HyLoConfig
    from hylo.serve.architecture import HyLoArchitecture
    from hylo.serve.settings import HyLoSettings

    # Else vLLM reads the config by the Auto classes, and asks for trust_remote_code where auto_map names one.
    _CONFIG_REGISTRY[HyLoConfig.model_type] = HyLoConfig
    MODEL_ARCH_CONFIG_CONVERTORS[HyLoConfig.model_type] = HyLoArchitecture
    MODELS_CONFIG_MAP[ARCHITECTURE] = HyLoSettings
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: a process that only schedules never imports the model.
        ModelRegistry.register_model(ARCHITECTURE, "hylo.serve.model:ServedHyLo")
