"""vLLM's own command line, in this interpreter: python -m hylo.serve.start serve MODEL ..."""

import sys
from functools import partialmethod

from hylo.serve.installed import name_vllm

# Seconds that answers under way have when the server is told to stop. vLLM ends its engine first, and would then wait
# without end for answers that cannot come.
STOP_S = 5


def prepare() -> None:
    """What each process needs before it imports vLLM."""
    name_vllm()
    import uvicorn

    uvicorn.Config.__init__ = partialmethod(uvicorn.Config.__init__, timeout_graceful_shutdown=STOP_S)


def main() -> None:
    from vllm.entrypoints.cli.main import main as command_line

    # What vLLM shows where it speaks of itself.
    sys.argv[0] = "vllm"
    command_line()


# By the second name Python runs this in the processes that vLLM starts anew: of several API servers each is one.
if __name__ in ("__main__", "__mp_main__"):
    prepare()
if __name__ == "__main__":
    main()
