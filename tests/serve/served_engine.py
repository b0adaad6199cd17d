"""Engines for the tests, and what their answers are compared with: the model itself, in plain transformers."""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny import HYBRIDS, VOCABULARY, random_hybrid
from transformers import PreTrainedModel

from hylo import HyLoForCausalLM

# Of a token's log-probability, in float32.
TOLERANCE = 1e-3
# vLLM sizes its cache in memory; tiny models have room for everything in this much.
CACHE_BYTES = 64 * 2**20


def save_hybrid(folder: Path, name: str, **changes: Any) -> HyLoForCausalLM:
    """One of the tiny hybrids, saved as any checkpoint is."""
    model = random_hybrid(**(HYBRIDS[name] | changes))
    model.save_pretrained(folder)
    return model


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM with a checkpoint, as `LLM(CHECKPOINT)` starts it; tokens are given as numbers."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from hylo.serve.plugin import register

    # The entry point does it, where the package was installed with it; twice does no harm.
    register()
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    llm = LLM(str(folder), **(settings | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def random_prompts(lengths: list[int], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def greedy(llm: Any, prompts: list[list[int]], new_tokens: list[int]) -> list[Any]:
    """Answers of these lengths, each token with its log-probability."""
    from vllm import SamplingParams

    sampling = [
        SamplingParams(temperature=0, max_tokens=count, logprobs=1, ignore_eos=True, detokenize=False)
        for count in new_tokens
    ]
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)


@torch.no_grad()
def worst_difference(model: PreTrainedModel, prompts: list[list[int]], answers: list[Any]) -> float:
    """The largest difference of a token's log-probability from the model's own, over all answers.

    Every token must be the model's own choice, up to two words that it finds as likely.
    """
    worst = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        output = answer.outputs[0]
        ids = list(output.token_ids)
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1)
        for step, token in enumerate(ids):
            own, given = expected[step, token].item(), output.logprobs[step][token].logprob
            assert expected[step].max().item() - own < TOLERANCE, f"token {step} after {len(prompt)}"
            assert math.isfinite(given), f"token {step} after {len(prompt)}"
            worst = max(worst, abs(own - given))
    return worst
