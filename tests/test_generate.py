"""Continuing a prompt: what is refused."""

from pathlib import Path
from typing import Any

import pytest
from tiny import VOCABULARY, make_tokenizer

from hylo.errors import HyLoError
from hylo.generate import continue_prompt
from hylo.upcycle.bases import load_model


@pytest.fixture
def model(base_folder: Path) -> Any:
    return load_model(base_folder)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "the prompt is empty"), ("bado \ud83d", "half of a surrogate pair; expected text that UTF-8 can hold")],
)
def test_what_is_no_prompt(model: Any, prompt: str, message: str) -> None:
    with pytest.raises(HyLoError, match=message):
        continue_prompt(model, make_tokenizer(), prompt, max_new_tokens=1)


def test_a_token_that_the_model_has_no_embedding_for(model: Any) -> None:
    tokenizer = make_tokenizer()
    while len(tokenizer) <= VOCABULARY:
        tokenizer.add_tokens([f"<more{len(tokenizer)}>"])
    assert isinstance(continue_prompt(model, tokenizer, "bado", max_new_tokens=1), str)
    with pytest.raises(HyLoError, match="gives the prompt id 300, and the model has embeddings for 300 ids alone"):
        continue_prompt(model, tokenizer, f"bado <more{VOCABULARY}>", max_new_tokens=1)
