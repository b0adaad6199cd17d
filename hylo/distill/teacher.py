"""The teacher: any causal language model, frozen, asked for its final hidden states on packed documents."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hylo.errors import HyLoError
from hylo.mixers.attention import Attention
from hylo.modeling import HyLoForCausalLM
from hylo.ops.packing import offsets_of
from hylo.upcycle.families import FAMILIES, hybrid_config

# What a model reads of a batch.
READ = ("input_ids", "position_ids", "cu_seqlens")
# What families do to their logits, as their configs name it.
_LOGIT_KEYS = ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier")
# Tokens that tell whether a teacher's head is all that makes its logits.
_TOLD_BY = 8


def as_hybrid(model: PreTrainedModel) -> PreTrainedModel:
    """A model of a supported family as a hybrid that kept all its attention, on the same weights.

    It reads packed documents without a mask over all of them, as the student does. Others are returned as they are.
    """
    config = model.config
    if config.model_type not in FAMILIES or getattr(config, "quantization_config", None):
        return model
    own = hybrid_config(config, ["attention"] * config.num_hidden_layers, {}, config.name_or_path)
    own._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        hybrid = HyLoForCausalLM(own)
    state = {name.replace(".self_attn.", ".mixer."): value for name, value in model.state_dict().items()}
    hybrid.load_state_dict(state, assign=True)
    hybrid.tie_weights()
    # Frequencies are not part of a checkpoint.
    hybrid.model.rotary_embeddings["attention"] = Attention.rotary_embedding(own).to(model.device)
    return hybrid.eval()


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises HyLoError where a teacher's logits are not its final hidden states times its head, as the loss takes them.

    Some families scale or cap them, or add a bias. Told by the probabilities of a few tokens; a hybrid, which any model
    of a supported family is read as, has nothing of the kind.
    """
    if isinstance(model, HyLoForCausalLM):
        return
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if head is None or decoder is model:
        raise HyLoError(
            f"a teacher of the {model.config.model_type!r} family cannot be distilled from: it does not tell its "
            "decoder and its head apart"
        )
    ids = torch.linspace(0, head.weight.shape[0] - 1, _TOLD_BY, device=model.device).long()[None]
    # Of the same pass: experts and atomic sums may round otherwise in another.
    final: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda _, __, output: final.append(output.last_hidden_state))
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    hidden = final[0] if final else decoder(input_ids=ids, use_cache=False).last_hidden_state
    ours = functional.linear(hidden, head.weight)
    fits = ours.shape == logits.shape
    if fits:
        off = (logits.float().log_softmax(-1) - ours.float().log_softmax(-1)).abs().max().item()
        # Both are rounded to the model's dtype: by some units in the last place at most.
        fits = off <= 4 * torch.finfo(hidden.dtype).eps * max(1.0, logits.abs().max().item())
    values = {key: getattr(model.config.get_text_config(), key, None) for key in _LOGIT_KEYS}
    # A cap bends a few small logits by less than bfloat16 rounds them.
    if fits and values["final_logit_softcapping"] is None:
        return
    causes = [f"{key} {value:g}" for key, value in values.items() if value is not None]
    if getattr(head, "bias", None) is not None:
        causes.append("a bias of the head")
    size = f"log-probabilities differ by up to {off:.2g}" if ours.shape == logits.shape else "they differ in shape"
    raise HyLoError(
        f"a teacher of the {model.config.model_type!r} family cannot be distilled from: its logits are not its final "
        f"hidden states times its head ({', '.join(causes) or 'in a way that its config does not name'}); {size}"
    )


@torch.no_grad()
def hidden_states(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """After the final norm, `[1, T, D]`.

    Args:
        batch: `input_ids` and `position_ids` `[1, T]`, and `cu_seqlens`: documents end to end.
    """
    if isinstance(model, HyLoForCausalLM):
        return model.model(**{key: batch[key] for key in READ}, use_cache=False).last_hidden_state
    # One document a row, in rows of similar length; padding comes last, where nothing sees it.
    offsets = offsets_of(batch["cu_seqlens"])
    spans = sorted((span for span in pairwise(offsets) if span[1] > span[0]), key=lambda span: span[0] - span[1])
    ids = batch["input_ids"][0]
    pieces: dict[int, Tensor] = {}
    while spans:
        longest = spans[0][1] - spans[0][0]
        count = max(1, len(ids) // longest)
        rows, spans = spans[:count], spans[count:]
        padded = torch.stack([functional.pad(ids[a:b], (0, longest - (b - a))) for a, b in rows])
        mask = torch.stack([functional.pad(torch.ones_like(ids[a:b]), (0, longest - (b - a))) for a, b in rows])
        hidden = model.get_decoder()(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state
        pieces |= {a: row[: b - a] for (a, b), row in zip(rows, hidden, strict=True)}
    return torch.cat([pieces[begin] for begin in sorted(pieces)])[None]


def beginnings(batch: dict[str, Any], length: int) -> tuple[dict[str, Any], Tensor | None]:
    """The first `length` tokens of each document, packed as before, and where they stood.

    Returns:
        the batch, and a mask `[1, T]` of the tokens in it; None where that is all of them.
    """
    offsets = offsets_of(batch["cu_seqlens"])
    lengths = [end - begin for begin, end in pairwise(offsets)]
    if max(lengths, default=0) <= length:
        return batch, None
    inside = batch["position_ids"] < length
    cut = torch.tensor([0, *(min(size, length) for size in lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    kept = {key: batch[key][inside][None] for key in ("input_ids", "position_ids")}
    return kept | {"cu_seqlens": cut.to(inside.device)}, inside
