"""Token stores that were made elsewhere: what `tokens:FOLDER` in a recipe stands for.

A folder, or folders below it, hold what `hylo.data.store` describes, and beside the shards `store.json`, which says how
the tokens were made. They are taken as they are: documents are neither tokenised nor kept apart from evaluation text.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hylo.data.encode import Encoder
from hylo.data.folders import files_below
from hylo.data.store import TokenStore, find_shards
from hylo.errors import HyLoError
from hylo.files import expand_user, read_json, write_json

PREFIX = "tokens:"
_FILE = "store.json"


def describe(folder: Path, encoder: Encoder) -> None:
    """Writes beside the shards of a store how its tokens were made."""
    write_json(folder / _FILE, encoder.settings())


@dataclass(frozen=True)
class TokenFolder:
    """A source of tokens.

    Attributes:
        source: its name in the recipe, `tokens:FOLDER`.
    """

    source: str

    def stores(self) -> list[Path]:
        """The folders that hold shards, through links too. Raises HyLoError where there is none."""
        root = expand_user(self.source.removeprefix(PREFIX))
        found = sorted(path.parent for path in files_below(root) if path.name == _FILE)
        if not found:
            raise HyLoError(f"{root} holds no tokens; expected a folder with {_FILE} and shards, at any depth")
        return found

    def open(self, encoder: Encoder) -> TokenStore:
        """All of its documents.

        Raises HyLoError where there is none, a shard is damaged, the tokens are not of this tokenizer and recipe, or
        documents of two stores start differently.
        """
        shards = []
        starts: dict[tuple[int, ...], Path] = {}
        for folder in self.stores():
            _check(folder, read_json(folder / _FILE), encoder.settings())
            found = find_shards(folder)
            shards += found
            starts |= {tuple(shard.info.start or ()): folder for shard in found if shard.info.documents}
        if not shards:
            raise HyLoError(f"{self.source} holds no shards of tokens")
        if len(starts) > 1:
            one, other = list(starts.items())[:2]
            raise HyLoError(
                f"documents start with tokens {list(one[0])} in {one[1]} and with {list(other[0])} in {other[1]}; "
                "name these as two sources"
            )
        return TokenStore(shards)

    def digest(self) -> str:
        """A hash over what the stores say of themselves, and the sizes of their files."""
        digest = hashlib.sha256()
        for folder in self.stores():
            for file in sorted(files_below(folder)):
                told_by = file.read_bytes() if file.suffix == ".json" else str(file.stat().st_size).encode()
                digest.update(f"{file.relative_to(folder)}\0".encode() + hashlib.sha256(told_by).digest())
        return digest.hexdigest()


def _check(folder: Path, made: Any, wanted: Mapping[str, Any]) -> None:
    if not isinstance(made, dict):
        raise HyLoError(
            f"{folder / _FILE} does not say how its tokens were made; expected an object with {', '.join(wanted)}"
        )
    for key, value in wanted.items():
        if made.get(key) != value:
            of = "the base's tokenizer" if key in ("vocabulary", "start") else f"{key}: {json.dumps(value)}"
            raise HyLoError(f"the tokens in {folder} were made otherwise; expected tokens of {of}")
