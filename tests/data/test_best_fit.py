"""Best-fit packing, against its definition and against the best there is."""

import itertools
import time
from functools import cache

import numpy as np
import pytest

from hylo.data.packing import best_fit, cut


def room_by_definition(sizes: list[int], capacity: int) -> list[int]:
    """What is left in each window, when each piece looks at all windows."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


def fewest_windows(sizes: tuple[int, ...], capacity: int) -> int:
    """By trying everything: over sets of placed pieces, the fewest windows and the least in the last."""

    @cache
    def best(placed: int) -> tuple[int, int]:
        if not placed:
            return 0, capacity
        options = []
        for i, size in enumerate(sizes):
            if placed >> i & 1:
                windows, used = best(placed & ~(1 << i))
                options.append((windows, used + size) if used + size <= capacity else (windows + 1, size))
        return min(options)

    return best((1 << len(sizes)) - 1)[0]


def random_sizes(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    capacity = int(generator.integers(1, 200))
    largest = int(generator.integers(1, capacity + 1))
    return generator.integers(1, largest + 1, int(generator.integers(1, 80))), capacity


@pytest.mark.parametrize("seed", range(200))
def test_it_is_best_fit_decreasing(seed: int) -> None:
    sizes, capacity = random_sizes(np.random.default_rng(seed))
    windows = best_fit(sizes, capacity)
    assert sorted(set(windows.tolist())) == list(range(windows.max() + 1))
    rooms = capacity - np.bincount(windows, weights=sizes).astype(int)
    assert sorted(rooms.tolist()) == room_by_definition(sizes.tolist(), capacity)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_close_to_the_best(seed: int) -> None:
    """At most 11/9 of the fewest windows and 6/9 more, the bound of first- and best-fit-decreasing."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 11, 9)
    fewest = fewest_windows(tuple(sizes.tolist()), 10)
    assert fewest <= best_fit(sizes, 10).max() + 1 <= 11 / 9 * fewest + 6 / 9


def test_the_bound_is_told_apart_from_a_worse_packing() -> None:
    """Where pieces are placed as they come, more windows are needed."""
    sizes = np.array([3, 7] * 10 + [5] * 10 + [2, 8] * 10)
    assert best_fit(sizes, 10).max() + 1 == 25 == sizes.sum() // 10


def test_no_pieces_and_bad_pieces() -> None:
    assert best_fit(np.empty(0, np.int64), 10).tolist() == []
    for bad in ([0], [11], [5, -1]):
        with pytest.raises(ValueError, match="expected pieces of 1 to 10 tokens"):
            best_fit(np.array(bad), 10)


def test_a_million_pieces() -> None:
    sizes = np.exp(np.random.default_rng(0).normal(6.5, 1.3, 10**6)).astype(np.int64).clip(1, 8192)
    start = time.perf_counter()
    windows = best_fit(sizes, 8192)
    # A tenth of a second on an idle core.
    assert time.perf_counter() - start < 5
    used = np.bincount(windows, weights=sizes)
    assert used.max() <= 8192
    assert used.mean() > 0.999 * 8192


def test_cut() -> None:
    lengths = np.array([3, 8, 4, 1, 9])
    pieces = cut(lengths, 4)
    expected = []
    for document, (length, begin) in enumerate(zip(lengths, itertools.accumulate([0, *lengths]), strict=False)):
        expected += [(document, begin + at, min(4, length - at)) for at in range(0, length, 4)]
    assert list(zip(pieces.document, pieces.begin, pieces.size, strict=True)) == expected
    assert pieces.cut == 2
    assert len(cut(np.empty(0, np.int64), 4).size) == 0
