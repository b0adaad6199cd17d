"""Packed batches through whole models: what each document is alone, and nothing of its neighbours."""

from typing import Any

import pytest
import torch
from differentiate import with_gradients
from tiny import HYBRIDS, random_hybrid, random_ids

from hylo import HyLoForCausalLM
from hylo.cache import make_cache

# Longer than windows, convolutions and a chunk of 64, and shorter than all of them. No row of two cuts one.
LENGTHS = [1, 12, 35, 24, 70, 2]
ROWS = 2
TOKENS = sum(LENGTHS)
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]


@pytest.fixture(params=HYBRIDS)
def model(request: pytest.FixtureRequest) -> HyLoForCausalLM:
    """In float64 throughout."""
    return random_hybrid(**HYBRIDS[request.param]).double()


# Eager attention takes its softmax in float32.
@pytest.mark.parametrize(("implementation", "tolerance"), [("sdpa", 1e-9), ("eager", 1e-4)])
def test_documents_are_what_each_is_alone(model: HyLoForCausalLM, implementation: str, tolerance: float) -> None:
    """Logits, and the gradients of all parameters; by offsets, by positions, and in several rows."""
    model.set_attn_implementation(implementation)
    parameters = dict(model.named_parameters())
    ids = random_ids(1, TOKENS)
    alone = torch.cat([model(document).logits for document in ids.split(LENGTHS, dim=1)], dim=1)
    expected = with_gradients([alone], parameters)
    assert (model(ids).logits - alone).abs().max() > 1e-2
    packings: list[tuple[int, dict[str, Any]]] = [
        (1, {"cu_seqlens": OFFSETS.int()}),
        (1, {"position_ids": POSITIONS}),
        (ROWS, {"cu_seqlens": OFFSETS, "position_ids": POSITIONS.view(ROWS, -1)}),
        (ROWS, {"position_ids": POSITIONS.view(ROWS, -1)}),
    ]
    for rows, options in packings:
        logits = model(ids.view(rows, -1), **options).logits
        assert logits.shape[:2] == (rows, TOKENS // rows)
        results = with_gradients([logits.reshape(alone.shape)], parameters)
        torch.testing.assert_close(results, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_offsets_may_cross_rows_and_name_empty_documents(model: HyLoForCausalLM) -> None:
    ids = random_ids(3, 20)
    offsets = torch.tensor([0, 0, 7, 33, 33, 60])
    logits = model(ids, cu_seqlens=offsets).logits.view(60, -1)
    for begin, end in ((0, 7), (7, 33), (33, 60)):
        alone = model(ids.view(1, -1)[:, begin:end]).logits[0]
        torch.testing.assert_close(logits[begin:end], alone, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_token_changes_nothing_outside_its_document(model: HyLoForCausalLM) -> None:
    """Not a bit of the documents before and after it."""
    ids = random_ids(1, TOKENS)
    changed = ids.clone()
    document = slice(int(OFFSETS[2]), int(OFFSETS[3]))
    changed[0, document.start] = (ids[0, document.start] + 1) % model.config.vocab_size
    before, after = (model(x, cu_seqlens=OFFSETS).logits[0] for x in (ids, changed))
    inside = torch.zeros(TOKENS, dtype=torch.bool)
    inside[document] = True
    assert torch.equal(before[~inside], after[~inside])
    assert (before[document] - after[document]).abs().amax(-1).min() > 0


def test_checkpointed_layers_know_their_documents() -> None:
    model = random_hybrid(**HYBRIDS["mix_of_all"]).double().train()
    parameters = dict(model.named_parameters())
    ids = random_ids(1, TOKENS)
    expected = with_gradients([model(ids, cu_seqlens=OFFSETS).logits], parameters)
    model.gradient_checkpointing_enable()
    results = with_gradients([model(ids, cu_seqlens=OFFSETS).logits], parameters)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_rows_that_begin_once_are_no_packed_batch() -> None:
    """Positions that say nothing new change nothing, and leave a cache."""
    model = random_hybrid(**HYBRIDS["mix_of_all"])
    ids = random_ids(2, 9)
    given = model(ids, position_ids=torch.arange(9).expand(2, -1), use_cache=True)
    assert torch.equal(given.logits, model(ids).logits)
    assert given.past_key_values.get_seq_length() == 9


@pytest.mark.parametrize(
    "offsets", [[], [0], [1, 10], [0, 9], [0, 11], [0, 6, 5, 10], [0, -1, 10], [[0, 10]]], ids=lambda x: str(x)
)
def test_offsets_that_do_not_fit_are_refused(offsets: list[Any]) -> None:
    model = random_hybrid(["gdn", "attention"])
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets that rise from 0 to 10"):
        model(random_ids(2, 5), cu_seqlens=torch.tensor(offsets))


@pytest.mark.parametrize("also", ["attention_mask", "past_key_values"])
def test_packed_documents_take_neither_mask_nor_cache(also: str) -> None:
    model = random_hybrid(["gdn", "attention"])
    given = {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]]), "past_key_values": make_cache(model.config)}
    with pytest.raises(ValueError, match=r"cu_seqlens.*take neither"):
        model(random_ids(1, 6), cu_seqlens=torch.tensor([0, 2, 6]), **{also: given[also]})


@pytest.mark.parametrize("name", ["attention", "mla", "gdn", "mamba2", "kda"])
def test_a_mask_that_hides_nothing_changes_nothing(name: str) -> None:
    model = random_hybrid([name])
    ids, positions = random_ids(1, 20), torch.tensor([[*range(8), *range(12)]])
    alone = model(ids, position_ids=positions).logits
    assert torch.equal(model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits, alone)


def test_offsets_by_the_name_that_transformers_collators_use() -> None:
    model = random_hybrid(["mla", "gdn"])
    ids, offsets = random_ids(1, 20), torch.tensor([0, 8, 20], dtype=torch.int32)
    flash = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 12, "max_length_k": 12}
    assert torch.equal(model(ids, **flash).logits, model(ids, cu_seqlens=offsets).logits)
