"""The part of a recipe that says what to train and to evaluate on."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    return value


Positive = Annotated[int, Field(gt=0)]
# Not strict: YAML reads 1e-3 as text.
Number = Annotated[float, Field(strict=False, allow_inf_nan=False), BeforeValidator(_not_bool)]


class Section(BaseModel):
    """What the sections of a recipe share: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# Keys of a dataset of the hub.
_HUB_KEYS = ("config", "split", "revision", "streaming")
# Keys of documents that are yet to be made tokens.
_DOCUMENT_KEYS = ("text", "messages", "limit_documents")


class SourceSection(Section):
    """One source of documents.

    Attributes:
        source: `python:topics`, `python:stdlib`, a file, a folder or a pattern such as `data/*.parquet` (text files:
            .txt, .md, .rst, .py; tables: .jsonl, .ndjson and .json, also as .gz or .zst, .parquet), the folder of a
            dataset that `save_to_disk` wrote, `hf:NAME` or `hf:OWNER/NAME/CONFIG` for a dataset of the Hugging Face
            hub, or `tokens:FOLDER` for token stores.
        config, split, revision: of a dataset of the hub; `train` is the split by default.
        streaming: read a dataset of the hub row by row over the network, rather than downloading it first. Files are
            always read row by row.
        text: the column of a table that holds texts; by default `text` or `content`.
        messages: the column of a table that holds chats; by default `messages` or `conversations`.
        weight: share of the tokens, relative to the weights of the other sources. Give all sources one, or none.
        limit_documents: how many documents or rows are read at most, from the source's beginning.
    """

    source: str = Field(min_length=1)
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    text: str | None = None
    messages: str | None = None
    weight: Number | None = Field(default=None, gt=0)
    limit_documents: Positive | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        given = [key for key in _HUB_KEYS if getattr(self, key) != type(self).model_fields[key].default]
        if given and not self.source.startswith("hf:"):
            raise ValueError(f"{given[0]} is for datasets of the hub; {self.source!r} does not begin with hf:")
        if self.source.startswith("tokens:"):
            for key in _DOCUMENT_KEYS:
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is for documents; {self.source!r} holds tokens and takes a weight alone")
        if self.text is not None and self.messages is not None:
            raise ValueError("text and messages are two columns; expected one of them")
        if self.source.startswith("python:") and (self.text or self.messages):
            raise ValueError(f"text and messages name columns of a table; {self.source} has none")
        return self


def _as_section(value: Any) -> Any:
    if isinstance(value, str):
        return {"source": value}
    if not isinstance(value, dict | SourceSection):
        raise ValueError(f"{value!r}; expected a file, a folder, a dataset, or keys such as 'source: ...'")
    return value


# A string stands for a source with nothing else said.
Source = Annotated[SourceSection, BeforeValidator(_as_section)]


class DataSection(Section):
    """What to train and to evaluate on.

    Attributes:
        train: sources, each a string or a `SourceSection`.
        eval: the same, for evaluation; by default, documents held out from `train`.
        holdout: share of the documents of `train` that is held out where `eval` is not given.
        loss: on `all` tokens, or in chats on those that the `assistant` wrote alone. Plain text counts whole.
        packing: several documents a window, none seeing another; otherwise one, and ends shorter than half a window
            are left out.
        end_of_text: put the tokenizer's end-of-sequence token after each plain text.
    """

    train: list[Source] = Field(min_length=1)
    eval: list[Source] | None = Field(default=None, min_length=1)
    holdout: Number = Field(default=0.1, gt=0, lt=1)
    loss: Literal["all", "assistant"] = "all"
    packing: bool = True
    end_of_text: bool = False

    @model_validator(mode="after")
    def _weights(self) -> Self:
        weighted = [source.weight is not None for source in self.train]
        if any(weighted) and not all(weighted):
            missing = self.train[weighted.index(False)].source
            raise ValueError(f"train: {missing!r} has no weight and others have; expected one for each source, or none")
        if not math.isfinite(sum(source.weight or 0.0 for source in self.train)):
            raise ValueError("train: the weights add up to more than a number can hold; expected smaller ones")
        for source in self.eval or []:
            if source.weight is not None:
                raise ValueError(f"eval: {source.source!r} has a weight; expected weights in train alone")
        return self
