"""Scores against whole logits."""

import math
from pathlib import Path

import pytest
import torch
from tiny import random_windows, write_base
from transformers import LlamaForCausalLM

from hylo import HyLoForCausalLM
from hylo.errors import HyLoError
from hylo.evaluate import agreement
from hylo.evaluate.agreement import evaluate, make_reference, score_checkpoint
from hylo.upcycle.bases import load_model


@torch.no_grad()
def test_scores_are_those_of_whole_logits(student: HyLoForCausalLM, teacher: LlamaForCausalLM) -> None:
    """Over three batches with padding in the last: means over predicted tokens, not over batches."""
    batches = random_windows(5, 40).batches(2)
    scores = evaluate(student, batches, make_reference(teacher, batches))
    entropy, kl, same = [], [], []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = ids[mask.bool()][None]
            ours, theirs = (model(row).logits[0, :-1].log_softmax(-1) for model in (student, teacher))
            entropy += torch.nn.functional.nll_loss(ours, row[0, 1:], reduction="none").tolist()
            kl += (theirs.exp() * (theirs - ours)).sum(-1).tolist()
            same += (ours.argmax(-1) == theirs.argmax(-1)).tolist()
    assert scores.tokens == len(entropy) == 5 * 39 - 3
    assert scores.perplexity == pytest.approx(math.exp(sum(entropy) / len(entropy)), rel=1e-4)
    assert scores.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert scores.agreement == pytest.approx(sum(same) / len(same))
    assert scores.kl > 0.01


def test_a_teacher_of_another_vocabulary_is_told_before_anything_is_read(
    base_folder: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "load_model", lambda *_: pytest.fail("weights were read"))
    other = write_base(tmp_path / "other", vocab_size=310)
    with pytest.raises(HyLoError, match="differ in vocabulary: 300 and 310 words"):
        score_checkpoint(str(base_folder), [str(text_folder)], teacher=str(other))


def test_the_size_of_a_batch_does_not_matter(student: HyLoForCausalLM) -> None:
    windows = random_windows(5, 40)
    one, three = (evaluate(student, windows.batches(size)) for size in (1, 3))
    assert one.perplexity == pytest.approx(three.perplexity, rel=1e-5)
    assert one.kl is None
    assert one.agreement is None


def test_a_model_against_itself(base_folder: Path, text_folder: Path) -> None:
    scores = score_checkpoint(
        str(base_folder), [str(text_folder)], teacher=str(base_folder), length=64, tokens=500, precision="float32"
    )
    assert abs(scores.kl) < 1e-6
    assert scores.agreement == 1
    assert scores.tokens == 7 * 63
    assert scores.perplexity > 2


def test_a_vocabulary_that_differs_is_refused(student: HyLoForCausalLM, tmp_path: Path) -> None:
    other = load_model(write_base(tmp_path / "base", vocab_size=280, tokenizer=False))
    batches = [{"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 2).long()}]
    with pytest.raises(HyLoError, match="300 and 280"):
        evaluate(student, batches, make_reference(other, batches))


def test_nothing_to_score_is_refused(student: HyLoForCausalLM) -> None:
    batches = [{"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.tensor([[1, 0]])}]
    with pytest.raises(HyLoError, match="no tokens"):
        evaluate(student, batches)


def test_scores_that_are_not_finite_are_refused(student: HyLoForCausalLM) -> None:
    with torch.no_grad():
        student.model.norm.weight.fill_(torch.nan)
    with pytest.raises(HyLoError, match="'it' are not finite"):
        evaluate(student, random_windows(1, 8).batches(1), description="it")
