"""Mixtures: shares, epochs, order."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_examples import write_store

from hylo.data.mixture import Part, WindowPlan, plan_windows
from hylo.errors import HyLoError


def random_lengths(count: int, seed: int, mean: float = 3.0) -> list[int]:
    return np.exp(np.random.default_rng(seed).normal(mean, 0.8, count)).astype(int).clip(1).tolist()


@pytest.fixture
def parts(tmp_path: Path) -> list[Part]:
    """A large source and a small one."""
    return [
        Part("large", write_store(tmp_path / "large", random_lengths(3000, 0))),
        Part("small", write_store(tmp_path / "small", random_lengths(60, 1))),
    ]


def weighted(parts: list[Part], *weights: float) -> list[Part]:
    return [Part(part.name, part.store, weight) for part, weight in zip(parts, weights, strict=True)]


def times_taken(plan: WindowPlan, source: int, until: int | None = None) -> Counter[int]:
    """How often each token of a source is in the windows before the `until`-th."""
    end = plan.offsets[-1 if until is None else until]
    counts: Counter[int] = Counter()
    for piece in range(end):
        if plan.source[piece] == source:
            counts.update(range(plan.begin[piece], plan.begin[piece] + plan.size[piece]))
    return counts


def window_sizes(plan: WindowPlan) -> list[int]:
    return [int(plan.size[a:b].sum()) for a, b in zip(plan.offsets[:-1], plan.offsets[1:], strict=True)]


def same(a: WindowPlan, b: WindowPlan) -> bool:
    return all(np.array_equal(getattr(a, key), getattr(b, key)) for key in ("source", "begin", "size", "offsets"))


def test_everything_once(parts: list[Part]) -> None:
    plan = plan_windows(parts, 64, tokens=None, seed=0)
    for i, part in enumerate(parts):
        assert times_taken(plan, i) == Counter(range(part.store.tokens))
    assert max(window_sizes(plan)) == 64
    assert [report.epochs for report in plan.sources] == [1.0, 1.0]
    assert [report.used_tokens for report in plan.sources] == [part.store.tokens for part in parts]
    assert plan.truncated == sum(int((part.store.lengths > 64).sum()) for part in parts)


@pytest.mark.parametrize("tokens", [64, 1_000, 6_400, 200_001])
def test_as_many_windows_as_were_asked_for(parts: list[Part], tokens: int) -> None:
    plan = plan_windows(parts, 64, tokens=tokens, seed=0)
    sizes = window_sizes(plan)
    assert len(sizes) == -(-tokens // 64)
    assert min(sizes) > 0
    assert sum(report.used_tokens for report in plan.sources) == sum(sizes)


def test_without_weights_sources_count_by_their_size(parts: list[Part]) -> None:
    plan = plan_windows(parts, 64, tokens=40_000, seed=0)
    large, small = plan.sources
    assert large.epochs == pytest.approx(small.epochs, rel=0.15)
    assert large.epochs < 1


def test_weights_are_shares_of_tokens(parts: list[Part]) -> None:
    plan = plan_windows(weighted(parts, 3, 1), 64, tokens=40_000, seed=0)
    large, small = plan.sources
    assert small.used_tokens / (small.used_tokens + large.used_tokens) == pytest.approx(0.25, abs=0.01)
    # The small one is gone over again and again, each time whole before it is begun anew.
    epochs = small.used_tokens / small.tokens
    assert epochs > 6
    assert small.epochs == pytest.approx(epochs, abs=1e-3)
    times = times_taken(plan, 1)
    assert len(times) == small.tokens
    # But for the windows that were one too many.
    assert set(times.values()) <= {int(epochs) - 1, int(epochs), int(epochs) + 1}
    assert max(times_taken(plan, 0).values()) == 1


def test_the_mixture_is_even_throughout(parts: list[Part]) -> None:
    plan = plan_windows(weighted(parts, 1, 1), 64, tokens=64_000, seed=0)
    for first in range(0, 1000, 200):
        pieces = slice(plan.offsets[first], plan.offsets[first + 200])
        sizes, small = plan.size[pieces], plan.source[pieces] == 1
        assert sizes[small].sum() / sizes.sum() == pytest.approx(0.5, abs=0.08)


def test_each_epoch_is_whole_before_the_next(parts: list[Part]) -> None:
    [part] = parts[1:]
    once = plan_windows([part], 64, tokens=None, seed=0)
    windows = len(once.offsets) - 1
    thrice = plan_windows([part], 64, tokens=3 * part.store.tokens, seed=0)
    for number in (1, 2):
        times = times_taken(thrice, 0, number * windows)
        assert len(times) == part.store.tokens
        assert set(times.values()) == {number}
    # In another order, and other documents together.
    order = [thrice.begin[thrice.offsets[i * windows] : thrice.offsets[(i + 1) * windows]].tolist() for i in range(2)]
    assert order[0] != order[1]
    together = [frozenset(thrice.begin[thrice.offsets[i] : thrice.offsets[i + 1]]) for i in range(2 * windows)]
    first, second = (
        {pieces for pieces in half if len(pieces) > 1} for half in (together[:windows], together[windows:])
    )
    assert len(first & second) < len(first) / 2


def test_the_seed_fixes_everything(parts: list[Part]) -> None:
    plans = [plan_windows(weighted(parts, 2, 1), 64, tokens=30_000, seed=seed) for seed in (1, 1, 2)]
    assert same(plans[0], plans[1])
    assert not same(plans[0], plans[2])
    assert plans[0].sources[0].documents == plans[2].sources[0].documents


def test_what_starts_a_text_starts_every_piece(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [3, 20, 7], start=[0, 1])
    plan = plan_windows([Part("a", store)], 10, tokens=None, seed=0)
    # Eight of each ten are text.
    assert times_taken(plan, 0) == Counter(range(30))
    assert sorted(plan.size.tolist()) == [3, 4, 7, 8, 8]
    assert plan.sources[0].used_tokens == 30 + 2 * 5
    with pytest.raises(HyLoError, match="a window of 2 tokens; expected more than the 2 that start every text"):
        plan_windows([Part("a", store)], 2, tokens=None, seed=0)


def test_without_packing(parts: list[Part]) -> None:
    """One piece a window, and ends of less than half a window are left out."""
    plan = plan_windows(parts, 64, tokens=None, seed=0, packing=False)
    assert np.array_equal(plan.offsets, np.arange(len(plan.size) + 1))
    assert plan.size.min() == 32
    lengths = np.concatenate([part.store.lengths for part in parts])
    assert len(plan.size) == int((lengths // 64).sum() + (lengths % 64 >= 32).sum())
    with pytest.raises(HyLoError, match="no document is long enough for a window of 4096 tokens"):
        plan_windows(parts, 4096, tokens=None, seed=0, packing=False)


def test_a_source_without_text(parts: list[Part], tmp_path: Path) -> None:
    empty = Part("empty", write_store(tmp_path / "empty", []))
    plan = plan_windows([*parts, empty], 64, tokens=5_000, seed=0)
    assert (plan.sources[2].used_tokens, plan.sources[2].epochs) == (0, 0.0)
    with pytest.raises(HyLoError, match="empty has a weight of 2 and no text that fits"):
        plan_windows(weighted([*parts, empty], 1, 1, 2), 64, tokens=5_000, seed=0)


@pytest.mark.parametrize("weights", [(1e308, 1e308), (1e305, 1)])
def test_weights_beyond_what_numbers_hold(parts: list[Part], weights: tuple[float, float]) -> None:
    with pytest.raises(HyLoError, match="too much for 5000 tokens; choose smaller ones"):
        plan_windows(weighted(parts, *weights), 64, tokens=5_000, seed=0)


def test_reports_say_what_was_left_out(tmp_path: Path) -> None:
    plan = plan_windows([Part("a", write_store(tmp_path / "a", [5, 6]))], 8, tokens=None, seed=0)
    report: dict[str, Any] = vars(plan.sources[0])
    assert report == {
        "source": "a",
        "documents": 2,
        "tokens": 11,
        "used_tokens": 11,
        "epochs": 1.0,
        "held_out": 0,
        "unusable": 0,
        "unusable_tokens": 0,
    }


@pytest.mark.parametrize("start", [[], [0]])
def test_pieces_without_a_token_to_predict_are_left_out(tmp_path: Path, start: list[int]) -> None:
    """A window of them alone would have no loss. The first token of a piece is predicted by what starts it."""
    answered = np.zeros(40, bool)
    # Of pieces of eight: the first token, the last, and the second of the document after it.
    answered[[8, 31, 33]] = True
    store = write_store(tmp_path / "a", [32, 8], start=start, counted=answered)
    plan = plan_windows([Part("a", store)], 8 + len(start), tokens=None, seed=0)
    expected = [8, 24, 32] if start else [24, 32]
    assert sorted(plan.begin.tolist()) == expected
    assert plan.sources[0].unusable_tokens == 40 - 8 * len(expected)
    assert plan.sources[0].epochs == 1.0
