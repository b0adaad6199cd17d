"""The published conversions: for each base its sizes, its mixers' geometries, and which layers are MLA.

Data, one file a base, in `hylo/geometries`.
"""

from functools import cache
from importlib import resources
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedConfig


class BaseSizes(BaseModel):
    """The sizes that a published geometry was made for, named as in config.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


class PublishedBase(BaseModel):
    """One base as it was converted.

    Attributes:
        base: its hub id.
        sizes: what a base must have for the geometry to fit.
        mixers: the sizes of each mixer, by name, as in `HyLoConfig.mixer_geometry`.
        mla_layers: the MLA layers of each published layout, by their number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    base: str
    sizes: BaseSizes
    mixers: dict[str, dict[str, Any]]
    mla_layers: dict[int, list[int]]


@cache
def published_bases() -> tuple[PublishedBase, ...]:
    """All of them, by file name."""
    files = sorted((resources.files("hylo") / "geometries").iterdir(), key=lambda file: file.name)
    return tuple(PublishedBase.model_validate(yaml.safe_load(file.read_text(encoding="utf-8"))) for file in files)


def published_for(config: PreTrainedConfig) -> PublishedBase | None:
    """The published conversion of a base of these sizes, whatever its name, or None."""
    for published in published_bases():
        if all(getattr(config, name, None) == size for name, size in published.sizes.model_dump().items()):
            return published
    return None


def published_mla_layers(num_layers: int, num_mla: int) -> list[int] | None:
    """Where `num_mla` of `num_layers` layers were MLA in a published layout, or None where there is none."""
    for published in published_bases():
        if published.sizes.num_hidden_layers == num_layers and num_mla in published.mla_layers:
            return published.mla_layers[num_mla]
    return None
