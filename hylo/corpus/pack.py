"""Packs of tokens for a machine without a network: pieces of a corpus, each a fair mixture, small enough to carry.

A pack is a compressed archive of token stores, one folder a group. Unpacked into one folder, several packs make one
corpus: each is a shard of its own. In a recipe, `source: tokens:FOLDER/GROUP`.
"""

import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hylo.corpus.tokens import LONG, StoredSource
from hylo.data.encode import Encoder
from hylo.data.store import ShardInfo
from hylo.data.tokens import describe
from hylo.errors import HyLoError
from hylo.files import write_json
from hylo.progress import bar

# A group whose documents all go into the first pack: they are few, and made for what the others lack.
_FIRST = ("exercises", "exercises-chats")
# Of the first pack, for long documents.
_LONG_SHARE = 0.4


@dataclass(frozen=True)
class _Choice:
    """Documents of a source, by number."""

    source: StoredSource
    documents: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        return int(self.source.store.lengths[self.documents].sum())


def choose(stores: Sequence[StoredSource], pieces: int, tokens: int, seed: int) -> list[list[_Choice]]:
    """Which documents go into which pack.

    The first has all exercises, and of the long documents as many as make two fifths of it; the rest of it, and of the
    others, has every source in proportion to what is left of it.
    """
    rng = np.random.default_rng(seed)
    left = {one.path: rng.permutation(one.store.documents) for one in stores}
    packs = []
    for number in range(pieces):
        taken: dict[str, list[NDArray[np.int64]]] = {one.path: [] for one in stores}
        size = 0
        if number == 0:
            long_left = tokens * _LONG_SHARE
            for one in stores:
                if one.group in _FIRST:
                    size += _take(one, left, taken, len(left[one.path]))
            every = [(one, doc) for one in stores for doc in left[one.path] if one.store.lengths[doc] >= LONG]
            for one, document in (every[at] for at in rng.permutation(len(every))):
                if long_left <= 0:
                    break
                taken[one.path].append(np.array([document]))
                left[one.path] = left[one.path][left[one.path] != document]
                size += int(one.store.lengths[document])
                long_left -= one.store.lengths[document]
        there = sum(int(one.store.lengths[left[one.path]].sum()) for one in stores)
        share = min(1.0, max(0, tokens - size) / there) if there else 0.0
        for one in stores:
            begins = np.cumsum(one.store.lengths[left[one.path]])
            _take(one, left, taken, int(np.searchsorted(begins, share * begins[-1] + 1)) if len(begins) else 0)
        # In the source's own order, in which neighbours resemble each other: that compresses better.
        chosen = [_Choice(one, np.sort(np.concatenate(taken[one.path]))) for one in stores if taken[one.path]]
        packs.append([one for one in chosen if len(one.documents)])
    return packs


def _take(
    one: StoredSource, left: dict[str, NDArray[np.int64]], taken: dict[str, list[NDArray[np.int64]]], count: int
) -> int:
    chosen, left[one.path] = left[one.path][:count], left[one.path][count:]
    taken[one.path].append(chosen)
    return int(one.store.lengths[chosen].sum())


def write_packs(
    stores: Sequence[StoredSource],
    encoder: Encoder,
    target: Path,
    *,
    pieces: int = 2,
    tokens: int = 80_000_000,
    largest_bytes: int = 60_000_000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Writes packs and returns what is in them; each file is at most `largest_bytes`.

    Args:
        target: folder; `tokens-1.tar.xz` and so on, in several parts `tokens-1.tar.xz.000` where it would be larger.
        pieces: how many packs.
        tokens: of each, about.

    Raises:
        HyLoError: where xz is not installed.
    """
    target.mkdir(parents=True, exist_ok=True)
    told = []
    for number, choices in enumerate(choose(stores, pieces, tokens, seed)):
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target) as work:
            groups = _write_shards(choices, encoder, Path(work) / "tokens", number)
            path = _compress(Path(work) / "tokens", Path(work) / f"tokens-{number + 1}.tar")
            files = _split(path, target, largest_bytes)
        told.append({"files": files, "tokens": sum(one["tokens"] for one in groups.values()), "groups": groups})
    write_json(target / "packs.json", told)
    return told


def _write_shards(choices: Sequence[_Choice], encoder: Encoder, folder: Path, number: int) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    total = sum(one.tokens for one in choices)
    with bar(f"pack {number + 1}", total, "tokens") as shown:
        for group in dict.fromkeys(one.source.group for one in choices):
            of = [one for one in choices if one.source.group == group]
            shard = folder / group / f"{number:05}"
            shard.mkdir(parents=True)
            lengths = np.concatenate([one.source.store.lengths[one.documents] for one in of])
            wide = encoder.largest_id >= 2**16
            ids = np.lib.format.open_memmap(
                shard / "ids.npy", "w+", np.uint32 if wide else np.uint16, (int(lengths.sum()),)
            )
            at = 0
            for one in of:
                begins = np.cumsum(one.source.store.lengths) - one.source.store.lengths
                for document in one.documents:
                    size = int(one.source.store.lengths[document])
                    ids[at : at + size] = one.source.store.read(int(begins[document]), size)[0]
                    at += size
                shown.advance(one.tokens, one.source.name)
            ids.flush()
            np.save(shard / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
            info = ShardInfo(len(lengths), at, read=len(lengths), complete=True, start=of[0].source.store.start)
            write_json(shard / "shard.json", asdict(info))
            describe(folder / group, encoder)
            groups[group] = {
                "documents": len(lengths),
                "tokens": at,
                "long_documents": int((lengths >= LONG).sum()),
                "long_tokens": int(lengths[lengths >= LONG].sum()),
                "sources": {one.source.name: one.tokens for one in of},
            }
    return groups


def _compress(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(folder, folder.name)
    # Ids are of two bytes: xz is told where they begin.
    command = ["xz", "-T2", "--lzma2=preset=6,lp=1,lc=3,pb=1", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        raise HyLoError("packs of tokens need xz; install xz-utils") from None
    return path.with_name(f"{path.name}.xz")


def _split(path: Path, target: Path, largest_bytes: int) -> list[dict[str, Any]]:
    """Moves a file to a folder, in parts where it is too large."""
    size = path.stat().st_size
    for old in target.glob(f"{path.name}*"):
        old.unlink()
    if size <= largest_bytes:
        path.replace(target / path.name)
        return [{"name": path.name, "bytes": size}]
    parts = -(-size // largest_bytes)
    each = -(-size // parts)
    files = []
    with path.open("rb") as whole:
        for number in range(parts):
            part = target / f"{path.name}.{number:03}"
            part.write_bytes(whole.read(each))
            files.append({"name": part.name, "bytes": part.stat().st_size})
    return files
