"""How `hylo serve` starts vLLM's own server: the flags that hybrids need, where the user gave none. Imports no vLLM."""

import importlib.util
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.plan.quantities import parse_contexts
from hylo.plan.source import read_config
from hylo.serve.parallel import check_parallel
from hylo.serve.states import page_tokens_of_a_state

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
    if request.model.startswith("-"):
        raise HyLoError(f"{request.model}: expected the model first, and options of vllm serve after it")
    told = with_file(request.extra)
    config = served_config(request.model, told)
    check_parallel(config, request.gpus)
    length = longest(request, config, told)
    flags = {"--max-model-len": str(length)}
    # Without it a step reads the longest prompt whole; vLLM knows how large that makes it.
    if not given("--no-enable-chunked-prefill", told):
        flags["--max-num-batched-tokens"] = str(step_tokens(request, config, told))
    flags["--max-num-seqs"] = str(most_requests(length))
    if request.gpus > 1:
        flags["--tensor-parallel-size"] = str(request.gpus)
    command = ["vllm", "serve", request.model]
    for flag, value in flags.items():
        if not given(flag, told):
            command += [flag, value]
    return command + list(request.extra)


def longest(request: Request, config: HyLoConfig, told: tuple[str, ...]) -> int:
    """Tokens of the longest request: the user's own, in vLLM's words or in ours, or the trained length."""
    asked = value_of("--max-model-len", told)
    if asked is not None:
        # What is no length is for vLLM to read, or to refuse.
        with suppress(HyLoError):
            return parse_contexts(asked)[0]
    return request.context or config.max_position_embeddings


def step_tokens(request: Request, config: HyLoConfig, told: tuple[str, ...]) -> int:
    """Tokens that a step reads. Where prefixes are kept vLLM wants a block to fit, which is as large as a state."""
    if "mla" not in (config.token_mixers or []) or not given("--enable-prefix-caching", told):
        return STEP_TOKENS
    block = page_tokens_of_a_state(config, request.gpus, torch.bfloat16) or 0
    # vLLM rounds blocks up, by its kernels' own sizes.
    return max(STEP_TOKENS, -(-(block + 512) // 1024) * 1024)


def most_requests(length: int) -> int:
    """How many requests of that length are run at once."""
    return MOST_REQUESTS if length <= LONG_CONTEXT else max(8, MOST_REQUESTS * LONG_CONTEXT // length)


def served_config(model: str, told: tuple[str, ...]) -> HyLoConfig:
    """The hybrid's config, from where vLLM is told to read it; no weights are read. Raises HyLoError on another."""
    config = read_config(value_of("--hf-config-path", told) or model, value_of("--revision", told))
    if not isinstance(config, HyLoConfig):
        raise HyLoError(f"{model} is a {config.model_type}, no hybrid; serve it with: vllm serve {model}")
    return config


def with_file(extra: tuple[str, ...]) -> tuple[str, ...]:
    """The user's arguments, and those of the file that `--config` names. Raises HyLoError where it cannot be read."""
    named = value_of("--config", extra)
    if named is None:
        return extra
    try:
        values = yaml.safe_load(Path(named).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise HyLoError(f"--config {named}: {' '.join(str(error).split())}") from None
    pairs = values.items() if isinstance(values, dict) else ()
    return (*extra, *(f"--{key}={value}" for key, value in pairs))


def value_of(flag: str, extra: tuple[str, ...]) -> str | None:
    """What the user gave a flag, as `--flag value`, `--flag=value` or with underscores; None where it is not there."""
    for i, part in enumerate(extra):
        name, equals, value = part.partition("=")
        if part.startswith("--") and name.replace("_", "-") == flag:
            return value if equals else next(iter(extra[i + 1 :]), "")
    return None


def given(flag: str, extra: tuple[str, ...]) -> bool:
    """Whether the user gave a flag, as `value_of` looks for it."""
    return value_of(flag, extra) is not None


def server_environment(request: Request, current: Mapping[str, str]) -> dict[str, str]:
    """The user's environment, with what vLLM has to be told there and not by flags."""
    ours: dict[str, str] = {}
    if importlib.util.find_spec("flashinfer") is None:
        # vLLM would ask for it to sample.
        ours["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    told = with_file(request.extra)
    config = served_config(request.model, told)
    if longest(request, config, told) > config.max_position_embeddings:
        # vLLM takes no more than the config says, for models whose angles are a table; ours are computed.
        ours["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return ours | dict(current)


def check_installed() -> None:
    """Raises HyLoError where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise HyLoError("vLLM is not installed: pip install 'hylo[serve]'")
