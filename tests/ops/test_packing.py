"""Packed batches: where documents begin, and that no operation lets one see another."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from differentiate import with_gradients
from torch import Tensor
from torch.nn import functional

from hylo.ops.attention import packed_attention
from hylo.ops.gated_delta_rule import gated_delta_net
from hylo.ops.gated_linear_attention import gated_linear_attention
from hylo.ops.kimi_delta_rule import kimi_delta_attention
from hylo.ops.packing import document_offsets, document_starts, each_document, offsets_of, spans
from hylo.ops.short_convolution import short_convolution

HEADS, KEY, VALUE = 2, 6, 5
# One token, none, a chunk of 64 and a remainder, less than a convolution's taps.
OFFSETS = torch.tensor([0, 1, 9, 9, 79, 81], dtype=torch.int32)
TOKENS = int(OFFSETS[-1])


@pytest.mark.parametrize(
    ("position_ids", "offsets"),
    [
        ([[0, 1, 2, 3]], [0, 4]),
        ([[0, 1, 0, 1, 2]], [0, 2, 5]),
        ([[0, 0, 0]], [0, 1, 2, 3]),
        # A row is a document of its own, whatever its first position.
        ([[0, 1, 2], [3, 4, 5]], [0, 3, 6]),
        ([[5, 6, 0], [0, 1, 1]], [0, 2, 3, 5, 6]),
    ],
)
def test_documents_begin_where_positions_do(position_ids: list[list[int]], offsets: list[int]) -> None:
    found = document_offsets(torch.tensor(position_ids))
    assert found.tolist() == offsets
    assert found.dtype == torch.int32


def test_spans_leave_out_empty_documents() -> None:
    assert spans(OFFSETS) == [(0, 1), (1, 9), (9, 79), (79, 81)]


@pytest.mark.parametrize("dim", [1, 2])
def test_each_document_is_computed_alone(dim: int) -> None:
    x = torch.randn(1, TOKENS, TOKENS, 3)
    sums = each_document(lambda part: part.cumsum(dim).transpose(1, dim), OFFSETS, x, dim=dim).transpose(1, dim)
    for begin, end in spans(OFFSETS):
        assert torch.equal(sums.narrow(dim, begin, end - begin), x.narrow(dim, begin, end - begin).cumsum(dim))


def random(*shape: int) -> Tensor:
    return torch.randn(1, TOKENS, *shape, dtype=torch.float64)


def delta_inputs(decays: int) -> dict[str, Tensor]:
    decay = {"a": random(HEADS)} if decays == 1 else {"f": random(HEADS, decays)}
    return {
        "q": random(HEADS, KEY),
        "k": random(HEADS, KEY),
        "v": random(HEADS, VALUE),
        "b": random(HEADS),
        **decay,
        "A_log": torch.randn(HEADS, dtype=torch.float64),
        "dt_bias": torch.randn(HEADS * decays, dtype=torch.float64),
    }


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """`packed_attention`, tokens first."""

    def alone(*heads_first: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if cu_seqlens is None:
        return alone(*heads_first)
    return packed_attention(alone, cu_seqlens, *heads_first, scale=q.shape[-1] ** -0.5)


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Tensor]]]] = {
    "gated_delta_net": (gated_delta_net, lambda: delta_inputs(1)),
    "kimi_delta_attention": (kimi_delta_attention, lambda: delta_inputs(KEY)),
    "gated_linear_attention": (
        gated_linear_attention,
        lambda: {
            "q": random(HEADS, KEY),
            "k": random(HEADS, KEY),
            "v": random(HEADS, VALUE),
            "g": -(random(HEADS) ** 2),
        },
    ),
    "short_convolution": (
        short_convolution,
        lambda: {
            "x": random(KEY),
            "weight": torch.randn(KEY, 4, dtype=torch.float64),
            "bias": torch.randn(KEY, dtype=torch.float64),
        },
    ),
    "attention": (attention, lambda: {"q": random(HEADS, KEY), "k": random(HEADS, KEY), "v": random(HEADS, VALUE)}),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_packed_documents_are_what_each_is_alone(name: str) -> None:
    """Values, and gradients of every input and parameter."""
    compute, make = OPERATIONS[name]
    inputs = {name: x.requires_grad_() for name, x in make().items()}

    def outputs(**options: Any) -> Tensor:
        result = compute(**options)
        return result[0] if isinstance(result, tuple) else result

    alone = [
        outputs(**{name: x[:, begin:end] if x.shape[:2] == (1, TOKENS) else x for name, x in inputs.items()})
        for begin, end in spans(OFFSETS)
    ]
    packed = outputs(**inputs, cu_seqlens=OFFSETS)
    expected = with_gradients([torch.cat(alone, dim=1)], inputs)
    torch.testing.assert_close(with_gradients([packed], inputs), expected, rtol=1e-12, atol=1e-12)
    # The law is not empty: as one document the same tokens give something else.
    assert (outputs(**inputs)[:, 1:] - packed[:, 1:]).abs().amax() > 1e-3


@pytest.mark.parametrize("name", ["gated_delta_net", "kimi_delta_attention", "gated_linear_attention"])
def test_packed_documents_leave_no_state(name: str) -> None:
    compute, make = OPERATIONS[name]
    assert compute(**make(), cu_seqlens=OFFSETS)[1] is None


def test_offsets_are_read_anew_where_they_changed() -> None:
    offsets = torch.tensor([0, 3, 8])
    assert offsets_of(offsets) == offsets_of(offsets) == [0, 3, 8]
    offsets[1] = 4
    assert offsets_of(offsets) == [0, 4, 8]
    assert offsets_of(torch.tensor([0, 8])) == [0, 8]


def test_offsets_without_a_version_are_read_each_time() -> None:
    with torch.inference_mode():
        offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
        assert offsets_of(offsets) == [0, 3, 8]
        assert document_starts(offsets, 8).tolist() == [0] * 3 + [3] * 5
        offsets[1] = 4
        assert offsets_of(offsets) == [0, 4, 8]
        assert document_starts(offsets, 8).tolist() == [0] * 4 + [4] * 4


def test_starts_of_documents() -> None:
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert document_starts(offsets, 5).tolist() == [0, 0, 2, 2, 2]
    offsets[1] = 1
    assert document_starts(offsets, 5).tolist() == [0, 1, 2, 2, 2]
