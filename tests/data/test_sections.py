"""The recipe's section on data."""

from typing import Any

import pytest
from pydantic import ValidationError

from hylo.data.sections import DataSection


def test_strings_stand_for_sources() -> None:
    section = DataSection.model_validate({"train": ["a.txt", {"source": "hf:owner/name", "split": "validation"}]})
    assert [source.source for source in section.train] == ["a.txt", "hf:owner/name"]
    assert [source.split for source in section.train] == ["train", "validation"]
    assert (section.eval, section.loss, section.packing, section.end_of_text) == (None, "all", True, False)
    # What a run keeps of a recipe can be read again.
    assert DataSection.model_validate(section.model_dump()) == section


def test_tokens_may_have_a_weight() -> None:
    section = DataSection.model_validate({"train": [{"source": "tokens:a", "weight": 3}]})
    assert section.train[0].weight == 3


def test_weights_may_be_whole_numbers() -> None:
    section = DataSection.model_validate({"train": [{"source": "a", "weight": 3}, {"source": "b", "weight": "1e-1"}]})
    assert [source.weight for source in section.train] == [3.0, 0.1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": []}, "at least 1 item"),
        ({"train": [5]}, "expected a file, a folder"),
        ({"train": [{"source": "a", "wieght": 1}]}, "Extra inputs"),
        ({"train": [{"source": "a", "weight": 0}]}, "greater than 0"),
        ({"train": [{"source": "a", "weight": True}]}, "True is not a number"),
        ({"train": [{"source": "a", "weight": 1}, "b"]}, "'b' has no weight"),
        ({"train": ["a"], "eval": [{"source": "b", "weight": 1}]}, "weights in train alone"),
        ({"train": [{"source": "a", "split": "test"}]}, "split is for datasets of the hub"),
        ({"train": [{"source": "a", "streaming": True}]}, "streaming is for datasets of the hub"),
        ({"train": [{"source": "a", "text": "x", "messages": "y"}]}, "two columns"),
        ({"train": [{"source": "python:topics", "text": "x"}]}, "python:topics has none"),
        ({"train": [{"source": "tokens:a", "text": "x"}]}, "text is for documents; 'tokens:a' holds tokens"),
        ({"train": [{"source": "tokens:a", "messages": "x"}]}, "messages is for documents"),
        ({"train": [{"source": "tokens:a", "limit_documents": 1}]}, "limit_documents is for documents"),
        ({"train": [{"source": "a", "weight": 1e308}, {"source": "b", "weight": 1e308}]}, "expected smaller ones"),
        ({"train": ["a"], "loss": "user"}, "'all' or 'assistant'"),
        ({"train": ["a"], "eval": []}, "at least 1 item"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataSection.model_validate(values)
