"""vLLM's own command line, in this interpreter: python -m hylo.serve.start serve MODEL ..."""

import sys
from functools import partialmethod

from hylo.serve.installed import name_vllm

# Seconds that answers under way have when the server is told to stop. vLLM ends its engine first, and would then wait
# without end for answers that cannot come.
STOP_S = 5


def main() -> None:
    name_vllm()
    import uvicorn
    from vllm.entrypoints.cli.main import main as command_line

    uvicorn.Config.__init__ = partialmethod(uvicorn.Config.__init__, timeout_graceful_shutdown=STOP_S)

    # What vLLM shows where it speaks of itself.
    sys.argv[0] = "vllm"
    command_line()


if __name__ == "__main__":
    main()
