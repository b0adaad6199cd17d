"""Mixers and models on a GPU against the float64 CPU. Run with HYLO_TEST_GPU=1 pytest tests/gpu."""

import copy
import statistics
from typing import Any

import pytest
import torch
from tiny import random_hybrid, random_ids

from hylo.ops.kernels import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and HYLO_TEST_GPU=1")

# Heads as in test_ops_on_gpu.py, so that kernels are tuned once.
SIZES: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
GEOMETRY: dict[str, dict[str, Any]] = {
    "gdn": {"num_heads": 4, "head_k_dim": 64, "head_v_dim": 64},
    "kda": {"num_heads": 4, "head_k_dim": 64, "head_v_dim": 64, "gate_rank": 64},
    "mamba2": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64},
    "mla": {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64},
}
MIXERS = ["attention", "mla", "gdn", "mamba2", "kda"]


def hybrid(mixers: list[str], **geometry: dict[str, Any]) -> Any:
    chosen = {name: (GEOMETRY | geometry)[name] for name in set(mixers) & set(GEOMETRY | geometry)}
    return random_hybrid(mixers, **SIZES, mixer_geometry=chosen)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("length", [1, 70, 512])
@pytest.mark.parametrize(
    ("mixer", "geometry"),
    [
        *((mixer, {}) for mixer in MIXERS),
        # Values that start at 8 bytes within their rows, and at 16.
        ("mla", {"mla": {"kv_lora_rank": 10, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}}),
        ("mla", {"mla": {"kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}}),
    ],
)
def test_forward(
    mixer: str, geometry: dict[str, dict[str, Any]], length: int, dtype: torch.dtype, tolerance: float
) -> None:
    model = hybrid([mixer], **geometry)
    hidden = model.model.embed_tokens(random_ids(2, length)).detach()
    layer = model.model.layers[0].double()

    def mixed(x: torch.Tensor) -> torch.Tensor:
        context = model.model.mixing_context(x)
        return layer.mixer(x, **context.arguments(layer.mixer), past_key_values=None)

    with torch.no_grad():
        expected = mixed(hidden.double())
        model.to("cuda")
        layer.float()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            output = mixed(hidden.float().cuda())
    assert (output.double().cpu() - expected).norm() < tolerance * expected.norm()


# Less than the rows from which convolutions, norms and rotary embedding have kernels of their own, and more.
@pytest.mark.parametrize("length", [150, 600])
@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients(mixer: str, length: int) -> None:
    """Of a layer in a training step: float32 weights, bfloat16 products, packed documents."""
    model = hybrid([mixer])
    layer = model.model.layers[0]
    offsets = torch.tensor([0, 40, 129, length], dtype=torch.int32)

    def gradients(x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
        layer.zero_grad()
        context = model.model.mixing_context(x, cu_seqlens=offsets.to(x.device))
        layer.mixer(x, **context.arguments(layer.mixer), past_key_values=None).backward(upstream)
        return {name: p.grad.double().cpu().clone() for name, p in layer.mixer.named_parameters() if p.grad is not None}

    # Mamba-2's norm multiplies the roundings of heads that are nearly 0: in one text of ten an error is ten times that
    # of most, in plain torch too, and the median of few texts is a matter of luck.
    texts = [(torch.randn(2, 1, length, SIZES["hidden_size"]).double()) for _ in range(25)]
    layer.double()
    expected = [gradients(hidden, upstream) for hidden, upstream in texts]
    layer.float()
    model.to("cuda")
    errors: dict[str, dict[str, float]] = {}
    for chosen in ("reference", "auto"):
        found = []
        for text, exact in zip(texts, expected, strict=True):
            with torch.autocast("cuda", dtype=torch.bfloat16), kernels(chosen):
                result = gradients(*text.float().to("cuda"))
            assert result.keys() == exact.keys()
            found.append({name: float((result[name] - value).norm() / value.norm()) for name, value in exact.items()})
        errors[chosen] = {name: statistics.median(each[name] for each in found) for name in expected[0]}
    # No more than twice what plain torch loses to the same roundings.
    worse = {
        name: (error, errors["reference"][name])
        for name, error in errors["auto"].items()
        if error > max(2 * errors["reference"][name], 1e-2)
    }
    assert not worse


def distance(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, from float64: roundings to bfloat16 differ by the order of sums, and none should be larger."""
    return float((result.double().cpu() - exact).norm() / exact.norm())


@pytest.mark.parametrize("mixers", [[mixer] for mixer in MIXERS] + [MIXERS])
@torch.no_grad()
def test_prefill_in_chunks_and_decoding_give_the_whole_forward(mixers: list[str]) -> None:
    model = hybrid(mixers)
    ids = random_ids(2, 300)
    exact = model.double()(ids).logits
    model.to("cuda", torch.bfloat16)
    ids = ids.cuda()
    whole = model(ids).logits
    cache, logits = None, []
    for part in (*ids[:, :290].split(77, dim=1), *ids[:, 290:].split(1, dim=1)):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    assert distance(torch.cat(logits, dim=1), exact) < 1.2 * distance(whole, exact)
    assert cache.token_bytes() == 2 * model.config.cache_bytes(300)
    assert cache.state_bytes() == 2 * model.config.state_bytes()


@torch.no_grad()
def test_generation_with_left_padding() -> None:
    model = hybrid(MIXERS)
    ids = random_ids(2, 40)
    exact = model.double()(ids[:1, 15:]).logits[0]
    model.to("cuda", torch.bfloat16)
    ids = ids.cuda()
    mask = torch.ones_like(ids)
    mask[0, :15] = 0
    ids[0, :15] = 0
    padded = model(ids, attention_mask=mask).logits[0, 15:]
    alone = model(ids[:1, 15:]).logits[0]
    assert distance(padded, exact) < 1.2 * distance(alone, exact)


@torch.no_grad()
def test_generate_of_prompts_of_several_lengths() -> None:
    """Left-padded, read in chunks and decoded: the logits of each step are those of a whole forward pass alone."""
    model = hybrid(MIXERS)
    prompts, new = [random_ids(1, length) for length in (300, 41, 170)], 6
    width = max(prompt.shape[1] for prompt in prompts)
    ids = torch.cat([torch.nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - prompt.shape[1] for prompt in prompts]).long()
    exact_model = copy.deepcopy(model).double()
    model.to("cuda", torch.bfloat16)
    out = model.generate(
        ids.cuda(),
        attention_mask=mask.cuda(),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        prefill_chunk_size=128,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, dim=1)
    for row, prompt in enumerate(prompts):
        alone = torch.cat([prompt, out.sequences[row : row + 1, width:].cpu()], dim=1)[:, :-1]
        exact = exact_model(alone).logits[0, -new:]
        whole = model(alone.cuda()).logits[0, -new:]
        assert distance(logits[row], exact) < 1.5 * distance(whole, exact)
