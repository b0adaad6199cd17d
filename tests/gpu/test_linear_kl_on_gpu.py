"""fused_linear_kl's kernel against float64, and what it takes. Run with HYLO_TEST_GPU=1 pytest tests/gpu."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hylo.ops.kernels import kernels
from hylo.ops.linear_kl import difference_, fused_linear_kl, linear_kl_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and HYLO_TEST_GPU=1")

LOSSES: list[dict[str, Any]] = [{}, {"temperature": 2.5}, {"top_k": 1}, {"top_k": 50, "temperature": 0.5}]
GIB = 2**30


def make_inputs(
    tokens: int, words: int, width: int, teacher_width: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Logits of a size that models have, so that some words are likely and most are not."""
    make = {"device": "cuda", "dtype": dtype}
    return {
        "student_hidden": torch.randn(tokens, width, **make).requires_grad_(),
        "student_head": (3 * width**-0.5 * torch.randn(words, width, **make)).requires_grad_(),
        "teacher_hidden": torch.randn(tokens, teacher_width, **make),
        "teacher_head": 3 * teacher_width**-0.5 * torch.randn(words, teacher_width, **make),
    }


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (inputs["student_hidden"], inputs["student_head"]))


def error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("words", [97, 4096, 49152, 50257, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_is_the_reference(words: int, dtype: torch.dtype, loss: dict[str, Any]) -> None:
    """Softmaxes, KL and gradient from the same logits."""
    from hylo.ops import linear_kl_triton

    logits = [(5 * torch.randn(7, words, device="cuda")).to(dtype) for _ in range(2)]
    options = {"temperature": 1.0, "top_k": None, "gradient": True} | loss
    expected = [x.double() for x in logits]
    expected_kl = torch.empty(7, dtype=torch.float64, device="cuda")
    difference_(*expected, expected_kl, **options)
    kl = torch.empty(7, device="cuda")
    untouched = [x.clone() for x in logits]
    linear_kl_triton.difference_(*untouched, kl, **options | {"gradient": False})
    assert all(torch.equal(*pair) for pair in zip(untouched, logits, strict=True))
    torch.testing.assert_close(kl.double(), expected_kl, rtol=1e-4, atol=1e-5)
    linear_kl_triton.difference_(*logits, kl, **options)
    torch.testing.assert_close(kl.double(), expected_kl, rtol=1e-4, atol=1e-5)
    rounding = {torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert error(logits[0], expected[0]) < rounding


# Which words are the first is not the same in bfloat16 and float64: there top-k is compared in float32 alone.
@pytest.mark.parametrize(
    ("dtype", "loss"), [*((torch.float32, loss) for loss in LOSSES), *((torch.bfloat16, loss) for loss in LOSSES[:2])]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chosen", ["auto", "reference"])
def test_equals_float64(chosen: str, masked: bool, dtype: torch.dtype, loss: dict[str, Any]) -> None:
    inputs = make_inputs(1000, 8192, 256, 384, dtype)
    mask = torch.rand(1000, device="cuda") < 0.6 if masked else None
    expected = linear_kl_reference(**inputs, mask=mask, **loss)
    with kernels(chosen):
        # Chunks and parts that do not divide.
        result = fused_linear_kl(**inputs, mask=mask, chunk_size=700, **loss)
    assert result.dtype == torch.float32
    value, gradient = (1e-5, 1e-4) if dtype == torch.float32 else (1e-2, 2e-2)
    assert error(result, expected) < value
    for ours, theirs in zip(gradients(result, inputs), gradients(expected, inputs), strict=True):
        assert ours.dtype == dtype
        assert error(ours, theirs) < gradient
        if masked and len(ours) == 1000:
            assert not ours[~mask].any()


@pytest.mark.parametrize("head_grad_dtype", [torch.bfloat16, torch.float32])
def test_autocast_of_float32_weights(head_grad_dtype: torch.dtype) -> None:
    inputs = make_inputs(1000, 8192, 256, 384, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        result = fused_linear_kl(**inputs, chunk_size=300, head_grad_dtype=head_grad_dtype)
    expected = linear_kl_reference(**inputs)
    assert error(result, expected) < 1e-2
    for ours, theirs in zip(gradients(result, inputs), gradients(expected, inputs), strict=True):
        assert ours.dtype == torch.float32
        assert error(ours, theirs) < 2e-2


def test_nothing_real() -> None:
    inputs = make_inputs(100, 8192, 256, 384)
    result = fused_linear_kl(**inputs, mask=torch.zeros(100, device="cuda"))
    assert result.item() == 0
    assert not any(gradient.any() for gradient in gradients(result, inputs))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chosen", ["auto", "reference"])
def test_under_one_gib(chosen: str, masked: bool) -> None:
    """Beyond inputs and gradients, at the published vocabulary and widths."""
    inputs = make_inputs(8192, 128256, 2048, 4096)
    mask = torch.rand(8192, device="cuda") < 0.9 if masked else None
    with kernels(chosen):
        gradients(fused_linear_kl(**inputs, mask=mask), inputs)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = gradients(fused_linear_kl(**inputs, mask=mask), inputs)
    assert torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in made) < GIB
