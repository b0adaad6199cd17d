"""Pages of the cache that are filled by the longest request."""

from types import SimpleNamespace

import pytest
import torch
from tiny import hybrid_config

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")

from hylo.serve import settings
from hylo.serve.architecture import mla_geometry
from hylo.serve.pages import PAGE_MULTIPLE, page_tokens, pages_of_a_request
from hylo.serve.states import largest_state

LENGTHS = (1, 1000, 8192, 69632, 131072, 262208, 1048576, 2097152)


@pytest.mark.parametrize(
    ("latent", "linear"), [(6, (22,)), (4, (12,)), (14, (14,)), (8, (9, 5)), (3, (4,)), (10, (6,)), (1, (1, 1, 1))]
)
def test_pages_are_grouped_as_vllm_groups_them(latent: int, linear: tuple[int, ...]) -> None:
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size as groups_of
    from vllm.v1.kv_cache_interface import MambaSpec, MLAAttentionSpec

    tokens = MLAAttentionSpec(block_size=1024, num_kv_heads=1, head_size=192, dtype=torch.bfloat16)
    specs = {f"latent.{i}": tokens for i in range(latent)}
    for kind, count in enumerate(linear):
        state = MambaSpec(
            block_size=1024,
            # Kinds of layers differ by their shapes.
            shapes=((3, 64 + kind), (2, 128, 128)),
            dtypes=(torch.bfloat16, torch.float32),
            page_size_padded=tokens.page_size_bytes,
        )
        specs |= {f"linear.{kind}.{i}": state for i in range(count)}
    groups = groups_of(specs)
    of_tokens = sum(any(name.startswith("latent") for name in group.layer_names) for group in groups)
    assert pages_of_a_request(latent, linear) == (of_tokens, len(groups) - of_tokens)


def memory(length: int, size: int, a_page: int, states: int) -> int:
    return (a_page * -(-length // size) + states) * size


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("pages", [(1, 4), (1, 1), (3, 2)])
def test_no_size_within_bounds_takes_less(length: int, pages: tuple[int, int]) -> None:
    least = 12424
    size = page_tokens(length, least, *pages)
    bounds = range(-(-least // PAGE_MULTIPLE) * PAGE_MULTIPLE, int(1.05 * 12544) + 1, PAGE_MULTIPLE)
    assert size in bounds
    assert memory(length, size, *pages) == min(memory(length, other, *pages) for other in bounds)


def test_a_published_model_saves_a_page() -> None:
    """3B 6MLA22GDN in requests of 256K and an answer: 22 pages of 12,432 tokens, or 21 of 12,544."""
    size = page_tokens(262_208, 12_424, *pages_of_a_request(6, [22]))
    assert size == 12_544
    assert memory(262_208, size, 1, 4) < 0.975 * memory(262_208, 12_432, 1, 4)


def test_what_the_user_or_a_prefix_asks_for_stays() -> None:
    config = hybrid_config(["mla", "gdn", "gdn"])

    def filled(**cache: object) -> SimpleNamespace:
        held = SimpleNamespace(block_size=16, user_specified_block_size=False, enable_prefix_caching=False)
        held.__dict__.update(cache)
        settings._fill_pages(
            config,
            SimpleNamespace(
                cache_config=held,
                model_config=SimpleNamespace(max_model_len=5000, dtype=torch.bfloat16),
                parallel_config=SimpleNamespace(tensor_parallel_size=1),
            ),
        )
        return held

    chosen = filled()
    assert chosen.user_specified_block_size
    assert chosen.block_size % PAGE_MULTIPLE == 0
    # A state fits into a page.
    latent = mla_geometry(config)
    page = chosen.block_size * (latent.kv_lora_rank + latent.qk_rope_head_dim) * 2
    assert page >= largest_state(config, 1, torch.bfloat16).nbytes(torch.bfloat16)
    assert filled(user_specified_block_size=True, block_size=256).block_size == 256
    assert filled(enable_prefix_caching=True).block_size == 16
