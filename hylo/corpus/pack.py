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

# Of a pack, for long documents at most.
_LONG_SHARE = 0.5
# Of the first pack, for exercises at most.
_EXERCISES_SHARE = 0.15
# How much more of what is scarce a pack takes than of what is plenty.
_WEIGHTS = {"prose": 4.0, "manuals": 2.0, "api": 1.0, "code": 0.5}


@dataclass(frozen=True)
class _Choice:
    """Documents of a source, by number."""

    source: StoredSource
    documents: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        return int(self.source.store.lengths[self.documents].sum())


def choose(stores: Sequence[StoredSource], pieces: int, tokens: int, seed: int) -> list[list[_Choice]]:
    """Which documents go into which pack; none goes into two.

    A pack takes long documents for half of it at most and exercises for 15 % at most, as far as there are any left, and
    fills the rest from every source: by its size, and by how scarce text of its group is.
    """
    rng = np.random.default_rng(seed)
    left = {one.path: rng.permutation(one.store.documents) for one in stores}
    packs = []
    for _ in range(pieces):
        taken = {one.path: [np.empty(0, np.int64)] for one in stores}
        size = _take_long(stores, left, taken, tokens * _LONG_SHARE, rng)
        exercises = [one for one in stores if one.group not in _WEIGHTS]
        size += _take_share(exercises, left, taken, _share(exercises, left, tokens * _EXERCISES_SHARE))
        others = [one for one in stores if one.group in _WEIGHTS]
        _take_share(others, left, taken, _share(others, left, tokens - size))
        # In the source's own order, in which neighbours resemble each other: that compresses better.
        chosen = [_Choice(one, np.sort(np.concatenate(taken[one.path]))) for one in stores]
        packs.append([one for one in chosen if len(one.documents)])
    return packs


Numbers = dict[str, NDArray[np.int64]]
Taken = dict[str, list[NDArray[np.int64]]]


def _take_long(
    stores: Sequence[StoredSource], left: Numbers, taken: Taken, tokens: float, rng: np.random.Generator
) -> int:
    """Long documents of any source, until they have so many tokens; returns how many."""
    every = [(one, document) for one in stores for document in left[one.path] if one.store.lengths[document] >= LONG]
    size = 0
    for one, document in (every[at] for at in rng.permutation(len(every))):
        length = int(one.store.lengths[document])
        if size + length > tokens:
            continue
        taken[one.path].append(np.array([document]))
        left[one.path] = left[one.path][left[one.path] != document]
        size += length
    return size


def _share(stores: Sequence[StoredSource], left: Numbers, tokens: float) -> dict[str, float]:
    """Of each source, the share of what is left of it that makes so many tokens of all together."""
    sizes = np.array([one.store.lengths[left[one.path]].sum() for one in stores], np.float64)
    weights = np.array([_WEIGHTS.get(one.group, 1.0) for one in stores])
    low, high = 0.0, 1.0 / weights.min() if len(weights) else 0.0
    for _ in range(50):
        middle = (low + high) / 2
        enough = (sizes * np.minimum(1.0, middle * weights)).sum() > tokens
        low, high = (low, middle) if enough else (middle, high)
    return {one.path: min(1.0, low * weight) for one, weight in zip(stores, weights, strict=True)}


def _take_share(stores: Sequence[StoredSource], left: Numbers, taken: Taken, shares: dict[str, float]) -> int:
    """The first documents of what is left of each source; returns how many tokens they have."""
    size = 0
    for one in stores:
        lengths = one.store.lengths[left[one.path]]
        # Those of which the middle lies in the share: neither more nor less on the whole.
        count = int((np.cumsum(lengths) - lengths / 2 < shares[one.path] * lengths.sum()).sum())
        taken[one.path].append(left[one.path][:count])
        left[one.path] = left[one.path][count:]
        size += int(lengths[:count].sum())
    return size


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


def pack_held_out(output: Path, target: Path) -> dict[str, Any]:
    """Packs a corpus's held-out text, and the exercises on it, as text; returns the file's name and size."""
    path = target / "held-out.tar.xz"
    with tarfile.open(path, "w:xz") as archive:
        for folder in sorted(output.glob("held-out*")):
            archive.add(folder, folder.name)
    return {"name": path.name, "bytes": path.stat().st_size}
