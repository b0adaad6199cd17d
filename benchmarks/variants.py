"""A recipe with some of its keys changed, its tokens shared out anew, and the corpus that it is trained on."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hylo.errors import HyLoError


def changed(values: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """A recipe's values with changes such as `stages.stage2.learning_rate=1e-3`, one after the other.

    An item of a list is named by its `name` or its number; `null` takes a key or an item away. What a recipe does not
    know is for the recipe to refuse.

    Raises HyLoError on any other form, and where there is no such item.
    """
    result = copy.deepcopy(dict(values))
    for change in changes:
        path, equals, text = change.partition("=")
        keys = path.split(".")
        if not (equals and all(keys)):
            raise HyLoError(f"{change!r}; expected KEY=VALUE such as stages.stage2.learning_rate=1e-3")
        section: Any = result
        for key in keys[:-1]:
            place = _place(section, key, change)
            if isinstance(section, dict) and place not in section:
                section[place] = {}
            section = section[place]
        place, value = _place(section, keys[-1], change), _value(change, text)
        if value is not None:
            section[place] = value
        elif isinstance(section, list) or place in section:
            del section[place]
    return result


def _value(change: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise HyLoError(f"{change!r}: {text!r} is no value; expected one as in a recipe") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """A file that holds a mapping. Raises HyLoError on any other."""
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise HyLoError(f"{file}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise HyLoError(f"{file} holds no keys with values")
    return values


def corpus_digest(data: Path) -> str:
    """Of the names and contents of what is trained on and held out, whatever folder it lies in."""
    told = hashlib.sha256()
    for file in sorted(file for part in ("tokens", "held-out") for file in (data / part).rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        told.update(f"{file.relative_to(data)} {content}\n".encode())
    return told.hexdigest()


def _place(section: Any, key: str, change: str) -> Any:
    """The key of a mapping, or the number of a list's item."""
    if isinstance(section, dict):
        return key
    if not isinstance(section, list):
        raise HyLoError(f"{change!r}: {key!r} is a key of no section")
    names = [item.get("name") if isinstance(item, dict) else None for item in section]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(section):
        return int(key)
    told = ", ".join(filter(None, names)) or f"a number below {len(section)}"
    raise HyLoError(f"{change!r}: there is no {key!r}; expected {told}")


def shared_out(
    values: Mapping[str, Any], tokens: int | None = None, layerwise: float | None = None, *, scale: float = 1.0
) -> dict[str, Any]:
    """A recipe's values with `tokens` in all for its stages.

    Args:
        tokens: `scale` times those of the recipe, where None.
        layerwise: the share of the layerwise stages, where there are any; by default, and among stages of one kind
            always, tokens are in proportion to what the recipe gives them.

    Raises HyLoError where there is no stage, or only layerwise ones and a share for others.
    """
    result = copy.deepcopy(dict(values))
    stages = result.get("stages") or []
    try:
        kinds = {kind: [stage for stage in stages if stage["objective"] == kind] for kind in ("layerwise", "kl")}
        sums = {kind: sum(int(stage["tokens"]) for stage in own) for kind, own in kinds.items()}
    except (TypeError, KeyError, ValueError):
        raise HyLoError("stages: expected a list, each with an objective and a number of tokens") from None
    if not kinds["kl"]:
        raise HyLoError("a recipe without a stage of KL has no curve to compare")
    if tokens is None:
        tokens = round(scale * sum(sums.values()))
    share = sums["layerwise"] / sum(sums.values())
    if layerwise is not None and kinds["layerwise"]:
        share = layerwise
    for kind, own in kinds.items():
        for stage in own:
            part = share if kind == "layerwise" else 1 - share
            stage["tokens"] = round(tokens * part * int(stage["tokens"]) / sums[kind])
    return result
