"""Kernels, fla's and the package's own, against the float64 references, forward and every gradient.

Run with HYLO_TEST_GPU=1 pytest tests/gpu. Inputs are rounded to bfloat16 first, so that only the arithmetic of kernels
differs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hylo.ops.attention import (
    PartialSoftmax,
    attention_with_lse,
    fastest_sdpa,
    packed_attention,
    shared_head_attention,
)
from hylo.ops.gated_delta_rule import gated_delta_net
from hylo.ops.gated_linear_attention import gated_linear_attention
from hylo.ops.gated_norm import gate_then_norm, norm_then_gate
from hylo.ops.kernels import kernels
from hylo.ops.kimi_delta_rule import kimi_delta_attention
from hylo.ops.rms_norm import add_then_norm, rms_norm
from hylo.ops.rotary import rotate
from hylo.ops.row_distance import row_distances
from hylo.ops.short_convolution import short_convolution
from hylo.ops.swiglu import swiglu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and HYLO_TEST_GPU=1")

FORWARD, BACKWARD = 8e-3, 2e-2


def rounded(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=torch.float64)).bfloat16().double()


def error(result: Tensor, expected: Tensor) -> float:
    """Relative, over the whole tensor; absolute where nothing is expected (a first token's decay, say)."""
    assert torch.isfinite(result).all()
    scale = expected.norm() if expected.norm() > 0 else torch.tensor(expected.numel() ** 0.5)
    return float((result.detach().double().cpu() - expected).norm() / scale)


def compare(
    compute: Callable[..., Tensor | tuple[Tensor, Any]], inputs: dict[str, Tensor], float32: tuple[str, ...] = ()
) -> None:
    """`compute` by fla in bfloat16 on the GPU, and by the reference in float64 on the CPU."""
    reference = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    fast = {
        name: value.to("cuda", torch.float32 if name in float32 else torch.bfloat16).requires_grad_()
        for name, value in inputs.items()
    }

    def first(result: Any) -> Tensor:
        return result[0] if isinstance(result, tuple) else result

    with kernels("reference"):
        expected = first(compute(**reference))
    with kernels("fla"):
        output = first(compute(**fast))
    assert output.dtype == torch.bfloat16
    assert error(output, expected.detach()) < FORWARD
    upstream = rounded(*expected.shape)
    expected.backward(upstream)
    output.backward(upstream.to("cuda", output.dtype))
    errors = {name: error(fast[name].grad, reference[name].grad) for name in inputs}
    assert max(errors.values()) < BACKWARD, errors


def delta_inputs(length: int, heads: int, k: int, v: int, batch: int = 1) -> dict[str, Tensor]:
    return {
        "q": rounded(batch, length, heads, k),
        "k": rounded(batch, length, heads, k),
        "v": rounded(batch, length, heads, v),
        "a": rounded(batch, length, heads),
        "b": rounded(batch, length, heads),
        "A_log": torch.linspace(-1, 2, heads, dtype=torch.float64),
        "dt_bias": torch.linspace(-4, -1, heads, dtype=torch.float64),
    }


def kimi_inputs(length: int, heads: int, size: int, batch: int = 1) -> dict[str, Tensor]:
    inputs = delta_inputs(length, heads, size, size, batch)
    del inputs["a"]
    return inputs | {
        "f": rounded(batch, length, heads, size),
        "dt_bias": torch.linspace(-5, -1, heads * size, dtype=torch.float64),
    }


def linear_inputs(length: int, heads: int, size: int, batch: int = 1) -> dict[str, Tensor]:
    return {
        "q": rounded(batch, length, heads, size, scale=size**-0.5),
        "k": rounded(batch, length, heads, size),
        "v": rounded(batch, length, heads, size),
        "g": -functional.softplus(rounded(batch, length, heads) - 2).bfloat16().double(),
    }


PACKED = torch.tensor([0, 5, 70, 134, 300], dtype=torch.int32)


@pytest.mark.parametrize("length", [1, 63, 64, 200, 1000])
def test_gated_delta_net(length: int) -> None:
    compare(gated_delta_net, delta_inputs(length, 4, 64, 64, batch=2), float32=("A_log", "dt_bias"))


@pytest.mark.parametrize("length", [100, 512])
def test_gated_delta_net_of_the_published_heads(length: int) -> None:
    compare(gated_delta_net, delta_inputs(length, 6, 256, 512), float32=("A_log", "dt_bias"))


@pytest.mark.parametrize("length", [1, 63, 200, 1000])
def test_kimi_delta_attention(length: int) -> None:
    compare(kimi_delta_attention, kimi_inputs(length, 4, 64, batch=2), float32=("A_log", "dt_bias"))


@pytest.mark.parametrize("length", [1, 100, 512])
def test_kimi_delta_attention_of_its_own_heads(length: int) -> None:
    compare(kimi_delta_attention, kimi_inputs(length, 3, 128), float32=("A_log", "dt_bias"))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("length", [1, 63, 200, 1000])
def test_gated_linear_attention(length: int, size: int) -> None:
    compare(gated_linear_attention, linear_inputs(length, 4, size, batch=2), float32=("g",))


@pytest.mark.parametrize("kind", ["gdn", "kda", "gla"])
def test_packed_documents(kind: str) -> None:
    tokens = int(PACKED[-1])
    compute, inputs, wide = {
        "gdn": (gated_delta_net, delta_inputs(tokens, 4, 64, 64), ("A_log", "dt_bias")),
        "kda": (kimi_delta_attention, kimi_inputs(tokens, 4, 64), ("A_log", "dt_bias")),
        "gla": (gated_linear_attention, linear_inputs(tokens, 4, 64), ("g",)),
    }[kind]
    compare(lambda **x: compute(**x, cu_seqlens=PACKED.to(x["q"].device)), inputs, float32=wide)


@pytest.mark.parametrize("kind", ["gdn", "kda", "gla"])
@pytest.mark.parametrize("cut", [1, 70, 130])
def test_state_is_handed_on(kind: str, cut: int) -> None:
    """Chunked, then recurrent kernels: in two parts as the reference in one, states included."""
    compute, inputs, wide = {
        "gdn": (gated_delta_net, delta_inputs(131, 4, 64, 64), ("A_log", "dt_bias")),
        "kda": (kimi_delta_attention, kimi_inputs(131, 4, 64), ("A_log", "dt_bias")),
        "gla": (gated_linear_attention, linear_inputs(131, 4, 64), ("g",)),
    }[kind]
    fixed = {name: value for name, value in inputs.items() if value.dim() == 1}
    moving = {name: value for name, value in inputs.items() if value.dim() > 1}

    def on_gpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: v.to("cuda", torch.float32 if n in wide else torch.bfloat16) for n, v in values.items()}

    with torch.no_grad(), kernels("reference"):
        expected, last = compute(**moving, **fixed)
    with torch.no_grad(), kernels("fla"):
        begin, state = compute(**on_gpu({n: v[:, :cut] for n, v in moving.items()} | fixed))
        end, state = compute(**on_gpu({n: v[:, cut:] for n, v in moving.items()} | fixed), state=state)
    assert error(torch.cat([begin, end], dim=1), expected) < FORWARD
    assert state.dtype == torch.float32
    assert error(state, last) < FORWARD


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("length", [1, 3, 200, 1000])
def test_short_convolution(length: int, bias: bool) -> None:
    inputs = {"x": rounded(2, length, 256), "weight": rounded(256, 4)} | ({"bias": rounded(256)} if bias else {})
    compare(short_convolution, inputs, float32=("weight", "bias"))
    past = rounded(2, 3, 256)
    compare(lambda **x: short_convolution(**x, past=past.to(x["x"])), inputs, float32=("weight", "bias"))


def test_short_convolution_of_packed_documents() -> None:
    inputs = {"x": rounded(1, 300, 256), "weight": rounded(256, 4), "bias": rounded(256)}
    compare(lambda **x: short_convolution(**x, cu_seqlens=PACKED.to(x["x"].device)), inputs, float32=("weight", "bias"))


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_norm_then_gate(activation: Any) -> None:
    inputs = {"x": rounded(2, 77, 4, 64), "gate": rounded(2, 77, 4, 64), "weight": rounded(64)}
    compare(lambda **x: norm_then_gate(**x, eps=1e-5, activation=activation), inputs, float32=("weight",))


def test_gate_then_norm() -> None:
    inputs = {"x": rounded(2, 77, 4, 64), "gate": rounded(2, 77, 4, 64), "weight": rounded(256)}
    compare(lambda **x: gate_then_norm(**x, eps=1e-5), inputs, float32=("weight",))


def test_add_then_norm() -> None:
    inputs = {"x": rounded(2, 150, 576), "residual": rounded(2, 150, 576), "weight": rounded(576)}
    compare(lambda **x: add_then_norm(**x, eps=1e-5), inputs, float32=("weight",))
    # Gradients through both results.
    compare(lambda **x: sum(add_then_norm(**x, eps=1e-5)), inputs, float32=("weight",))


@pytest.mark.parametrize("columns", [64, 576, 2048, 4096])
def test_rms_norm(columns: int) -> None:
    inputs = {"x": rounded(2, 150, columns), "weight": rounded(columns)}
    compare(lambda **x: rms_norm(**x, eps=1e-5), inputs, float32=("weight",))


@pytest.mark.parametrize(("size", "turned"), [(64, 64), (128, 128), (96, 32), (160, 32), (10, 4)])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotate(size: int, turned: int, rows: int) -> None:
    angles = torch.randn(rows, 150, turned // 2, dtype=torch.float64)
    cos, sin = (f(torch.cat([angles, angles], dim=-1)) for f in (torch.cos, torch.sin))
    # Heads that lie apart, as parts of a wider projection do.
    compare(lambda x: rotate(x[:, :, ::2], cos.to(x), sin.to(x)), {"x": rounded(2, 150, 8, size)})


@pytest.mark.parametrize("columns", [64, 576, 2048])
def test_row_distances(columns: int) -> None:
    x, y = rounded(2, 2, 150, columns)
    fast = x.to("cuda", torch.bfloat16).requires_grad_()
    slow = x.clone().requires_grad_()
    upstream = rounded(2, 150)
    distances = row_distances(fast, y.float().cuda())
    distances.backward(upstream.float().cuda())
    expected = row_distances(slow, y)
    expected.backward(upstream)
    assert error(distances, expected.detach()) < 1e-5
    assert error(fast.grad, slow.grad) < FORWARD


def test_swiglu() -> None:
    compare(swiglu, {"gate": rounded(2, 150, 1536), "up": rounded(2, 150, 1536)})


@pytest.mark.parametrize(("k_size", "v_size"), [(64, 64), (128, 128), (96, 64), (64, 128)])
@pytest.mark.parametrize("offsets", [[0, 5, 70, 134, 300], [0, 1024, 1024, 2048]])
def test_packed_attention(offsets: list[int], k_size: int, v_size: int) -> None:
    """By one kernel for all documents."""
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    inputs = {
        "q": rounded(1, 8, offsets[-1], k_size),
        "k": rounded(1, 2, offsets[-1], k_size),
        "v": rounded(1, 2, offsets[-1], v_size),
    }

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    compare(
        lambda **x: packed_attention(alone, cu_seqlens.to(x["q"].device), **x, scale=k_size**-0.5),
        inputs,
    )


@pytest.mark.parametrize(("k_size", "v_size"), [(64, 64), (128, 128)])
def test_the_faster_kernel_of_sdpa(k_size: int, v_size: int) -> None:
    inputs = {"q": rounded(1, 8, 1024, k_size), "k": rounded(1, 2, 1024, k_size), "v": rounded(1, 2, 1024, v_size)}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with fastest_sdpa(q, k.shape[2]):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    compare(attend, inputs)


@pytest.mark.parametrize(("k_size", "v_size"), [(64, 64), (128, 128), (96, 64), (64, 128)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_with_lse(k_size: int, v_size: int, causal: bool) -> None:
    length = 333
    q, k = rounded(2, 8, length, k_size), rounded(2, 2, length, k_size)
    v = rounded(2, 2, length, v_size)
    with torch.no_grad():
        expected, lses = attention_with_lse(q, k, v, scale=k_size**-0.5, causal=causal)
        half = (x.to("cuda", torch.bfloat16) for x in (q, k, v))
        output, lse = attention_with_lse(*half, scale=k_size**-0.5, causal=causal)
    assert error(output, expected) < FORWARD
    assert error(lse, lses) < 1e-3


def test_blocks_join_to_one_softmax() -> None:
    q, k, v = rounded(1, 8, 100, 64), rounded(1, 2, 1000, 64), rounded(1, 2, 1000, 64)
    with torch.no_grad():
        expected, _ = attention_with_lse(q, k, v, scale=0.125, causal=False)
        softmax = PartialSoftmax()
        q, k, v = (x.to("cuda", torch.bfloat16) for x in (q, k, v))
        for begin in range(0, 1000, 300):
            part = slice(begin, begin + 300)
            softmax.add(*attention_with_lse(q, k[:, :, part], v[:, :, part], scale=0.125, causal=False))
    assert error(softmax.result(torch.bfloat16), expected.transpose(1, 2)) < FORWARD


@pytest.mark.parametrize("length", [1, 2047, 2048, 2049, 10000])
@pytest.mark.parametrize(("heads", "rank", "rope"), [(32, 128, 32), (24, 128, 64), (16, 256, 64), (9, 64, 32)])
def test_shared_head_attention(length: int, heads: int, rank: int, rope: int) -> None:
    query, key = rounded(2, heads, rank + rope), rounded(2, length, rank + rope)
    scale = (rank + rope) ** -0.5
    with torch.no_grad():
        expected = shared_head_attention(query, key, rank, scale=scale)
        output = shared_head_attention(
            query.to("cuda", torch.bfloat16), key.to("cuda", torch.bfloat16), rank, scale=scale
        )
    assert error(output, expected) < FORWARD
