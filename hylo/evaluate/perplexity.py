"""Perplexity by position: how well a model predicts the first 1,024 tokens of a long text, the next 1,024, and so on.

Where a model's context breaks, the curve turns up.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hylo.data.encode import first_ids, text_pieces
from hylo.errors import HyLoError
from hylo.evaluate.engine import Engine
from hylo.modeling import PREFILL_CHUNK
from hylo.progress import bar

POSITIONS = 1024


@dataclass(frozen=True)
class PositionScore:
    """Over the tokens of one stretch of all windows.

    Attributes:
        start: of the stretch, in tokens from the window's first.
        tokens: how many predictions were scored.
        nats: their mean cross-entropy.
        stderr: of that mean, over windows; None for one window.
    """

    start: int
    tokens: int
    nats: float
    stderr: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats, 700.0))


@dataclass(frozen=True)
class Perplexity:
    """Over all tokens, and by position.

    Attributes:
        nats: mean cross-entropy of all predictions.
        stderr: of that mean, over windows; None for one window.
    """

    nats: float
    stderr: float | None
    positions: list[PositionScore]

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats, 700.0))


def cut_windows(texts: Iterable[str], tokenizer: Any, length: int, count: int) -> list[list[int]]:
    """At most `count` windows of exactly `length` tokens from the texts laid end to end, each begun as a text begins.

    Texts are taken, and tokenised, as far as the windows reach. Raises HyLoError where they are shorter than one.
    """
    begin = first_ids(tokenizer)
    piece = length - len(begin)
    if piece < 1:
        raise HyLoError(f"a window of {length} tokens; expected more than the {len(begin)} that start every text")
    ids: list[int] = []
    for text in _laid_end_to_end(texts):
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count * piece:
            break
    windows = [begin + ids[at : at + piece] for at in range(0, len(ids) - piece + 1, piece)][:count]
    if not windows:
        raise HyLoError(f"the text has {len(ids):,} tokens, fewer than a window of {length:,}; give more text")
    return windows


def _laid_end_to_end(texts: Iterable[str]) -> Iterator[str]:
    for i, text in enumerate(texts):
        yield from text_pieces(f"\n\n{text}" if i else text)


@torch.no_grad()
def perplexity_by_position(engine: Engine, windows: Sequence[Sequence[int]]) -> Perplexity:
    """Mean cross-entropy of each stretch of 1,024 tokens; windows are read in chunks, through the cache.

    Raises HyLoError where a value is not finite, or an id is beyond the model's embeddings.
    """
    engine.check_ids(windows)
    length = len(windows[0])
    sums = torch.zeros(len(windows), -(-length // POSITIONS), dtype=torch.float64)
    with bar("perplexity", len(windows) * length, "tokens") as shown:
        for row, window in enumerate(windows):
            for start, values in _chunk_scores(engine, window):
                # The token at position p is predicted by the one before it.
                places = (torch.arange(start + 1, start + 1 + len(values))) // POSITIONS
                sums[row].index_add_(0, places, -values.double())
                shown.advance(len(values))
    counts = torch.tensor(
        [min(length, start + POSITIONS) - max(start, 1) for start in range(0, length, POSITIONS)], dtype=torch.float64
    )
    means = sums / counts
    if not bool(means.isfinite().all()):
        raise HyLoError("the perplexities are not finite")
    positions = [
        PositionScore(start, int(counts[i]) * len(windows), float(means[:, i].mean()), _stderr(means[:, i]))
        for i, start in enumerate(range(0, length, POSITIONS))
    ]
    whole = sums.sum(1) / counts.sum()
    return Perplexity(float(whole.mean()), _stderr(whole), positions)


def _stderr(of_windows: Tensor) -> float | None:
    return float(of_windows.std() / len(of_windows) ** 0.5) if len(of_windows) > 1 else None


def _chunk_scores(engine: Engine, window: Sequence[int]) -> Any:
    """Of each chunk: where it starts, and the log-probability of the token after each of its tokens."""
    ids = torch.tensor(window, device=engine.device)[None]
    cache = None
    for start in range(0, len(window) - 1, PREFILL_CHUNK):
        piece = ids[:, start : min(start + PREFILL_CHUNK, len(window) - 1)]
        output = engine.model.get_decoder()(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        wanted = ids[0, start + 1 : start + 1 + piece.shape[1]]
        yield start, engine.token_scores(output.last_hidden_state[0], wanted)[0]
