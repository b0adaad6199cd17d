"""Cross-entropy from hidden states against its definition with whole logits."""

import pytest
import torch
from differentiate import with_gradients
from torch import Tensor

from hylo.ops.linear_cross_entropy import IGNORED, linear_cross_entropy, linear_cross_entropy_reference

TOKENS, WORDS, WIDTH = 37, 23, 6


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Tensor]:
    targets = torch.randint(0, WORDS, (TOKENS,))
    targets[torch.rand(TOKENS) < 0.3] = IGNORED
    return {
        "hidden": torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True),
        "head": torch.randn(WORDS, WIDTH, dtype=dtype, requires_grad=True),
    }, targets


@pytest.mark.parametrize("count", [None, 100.0])
@pytest.mark.parametrize("chunk_size", [1, 8, 37, None])
def test_equals_reference(chunk_size: int | None, count: float | None) -> None:
    inputs, targets = make_inputs()
    expected = linear_cross_entropy_reference(**inputs, targets=targets, count=count)
    actual = linear_cross_entropy(**inputs, targets=targets, count=count, chunk_size=chunk_size)
    ours, theirs = (with_gradients([loss], inputs) for loss in (actual, expected))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-10)


def test_a_batch_cut_in_two_has_the_same_loss() -> None:
    inputs, targets = make_inputs()
    count = (targets != IGNORED).sum()
    parts = [
        linear_cross_entropy(inputs["hidden"][rows], inputs["head"], targets[rows], count=count)
        for rows in (slice(0, 11), slice(11, None))
    ]
    torch.testing.assert_close(sum(parts), linear_cross_entropy(**inputs, targets=targets))


def test_nothing_to_predict() -> None:
    inputs, targets = make_inputs()
    loss = linear_cross_entropy(**inputs, targets=torch.full_like(targets, IGNORED))
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, list(inputs.values())))


def test_a_frozen_head_and_no_gradient_at_all() -> None:
    inputs, targets = make_inputs()
    expected = linear_cross_entropy(**inputs, targets=targets)
    frozen = linear_cross_entropy(inputs["hidden"], inputs["head"].detach(), targets)
    for loss in (expected, frozen):
        (gradient,) = torch.autograd.grad(loss, [inputs["hidden"]])
        torch.testing.assert_close(
            gradient,
            torch.autograd.grad(linear_cross_entropy_reference(**inputs, targets=targets), [inputs["hidden"]])[0],
        )
    with torch.no_grad():
        assert linear_cross_entropy(**inputs, targets=targets) == expected


def test_bfloat16_products() -> None:
    inputs, targets = make_inputs(torch.float32)
    exact = linear_cross_entropy(**inputs, targets=targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = linear_cross_entropy(**inputs, targets=targets)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=2e-2)
    for gradient, other in zip(*(torch.autograd.grad(x, list(inputs.values())) for x in (rounded, exact)), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - other).norm() < 0.02 * other.norm()
