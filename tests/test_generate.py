"""Continuing a prompt: what is no prompt."""

from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer

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
