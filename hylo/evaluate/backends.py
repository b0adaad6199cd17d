"""The two ways a model is asked: through transformers (`HfBackend`), or through any model of lm-eval, such as its vLLM
one (`HarnessBackend`). Both answer the same questions, and both are a model of lm-eval for its own tasks.
"""

import gc
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from hylo.errors import HyLoError
from hylo.evaluate.engine import Engine, Row, Scored, context_limit
from hylo.evaluate.quiet import quiet

_CPU_MEMORY_SHARE = 0.3
_LITTLE = 0.05


class Backend(Protocol):
    """What the suites ask for."""

    @property
    def harness_model(self) -> Any:
        """A model of lm-eval."""
        ...

    def answers(self, prompts: Sequence[str], new_tokens: int, *, special: bool, description: str) -> list[str]:
        """Greedy answers of at most `new_tokens` tokens; `special` adds what the tokenizer puts before a text."""
        ...

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]], description: str) -> list[Scored]:
        """Of each (context, continuation): natural log of the probability, and whether it is the greedy one."""
        ...


class HfBackend:
    """A model of transformers.

    Args:
        engine: what reads and generates.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @cached_property
    def harness_model(self) -> Any:
        from hylo.evaluate.harness import harness_model

        return harness_model(self.engine)

    def answers(self, prompts: Sequence[str], new_tokens: int, *, special: bool, description: str) -> list[str]:
        ids = [self.engine.encode(prompt, special) for prompt in prompts]
        return self.engine.generate(ids, new_tokens, description=description)

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]], description: str) -> list[Scored]:
        limit = context_limit(self.engine.model)
        rows = [self._row(context, continuation, limit) for context, continuation in pairs]
        return self.engine.loglikelihoods(rows, description)

    def _row(self, context: str, continuation: str, limit: int) -> Row:
        """Tokens of both, told apart as lm-eval does: the continuation is what the whole has beyond the context."""
        whole, begun = self.engine.encode(context + continuation), self.engine.encode(context)
        return cut_left(whole[: len(begun)], whole[len(begun) :], limit)


def cut_left(context: list[int], continuation: list[int], limit: int) -> Row:
    """Without what stands more than `limit` tokens before the last one."""
    return context[max(0, len(context) + len(continuation) - limit - 1) :], continuation


class HarnessBackend:
    """Any model of lm-eval."""

    def __init__(self, model: Any) -> None:
        self.harness_model = model

    def answers(self, prompts: Sequence[str], new_tokens: int, *, special: bool, description: str) -> list[str]:
        # Prompts that bring their own first token are known to lm-eval by it, whatever `special` says.
        settings = {"until": [], "max_gen_toks": new_tokens, "do_sample": False, "temperature": 0.0}
        asked = _instances("generate_until", [(prompt, settings) for prompt in prompts])
        with quiet():
            return self.harness_model.generate_until(asked)

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]], description: str) -> list[Scored]:
        with quiet():
            return self.harness_model.loglikelihood(_instances("loglikelihood", list(pairs)))


def _instances(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@contextmanager
def vllm_backend(
    folder: Path, max_length: int, context: int, dtype: str, cache_bytes: int | None = None
) -> Iterator[HarnessBackend]:
    """lm-eval's vLLM model for the length of the block; after it another engine finds the memory free.

    Raises HyLoError where vLLM is not installed, or does not take the model.

    Args:
        max_length: tokens of the longest sequence; vLLM refuses a model whose cache has no room for it.
        context: tokens that the model was made for. Beyond them positions go on as they are, as in transformers.
        cache_bytes: of vLLM's cache; what is left of nearly all of a GPU where None.
    """
    check_vllm()
    from hylo.serve.installed import name_vllm

    name_vllm()
    from lm_eval.models.vllm_causallms import VLLM

    # vLLM refuses more than the config says, and tabulates that many positions' rotations.
    beyond = {"hf_overrides": {"max_position_embeddings": max_length}} if max_length > context else {}
    settings: dict[str, Any] = {"dtype": dtype, "max_model_len": max_length, "batch_size": "auto"}
    try:
        model = VLLM(pretrained=str(folder), **settings, **engine_memory(cache_bytes), **beyond)
    except (ValueError, RuntimeError) as error:
        raise HyLoError(f"vLLM does not take {folder}: {' '.join(str(error).split())[:200]}") from None
    backend = HarnessBackend(model)
    try:
        yield backend
    finally:
        from vllm.distributed import cleanup_dist_env_and_memory

        model.model.llm_engine.engine_core.shutdown()
        del model.model, backend.harness_model, model
        gc.collect()
        cleanup_dist_env_and_memory()


def engine_memory(cache_bytes: int | None) -> dict[str, Any]:
    """vLLM's arguments for a cache of so many bytes; where None, of what is left."""
    if cache_bytes is not None:
        # A cache that is said is not measured, which what runs beside would disturb; the share is only looked for free.
        return {"kv_cache_memory_bytes": cache_bytes, "gpu_memory_utilization": _LITTLE}
    # Of a GPU vLLM takes nearly all; of a CPU's memory it would too, and there others need some.
    return {} if torch.cuda.is_available() else {"gpu_memory_utilization": _CPU_MEMORY_SHARE}


def check_vllm() -> None:
    """Raises HyLoError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise HyLoError("--backend vllm needs vllm, which is not installed; leave it out for transformers")
