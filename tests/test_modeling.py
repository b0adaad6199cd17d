"""The hybrid model: cache, padding, saving and loading, for every mixer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from differentiate import with_gradients
from tiny import GEOMETRY, HYBRIDS, hybrid_config, random_hybrid, random_ids
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import hylo
from hylo import HyLoConfig, HyLoError, HyLoForCausalLM

SPLITS = {
    12: [[12], [1] * 12, [1, 11], [5, 1, 1, 5], [2, 1, 2, 7], [3, 3, 3, 3], [11, 1]],
    # Across the chunks of the gated delta rule.
    70: [[65, 1, 4], [1, 64, 5], [30, 40]],
}


@pytest.fixture(params=HYBRIDS)
def model(request: pytest.FixtureRequest) -> HyLoForCausalLM:
    return random_hybrid(**HYBRIDS[request.param])


def in_pieces(model: HyLoForCausalLM, ids: Tensor, pieces: list[int]) -> Tensor:
    """Logits `[B, T, V]` from a prefill and continuations of the given lengths."""
    cache = DynamicCache(config=model.config)
    logits = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split(pieces, dim=1)]
    return torch.cat(logits, dim=1)


@torch.no_grad()
def test_pieces_equal_one_forward(model: HyLoForCausalLM) -> None:
    for length, splits in SPLITS.items():
        ids = random_ids(2, length)
        whole = model(ids, use_cache=False).logits
        for pieces in splits:
            torch.testing.assert_close(
                in_pieces(model, ids, pieces), whole, rtol=0, atol=1e-4, msg=lambda text, p=pieces: f"{p}: {text}"
            )


@torch.no_grad()
def test_causal(model: HyLoForCausalLM) -> None:
    """A token changes nothing before it, and something from it on."""
    ids = random_ids(1, 10)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % model.config.vocab_size
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-6)
    assert (before[:, 6:] - after[:, 6:]).abs().amax(dim=-1).min() > 1e-4


@torch.no_grad()
def test_left_padding_changes_no_generated_token(model: HyLoForCausalLM) -> None:
    prompts = [random_ids(1, length) for length in (3, 9, 1)]
    width = max(prompt.shape[1] for prompt in prompts)
    ids = torch.cat([torch.nn.functional.pad(prompt, (width - prompt.shape[1], 0), value=7) for prompt in prompts])
    mask = torch.cat([torch.arange(width)[None] >= width - prompt.shape[1] for prompt in prompts]).long()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 7}
    together = model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:]
    for prompt, tokens in zip(prompts, together, strict=True):
        alone = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(alone[0, prompt.shape[1] :], tokens)


@torch.no_grad()
def test_left_padding_in_pieces_equals_unpadded(model: HyLoForCausalLM) -> None:
    """A padded prefill that is itself cut in two, then a token: the mask covers cached and new tokens."""
    ids = random_ids(1, 9)
    padded = torch.nn.functional.pad(ids, (4, 0), value=7)
    mask = (torch.arange(13)[None] >= 4).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits = [
        model(
            padded[:, first:last],
            attention_mask=mask[:, :last],
            position_ids=positions[:, first:last],
            past_key_values=cache,
        ).logits
        for first, last in ((0, 6), (6, 12), (12, 13))
    ]
    torch.testing.assert_close(torch.cat(logits, dim=1)[:, 4:], model(ids).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_right_padding_changes_nothing_before_it(model: HyLoForCausalLM) -> None:
    ids = random_ids(1, 9)
    padded = torch.nn.functional.pad(ids, (0, 5), value=7)
    logits = model(padded, attention_mask=(torch.arange(14)[None] < 9).long()).logits
    torch.testing.assert_close(logits[:, :9], model(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_save_load_generate(model: HyLoForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is HyLoConfig
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is HyLoForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is hylo.HyLoModel
    assert loaded.config.token_mixers == model.config.token_mixers
    for mixer in set(model.config.token_mixers):
        assert loaded.config.geometry(mixer) == model.config.geometry(mixer)
    # Buffers too: rotary frequencies are not saved, and models load through the meta device.
    for ours, theirs in ((model.state_dict(), loaded.state_dict()), (buffers(model), buffers(loaded))):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
    ids = random_ids(2, 6)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    loaded.generation_config.eos_token_id = None
    assert torch.equal(model.generate(ids, **options), loaded.eval().generate(ids, **options))


def buffers(model: HyLoForCausalLM) -> dict[str, Tensor]:
    return dict(model.named_buffers())


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "yarn", "factor": 4.0}])
def test_rotary_frequencies_are_the_bases(rope: dict[str, Any]) -> None:
    """Chosen pairs turn at their own frequencies; all of a head is the base's; half a head is every other pair."""
    sizes = {"rope_parameters": {"rope_theta": 10_000.0, "original_max_position_embeddings": 128} | rope}
    whole = LlamaRotaryEmbedding(hybrid_config(["attention"], **sizes)).inv_freq

    def frequencies(mla: dict[str, Any]) -> Tensor:
        return random_hybrid(["mla"], mla, **sizes).model.rotary_embeddings["mla"].inv_freq

    assert torch.equal(frequencies({"rope_pairs": [3, 1]}), whole[[3, 1]])
    assert torch.equal(frequencies({"qk_nope_head_dim": 0, "qk_rope_head_dim": 8}), whole)
    if rope["rope_type"] == "default":
        torch.testing.assert_close(frequencies({}), whole[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cache_bytes_are_those_of_the_tensors(model: HyLoForCausalLM, dtype: torch.dtype) -> None:
    model.to(dtype)
    tokens = 11
    cached = states = 0
    for layer in model(random_ids(1, tokens), use_cache=True).past_key_values.layers:
        if hasattr(layer, "conv_states"):
            states += layer.conv_states[0].nbytes + layer.recurrent_states[0].nbytes
        else:
            cached += layer.keys.nbytes + layer.values.nbytes
    assert cached == model.config.cache_bytes(tokens, dtype.itemsize)
    assert states == model.config.state_bytes(dtype.itemsize)
    assert cached + states > 0


@torch.no_grad()
def test_bfloat16_stays_near_float32(model: HyLoForCausalLM) -> None:
    ids = random_ids(2, 40)
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids).logits
    low = model.to(torch.bfloat16)
    assert low(ids).logits.dtype == torch.bfloat16
    pieces = in_pieces(low, ids, [37, 1, 1, 1])
    for logits in (mixed, low(ids).logits, pieces):
        assert torch.isfinite(logits).all()
        assert (logits.float() - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
def test_eager_and_sdpa_agree(model: HyLoForCausalLM) -> None:
    """Through either attention implementation of transformers: with padding, with packed documents, and decoding."""
    ids, mask = random_ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    logits = {}
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        padded = model(ids, attention_mask=mask).logits[mask.bool()]
        packed = model(ids, cu_seqlens=torch.tensor([0, 3, 15, 20])).logits
        logits[name] = [padded, packed, in_pieces(model, ids, [6, 3, 1])]
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=0, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = random_hybrid(**HYBRIDS["mix_of_all"]).train()
    ids = random_ids(2, 9)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_logits_to_keep_and_labels() -> None:
    model = random_hybrid(["gdn", "mla"])
    ids = random_ids(2, 8)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, logits[:, -1:], rtol=0, atol=1e-6)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)


def test_one_input_is_expected() -> None:
    with pytest.raises(ValueError, match="exactly one of"):
        random_hybrid(["gdn"]).model()


def test_fresh_decays_start_in_the_range_of_mamba2() -> None:
    """Models that are not loaded start with A in [1, 16] and steps in [0.001, 0.1]."""
    mixer = HyLoForCausalLM(hybrid_config(["gdn"] * 8)).model.layers[3].mixer
    decay, step = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert ((decay >= 1) & (decay <= 16)).all()
    assert ((step >= 0.99e-3) & (step <= 0.101)).all()
    assert len(set(decay.tolist())) == len(decay)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "too few mixers": ({"token_mixers": ["mla"]}, "token_mixers"),
    "unknown mixer": ({"token_mixers": ["mla", "hyena"]}, "hyena"),
    "missing size": ({"mixer_geometry": {"mla": {"kv_lora_rank": 4}}}, "qk_nope_head_dim"),
    "unknown size": ({"mixer_geometry": {"gdn": {"heads": 4}}, "token_mixers": ["gdn", "gdn"]}, "heads"),
    "a size that is to be a list": (
        {"mixer_geometry": {"mla": GEOMETRY["mla"] | {"rope_pairs": 3}}},
        "geometry of mla: rope_pairs is 3; expected a list of whole numbers, or null",
    ),
    "a number for sizes": ({"mixer_geometry": {"mla": 3}}, "geometry of mla is 3; expected an object of sizes"),
    "a number for all sizes": ({"mixer_geometry": 3}, "mixer_geometry is 3; expected an object of sizes by mixer"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "heads"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_is_refused(case: str) -> None:
    """Whether it is built or read from a folder: what does not fit is named."""
    changes, named = BAD_CONFIGS[case]
    values = hybrid_config(["mla", "mla"]).to_dict() | changes
    for key in ("architectures", "transformers_version", "model_type"):
        values.pop(key, None)
    with pytest.raises(HyLoError, match=named):
        HyLoForCausalLM(HyLoConfig(**values))


PUBLISHED = {
    "4MLA12GDN on Llama-3.2-1B": (
        1_673_797_776,
        {
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "token_mixers": ["mla" if i in (1, 5, 10, 14) else "gdn" for i in range(16)],
        },
        {"kv_lora_rank": 128, "q_lora_rank": 1344, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64},
        6,
    ),
    "14MLA14GDN on Llama-3.2-3B": (
        3_971_381_500,
        {
            "hidden_size": 3072,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "token_mixers": ["mla", "gdn"] * 14,
        },
        {"kv_lora_rank": 128, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 128},
        9,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_geometries_to_the_parameter(name: str) -> None:
    """The counts that the released checkpoints state, with the head counted apart from the embedding."""
    expected, sizes, mla, heads = PUBLISHED[name]
    config = HyLoConfig(
        **sizes,
        num_hidden_layers=len(sizes["token_mixers"]),
        intermediate_size=8192,
        vocab_size=128_256,
        tie_word_embeddings=False,
        mixer_geometry={"mla": mla, "gdn": {"num_heads": heads, "head_k_dim": 256, "head_v_dim": 512}},
    )
    with torch.device("meta"):
        model = HyLoForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("training", [False, True])
def test_an_mlp_in_chunks_is_the_mlp(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients; without gradients long sequences pass in chunks by themselves."""
    model = random_hybrid(["attention"]).double()
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 23, model.config.hidden_size, dtype=torch.float64)
    seen: list[int] = []
    mlp.gate_proj.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    inputs = {"x": x.requires_grad_(), **dict(mlp.named_parameters())}
    expected = with_gradients([mlp(x)], inputs) if training else mlp(x).detach()
    assert seen == [23]
    seen.clear()
    monkeypatch.setattr(mlp, "chunk_size", 10)
    monkeypatch.setattr("hylo.modeling.MLP_CHUNK", 10)
    with torch.set_grad_enabled(training):
        result = with_gradients([mlp(x)], inputs) if training else mlp(x)
    # Once more each in the backward pass.
    assert sorted(seen) == sorted([10, 10, 3] * (2 if training else 1))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_the_stream_may_be_in_half_precision() -> None:
    model = random_hybrid(["attention", "gdn"])
    ids = random_ids(2, 12)
    inputs: list[torch.dtype] = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = model(ids).logits
        model.model.stream_dtype = torch.bfloat16
        half = model(ids).logits
    assert inputs == [torch.float32, torch.float32, torch.bfloat16]
    assert (half - exact).norm() < 2 * (wide - exact).norm()
