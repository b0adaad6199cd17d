"""Rows that the tests of the data are made of."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tiny import make_tokenizer, sentences

from hylo.data.encode import Encoder
from hylo.data.store import ShardInfo, StoreWriter, TokenStore


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Texts that share no run of 13 words."""
    return [{"text": sentences(1000 + first + i, 6), "number": first + i} for i in range(count)]


def chats(count: int) -> list[dict[str, Any]]:
    """Two turns each, that share no run of 13 words."""
    return [
        {
            "messages": [
                {"role": "user", "content": sentences(3000 + 4 * i, 1).strip()},
                {"role": "assistant", "content": sentences(3001 + 4 * i, 2).strip()},
                {"role": "user", "content": sentences(3002 + 4 * i, 1).strip()},
                {"role": "assistant", "content": sentences(3003 + 4 * i, 1).strip()},
            ]
        }
        for i in range(count)
    ]


def write_store(folder: Path, lengths: Sequence[int], start: Sequence[int] = (), counted: Any = False) -> TokenStore:
    """A store as `hylo.data.store` describes it, in one shard: its tokens are numbered from 2, and told apart so.

    `counted` says which the loss is to predict; True for every third.
    """
    shard = folder / "00000"
    shard.mkdir(parents=True)
    total = sum(lengths)
    np.save(shard / "ids.npy", np.arange(2, 2 + total, dtype=np.uint32))
    np.save(shard / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    if counted is not False:
        np.save(shard / "counted.npy", np.arange(2, 2 + total) % 3 == 0 if counted is True else counted)
    info = ShardInfo(documents=len(lengths), tokens=total, read=len(lengths), complete=True, start=list(start))
    (shard / "shard.json").write_text(json.dumps(asdict(info)))
    return StoreWriter(folder, "numbers", list, lambda document: document, Encoder(make_tokenizer())).open()
