"""Mixers on a GPU against the float64 CPU. Run with HYLO_TEST_GPU=1 pytest tests/gpu."""

from typing import Any

import pytest
import torch
from tiny import random_hybrid, random_ids

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and HYLO_TEST_GPU=1")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("length", [1, 70, 512])
@pytest.mark.parametrize(
    ("mixer", "mla"),
    [
        ("attention", None),
        ("gdn", None),
        ("mla", None),
        # Values that start at 8 bytes within their rows, and at 16.
        ("mla", {"kv_lora_rank": 10, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}),
        ("mla", {"kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}),
    ],
)
def test_forward(mixer: str, mla: dict[str, Any] | None, length: int, dtype: torch.dtype, tolerance: float) -> None:
    model = random_hybrid([mixer], mla)
    hidden = model.model.embed_tokens(random_ids(2, length)).detach()
    layer = model.model.layers[0].double()

    def mixed(x: torch.Tensor) -> torch.Tensor:
        context = model.model.mixing_context(x)
        return layer.mixer(x, **context.arguments(layer.mixer), past_key_values=None)

    with torch.no_grad():
        expected = mixed(hidden.double())
        model.to("cuda")
        layer.float()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            output = mixed(hidden.float().cuda())
    assert (output.double().cpu() - expected).norm() < tolerance * expected.norm()
