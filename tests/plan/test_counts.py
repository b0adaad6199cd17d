"""Sizes of a plan: the published counts, to the parameter."""

from pathlib import Path
from typing import Any

import pytest
from base_configs import LLAMA_1B, LLAMA_3B, QWEN, write_config
from tiny import MIXED_LAYOUT, convert_base, hybrid_config

from hylo import HyLoForCausalLM
from hylo.errors import HyLoError
from hylo.plan.inference import Serving
from hylo.plan.model import plan_model
from hylo.plan.report import plan_pair, plan_report
from hylo.plan.source import read_config


def planned(folder: Path, base: str, layout: str) -> dict[str, Any]:
    hybrid, dense = plan_pair(read_config(str(write_config(folder, base))), layout, "paper", base)
    return plan_report(hybrid, dense, [8192], Serving())


@pytest.mark.parametrize(
    ("base", "layout", "parameters"),
    [(LLAMA_1B, "4MLA12GDN", 1_673_797_776), (LLAMA_3B, "14MLA14GDN", 3_971_381_500)],
)
def test_published_parameters(tmp_path: Path, base: str, layout: str, parameters: int) -> None:
    plan = planned(tmp_path, base, layout)
    assert plan["parameters_untied"] == parameters
    vocabulary, hidden = 128256, 2048 if base == LLAMA_1B else 3072
    assert plan["parameters"] == parameters - vocabulary * hidden


@pytest.mark.parametrize(
    ("base", "layout", "ratio"),
    [
        (LLAMA_1B, "4MLA12GDN", 0.0390625),
        (LLAMA_1B, "8MLA8GDN", 0.078125),
        (LLAMA_3B, "6MLA22GDN", 6 * 192 / (28 * 2048)),
        (LLAMA_3B, "14MLA14GDN", 14 * 192 / (28 * 2048)),
        (QWEN, "7MLA21GDN", 0.0390625),
        (QWEN, "14MLA14GDN", 0.078125),
        (QWEN, "14MLA14M2", 0.078125),
    ],
)
def test_published_cache(tmp_path: Path, base: str, layout: str, ratio: float) -> None:
    plan = planned(tmp_path, base, layout)
    assert plan["kv_cache_ratio"] == ratio
    assert plan["kv_cache_bytes_per_token"] == ratio * plan["base_kv_cache_bytes_per_token"]


def test_state_by_hand(tmp_path: Path) -> None:
    plan = planned(tmp_path, LLAMA_1B, "4MLA12GDN")
    # Six heads of 256 x 512 in float32, three inputs of the convolutions in bfloat16.
    assert plan["state_bytes_per_sequence"] == 12 * (6 * 256 * 512 * 4 + 3 * 6 * 1024 * 2)
    assert [i for i, name in enumerate(plan["layers"]) if name == "mla"] == [1, 5, 10, 14]


def test_parameters_are_those_of_the_model() -> None:
    config = hybrid_config(["gdn", "mla", "attention", "gdn"])
    model = HyLoForCausalLM(config)
    plan = plan_model(config)
    assert plan.parameters == plan.parameters_untied == sum(p.numel() for p in model.parameters())
    replaced = [layer.mixer for layer in model.model.decoder_layers if layer.mixer.replaces_attention]
    assert plan.replaced_parameters == sum(p.numel() for mixer in replaced for p in mixer.parameters())
    tied = plan_model(hybrid_config(["gdn"], tie_word_embeddings=True))
    assert tied.parameters_untied - tied.parameters == config.vocab_size * config.hidden_size


def test_a_hybrid_is_planned_as_it_is(base_folder: Path, tmp_path: Path) -> None:
    convert_base(base_folder, tmp_path / "hybrid", MIXED_LAYOUT, {"mla": {"kv_lora_rank": 6}})
    config = read_config(str(tmp_path / "hybrid"))
    hybrid, dense = plan_pair(config, None, {}, "hybrid")
    from_base, its_dense = plan_pair(read_config(str(base_folder)), MIXED_LAYOUT, {"mla": {"kv_lora_rank": 6}}, "base")
    assert hybrid.layers == ["gdn", "mla", "gdn", "attention"]
    assert (hybrid.parameters, dense.parameters) == (from_base.parameters, its_dense.parameters)
    with pytest.raises(HyLoError, match="a hybrid already"):
        plan_pair(config, "4GDN", {}, "hybrid")


def test_a_base_without_a_layout(base_folder: Path) -> None:
    with pytest.raises(HyLoError, match="--layout"):
        plan_pair(read_config(str(base_folder)), None, {}, "base")
