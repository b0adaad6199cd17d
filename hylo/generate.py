"""Continuing a prompt."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hylo.data.documents import is_unicode
from hylo.errors import HyLoError


def check_prompt(tokenizer: Any, prompt: str, words: int) -> None:
    """Raises HyLoError on a prompt that is empty, that UTF-8 cannot hold or that has ids of `words` or more."""
    if not prompt.strip():
        raise HyLoError("the prompt is empty")
    if not is_unicode(prompt):
        raise HyLoError("the prompt holds half of a surrogate pair; expected text that UTF-8 can hold")
    _check_ids(max(tokenizer(prompt)["input_ids"], default=0), words)


def _check_ids(largest: int, words: int) -> None:
    if largest >= words:
        raise HyLoError(
            f"the tokenizer gives the prompt id {largest}, and the model has embeddings for {words} ids alone"
        )


@torch.no_grad()
def continue_prompt(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    temperature: float = 0.0,
    streamer: BaseStreamer | None = None,
) -> str:
    """What the model writes after `prompt`, without the prompt.

    Args:
        chat: put the prompt into the tokenizer's chat template, as the user's turn.
        temperature: 0 is greedy.

    Raises:
        HyLoError: on a prompt that is empty, that UTF-8 cannot hold or that has ids beyond the model's embedding, or
            where `chat` is asked of a tokenizer without a template.
    """
    words = model.get_input_embeddings().num_embeddings
    check_prompt(tokenizer, prompt, words)
    if chat:
        if not tokenizer.chat_template:
            raise HyLoError("the tokenizer has no chat template; leave out --chat")
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
    _check_ids(int(inputs["input_ids"].max()), words)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=streamer,
        **sampling,
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
