"""How `hylo serve` starts vLLM's own server: the flags that hybrids need, where the user gave none. Imports no vLLM."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.plan.source import read_config
from hylo.serve.parallel import check_parallel

# Tokens of a prompt that one step reads: what keeps a GPU busy, in little memory beside the cache.
STEP_TOKENS = 8192
# Requests at a time: each has its states in the cache, however short it is.
MOST_REQUESTS = 256
# Beyond this length few requests run at once, and buffers sized for many would take the room of their caches.
LONG_CONTEXT = 131072


@dataclass(frozen=True)
class Request:
    """What is served, and how.

    Attributes:
        model: a checkpoint's folder or hub id.
        context: tokens of the longest request; the trained length by default.
        gpus: ranks that share the model.
        extra: arguments for `vllm serve`, as they are; they win over ours.
    """

    model: str
    context: int | None = None
    gpus: int = 1
    extra: tuple[str, ...] = ()


def serve_command(request: Request) -> list[str]:
    """`vllm serve` and its arguments. Raises HyLoError where the model cannot be served so."""
    config = served_config(request.model)
    check_parallel(config, request.gpus)
    length = request.context or config.max_position_embeddings
    flags = {
        "--max-model-len": str(length),
        "--max-num-batched-tokens": str(STEP_TOKENS),
        "--max-num-seqs": str(most_requests(length)),
    }
    if request.gpus > 1:
        flags["--tensor-parallel-size"] = str(request.gpus)
    command = ["vllm", "serve", request.model]
    for flag, value in flags.items():
        if not given(flag, request.extra):
            command += [flag, value]
    return command + list(request.extra)


def most_requests(length: int) -> int:
    """How many requests of that length are run at once."""
    return MOST_REQUESTS if length <= LONG_CONTEXT else max(8, MOST_REQUESTS * LONG_CONTEXT // length)


def served_config(model: str) -> HyLoConfig:
    """The hybrid's config; no weights are read. Raises HyLoError where it is none."""
    config = read_config(model)
    if not isinstance(config, HyLoConfig):
        raise HyLoError(f"{model} is a {config.model_type}, no hybrid; serve it with: vllm serve {model}")
    return config


def given(flag: str, extra: tuple[str, ...]) -> bool:
    """Whether the user gave a flag, as `--flag value`, `--flag=value` or with underscores."""
    names = {part.split("=", 1)[0].replace("_", "-") for part in extra if part.startswith("--")}
    return flag in names


def server_environment(request: Request, current: Mapping[str, str]) -> dict[str, str]:
    """The user's environment, with what vLLM has to be told there and not by flags."""
    ours: dict[str, str] = {}
    if importlib.util.find_spec("flashinfer") is None:
        # vLLM would ask for it to sample.
        ours["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if request.context and request.context > served_config(request.model).max_position_embeddings:
        # vLLM takes no more than the config says, for models whose angles are a table; ours are computed.
        ours["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return ours | dict(current)


def check_installed() -> None:
    """Raises HyLoError where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise HyLoError("vLLM is not installed: pip install 'hylo[serve]'")
