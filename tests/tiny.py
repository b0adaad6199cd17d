"""Tiny models, tokenizers and texts that the tests are made of."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from hylo import HyLoConfig, HyLoForCausalLM
from hylo.data.batches import PackedWindows, collate
from hylo.data.mixture import Part, plan_windows
from hylo.data.store import MemoryStore
from hylo.data.windows import Windows
from hylo.upcycle.activations import AttentionStatistics, AttentionWeights
from hylo.upcycle.bases import Base
from hylo.upcycle.convert import ConversionPlan, convert, plan_conversion
from hylo.upcycle.trace import enter_layers, trace_layers

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # Wide enough that attention is far from uniform: a wrong mask or rotation shows.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Every mixer in four layers.
MIXED_LAYOUT = "GDN:0,2 MLA:1 ATT"
GEOMETRY: dict[str, dict[str, Any]] = {
    "mla": {"kv_lora_rank": 10, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8},
    "gdn": {"num_heads": 4, "head_k_dim": 8, "head_v_dim": 8},
    "mamba2": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "kda": {"num_heads": 4, "head_k_dim": 8, "head_v_dim": 8, "gate_rank": 3},
}
# What `random_hybrid` takes: every mixer alone, with all that a base may add to it, and mixes.
HYBRIDS: dict[str, dict[str, Any]] = {
    "attention": {"token_mixers": ["attention"] * 2},
    "attention_bias": {"token_mixers": ["attention"] * 2, "attention_bias": True},
    "attention_qk_norm": {"token_mixers": ["attention"] * 2, "qk_norm": True},
    "attention_window": {"token_mixers": ["attention"] * 2, "sliding_window": 4, "sliding_layers": [1]},
    "mla": {"token_mixers": ["mla"] * 2},
    "mla_low_rank_query": {"token_mixers": ["mla"] * 2, "mla": {"q_lora_rank": 12}, "attention_bias": True},
    "mla_rope_pairs": {"token_mixers": ["mla"] * 2, "mla": {"rope_pairs": [0, 3]}},
    "mla_all_rotary": {"token_mixers": ["mla"] * 2, "mla": {"qk_nope_head_dim": 0, "qk_rope_head_dim": 8}},
    "mla_query_norm": {"token_mixers": ["mla"] * 2, "qk_norm": True},
    "mla_key_norm": {"token_mixers": ["mla"] * 2, "mla": {"key_norm": True}, "qk_norm": True},
    "gdn": {"token_mixers": ["gdn"] * 2},
    "gdn_bias": {"token_mixers": ["gdn"] * 2, "attention_bias": True},
    "mamba2": {"token_mixers": ["mamba2"] * 2},
    "mamba2_bias": {"token_mixers": ["mamba2"] * 2, "attention_bias": True},
    "kda": {"token_mixers": ["kda"] * 2},
    "kda_bias": {"token_mixers": ["kda"] * 2, "attention_bias": True},
    "mix": {"token_mixers": ["gdn", "mla", "attention", "gdn"], "mla": {"rope_pairs": [1, 2]}},
    "mix_of_all": {
        "token_mixers": ["kda", "attention", "mamba2", "mla", "attention", "gdn"],
        "attention_bias": True,
        "sliding_window": 4,
        "sliding_layers": [1],
    },
}

_generator = random.Random(7)
_WORDS = ["".join(_generator.choice("bdfgklmnprst") + _generator.choice("aeiou") for _ in range(3)) for _ in range(150)]


def sentences(seed: int, count: int = 40) -> str:
    """Random sentences in paragraphs of four: two seeds share no run of 13 words."""
    chosen = random.Random(seed)
    lines = [" ".join(chosen.choices(_WORDS, k=chosen.randint(9, 14))) + "." for _ in range(count)]
    return "\n\n".join(" ".join(lines[i : i + 4]) for i in range(0, count, 4)) + "\n"


def write_texts(folder: Path, count: int) -> Path:
    for i in range(count):
        (folder / f"text{i:02}.txt").write_text(sentences(100 + i))
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a few sentences: it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentences(1)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_base(folder: Path, *, family: str = "llama", seed: int = 0, tokenizer: bool = True, **sizes: Any) -> Path:
    """A random base as transformers saves it. Norm weights differ from one, so that a norm left out shows."""
    torch.manual_seed(seed)
    values = SIZES | sizes
    if family != "llama" and "head_dim" not in sizes:
        # Not every family's config has it.
        del values["head_dim"]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def convert_base(
    base: Path, output: Path, layout: str | list[str], geometry: dict[str, Any] | None = None, **options: Any
) -> ConversionPlan:
    with Base.open(base) as opened:
        plan = plan_conversion(opened, layout, geometry, **options)
        convert(plan, opened, output)
    return plan


def hybrid_config(token_mixers: list[str], mla: dict[str, Any] | None = None, **sizes: Any) -> HyLoConfig:
    geometry = sizes.pop("mixer_geometry", None) or {name: GEOMETRY[name] for name in set(token_mixers) & set(GEOMETRY)}
    if "mla" in geometry:
        geometry["mla"] = geometry["mla"] | (mla or {})
    values = SIZES | {"num_hidden_layers": len(token_mixers)} | sizes
    return HyLoConfig(**values, token_mixers=token_mixers, mixer_geometry=geometry)


def random_hybrid(token_mixers: list[str], mla: dict[str, Any] | None = None, **sizes: Any) -> HyLoForCausalLM:
    """A hybrid none of whose parameters is at a neutral value: gates, decays and convolutions all matter."""
    torch.manual_seed(3)
    model = HyLoForCausalLM(hybrid_config(token_mixers, mla, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("dt_bias", "A_log")):
                parameter.copy_(torch.randn_like(parameter) - 1)
            elif name.endswith((".D", ".bias")):
                parameter.copy_(0.5 * torch.randn_like(parameter))
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif "conv1d" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model


def random_ids(*shape: int) -> Tensor:
    return torch.randint(2, VOCABULARY, shape)


def random_windows(count: int, length: int) -> Windows:
    """Windows of random tokens; the last one is padded."""
    rows = random_ids(count, length).tolist()
    rows[-1] = rows[-1][: length - 3]
    return Windows(rows, length)


def random_packed(count: int, length: int) -> PackedWindows:
    """Packed windows of random tokens: documents shorter than a window, longer ones, and some padding."""
    # Whole multiples of a window, what fills it up, and pieces that leave three places.
    lengths = [length, 5, length - 5, 2 * length + 4, length - 7] * -(-count // 5)
    store = MemoryStore([random_ids(size).numpy() for size in lengths])
    plan = plan_windows([Part("random", store, None)], length, tokens=count * length, seed=0, packing=True)
    return PackedWindows([store], plan)


def collated(count: int, length: int) -> dict[str, Any]:
    """A batch of them."""
    windows = random_packed(count, length)
    return collate([windows[i] for i in range(count)])


def documents_of(batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Each document of a packed batch alone: `input_ids` and `labels`, `[1, T]`."""
    return [
        {key: batch[key][:, begin:end] for key in ("input_ids", "labels")}
        for begin, end in pairwise(batch["cu_seqlens"].tolist())
    ]


def statistics_of(teacher: LlamaForCausalLM, *batches: dict[str, Tensor], layer: int = 1) -> AttentionStatistics:
    """What one layer's attention does on texts, `input_ids` and `attention_mask` each."""
    module = teacher.model.layers[layer]
    statistics = AttentionStatistics(AttentionWeights.of(module.self_attn))
    for batch in batches:
        inputs = module.input_layernorm(trace_layers(teacher, batch).inputs[layer])
        positions = enter_layers(teacher, batch)[1][layer]["position_embeddings"]
        statistics.add(inputs, batch["attention_mask"].bool(), positions)
    return statistics
