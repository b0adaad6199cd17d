"""The corpus in tokens: each source a store that `tokens:` reads, and how many documents and tokens it has."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from hylo.corpus.rows import SUFFIX
from hylo.data.documents import Document
from hylo.data.encode import Encoder
from hylo.data.sources import open_source
from hylo.data.store import StoreWriter, TokenStore
from hylo.data.tokens import TokenFolder, describe
from hylo.progress import bar
from hylo.upcycle.bases import load_tokenizer, resolve_base

# Of documents, in tokens: from a page to a book.
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
LONG = 65536


@dataclass(frozen=True)
class StoredSource:
    """A source's tokens."""

    group: str
    name: str
    store: TokenStore

    @property
    def path(self) -> str:
        return f"{self.group}/{self.name}"


def base_tokenizer(reference: str) -> Any:
    """The tokenizer of a base, also of a GGUF file. Raises HyLoError where there is none."""
    path = resolve_base(reference)
    if path.suffix != ".gguf":
        return load_tokenizer(path)
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def tokenise(output: Path, encoder: Encoder, place: str = "train") -> list[StoredSource]:
    """Tokenises each file of `output/place` into `output/tokens/place`, unless it was done before.

    Raises HyLoError where a file cannot be read.
    """
    files = sorted((output / place).rglob(f"*{SUFFIX}"))
    stores = []
    with bar(f"tokenise {place}", sum(file.stat().st_size for file in files), "bytes") as shown:
        for file in files:
            stores.append(tokenise_file(output, file, encoder))
            shown.advance(file.stat().st_size, stores[-1].name)
    return [one for one in stores if one.store.documents]


def tokenise_file(output: Path, file: Path, encoder: Encoder) -> StoredSource:
    """Tokenises a file of a corpus, unless it was done before. Raises HyLoError where it cannot be read."""
    place, *groups = file.parent.relative_to(output).parts
    group, name = "/".join(groups), file.name.removesuffix(SUFFIX)
    folder = output / "tokens" / place / group / name
    store = StoreWriter(folder, name, open_source(str(file)).documents, _whole, encoder).open()
    describe(folder, encoder)
    return StoredSource(group, name, store)


def _whole(document: Document) -> Document:
    return document


def stored(output: Path, encoder: Encoder, place: str = "train") -> list[StoredSource]:
    """What `tokenise` made. Raises HyLoError where there is nothing, or other tokens."""
    root = output / "tokens" / place
    folders = TokenFolder(f"tokens:{root}").stores()
    return [
        StoredSource(str(folder.parent.relative_to(root)), folder.name, TokenFolder(f"tokens:{folder}").open(encoder))
        for folder in folders
    ]


def histogram(lengths: NDArray[np.int64]) -> list[dict[str, int]]:
    """Documents and tokens by length: each row counts those from `from_tokens` up to the next row's."""
    edges = np.array([0, *LENGTHS])
    place = np.searchsorted(edges, lengths, side="right") - 1
    documents = np.bincount(place, minlength=len(edges))
    tokens = np.bincount(place, weights=lengths, minlength=len(edges)).astype(np.int64)
    return [
        {"from_tokens": int(edge), "documents": int(count), "tokens": int(size)}
        for edge, count, size in zip(edges, documents, tokens, strict=True)
    ]


def totals(stores: list[StoredSource]) -> dict[str, Any]:
    """Tokens and documents of all, by group and by length."""
    lengths = np.concatenate([np.empty(0, np.int64), *(one.store.lengths for one in stores)])
    groups: dict[str, Mapping[str, int]] = {}
    for group in dict.fromkeys(one.group for one in stores):
        of = [one.store for one in stores if one.group == group]
        groups[group] = {"documents": sum(one.documents for one in of), "tokens": sum(one.tokens for one in of)}
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "long_documents": int((lengths >= LONG).sum()),
        "long_tokens": int(lengths[lengths >= LONG].sum()),
        "groups": groups,
        "lengths": histogram(lengths),
        "sources": {one.path: {"documents": one.store.documents, "tokens": one.store.tokens} for one in stores},
    }
