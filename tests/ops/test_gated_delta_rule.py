"""The chunked form of the gated delta rule against the recurrent one, and both against the formula."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hylo.ops.gated_delta_rule import chunk_gated_delta_rule, gated_delta_net, recurrent_gated_delta_rule

BATCH, HEADS, KEY, VALUE = 2, 2, 8, 6
LENGTHS = [1, 5, 64, 150]
DECAYS = ["mild", "strong", "none", "alternating"]


def make_inputs(length: int, decay: str, dtype: torch.dtype, *, state: bool) -> dict[str, Tensor]:
    q = torch.randn(BATCH, length, HEADS, KEY, dtype=torch.float64)
    k = torch.nn.functional.normalize(torch.randn(BATCH, length, HEADS, KEY, dtype=torch.float64), dim=-1)
    mild = -torch.rand(BATCH, length, HEADS, dtype=torch.float64)
    strong = mild - 20
    # Strong and mild in turn: small differences of large sums of log decays.
    odd = (torch.arange(length) % 2 == 1)[None, :, None]
    inputs = {
        "q": q,
        "k": k,
        "v": torch.randn(BATCH, length, HEADS, VALUE, dtype=torch.float64),
        "g": {
            "mild": mild,
            "strong": strong,
            "none": torch.zeros_like(mild),
            "alternating": torch.where(odd, strong, mild),
        }[decay],
        "beta": torch.rand(BATCH, length, HEADS, dtype=torch.float64),
    }
    if state:
        inputs["state"] = torch.randn(BATCH, HEADS, KEY, VALUE, dtype=torch.float64)
    return {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}


def naive(inputs: dict[str, Tensor], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """S_t = exp(g) S + k beta (v - exp(g) S^T k)^T; o = S^T q * scale, in numpy, one head and token at a time."""
    q, k, v, g, beta = (inputs[name].detach().double().numpy() for name in ("q", "k", "v", "g", "beta"))
    outputs = np.zeros_like(v)
    states = np.zeros((BATCH, HEADS, KEY, VALUE))
    if "state" in inputs:
        states = inputs["state"].detach().double().numpy().copy()
    for b in range(BATCH):
        for h in range(HEADS):
            S = states[b, h]
            for t in range(q.shape[1]):
                S = np.exp(g[b, t, h]) * S
                S = S + np.outer(k[b, t, h], beta[b, t, h] * (v[b, t, h] - S.T @ k[b, t, h]))
                outputs[b, t, h] = S.T @ q[b, t, h] * scale
            states[b, h] = S
    return outputs, states


@pytest.mark.parametrize("rule", [recurrent_gated_delta_rule, chunk_gated_delta_rule])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", LENGTHS)
def test_formula(rule: object, length: int, decay: str, state: bool) -> None:
    inputs = make_inputs(length, decay, torch.float64, state=state)
    outputs, final = rule(**inputs)
    expected, expected_final = naive(inputs, KEY**-0.5)
    np.testing.assert_allclose(outputs.detach(), expected, atol=1e-9)
    np.testing.assert_allclose(final.detach(), expected_final, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_recurrent(length: int, decay: str, state: bool, dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs(length, decay, dtype, state=state)
    weights = torch.randn(BATCH, length, HEADS, VALUE, dtype=dtype)
    state_weights = torch.randn(BATCH, HEADS, KEY, VALUE, dtype=dtype)
    results = []
    for rule in (recurrent_gated_delta_rule, chunk_gated_delta_rule):
        outputs, final = rule(**inputs)
        # The final state takes part, so that gradients flow through both results.
        loss = (outputs * weights).sum() + (final * state_weights).sum()
        gradients = torch.autograd.grad(loss, list(inputs.values()))
        results.append({"outputs": outputs, "final": final, **dict(zip(inputs, gradients, strict=True))})
    for name, expected in results[0].items():
        assert torch.isfinite(results[1][name]).all(), name
        torch.testing.assert_close(
            results[1][name], expected, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("chunk_size", [1, 16, 64, 256])
def test_chunk_size_does_not_matter(chunk_size: int) -> None:
    inputs = make_inputs(50, "mild", torch.float64, state=True)
    expected, expected_final = recurrent_gated_delta_rule(**inputs, scale=0.3)
    outputs, final = chunk_gated_delta_rule(**inputs, scale=0.3, chunk_size=chunk_size)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(final, expected_final, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", [recurrent_gated_delta_rule, chunk_gated_delta_rule])
def test_split_with_state_equals_whole(rule: object) -> None:
    inputs = make_inputs(90, "mild", torch.float64, state=False)
    whole, final = rule(**inputs)
    first, state = rule(**{name: x[:, :33] for name, x in inputs.items()})
    second, state = rule(**{name: x[:, 33:] for name, x in inputs.items()}, state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", [recurrent_gated_delta_rule, chunk_gated_delta_rule])
def test_half_precision_keeps_a_float32_state(rule: object) -> None:
    """bfloat16 goes in and out; state and sums are float32, inside autocast as well."""
    inputs = make_inputs(20, "mild", torch.bfloat16, state=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, final = rule(**inputs)
    assert outputs.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    expected, expected_final = rule(**{name: x.double() for name, x in inputs.items()})
    torch.testing.assert_close(outputs.double(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(final.double(), expected_final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 20])
def test_net_makes_gates_and_normalises(length: int) -> None:
    """g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b), q and k of length one."""
    inputs = make_inputs(length, "mild", torch.float64, state=True)
    a, b = torch.randn(2, BATCH, length, HEADS, dtype=torch.float64)
    A_log, dt_bias = torch.randn(2, HEADS, dtype=torch.float64)
    q, k, v, state = (inputs[name] for name in ("q", "k", "v", "state"))
    results = gated_delta_net(q, 3 * k, v, a, b, A_log, dt_bias, state=state)
    gated = {"q": q / q.norm(dim=-1, keepdim=True), "beta": 1 / (1 + (-b).exp())}
    gated["g"] = -A_log.exp() * torch.log1p((a + dt_bias).exp())
    # The lengths are kept from zero by 1e-6 under the root.
    for result, expected in zip(results, naive(inputs | gated, KEY**-0.5), strict=True):
        np.testing.assert_allclose(result.detach(), expected, rtol=0, atol=1e-5)
