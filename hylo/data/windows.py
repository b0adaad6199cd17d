"""Windows of one document each, in memory: for evaluation and calibration.

A window never crosses a document.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hylo.data.batches import PackedWindows
from hylo.data.documents import Document
from hylo.data.encode import Encoder
from hylo.errors import HyLoError


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Token windows of one length, each from one document; the ends of documents are padded.

    Items hold `input_ids` `[T]`, `attention_mask` `[T]` with zeros where padding, and `labels` `[T]`: the input ids,
    -100 where the position does not count in the loss. The first position does not: it has seen one token.
    """

    def __init__(self, windows: list[list[int]], length: int, documents: int = 1) -> None:
        self.windows, self.length, self.documents = windows, length, documents

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.tensor(self.windows[index])
        padding = self.length - len(ids)
        labels = ids.clone()
        labels[0] = -100
        pad = torch.nn.functional.pad
        return {
            # Whatever the padding id, nothing reads it: the mask says so.
            "input_ids": pad(ids, (0, padding)),
            "attention_mask": pad(torch.ones_like(ids), (0, padding)),
            "labels": pad(labels, (0, padding), value=-100),
        }

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(len(window) for window in self.windows)

    @property
    def fill(self) -> float:
        """The share of real tokens among all positions."""
        return self.tokens / (len(self) * self.length)

    def batches(self, batch_size: int) -> list[dict[str, Tensor]]:
        """All windows in order, stacked `batch_size` at a time."""
        items = [self[i] for i in range(len(self))]
        groups = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
        return [{key: torch.stack([item[key] for item in group]) for key in group[0]} for group in groups]


def make_windows(
    documents: Sequence[Document],
    tokenizer: Any,
    length: int,
    *,
    limit_tokens: int | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
) -> Windows:
    """Cuts documents to windows, in an order that `seed` fixes. Each starts as the tokenizer starts a text.

    At most `limit_tokens` of them, padding counted, but one window at least.
    The end of a document is kept where it fills at least half a window.

    Raises HyLoError where no document is that long, or one has an id beyond `vocabulary`, the model's
    `config.vocab_size`.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    limit = None if limit_tokens is None else max(1, limit_tokens // length)
    encoder = Encoder(tokenizer, vocabulary=vocabulary)
    windows: list[list[int]] = []
    used: set[int] = set()
    pieces: dict[int, Iterator[list[int]]] = {}
    # The first window of each document, then the second of each, ...: a small budget sees many documents.
    while True:
        before = len(windows)
        for i in order:
            if i not in pieces:
                pieces[i] = _cut(documents[i], encoder, length)
            if (window := next(pieces[i], None)) is not None:
                windows.append(window)
                used.add(i)
                if len(windows) == limit:
                    return Windows(windows, length, len(used))
        if len(windows) == before:
            break
    if not windows:
        raise HyLoError(f"no document is long enough for a window of {length} tokens; choose a smaller length")
    return Windows(windows, length, len(used))


def _cut(document: Document, encoder: Encoder, length: int) -> Iterator[list[int]]:
    """A document's windows; it is tokenised as far as they are taken."""
    start = encoder.start(document)
    if length <= len(start):
        raise HyLoError(f"a window of {length} tokens; expected more than the {len(start)} that start every text")
    size = length - len(start)
    ids: list[int] = []
    for more in encoder.pieces(document, start):
        ids += more
        whole = len(ids) // size * size
        yield from (start + ids[at : at + size] for at in range(0, whole, size))
        ids = ids[whole:]
    if ids and 2 * (len(start) + len(ids)) >= length:
        yield start + ids


def single_documents(packed: PackedWindows) -> Windows:
    """Windows that were made without packing, as windows in memory."""
    windows = [packed.pieces(index)[0] for index in range(len(packed))]
    return Windows(windows, packed.length, packed.documents)
