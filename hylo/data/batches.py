"""Packed windows as a dataset, and batches of them as one row of documents end to end.

What the loss is on: a label that is not -100 says that its token is to be predicted. The position before it predicts
it, and counts in KL and cross-entropy: see `targets`. No document's first token has a label, so labels and positions
that count are as many, in a window, in a batch, and over batches; transformers' Trainer divides by that number.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hylo.data.mixture import SourceReport, WindowPlan
from hylo.data.store import TokenStore
from hylo.errors import HyLoError
from hylo.ops.linear_cross_entropy import IGNORED


class PackedWindows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of one length, each of whole or cut documents, and padding at its end.

    Items hold

        input_ids     `[T]`, zero where padding
        labels        `[T]`, the ids of tokens that are to be predicted from those before them; else -100
        position_ids  `[T]`, from 0 in each document
        lengths       `[N]` int32, tokens of each document in the window; padding is one of its own

    An item depends on its number alone: any order, any worker and any rank gives the same.

    Args:
        stores: the sources' tokens, in the plan's order.
        plan: which of their tokens make which window.
        vocabulary: the model's `config.vocab_size`; None for no check of ids.

    Items raise HyLoError on an id beyond the vocabulary.
    """

    def __init__(self, stores: Sequence[TokenStore], plan: WindowPlan, vocabulary: int | None = None) -> None:
        self.stores, self._plan, self._vocabulary = list(stores), plan, vocabulary
        self._starts = [np.array(store.start, np.int64) for store in stores]

    def __len__(self) -> int:
        return len(self._plan.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        plan, length = self._plan, self.length
        ids = np.zeros(length, np.int64)
        labels = np.full(length, IGNORED, np.int64)
        positions = np.empty(length, np.int64)
        lengths, at = [], 0
        for piece in range(plan.offsets[index], plan.offsets[index + 1]):
            source = plan.source[piece]
            start = self._starts[source]
            tokens, counted = self._read(piece)
            text, end = at + len(start), at + len(start) + len(tokens)
            ids[at:text] = start
            ids[text:end] = tokens
            labels[text:end] = tokens if counted is None else np.where(counted, tokens, IGNORED)
            labels[at] = IGNORED
            positions[at:end] = np.arange(end - at)
            lengths.append(end - at)
            at = end
        if at < length:
            positions[at:] = np.arange(length - at)
            lengths.append(length - at)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
            "lengths": torch.tensor(lengths, dtype=torch.int32),
        }

    def _read(self, piece: int) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """As `TokenStore.read`, without what starts the piece."""
        plan = self._plan
        source = plan.source[piece]
        tokens, counted = self.stores[source].read(int(plan.begin[piece]), int(plan.size[piece]))
        largest = max(int(tokens.max(initial=0)), int(self._starts[source].max(initial=0)))
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise HyLoError(
                f"{plan.sources[source].source} holds token id {largest}, and the model's config.vocab_size is "
                f"{self._vocabulary}; expected ids below that"
            )
        return tokens, counted

    def check(self) -> None:
        """Reads every piece. Raises HyLoError on an id beyond the vocabulary."""
        for piece in range(len(self._plan.size)):
            self._read(piece)

    @property
    def length(self) -> int:
        """Tokens a window."""
        return self._plan.length

    @property
    def sources(self) -> list[SourceReport]:
        """What the windows are made of."""
        return self._plan.sources

    @property
    def truncated(self) -> int:
        """Documents that are longer than a window, and so were cut."""
        return self._plan.truncated

    @cached_property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(source.used_tokens for source in self.sources)

    @property
    def fill(self) -> float:
        """The share of real tokens among all positions."""
        return self.tokens / (len(self) * self.length)

    @cached_property
    def attended(self) -> float:
        """Length of the documents in windows as their tokens see it, on average: of two documents the longer has more.

        A token sees half of it, and itself, in causal attention without a window.
        """
        plan = self._plan
        sizes = plan.size.astype(np.float64) + np.array([len(start) for start in self._starts])[plan.source]
        return float((sizes**2).sum() / sizes.sum())

    @cached_property
    def documents(self) -> int:
        """How many different documents there are in the windows."""
        source, document = self._plan.source, self._plan.document
        return sum(len(np.unique(document[source == i])) for i in range(len(self.stores)))

    def pieces(self, index: int) -> list[list[int]]:
        """The ids of each document's piece in a window."""
        item = self[index]
        parts = torch.split(item["input_ids"], item["lengths"].tolist())
        count = int(self._plan.offsets[index + 1] - self._plan.offsets[index])
        return [part.tolist() for part in parts[:count]]


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """B windows as one row.

    Returns:
        `input_ids`, `labels` and `position_ids`, `[1, B * T]`; `cu_seqlens`, `[N + 1]` int32, where each document
        begins, and at the end B * T; `max_seqlen`, tokens of the longest document.
    """
    lengths = torch.cat([item["lengths"] for item in items])
    ends = lengths.cumsum(0, dtype=torch.int32)
    batch: dict[str, Any] = {
        key: torch.cat([item[key] for item in items])[None] for key in ("input_ids", "labels", "position_ids")
    }
    return batch | {"cu_seqlens": torch.nn.functional.pad(ends, (1, 0)), "max_seqlen": int(lengths.max())}


def targets(labels: Tensor) -> Tensor:
    """The token that each position is to predict, `[B, T]`; -100 where the position does not count in the loss.

    As many as there are labels: no first token of a row or a document has one, so each has a position before it.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
