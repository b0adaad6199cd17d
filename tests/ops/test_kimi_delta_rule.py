"""The chunked form of the Kimi delta rule against the recurrent one, and both against the formula."""

import pytest
import torch
from differentiate import with_gradients
from torch import Tensor
from torch.nn import functional

from hylo.ops.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from hylo.ops.kimi_delta_rule import chunk_kimi_delta_rule, kimi_delta_attention

BATCH, HEADS, KEY, VALUE = 2, 2, 6, 5
LENGTHS = [1, 5, 16, 50]
DECAYS = ["mild", "strong", "none", "by channel", "by token"]


def make_inputs(length: int, decay: str = "mild", *, state: bool = False) -> dict[str, Tensor]:
    mild = -torch.rand(BATCH, length, HEADS, KEY, dtype=torch.float64)
    strong = mild - 300
    # Strong and mild in turn: channels (or tokens) whose decays no common factor can be taken from.
    odd_channel = torch.arange(KEY) % 2 == 1
    odd_token = (torch.arange(length) % 2 == 1)[None, :, None, None]
    g = {
        "mild": mild,
        "strong": strong,
        "none": torch.zeros_like(mild),
        "by channel": torch.where(odd_channel, strong, mild),
        "by token": torch.where(odd_token, strong, mild),
    }[decay]
    inputs = {
        "q": torch.randn_like(mild),
        "k": functional.normalize(torch.randn_like(mild), dim=-1),
        "v": torch.randn(BATCH, length, HEADS, VALUE, dtype=torch.float64),
        "g": g,
        "beta": torch.rand(BATCH, length, HEADS, dtype=torch.float64),
    }
    if state:
        inputs["state"] = torch.randn(BATCH, HEADS, KEY, VALUE, dtype=torch.float64)
    return {name: value.requires_grad_() for name, value in inputs.items()}


def direct(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta k k^T) Diag(exp g) S + beta k v^T and o_t = S_t^T q / sqrt(K), with the matrices written out."""
    S = torch.zeros(BATCH, HEADS, KEY, VALUE, dtype=torch.float64) if state is None else state
    outputs = []
    for t in range(q.shape[1]):
        key, strength = k[:, t, :, :, None], beta[:, t, :, None, None]
        erase = torch.eye(KEY, dtype=torch.float64) - strength * key @ key.mT
        S = erase @ torch.diag_embed(g[:, t].exp()) @ S + strength * key @ v[:, t, :, None, :]
        outputs.append((S.mT @ q[:, t, :, :, None])[..., 0] / KEY**0.5)
    return torch.stack(outputs, dim=1), S


@pytest.mark.parametrize("rule", [recurrent_gated_delta_rule, chunk_kimi_delta_rule])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", LENGTHS)
def test_formula(rule: object, length: int, decay: str, state: bool) -> None:
    """Values and every gradient of the definition and of the chunked form."""
    inputs = make_inputs(length, decay, state=state)
    expected = with_gradients(direct(**inputs), inputs)
    torch.testing.assert_close(with_gradients(rule(**inputs), inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunk_size_does_not_matter(chunk_size: int) -> None:
    inputs = make_inputs(40, state=True)
    expected = recurrent_gated_delta_rule(**inputs, scale=0.3)
    results = chunk_kimi_delta_rule(**inputs, scale=0.3, chunk_size=chunk_size)
    torch.testing.assert_close(results, expected, rtol=0, atol=1e-10)


def test_equal_channels_are_the_gated_delta_rule() -> None:
    inputs = make_inputs(37, state=True)
    inputs["g"] = inputs["g"][..., 0].detach().requires_grad_()
    expected = with_gradients(chunk_gated_delta_rule(**inputs), inputs)
    spread = inputs | {"g": inputs["g"][..., None].expand(-1, -1, -1, KEY)}
    results = with_gradients(chunk_kimi_delta_rule(**spread), inputs)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cut", [1, 16, 33])
def test_split_with_state_equals_whole(cut: int) -> None:
    inputs = make_inputs(50)
    whole, final = chunk_kimi_delta_rule(**inputs)
    first, state = chunk_kimi_delta_rule(**{name: x[:, :cut] for name, x in inputs.items()})
    second, state = chunk_kimi_delta_rule(**{name: x[:, cut:] for name, x in inputs.items()}, state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-10)


def test_half_precision_keeps_a_float32_state() -> None:
    """bfloat16 goes in and out; state and sums are float32, inside autocast as well."""
    inputs = {name: x.detach().bfloat16() for name, x in make_inputs(20).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, final = chunk_kimi_delta_rule(**inputs)
    assert (outputs.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    expected, expected_final = chunk_kimi_delta_rule(**{name: x.double() for name, x in inputs.items()})
    torch.testing.assert_close(outputs.double(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(final.double(), expected_final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 20])
def test_attention_makes_gates_and_normalises(length: int) -> None:
    """g = -exp(A_log) softplus(f + dt_bias), a value a channel; beta = sigmoid(b); q and k of length one."""
    inputs = make_inputs(length, state=True)
    q, k, v, f, state = (inputs[name] for name in ("q", "k", "v", "g", "state"))
    b = torch.randn(BATCH, length, HEADS, dtype=torch.float64)
    A_log, dt_bias = torch.randn(HEADS, dtype=torch.float64), torch.randn(HEADS * KEY, dtype=torch.float64)
    results = kimi_delta_attention(q, 3 * k, v, f, b, A_log, dt_bias, state=state)
    rate = A_log.exp()[:, None] * torch.log1p((f + dt_bias.view(HEADS, KEY)).exp())
    expected = direct(q / q.norm(dim=-1, keepdim=True), k, v, -rate, 1 / (1 + (-b).exp()), state)
    # The lengths are kept from zero by 1e-6 under the root.
    torch.testing.assert_close(results, expected, rtol=0, atol=1e-5)
