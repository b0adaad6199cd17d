"""What vLLM is told, so that compiled code and recorded graphs read what they were made for."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")

from hylo.serve import compilation


def strides_of_parts(shape_padding: bool, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of a projection to 18 values cut in two, compiled as vLLM compiles a piece, widened as if on a GPU."""
    from torch._inductor import config, standalone_compile
    from torch._inductor.fx_passes import pad_mm
    from torch.fx.experimental.proxy_tensor import make_fx

    monkeypatch.setattr(pad_mm, "check_device", lambda a, b: True)
    monkeypatch.setattr(pad_mm, "has_triton", lambda: True)

    def projected(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (x @ weight.t()).split([12, 6], dim=-1)

    inputs = [torch.randn(5, 16, dtype=torch.bfloat16), torch.randn(18, 16, dtype=torch.bfloat16)]
    with torch.no_grad(), config.patch(force_shape_pad=True, shape_padding=shape_padding, fx_graph_cache=False):
        compiled = standalone_compile(make_fx(projected)(*inputs), inputs, dynamic_shapes="from_example_inputs")
        parts = compiled(*inputs)
        for part, expected in zip(parts, projected(*inputs), strict=True):
            torch.testing.assert_close(part, expected)
    return [part.stride() for part in parts]


def test_widened_products_change_the_strides_of_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And unchanged they are where the option that is set says so."""
    assert strides_of_parts(True, monkeypatch) == [(24, 1), (24, 1)]
    assert strides_of_parts(compilation.OPTIONS["shape_padding"], monkeypatch) == [(18, 1), (18, 1)]


def test_an_engine_is_told(tmp_path: Any) -> None:
    from served_engine import engine, save_hybrid

    save_hybrid(tmp_path / "model", "gdn")
    with engine(tmp_path / "model") as llm:
        (told,) = llm.collective_rpc(lambda worker: worker.vllm_config.compilation_config.inductor_compile_config)
    assert compilation.OPTIONS.items() <= told.items()


def test_each_group_of_attention_layers_has_metadata_of_its_own() -> None:
    """FlashAttention's builder would hand on those of the first, with a schedule that graphs of others do not read."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionMetadataBuilder

    from hylo.serve.attention import build_for_each_group

    build_for_each_group(FlashAttentionBackend)
    assert not FlashAttentionMetadataBuilder.supports_update_block_table
