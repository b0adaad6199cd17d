"""The chunked form of gated linear attention against the recurrent one, and both against the formula."""

import pytest
import torch
from differentiate import with_gradients
from torch import Tensor

from hylo.ops.gated_linear_attention import (
    chunk_gated_linear_attention,
    gated_linear_attention,
    recurrent_gated_linear_attention,
)

BATCH, HEADS, KEY, VALUE = 2, 2, 6, 5
LENGTHS = [1, 5, 64, 150]
DECAYS = ["mild", "strong", "none", "by token"]


def make_inputs(length: int, decay: str = "mild", *, state: bool = False) -> dict[str, Tensor]:
    mild = -torch.rand(BATCH, length, HEADS, dtype=torch.float64)
    strong = mild - 300
    odd = (torch.arange(length) % 2 == 1)[None, :, None]
    inputs = {
        "q": torch.randn(BATCH, length, HEADS, KEY, dtype=torch.float64),
        "k": torch.randn(BATCH, length, HEADS, KEY, dtype=torch.float64),
        "v": torch.randn(BATCH, length, HEADS, VALUE, dtype=torch.float64),
        "g": {
            "mild": mild,
            "strong": strong,
            "none": torch.zeros_like(mild),
            "by token": torch.where(odd, strong, mild),
        }[decay],
    }
    if state:
        inputs["state"] = torch.randn(BATCH, HEADS, KEY, VALUE, dtype=torch.float64)
    return {name: value.requires_grad_() for name, value in inputs.items()}


def direct(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """o_t = sum over s <= t of exp(g_{s+1} + ... + g_t) (q_t . k_s) v_s: the recurrence unrolled, no state carried."""
    length = q.shape[1]
    S = torch.zeros(BATCH, HEADS, KEY, VALUE, dtype=torch.float64) if state is None else state

    def at(t: int, reader: Tensor) -> Tensor:
        """`reader` `[B, H, K, R]` on the state after token t."""
        out = g[:, : t + 1].sum(1).exp()[..., None, None] * (reader.mT @ S)
        for s in range(t + 1):
            decay = g[:, s + 1 : t + 1].sum(1).exp()[..., None, None]
            out = out + decay * (reader.mT @ k[:, s, :, :, None]) @ v[:, s, :, None, :]
        return out

    outputs = [at(t, q[:, t, :, :, None])[..., 0, :] for t in range(length)]
    every_row = torch.eye(KEY, dtype=torch.float64).expand(BATCH, HEADS, KEY, KEY)
    return torch.stack(outputs, dim=1), at(length - 1, every_row)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 5, 18])
def test_definition_is_the_formula(length: int, decay: str, state: bool) -> None:
    inputs = make_inputs(length, decay, state=state)
    expected = with_gradients(direct(**inputs), inputs)
    results = with_gradients(recurrent_gated_linear_attention(**inputs), inputs)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_recurrent(length: int, decay: str, state: bool) -> None:
    inputs = make_inputs(length, decay, state=state)
    expected = with_gradients(recurrent_gated_linear_attention(**inputs), inputs)
    results = with_gradients(chunk_gated_linear_attention(**inputs), inputs)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [1, 7, 256])
def test_chunk_size_does_not_matter(chunk_size: int) -> None:
    inputs = make_inputs(50, state=True)
    expected = recurrent_gated_linear_attention(**inputs)
    results = chunk_gated_linear_attention(**inputs, chunk_size=chunk_size)
    torch.testing.assert_close(results, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cut", [1, 33, 64])
def test_split_with_state_equals_whole(cut: int) -> None:
    inputs = make_inputs(90)
    whole, final = gated_linear_attention(**inputs)
    first, state = gated_linear_attention(**{name: x[:, :cut] for name, x in inputs.items()})
    second, state = gated_linear_attention(**{name: x[:, cut:] for name, x in inputs.items()}, state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-10)


def test_half_precision_keeps_a_float32_state() -> None:
    inputs = {name: x.detach().bfloat16() for name, x in make_inputs(20).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, final = gated_linear_attention(**inputs)
    assert (outputs.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    expected, expected_final = gated_linear_attention(**{name: x.double() for name, x in inputs.items()})
    torch.testing.assert_close(outputs.double(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(final.double(), expected_final, rtol=1e-4, atol=1e-4)
