"""linear_kl against its reference, torch's own KL, and what a loss for distillation has to hold."""

import pytest
import torch
from torch import Tensor

from hylo.ops.linear_kl import linear_kl, linear_kl_reference

TOKENS, WORDS, WIDTH, TEACHER_WIDTH = 37, 23, 6, 9


def make_inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        "student_hidden": torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True),
        "student_head": torch.randn(WORDS, WIDTH, dtype=dtype, requires_grad=True),
        "teacher_hidden": torch.randn(TOKENS, TEACHER_WIDTH, dtype=dtype),
        "teacher_head": torch.randn(WORDS, TEACHER_WIDTH, dtype=dtype),
        "mask": torch.rand(TOKENS) < 0.7,
    }


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (inputs["student_hidden"], inputs["student_head"]))


@pytest.mark.parametrize("chunk_size", [1, 8, 36, 37, 100, None])
def test_equals_reference(chunk_size: int | None) -> None:
    inputs = make_inputs()
    expected = linear_kl_reference(**inputs)
    actual = linear_kl(**inputs, chunk_size=chunk_size)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    # Through a factor, as gradient accumulation and loss scaling apply one.
    pairs = zip(gradients(actual * 3, inputs), gradients(expected * 3, inputs), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_direction_is_teacher_to_student() -> None:
    inputs = make_inputs()
    q = (inputs["student_hidden"] @ inputs["student_head"].T).log_softmax(-1)[inputs["mask"]]
    p = (inputs["teacher_hidden"] @ inputs["teacher_head"].T).log_softmax(-1)[inputs["mask"]]
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / inputs["mask"].sum()
    torch.testing.assert_close(linear_kl(**inputs), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(linear_kl_reference(**inputs), expected, rtol=0, atol=1e-10)


def test_masked_tokens_have_no_gradient_and_no_value() -> None:
    inputs = make_inputs()
    loss = linear_kl(**inputs)
    hidden_gradient, _ = gradients(loss, inputs)
    assert not hidden_gradient[~inputs["mask"]].any()
    assert hidden_gradient[inputs["mask"]].any(dim=-1).all()
    other = inputs | {"teacher_hidden": torch.where(inputs["mask"][:, None], inputs["teacher_hidden"], 5.0)}
    torch.testing.assert_close(linear_kl(**other), loss, rtol=0, atol=0)


def test_all_tokens_masked_is_zero() -> None:
    inputs = make_inputs() | {"mask": torch.zeros(TOKENS, dtype=torch.bool)}
    loss = linear_kl(**inputs)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(loss, inputs))


def test_zero_where_student_is_teacher() -> None:
    inputs = make_inputs()
    inputs["teacher_hidden"] = inputs["student_hidden"].detach()
    inputs["teacher_head"] = inputs["student_head"].detach()
    loss = linear_kl(**inputs)
    assert abs(loss.item()) < 1e-14
    for gradient in gradients(loss, inputs):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


def test_cut_of_the_batch_does_not_matter() -> None:
    """Two halves with the count of the whole sum to the whole, values and gradients."""
    inputs = make_inputs()
    whole = linear_kl(**inputs)
    heads = {name: inputs[name] for name in ("student_head", "teacher_head")}
    count = inputs["mask"].sum()
    parts = [
        linear_kl(**{name: x[rows] for name, x in inputs.items() if name not in heads}, **heads, count=count)
        for rows in (slice(0, 11), slice(11, None))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-12)
    for ours, theirs in zip(gradients(sum(parts), inputs), gradients(whole, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [50, 50.0, torch.tensor(50)])
def test_count_divides_the_sum(count: float | Tensor) -> None:
    inputs = make_inputs()
    expected = linear_kl_reference(**inputs) * inputs["mask"].sum() / 50
    torch.testing.assert_close(linear_kl(**inputs, count=count), expected, rtol=0, atol=1e-10)


def test_tied_head_gets_one_gradient_from_both_uses() -> None:
    """With tied embeddings the head is also the student's input: both paths must add up."""
    inputs = make_inputs()
    head, ids = inputs["student_head"], torch.randint(0, WORDS, (TOKENS,))
    rest = [inputs["teacher_hidden"], inputs["teacher_head"], inputs["mask"]]
    (ours,) = torch.autograd.grad(linear_kl(torch.tanh(head[ids]), head, *rest), head)
    (theirs,) = torch.autograd.grad(linear_kl_reference(torch.tanh(head[ids]), head, *rest), head)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_frozen_head_costs_no_gradient() -> None:
    inputs = make_inputs()
    inputs["student_head"].requires_grad_(False)
    loss = linear_kl(**inputs)
    _, head_gradient = loss.grad_fn.saved_tensors
    assert head_gradient is None
    loss.backward()
    assert inputs["student_head"].grad is None
    reference = inputs["student_hidden"].detach().clone().requires_grad_()
    linear_kl_reference(**inputs | {"student_hidden": reference}).backward()
    torch.testing.assert_close(inputs["student_hidden"].grad, reference.grad, rtol=0, atol=1e-10)


def test_different_vocabularies_are_refused() -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match=f"{WORDS} and {WORDS - 1}"):
        linear_kl(**inputs | {"teacher_head": inputs["teacher_head"][1:]})


def test_autocast_computes_in_its_dtype_and_stays_near() -> None:
    inputs = make_inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_kl(**inputs)
    expected = linear_kl_reference(**inputs)
    assert loss.dtype == torch.float32
    assert loss.item() != expected.item()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    for ours, theirs in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 3e-2 * theirs.norm()
