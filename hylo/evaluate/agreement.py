"""Perplexity, KL(teacher || student) and top-1 agreement on text, from hidden states, a chunk at a time."""

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hylo.data.sources import read_documents
from hylo.data.windows import make_windows
from hylo.errors import HyLoError
from hylo.precision import Precision, autocast, default_device, resolve_precision
from hylo.progress import bar
from hylo.upcycle.bases import check_same_vocabulary, load_model, load_text_config, load_tokenizer, opened_folder

_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Scores:
    """Means over predicted tokens.

    Attributes:
        perplexity: exp of the cross-entropy of the next token.
        kl: KL(teacher || model) in nats a token; None without a teacher.
        agreement: share of tokens where model and teacher put the same word first; None without a teacher.
        tokens: how many predictions were scored.
    """

    perplexity: float
    kl: float | None
    agreement: float | None
    tokens: int

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """A teacher's final hidden states on the batches, kept so that it runs once for many students."""

    hidden: list[Tensor]
    head: Tensor


@torch.no_grad()
def final_hidden(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """`[B, T, D]`, after the final norm."""
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    return model.get_decoder()(**inputs, use_cache=False).last_hidden_state


def make_reference(teacher: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> Reference:
    """Runs the teacher once over the batches."""
    total = sum(int(batch["attention_mask"].sum()) for batch in batches)
    hidden = []
    with bar("evaluate teacher", total, "tokens") as shown:
        for batch in batches:
            hidden.append(final_hidden(teacher, batch))
            shown.advance(int(batch["attention_mask"].sum()))
    return Reference(hidden, teacher.get_output_embeddings().weight)


def evaluate(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    reference: Reference | None = None,
    *,
    description: str = "evaluate",
) -> Scores:
    """Scores a model on batches of windows (`input_ids`, `attention_mask`, `[B, T]` each).

    Raises HyLoError where model and teacher differ in vocabulary, or a score is not finite.
    """
    hidden = (final_hidden(model, batch) for batch in batches)
    total = sum(int(batch["attention_mask"].sum()) for batch in batches)
    with bar(description, total, "tokens") as shown:

        def passing() -> Iterable[Tensor]:
            for states, batch in zip(hidden, batches, strict=True):
                yield states
                shown.advance(int(batch["attention_mask"].sum()))

        return score(passing(), model.get_output_embeddings().weight, batches, reference, description)


@torch.no_grad()
def score(
    hidden: Iterable[Tensor],
    head: Tensor,
    batches: Sequence[dict[str, Tensor]],
    reference: Reference | None = None,
    description: str = "evaluate",
) -> Scores:
    """Scores final hidden states `[B, T, D]`, one for each batch, that meet a head `[V, D]`. Raises as `evaluate`."""
    if reference is not None and reference.head.shape[0] != head.shape[0]:
        raise HyLoError(f"model and teacher differ in vocabulary: {head.shape[0]} and {reference.head.shape[0]} words")
    sums = torch.zeros(4, dtype=torch.float64)
    for i, (states, batch) in enumerate(zip(hidden, batches, strict=True)):
        mask = batch["attention_mask"].bool().to(states.device)
        predicts = mask[:, :-1] & mask[:, 1:]
        predicting = states[:, :-1][predicts]
        targets = batch["input_ids"].to(states.device)[:, 1:][predicts]
        teacher = reference.hidden[i][:, :-1][predicts] if reference is not None else None
        for start in range(0, len(targets), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            sums += _chunk_sums(
                predicting[rows],
                head,
                targets[rows],
                teacher[rows] if teacher is not None else None,
                reference.head if reference is not None else None,
            )
    entropy, kl, agreement, count = sums.tolist()
    if not count or not math.isfinite(entropy + kl):
        raise HyLoError(f"the scores of {description!r} are not finite" if count else "no tokens to score")
    compared = reference is not None
    return Scores(
        perplexity=math.exp(min(entropy / count, 700.0)),
        kl=kl / count if compared else None,
        agreement=agreement / count if compared else None,
        tokens=int(count),
    )


def _chunk_sums(
    hidden: Tensor, head: Tensor, targets: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None
) -> Tensor:
    """Sums over tokens of cross-entropy, KL and agreement, and the count."""
    # In float32 whatever autocast says: bfloat16 logits tie, and a tie is no agreement.
    with torch.autocast(hidden.device.type, enabled=False):
        student = (hidden.float() @ head.float().T).log_softmax(-1)
        entropy = -student.gather(-1, targets[:, None]).sum()
        kl = agreement = torch.zeros(())
        if teacher_hidden is not None and teacher_head is not None:
            teacher = (teacher_hidden.float() @ teacher_head.float().T).log_softmax(-1)
            agreement = (student.argmax(-1) == teacher.argmax(-1)).sum()
            kl = (teacher.exp() * (teacher - student)).sum()
    return torch.stack([x.double().cpu() for x in (entropy, kl, agreement, torch.tensor(len(targets)))])


def score_checkpoint(
    model: str,
    text: Sequence[str],
    *,
    teacher: str | None = None,
    length: int = 1024,
    tokens: int = 50_000,
    precision: Precision = "auto",
) -> Scores:
    """Scores a model by reference (folder, hub id, GGUF) on text sources, against a teacher if one is named.

    Raises HyLoError on bad input, or where model and teacher differ in vocabulary.
    """
    documents = read_documents(text)
    device, dtype = default_device(), resolve_precision(precision)
    with ExitStack() as stack:
        folder = stack.enter_context(opened_folder(model))
        teacher_folder = stack.enter_context(opened_folder(teacher)) if teacher else None
        tokenizer = load_tokenizer(folder)
        if teacher_folder is not None:
            check_same_vocabulary(tokenizer, load_tokenizer(teacher_folder))
        words = load_text_config(folder).vocab_size
        if teacher_folder is not None:
            others = load_text_config(teacher_folder).vocab_size
            if others != words:
                raise HyLoError(f"model and teacher differ in vocabulary: {words} and {others} words")
        batches = make_windows(documents, tokenizer, length, limit_tokens=tokens, vocabulary=words).batches(2)
        with autocast(device, dtype):
            reference = None
            if teacher_folder is not None:
                reference = make_reference(load_model(teacher_folder, torch.float32).to(device), batches)
            return evaluate(load_model(folder, torch.float32).to(device), batches, reference)
