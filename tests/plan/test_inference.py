"""Memory to serve: exact where it can be, and remedies that hold."""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from base_configs import CONFIGS, LLAMA_3B
from tiny import hybrid_config as plain_config
from tiny import random_hybrid, random_ids
from transformers import AutoConfig

from hylo import HyLoError
from hylo.cache import make_cache
from hylo.mixers import MIXERS
from hylo.plan.inference import RESERVED_BYTES, Serving, fits, inference_memory, longest_context, remedies
from hylo.plan.model import ModelPlan, plan_model
from hylo.plan.quantities import GIB
from hylo.plan.report import plan_pair
from hylo.plan.workspace import Chunk, prefill_workspace, workspace_by_part
from hylo.upcycle.families import hybrid_config

K = 1024


@cache
def pair() -> tuple[ModelPlan, ModelPlan]:
    """Llama-3.2-3B as 6MLA22GDN, and dense."""
    return plan_pair(AutoConfig.for_model(**CONFIGS[LLAMA_3B]), "6MLA22GDN", "paper", LLAMA_3B)


def test_weights_and_cache_are_exact() -> None:
    hybrid, dense = pair()
    parts = inference_memory(hybrid, 64 * K, Serving(batch=3))
    assert parts["weights"] == 2 * hybrid.parameters
    assert parts["cache"] == 3 * hybrid.config.cache_bytes(64 * K) == 3 * 64 * K * 6 * 192 * 2
    assert parts["state"] == 3 * hybrid.config.state_bytes()
    assert inference_memory(dense, 64 * K, Serving())["cache"] == 64 * K * 28 * 2 * 8 * 128 * 2


def test_cache_and_state_are_what_generation_holds() -> None:
    model = random_hybrid(["gdn", "mla", "attention", "mla"])
    held = make_cache(model.config)
    with torch.no_grad():
        model(random_ids(2, 20), past_key_values=held, use_cache=True)
    parts = inference_memory(plan_model(model.config), 20, Serving(batch=2, element_size=4))
    assert (parts["cache"], parts["state"]) == (held.token_bytes(), held.state_bytes())


def test_a_state_that_no_head_divides_is_counted_whole() -> None:
    """Seven query heads share the convolved key and value of one."""
    sizes = {"num_attention_heads": 7, "num_key_value_heads": 1}
    geometry = {"mamba2": {"num_heads": 7, "num_kv_heads": 1, "head_dim": 8}}
    config = plain_config(["mamba2"], mixer_geometry=geometry, **sizes)
    assert config.state_bytes() % 7
    assert inference_memory(plan_model(config), 20, Serving())["state"] == config.state_bytes()


def test_gpus_share_what_can_be_shared() -> None:
    hybrid, dense = pair()
    one, four = (inference_memory(hybrid, 64 * K, Serving(gpus=gpus)) for gpus in (1, 4))
    assert four["weights"] == one["weights"] // 4
    assert four["cache"] == one["cache"]
    wide = inference_memory(dense, 64 * K, Serving(gpus=16))["cache"]
    # No GPU holds less than one of the eight KV heads.
    assert wide * 8 == inference_memory(dense, 64 * K, Serving())["cache"]


def test_the_fullest_gpu_holds_whole_heads() -> None:
    hybrid, dense = pair()
    whole, cache = (inference_memory(model, 64 * K, Serving()) for model in pair())
    for gpus in (2, 3, 4, 8, 9, 16):
        # 9 GDN heads; 8 KV heads.
        state = inference_memory(hybrid, 64 * K, Serving(gpus=gpus))["state"]
        assert state * 9 == whole["state"] * -(-9 // gpus)
        assert inference_memory(dense, 64 * K, Serving(gpus=gpus))["cache"] * 8 == cache["cache"] * -(-8 // gpus)


def test_layers_with_a_window_cache_no_more_than_it() -> None:
    model = plan_model(plain_config(["attention", "attention"], sliding_window=16, sliding_layers=[0]))
    each = 2 * 2 * 8 * 2
    for tokens in (10, 15, 16, 100):
        assert inference_memory(model, tokens, Serving())["cache"] == (min(tokens, 15) + tokens) * each
        assert inference_memory(model, tokens, Serving())["cache"] == model.config.cache_bytes(tokens)


@pytest.mark.parametrize("window", [1, 0, -5])
def test_windows_that_see_nothing_are_refused(window: int) -> None:
    with pytest.raises(HyLoError, match=f"sliding_window {window}; expected 2 tokens or more"):
        plain_config(["attention"], sliding_window=window, sliding_layers=[0])


def test_workspace_does_not_grow_with_the_prompt() -> None:
    config = pair()[0].config
    sizes = [prefill_workspace(Chunk(config, 8 * K, 1, context, 2)) for context in (64 * K, 1024 * K)]
    assert sizes[0] == sizes[1]
    assert prefill_workspace(Chunk(config, 2 * K, 1, 64 * K, 2)) < sizes[0]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_has_a_workspace(mixer: str) -> None:
    config = AutoConfig.for_model(**CONFIGS[LLAMA_3B])
    hybrid = hybrid_config(config, [mixer] * 28, {}, LLAMA_3B)
    parts = workspace_by_part(Chunk(hybrid, 8 * K, 1, 64 * K, 2))
    assert set(parts) == {"mlp", mixer}
    # More than the residual stream, less than all of the model's heads in float32 ten times over.
    stream = 8 * K * 3072 * 2
    assert stream < sum(parts[mixer].values()) < 40 * stream


def test_workspace_by_hand() -> None:
    """One MLA layer of the published 3B geometry, a chunk of 8K at 64K."""
    terms = workspace_by_part(Chunk(pair()[0].config, 8 * K, 1, 64 * K, 2))["mla"]
    rows = 8 * K
    assert terms["residual_stream"] == 3 * rows * 3072 * 2
    assert terms["queries"] == rows * 24 * 128 * 2
    # Keys and values of 8 heads of 128 for 16K tokens, each twice.
    assert terms["key_block"] == 2 * (16 * K * 8 * (128 + 128) * 2)
    assert terms["attention_output"] == rows * 24 * 128 * (2 + 4 + 4)
    linear = workspace_by_part(Chunk(pair()[0].config, 8 * K, 1, 64 * K, 2))["gdn"]
    assert linear["chunk_states"] == 128 * 9 * 256 * 512 * 2


def test_longest_context_is_the_last_that_fits() -> None:
    serving = Serving(gpu_memory=80 * GIB)
    for model in pair():
        longest = longest_context(model, serving)
        assert longest is not None
        assert fits(model, longest, serving)
        assert not fits(model, longest + 1, serving)
        assert sum(inference_memory(model, longest, serving).values()) <= 80 * GIB - RESERVED_BYTES
        assert longest_context(model, replace(serving, gpu_memory=4 * GIB)) == 0
    linear = plan_model(hybrid_config(AutoConfig.for_model(**CONFIGS[LLAMA_3B]), ["gdn"] * 28, {}, LLAMA_3B))
    assert longest_context(linear, serving) is None


def test_remedies_make_it_fit() -> None:
    _, dense = pair()
    serving = Serving(batch=4, gpu_memory=80 * GIB)
    assert remedies(dense, 8 * K, serving) == []
    context = 256 * K
    batch, gpus, layers, shorter = remedies(dense, context, serving)
    smaller = int(batch.removeprefix("--batch "))
    assert fits(dense, context, replace(serving, batch=smaller))
    assert not fits(dense, context, replace(serving, batch=2 * smaller))
    assert fits(dense, context, replace(serving, gpus=int(gpus.removeprefix("--gpus "))))
    found = re.search(r"at most (\d+) of the 28 layers", layers)
    assert found is not None
    parts = inference_memory(dense, context, serving)
    rest = sum(parts.values()) - parts["cache"]
    assert rest + parts["cache"] * int(found[1]) / 28 <= 80 * GIB - RESERVED_BYTES
    assert shorter.startswith("a context of at most")


def test_a_smaller_chunk_where_the_workspace_is_what_is_too_large() -> None:
    hybrid, _ = pair()
    serving = Serving(prefill_chunk=64 * K, gpu_memory=12 * GIB)
    assert "--prefill-chunk 16384" in remedies(hybrid, 64 * K, serving)
    # Weights alone are too large for one GPU.
    assert remedies(hybrid, 8 * K, Serving(gpu_memory=7 * GIB)) == ["--gpus 2"]
