"""Rope scaling of GGUF files: Llama 3's is restored, any other is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tokenizer, random_ids, write_base
from torch import Tensor
from transformers import LlamaForCausalLM

from hylo.errors import HyLoError
from hylo.plan.source import read_config
from hylo.upcycle.bases import load_model, model_folder

gguf = pytest.importorskip("gguf")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors(head_dim: int, theta: float, factor: float) -> Tensor:
    """As llama.cpp's converter writes them."""
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        smooth = min(max((8192 / wavelength - 1) / 3, 0), 1)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors)


def write_gguf(file: Path, model: LlamaForCausalLM, factors: Tensor | None, told: dict[str, Any]) -> Path:
    """A model as llama.cpp's converter writes it: rows of queries and keys with pairs side by side."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for name, value in told.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"llama.rope.{name}", value)
    tokenizer = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    vocabulary = tokenizer["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in state.items():
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        told_name = names.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{told_name}.weight", value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    def make(rope: dict[str, Any], factors: Tensor | None = None, **told: Any) -> Path:
        base = write_base(tmp_path / "base", hidden_size=128, head_dim=32, num_hidden_layers=1, rope_parameters=rope)
        return write_gguf(tmp_path / "model.gguf", load_model(base, torch.float32), factors, told)

    return make


@torch.no_grad()
def test_llama3_is_restored(made: Callable[..., Path], tmp_path: Path) -> None:
    file = made(LLAMA3, llama3_factors(32, 500_000.0, 32.0))
    assert read_config(str(file)).rope_parameters == LLAMA3
    base, read = load_model(tmp_path / "base"), load_model(model_folder(file, tmp_path / "read"))
    ids = random_ids(1, 200)
    torch.testing.assert_close(read(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factors", [None, torch.ones(16)])
@pytest.mark.parametrize("told", [{}, {"scaling.type": "none"}, {"scaling.type": "none", "scaling.factor": 2.0}])
def test_no_scaling_stays_none(made: Callable[..., Path], factors: Tensor | None, told: dict[str, Any]) -> None:
    file = made({"rope_type": "default", "rope_theta": 10_000.0}, factors, **told)
    assert read_config(str(file)).rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    ("factors", "told", "named"),
    [
        (None, {"scaling.type": "yarn", "scaling.factor": 4.0}, "'yarn'"),
        (None, {"scaling.type": "linear", "scaling.factor": 4.0}, "'linear'"),
        (None, {"scale_linear": 4.0}, "'linear'"),
        (torch.full((16,), 8.0), {}, "rope_freqs"),
        (llama3_factors(16, 500_000.0, 32.0), {}, "rope_freqs"),
    ],
)
def test_other_scaling_is_refused(
    made: Callable[..., Path], tmp_path: Path, factors: Tensor | None, told: dict[str, Any], named: str
) -> None:
    file = made({"rope_type": "default", "rope_theta": 500_000.0}, factors, **told)
    for read in (lambda: read_config(str(file)), lambda: model_folder(file, tmp_path / "read")):
        with pytest.raises(HyLoError, match=named):
            read()
    assert not (tmp_path / "read").exists()
