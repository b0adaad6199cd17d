"""Teachers of any family: what the loss takes for their logits is what they would say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES, random_packed, write_base
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from hylo import HyLoForCausalLM
from hylo.distill.recipe import StageSection
from hylo.distill.teacher import as_hybrid, check_head
from hylo.distill.trainer import train_stage
from hylo.errors import HyLoError

STAGE = StageSection(name="stage2", objective="kl", length=16, tokens=32, batch_size=2, learning_rate=1e-3)
# Families whose heads do more than multiply, and what the refusal names.
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "granite": ({"logits_scaling": 8.0}, "logits_scaling 8"),
    "gemma2": ({"final_logit_softcapping": 30.0, "head_dim": 8}, "final_logit_softcapping 30"),
    "cohere": ({}, "logit_scale 0.0625"),
    "phi": ({}, "a bias of the head"),
}


def made(folder: Path, family: str, dtype: torch.dtype, **sizes: Any) -> PreTrainedModel:
    write_base(folder, family=family, tokenizer=False, pad_token_id=0, **sizes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma"])
def test_a_plain_head_is_taken(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    check_head(made(tmp_path, family, dtype))


@pytest.mark.parametrize("family", OTHERS)
def test_a_head_that_does_more_is_refused(student: HyLoForCausalLM, tmp_path: Path, family: str) -> None:
    """It would be distilled from probabilities that are not its own."""
    sizes, named = OTHERS[family]
    teacher = made(tmp_path / "teacher", family, torch.float32, **sizes)
    with pytest.raises(HyLoError, match=f"'{family}' family cannot be distilled from.*{named}") as error:
        train_stage(STAGE, student, teacher, random_packed(2, 16), tmp_path / "run", dtype=torch.float32, seed=0)
    assert "\n" not in str(error.value)


def test_a_cap_that_bfloat16_rounds_away_is_refused(tmp_path: Path) -> None:
    """On a few tokens; others would be capped all the same."""
    sizes, named = OTHERS["gemma2"]
    with pytest.raises(HyLoError, match=named):
        check_head(made(tmp_path, "gemma2", torch.bfloat16, **sizes))
    check_head(made(tmp_path, "gemma2", torch.bfloat16, **sizes | {"final_logit_softcapping": None}))


def test_a_decoder_that_is_not_told_apart_is_refused(tmp_path: Path) -> None:
    """transformers takes this family's model for its own decoder."""
    teacher = made(tmp_path, "llama4_text", torch.float32)
    with pytest.raises(HyLoError, match="'llama4_text' family cannot be distilled from: it does not tell"):
        check_head(teacher)


# Their layers have other names, or no attention; only the first tells how long its documents may be.
UNLIKE: dict[str, dict[str, int]] = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 8},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mamba": {},
}


@pytest.mark.parametrize("family", UNLIKE)
def test_families_unlike_llama_teach(student: HyLoForCausalLM, tmp_path: Path, family: str) -> None:
    sizes = {"vocab_size": SIZES["vocab_size"], "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    teacher = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes | UNLIKE[family])).eval()
    logs = train_stage(STAGE, student, teacher, random_packed(2, 16), tmp_path, dtype=torch.float32, seed=0)
    assert logs[-1]["loss"] > 0
    assert ("cross_entropy" in logs[-1]) == (family == "gpt2")


def test_scales_of_one_are_none(tmp_path: Path) -> None:
    check_head(made(tmp_path, "granite", torch.float32, logits_scaling=1.0))


def test_a_family_that_is_read_as_a_hybrid_needs_no_look(teacher: PreTrainedModel) -> None:
    hybrid = as_hybrid(teacher)
    hybrid.forward = None
    check_head(hybrid)
