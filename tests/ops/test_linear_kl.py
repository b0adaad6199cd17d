"""fused_linear_kl against its reference, torch's own KL, and what a loss for distillation has to hold."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hylo.ops.linear_kl import (
    WORKSPACE_BYTES,
    fused_linear_kl,
    gpu_chunk_size,
    linear_kl_reference,
    part_rows,
    workspace_bytes,
)

TOKENS, WORDS, WIDTH, TEACHER_WIDTH = 37, 23, 6, 9
# Losses: all words at two temperatures, the teacher's first word, some first words, and more than there are.
LOSSES: list[dict[str, Any]] = [
    {},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7, "temperature": 0.5},
    {"top_k": WORDS - 1},
    {"top_k": WORDS + 5, "temperature": 3},
]


def make_inputs(dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> dict[str, Tensor]:
    return {
        "student_hidden": torch.randn(tokens, WIDTH, dtype=dtype, requires_grad=True),
        "student_head": torch.randn(WORDS, WIDTH, dtype=dtype, requires_grad=True),
        "teacher_hidden": torch.randn(tokens, TEACHER_WIDTH, dtype=dtype),
        "teacher_head": torch.randn(WORDS, TEACHER_WIDTH, dtype=dtype),
        "mask": torch.rand(tokens) < 0.7,
    }


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (inputs["student_hidden"], inputs["student_head"]))


def assert_same(actual: Tensor, expected: Tensor, inputs: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Values, and gradients through a factor, as loss scaling applies one."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    for ours, theirs in zip(gradients(actual * 3, inputs), gradients(expected * 3, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 8, 36, 37, 100, None])
def test_equals_reference(chunk_size: int | None, loss: dict[str, Any]) -> None:
    inputs = make_inputs()
    expected = linear_kl_reference(**inputs, **loss)
    assert_same(fused_linear_kl(**inputs, **loss, chunk_size=chunk_size), expected, inputs)


@pytest.mark.parametrize("mask", [None, torch.ones(TOKENS)])
def test_all_tokens_count(mask: Tensor | None) -> None:
    inputs = make_inputs() | {"mask": mask}
    assert_same(fused_linear_kl(**inputs, chunk_size=8), linear_kl_reference(**inputs), inputs)


@pytest.mark.parametrize("tokens", [300, 1000])
def test_teacher_comes_in_parts(tokens: int) -> None:
    """Chunks of several parts, the last chunk and the last part cut short."""
    inputs = make_inputs(tokens=tokens)
    assert part_rows(400) == 256
    assert_same(fused_linear_kl(**inputs, chunk_size=400), linear_kl_reference(**inputs), inputs)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradients_are_those_of_finite_differences(loss: dict[str, Any]) -> None:
    inputs = make_inputs(tokens=5)
    rest = [inputs["teacher_hidden"], inputs["teacher_head"], inputs["mask"]]
    variables = (inputs["student_hidden"], inputs["student_head"])
    assert torch.autograd.gradcheck(lambda h, w: fused_linear_kl(h, w, *rest, **loss, chunk_size=2), variables)
    assert torch.autograd.gradcheck(lambda h, w: linear_kl_reference(h, w, *rest, **loss), variables)


@pytest.mark.parametrize("real", [0, 1])
def test_one_token(real: int) -> None:
    inputs = make_inputs(tokens=1) | {"mask": torch.tensor([real])}
    loss = fused_linear_kl(**inputs)
    assert (loss.item() > 0) == bool(real)
    assert_same(loss, linear_kl_reference(**inputs), inputs)


def test_direction_is_teacher_to_student() -> None:
    inputs = make_inputs()
    q = (inputs["student_hidden"] @ inputs["student_head"].T).log_softmax(-1)[inputs["mask"]]
    p = (inputs["teacher_hidden"] @ inputs["teacher_head"].T).log_softmax(-1)[inputs["mask"]]
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / inputs["mask"].sum()
    torch.testing.assert_close(fused_linear_kl(**inputs), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(linear_kl_reference(**inputs), expected, rtol=0, atol=1e-10)


def test_temperature_divides_both_logits_and_its_square_multiplies() -> None:
    inputs = make_inputs()
    cooled = inputs | {name: inputs[name] / 4 for name in ("student_hidden", "teacher_hidden")}
    torch.testing.assert_close(
        fused_linear_kl(**inputs, temperature=4), 16 * fused_linear_kl(**cooled), rtol=0, atol=1e-10
    )


def test_top_k_is_the_kl_of_the_first_words_and_the_others_as_one() -> None:
    inputs = make_inputs()
    q = (inputs["student_hidden"] @ inputs["student_head"].T).softmax(-1)
    p = (inputs["teacher_hidden"] @ inputs["teacher_head"].T).softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for token in inputs["mask"].nonzero()[:, 0]:
        order = p[token].argsort(descending=True)
        first = order[:4]
        buckets = [torch.cat([x[token][first], x[token][order[4:]].sum()[None]]) for x in (p, q)]
        total += (buckets[0] * (buckets[0] / buckets[1]).log()).sum()
    expected = total / inputs["mask"].sum()
    torch.testing.assert_close(fused_linear_kl(**inputs, top_k=4), expected, rtol=0, atol=1e-10)


def test_top_k_is_between_zero_and_the_kl_and_grows_with_k() -> None:
    inputs = make_inputs()
    losses = [0.0, *(fused_linear_kl(**inputs, top_k=k).item() for k in range(1, WORDS + 1))]
    assert losses == sorted(losses)
    assert losses[-1] == fused_linear_kl(**inputs).item()
    # Where the student is the teacher rounding alone is left.
    inputs["student_hidden"], inputs["student_head"] = inputs["teacher_hidden"], inputs["teacher_head"]
    assert all(abs(fused_linear_kl(**inputs, top_k=k).item()) < 1e-14 for k in range(1, WORDS))


def test_words_tied_with_the_last_are_kept() -> None:
    inputs = make_inputs() | {"teacher_hidden": torch.zeros(TOKENS, TEACHER_WIDTH, dtype=torch.float64)}
    assert_same(fused_linear_kl(**inputs, top_k=2), linear_kl_reference(**inputs), inputs)
    assert_same(linear_kl_reference(**inputs, top_k=2), linear_kl_reference(**inputs), inputs)


def test_masked_tokens_have_no_gradient_and_no_value() -> None:
    inputs = make_inputs()
    loss = fused_linear_kl(**inputs)
    hidden_gradient, _ = gradients(loss, inputs)
    assert not hidden_gradient[~inputs["mask"]].any()
    assert hidden_gradient[inputs["mask"]].any(dim=-1).all()
    # Not even what is not a number.
    other = inputs | {"teacher_hidden": torch.where(inputs["mask"][:, None], inputs["teacher_hidden"], math.nan)}
    torch.testing.assert_close(fused_linear_kl(**other), loss, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [TOKENS, 0])
@pytest.mark.parametrize("loss", LOSSES[:3], ids=str)
def test_all_tokens_masked_is_zero(loss: dict[str, Any], tokens: int) -> None:
    inputs = make_inputs(tokens=tokens) | {"mask": torch.zeros(tokens, dtype=torch.bool)}
    result = fused_linear_kl(**inputs, **loss)
    assert result.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(result, inputs))


def test_zero_where_student_is_teacher() -> None:
    inputs = make_inputs()
    inputs["teacher_hidden"] = inputs["student_hidden"].detach()
    inputs["teacher_head"] = inputs["student_head"].detach()
    loss = fused_linear_kl(**inputs)
    assert abs(loss.item()) < 1e-14
    for gradient in gradients(loss, inputs):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


def test_cut_of_the_batch_does_not_matter() -> None:
    """Two halves with the count of the whole sum to the whole, values and gradients; and so in any order of tokens."""
    inputs = make_inputs()
    expected = fused_linear_kl(**inputs)
    heads = {name: inputs[name] for name in ("student_head", "teacher_head")}
    count = inputs["mask"].sum()
    order = torch.randperm(TOKENS)
    parts = [
        fused_linear_kl(**{name: x[rows] for name, x in inputs.items() if name not in heads}, **heads, count=count)
        for rows in (order[:11], order[11:])
    ]
    assert_same(sum(parts), expected, inputs, tolerance=1e-12)


@pytest.mark.parametrize("count", [50, 50.0, torch.tensor(50), 0.25, torch.tensor(0.25)])
def test_count_divides_the_sum(count: float | Tensor) -> None:
    inputs = make_inputs()
    expected = linear_kl_reference(**inputs) * inputs["mask"].sum() / float(count)
    torch.testing.assert_close(fused_linear_kl(**inputs, count=count), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(linear_kl_reference(**inputs, count=count), expected, rtol=0, atol=1e-10)


def test_tied_head_gets_one_gradient_from_both_uses() -> None:
    """With tied embeddings the head is also the student's input: both paths must add up."""
    inputs = make_inputs()
    head, ids = inputs["student_head"], torch.randint(0, WORDS, (TOKENS,))
    rest = [inputs["teacher_hidden"], inputs["teacher_head"], inputs["mask"]]
    (ours,) = torch.autograd.grad(fused_linear_kl(torch.tanh(head[ids]), head, *rest), head)
    (theirs,) = torch.autograd.grad(linear_kl_reference(torch.tanh(head[ids]), head, *rest), head)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("frozen", "trained"), [("student_head", "student_hidden"), ("student_hidden", "student_head")]
)
def test_what_is_frozen_costs_no_gradient(frozen: str, trained: str) -> None:
    inputs = make_inputs()
    inputs[frozen].requires_grad_(False)
    loss = fused_linear_kl(**inputs)
    kept = [x for x in loss.grad_fn.saved_tensors if x is not None]
    assert [x.shape for x in kept] == [inputs[trained].shape, torch.Size([])]
    loss.backward()
    assert inputs[frozen].grad is None
    (expected,) = torch.autograd.grad(linear_kl_reference(**inputs), inputs[trained])
    torch.testing.assert_close(inputs[trained].grad, expected, rtol=0, atol=1e-10)


def test_without_gradients_none_is_made() -> None:
    inputs = make_inputs()
    expected = fused_linear_kl(**inputs)
    with torch.no_grad():
        loss = fused_linear_kl(**inputs)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_backward_twice_gives_the_same_twice() -> None:
    inputs = make_inputs()
    loss = fused_linear_kl(**inputs)
    variables = (inputs["student_hidden"], inputs["student_head"])
    first = torch.autograd.grad(loss * 3, variables, retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(loss * 3, variables), first, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_k": 0}, "top_k 0"),
        ({"count": 0}, "count 0.0; expected a positive number"),
        ({"count": torch.tensor(-1)}, "count -1.0"),
        ({"count": math.nan}, "count nan"),
        ({"mask": torch.full((TOKENS,), 0.5)}, "mask holds values between"),
        ({"mask": torch.full((TOKENS,), 2)}, "mask holds values"),
        ({"mask": torch.ones(TOKENS + 1)}, "each of 37 tokens"),
        ({"mask": torch.ones(1, TOKENS)}, r"mask \(1, 37\)"),
        ({"teacher_hidden": torch.randn(TOKENS + 1, TEACHER_WIDTH)}, "differ in tokens: 37 and 38"),
        ({"teacher_hidden": torch.randn(TOKENS, WIDTH)}, r"teacher: hidden states \(37, 6\) and head \(23, 9\)"),
        ({"student_hidden": torch.randn(1, TOKENS, WIDTH)}, "student: hidden states"),
    ],
)
def test_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    """By the definition too."""
    for function in (fused_linear_kl, linear_kl_reference):
        with pytest.raises(ValueError, match=message):
            function(**make_inputs() | change)


def test_a_chunk_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_size 0"):
        fused_linear_kl(**make_inputs(), chunk_size=0)


def test_different_vocabularies_are_refused() -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match=f"{WORDS} and {WORDS - 1}"):
        fused_linear_kl(**inputs | {"teacher_head": inputs["teacher_head"][1:]})


@pytest.mark.parametrize("loss", [{}, {"temperature": 2.0}, {"top_k": 7}], ids=str)
@pytest.mark.parametrize("chunk_size", [8, None])
def test_autocast_computes_in_its_dtype_and_stays_near(chunk_size: int | None, loss: dict[str, Any]) -> None:
    inputs = make_inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fused_linear_kl(**inputs, **loss, chunk_size=chunk_size)
    expected = linear_kl_reference(**inputs, **loss)
    assert result.dtype == torch.float32
    assert result.item() != expected.item()
    torch.testing.assert_close(result.double(), expected, rtol=2e-2, atol=0)
    for ours, theirs in zip(gradients(result, inputs), gradients(expected, inputs), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 3e-2 * theirs.norm()


def test_sum_of_the_heads_gradient_in_bfloat16_and_float32() -> None:
    """What the docstring says of sums over 22 chunks, with what the products themselves round in both."""
    words, width, tokens = 512, 64, 22 * 96
    inputs = {
        "student_hidden": torch.randn(tokens, width).bfloat16(),
        "student_head": (torch.randn(words, width) / 4).bfloat16().requires_grad_(),
        "teacher_hidden": torch.randn(tokens, width).bfloat16(),
        "teacher_head": (torch.randn(words, width) / 4).bfloat16(),
    }
    (exact,) = torch.autograd.grad(linear_kl_reference(**inputs), inputs["student_head"])
    errors = {}
    for dtype in (torch.bfloat16, torch.float32):
        loss = fused_linear_kl(**inputs, chunk_size=96, head_grad_dtype=dtype)
        (gradient,) = torch.autograd.grad(loss, inputs["student_head"])
        assert gradient.dtype == torch.bfloat16
        errors[dtype] = ((gradient.double() - exact.double()).norm() / exact.double().norm()).item()
    assert errors[torch.float32] < 7e-3
    assert errors[torch.float32] < errors[torch.bfloat16] < 1e-2


@pytest.mark.parametrize("words", [32000, 49152, 128256, 151936, 262144])
@pytest.mark.parametrize("size", [2, 4])
def test_workspace_on_a_gpu_stays_under_one_gib(words: int, size: int) -> None:
    chunk = gpu_chunk_size(words, 2048, 4096, size)
    assert workspace_bytes(65536, words, 2048, 4096, size) <= WORKSPACE_BYTES < 2**30
    assert chunk % 128 == 0
    # No smaller than it has to be.
    assert chunk == 8192 or workspace_bytes(65536, words, 2048, 4096, size) > 0.8 * WORKSPACE_BYTES
    assert gpu_chunk_size(words, 2048, 4096, size, eager=True) <= chunk


def test_chunks_of_the_published_size() -> None:
    assert gpu_chunk_size(128256, 2048, 4096, 2) == 3072
    assert part_rows(3072) == 1024
