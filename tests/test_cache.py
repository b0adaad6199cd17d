"""The cache: what it holds, where it holds it, and that generation with it is generation without it."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from differentiate import with_gradients
from tiny import HYBRIDS, random_hybrid, random_ids
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from hylo import HyLoForCausalLM
from hylo.cache import HyLoCache, ReservedLayer, make_cache

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}


@pytest.fixture(params=HYBRIDS)
def model(request: pytest.FixtureRequest) -> HyLoForCausalLM:
    return random_hybrid(**HYBRIDS[request.param])


def reserved_layers(cache: HyLoCache) -> list[ReservedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, ReservedLayer)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_holds_what_the_config_counts(model: HyLoForCausalLM, dtype: torch.dtype) -> None:
    """To the byte, in storage that was reserved once: the last new token is not read again."""
    model.to(dtype)
    out = model.generate(random_ids(3, 30), **GREEDY, return_dict_in_generate=True)
    cache, tokens = out.past_key_values, 30 + 6 - 1
    assert type(cache) is HyLoCache
    assert cache.get_seq_length() == tokens
    assert cache.token_bytes() == 3 * model.config.cache_bytes(tokens, dtype.itemsize)
    assert cache.state_bytes() == 3 * model.config.state_bytes(dtype.itemsize)
    for layer in reserved_layers(cache):
        assert [storage.shape[-2] for storage in layer._storage] == [tokens, tokens]


# Less than a convolution's taps; a remainder of one token; more than the prompt.
@pytest.mark.parametrize("chunk", [1, 2, 7, 50])
def test_prefill_in_chunks_changes_no_token(model: HyLoForCausalLM, chunk: int) -> None:
    ids = random_ids(2, 22)
    expected = model.generate(ids, **GREEDY, output_logits=True, return_dict_in_generate=True)
    result = model.generate(ids, **GREEDY, output_logits=True, return_dict_in_generate=True, prefill_chunk_size=chunk)
    assert torch.equal(result.sequences, expected.sequences)
    torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=1e-4)
    assert result.past_key_values.get_seq_length() == 22 + 6 - 1


def test_long_prompts_are_read_in_chunks_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hylo.modeling.PREFILL_CHUNK", 8)
    model = random_hybrid(["gdn", "mla"])
    read: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape[1]))
    ids = random_ids(1, 22)
    for settings, expected in (({}, [8, 8, 6]), ({"prefill_chunk_size": 16}, [16, 6])):
        read.clear()
        model.generate(ids, **GREEDY, **settings)
        assert read == [*expected, *[1] * 5]
    read.clear()
    model.generate(ids[:, :8], **GREEDY)
    assert read == [8, *[1] * 5]


def test_embeddings_are_continued_as_their_tokens_are(model: HyLoForCausalLM) -> None:
    ids, options = random_ids(2, 9), GREEDY | {"return_dict_in_generate": True}
    out = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert torch.equal(out.sequences, model.generate(ids, **options).sequences[:, 9:])
    assert type(out.past_key_values) is HyLoCache
    for layer in reserved_layers(out.past_key_values):
        assert layer._storage[0].shape[-2] == 9 + 6 - 1


def test_generation_without_a_prompt(model: HyLoForCausalLM) -> None:
    """It begins with the first token of a text."""
    bos = torch.tensor([[model.config.bos_token_id]])
    assert torch.equal(model.generate(**GREEDY), model.generate(bos, **GREEDY))


def test_decoding_reads_latents_alone() -> None:
    """One more cached token costs its products with the latent, and no expansion to keys and values of all heads."""
    sizes = {"kv_lora_rank": 10, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
    model = random_hybrid(["mla"], mla=sizes)
    costs = []
    for length in (40, 80):
        cache = make_cache(model.config)
        with torch.no_grad():
            model(random_ids(1, length), past_key_values=cache, use_cache=True)
            with FlopCounterMode(display=False) as counter:
                model(random_ids(1, 1), past_key_values=cache, use_cache=True)
        costs.append(counter.get_total_flops())
    heads, scores, weighted = 4, 10 + 4, 10
    assert costs[1] - costs[0] == 40 * 2 * heads * (scores + weighted)


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_prefill_in_chunks_with_left_padding(model: HyLoForCausalLM, chunk: int) -> None:
    """Chunks that are all padding included."""
    lengths, width = (3, 15, 9), 15
    prompts = [random_ids(1, length) for length in lengths]
    ids = torch.cat([functional.pad(prompt, (width - prompt.shape[1], 0), value=7) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    together = model.generate(ids, attention_mask=mask, **GREEDY, prefill_chunk_size=chunk)[:, width:]
    for prompt, tokens in zip(prompts, together, strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
        assert torch.equal(alone[0, prompt.shape[1] :], tokens)


def test_beams_with_a_cache_are_those_without(model: HyLoForCausalLM) -> None:
    ids = random_ids(2, 9)
    options = GREEDY | {"num_beams": 3, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


@pytest.mark.parametrize("pieces", [[9], [5, 4], [7, 1, 1]])
def test_gradients_flow_through_a_cache(model: HyLoForCausalLM, pieces: list[int]) -> None:
    """In float64: sums over decayed states cancel more digits than float32 has to spare."""
    model = model.double()
    parameters = dict(model.named_parameters())
    ids = random_ids(2, 9)
    expected = with_gradients([model(ids, use_cache=False).logits], parameters)
    cache = make_cache(model.config, reserve=9)
    logits = [model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)]
    results = with_gradients([torch.cat(logits, dim=1)], parameters)
    for name, value in expected.items():
        assert (results[name] - value).norm() <= 1e-5 * value.norm() + 1e-6, name


@torch.no_grad()
def test_a_reset_cache_is_an_empty_one(model: HyLoForCausalLM) -> None:
    cache = make_cache(model.config)
    first, second = random_ids(1, 9), random_ids(1, 12)
    model(first, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(second, past_key_values=cache).logits, model(second).logits, rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 12


def appended(layer: ReservedLayer, pieces: list[tuple[Tensor, Tensor]]) -> list[int]:
    """Appends; returns where the keys lay after each piece."""
    places = []
    for key, value in pieces:
        layer.update(key, value)
        places.append(layer.keys.data_ptr())
    return places


@pytest.mark.parametrize("values", [0, 4])
@pytest.mark.parametrize("capacity", [0, 10, 60, 100])
def test_layer_appends_in_place(capacity: int, values: int) -> None:
    """Within what was reserved nothing moves; beyond it storage grows by an eighth, seldom."""
    layer = ReservedLayer(capacity)
    pieces = [(torch.randn(2, 2, n, 3), torch.randn(2, 2, n, values)) for n in [9, *[1] * 51]]
    places = appended(layer, pieces)
    for held, new in zip((layer.keys, layer.values), zip(*pieces, strict=True), strict=True):
        assert torch.equal(held, torch.cat(new, dim=-2))
    moves = sum(a != b for a, b in pairwise(places))
    assert moves == 0 if capacity >= 60 else 1 < moves <= 15
    assert layer.get_seq_length() == 60
    if capacity >= 60:
        assert layer._storage[0].shape[-2] == capacity


def test_layer_goes_on_after_beams_are_reordered() -> None:
    layer = ReservedLayer(20)
    before, after = (torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)), (torch.randn(3, 2, 1, 4),) * 2
    layer.update(*before)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    keys, _ = layer.update(*after)
    assert torch.equal(keys, torch.cat([before[0][[2, 0, 0]], after[0]], dim=-2))


@pytest.mark.parametrize("selected", [torch.tensor([1]), slice(0, 1)], ids=["copied", "viewed"])
def test_layer_goes_on_with_fewer_sequences(selected: Any) -> None:
    layer = ReservedLayer(20)
    before, after = torch.randn(3, 2, 5, 4), torch.randn(1, 2, 1, 4)
    layer.update(before, before)
    layer.batch_select_indices(selected)
    keys, _ = layer.update(after, after)
    assert torch.equal(keys, torch.cat([before[selected], after], dim=-2))


@pytest.mark.parametrize("kept", [0, 3])
def test_layer_goes_on_after_a_crop(kept: int) -> None:
    layer = ReservedLayer(20)
    before, after = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 2, 4)
    layer.update(before, before)
    layer.crop(kept - 5)
    assert layer.get_seq_length() == kept
    keys, values = layer.update(after, after)
    assert torch.equal(keys, torch.cat([before[:, :, :kept], after], dim=-2))
    assert torch.equal(values, keys)


def test_layer_writes_over_nothing_that_a_backward_pass_reads() -> None:
    layer = ReservedLayer(20)
    x = torch.randn(1, 1, 2, 3, requires_grad=True)
    loss = sum(layer.update(x * i, x)[0].square().sum() for i in (1.0, 2.0))
    loss.backward()
    # The first x stands in both sums, the second in one.
    torch.testing.assert_close(x.grad, 2 * x * (1 + 1 + 4))


@pytest.mark.parametrize("mixers", [["attention"], ["mla"], ["mla", "gdn", "mamba2"]])
def test_left_padding_needs_no_mask_over_the_past(mixers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded prompt in chunks goes block by block as any other, and gives what a mask gives."""
    model = random_hybrid(mixers)
    ids, mask = random_ids(3, 40), torch.ones(3, 40, dtype=torch.long)
    for row, padding in enumerate((0, 5, 23)):
        mask[row, :padding] = 0
    monkeypatch.setattr("hylo.mixers.softmax.KEY_BLOCK", 7)

    @torch.no_grad()
    def in_chunks() -> Tensor:
        cache, logits = make_cache(model.config), []
        for begin in range(0, 40, 10):
            seen = begin + 10
            part = ids[:, begin:seen]
            logits.append(model(part, attention_mask=mask[:, :seen], past_key_values=cache).logits)
        return torch.cat(logits, dim=1)

    blocks = in_chunks()
    monkeypatch.setattr("hylo.modeling.left_padding", lambda _: None)
    masked = in_chunks()
    real = mask.bool()
    assert (blocks - masked)[real].abs().max() < 1e-4 * masked.abs().max()


def test_generation_from_guesses_is_refused_where_a_state_cannot_be_taken_back() -> None:
    ids = random_ids(1, 12)
    with pytest.raises(ValueError, match=r"[Aa]ssisted|stateful"):
        random_hybrid(["gdn", "attention"]).generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=4)
    model = random_hybrid(["mla"])
    guessed = model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False)
    assert torch.equal(guessed, model.generate(ids, max_new_tokens=8, do_sample=False))


@pytest.mark.skipif(transformers.__version__.startswith("5.17."), reason="its windows hold one guess at a time")
@pytest.mark.parametrize("mixers", [["attention", "attention"], ["mla", "attention"]])
def test_a_hybrid_with_windows_drafts_for_another(mixers: list[str]) -> None:
    """Guesses of the model itself are all taken, past a window's length too: none is made from a wrong past."""
    target, draft = (random_hybrid(mixers, sliding_window=4, sliding_layers=[1]) for _ in range(2))
    ids, options = random_ids(1, 20), GREEDY | {"max_new_tokens": 12}
    expected = target.generate(ids, **options)
    # So many guesses at a time, however sure it is of them.
    settings = {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
    draft.generation_config.update(**settings, assistant_confidence_threshold=0.0)
    calls: list[int] = []
    target.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(target.generate(ids, **options, assistant_model=draft), expected)
    assert len(calls) == 12 // (3 + 1)


def test_a_draft_whose_state_cannot_be_taken_back_is_refused() -> None:
    target, draft = random_hybrid(["mla"]), random_hybrid(["gdn", "attention"])
    with pytest.raises(ValueError, match="the draft has linear layers"):
        target.generate(random_ids(1, 12), assistant_model=draft, max_new_tokens=4)


def test_a_cache_of_another_kind_is_refused() -> None:
    model = random_hybrid(["mla", "gdn"])
    with pytest.raises(ValueError, match="make_cache"):
        model(random_ids(1, 5), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(random_ids(1, 5), cache_implementation="static", max_new_tokens=2)
