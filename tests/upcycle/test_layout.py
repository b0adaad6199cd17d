"""Layouts: what each way of writing one means, and what is refused."""

from itertools import pairwise

import pytest

from hylo.errors import HyLoError
from hylo.upcycle.layout import format_layout, parse_layout, spread_evenly


@pytest.mark.parametrize(
    ("layout", "layers", "mla"),
    [
        # The published layouts, as counts.
        ("8MLA22GDN", 30, [1, 5, 9, 12, 16, 20, 24, 28]),
        ("2MLA2GDN", 4, None),
        ("1MLA3GDN", 4, [1]),
        ("MLA:1,5,10,14 GDN", 16, [1, 5, 10, 14]),
        ("GDN MLA:0-2,7", 8, [0, 1, 2, 7]),
        ("mla:0 gdn", 3, [0]),
        ("  4MLA ", 4, [0, 1, 2, 3]),
        (["mla", "gdn", "mla"], 3, [0, 2]),
        (["MLA", "GDN", "mla"], 3, [0, 2]),
    ],
)
def test_meaning(layout: str | list[str], layers: int, mla: list[int] | None) -> None:
    mixers = parse_layout(layout, layers)
    assert len(mixers) == layers
    assert set(mixers) <= {"mla", "gdn"}
    if layout == "8MLA22GDN":
        found = [i for i, name in enumerate(mixers) if name == "mla"]
        gaps = [b - a for a, b in pairwise(found)]
        assert len(found) == 8
        assert max(gaps) - min(gaps) <= 1
    elif mla is not None:
        assert [i for i, name in enumerate(mixers) if name == "mla"] == mla


@pytest.mark.parametrize("counts", [{"mla": 4, "gdn": 12}, {"mla": 1, "gdn": 1, "attention": 5}, {"gdn": 7}])
def test_spread_keeps_the_counts(counts: dict[str, int]) -> None:
    layout = spread_evenly(counts)
    assert {name: layout.count(name) for name in set(layout)} == counts


@pytest.mark.parametrize("layout", ["4MLA12GDN", "12GDN4MLA", "4mla12m2", "4MLA12KDA"])
def test_published_positions_whatever_the_linear_block(layout: str) -> None:
    mixers = parse_layout(layout, 16)
    assert [i for i, name in enumerate(mixers) if name == "mla"] == [1, 5, 10, 14]


@pytest.mark.parametrize(
    ("layout", "counts"),
    [
        ("4MLA12ATT", {"mla": 4, "attention": 12}),
        ("4MLA6GDN6KDA", {"mla": 4, "gdn": 6, "kda": 6}),
        ("3MLA13GDN", {"mla": 3, "gdn": 13}),
        ("4ATT12GDN", {"attention": 4, "gdn": 12}),
    ],
)
def test_even_spread_where_none_was_published(layout: str, counts: dict[str, int]) -> None:
    assert parse_layout(layout, 16) == spread_evenly(counts)


def test_block_names() -> None:
    assert parse_layout("4ATT", 4) == ["attention"] * 4
    assert parse_layout("14MLA14M2", 28) == ["mla", "mamba2"] * 14
    kept = parse_layout("7ATT21KDA", 28)
    assert (kept.count("attention"), kept.count("kda")) == (7, 21)


@pytest.mark.parametrize("layout", ["2MLA6GDN", "1ATT2MLA5GDN", "8ATT"])
def test_format_names_what_was_parsed(layout: str) -> None:
    assert format_layout(parse_layout(layout, 8)) == layout


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        ("2MLA5GDN", "7 layers"),
        ("2MLA2MLA4GDN", "twice"),
        ("4FOO4GDN", "MLA, GDN"),
        ("FOO:1 GDN", "'FOO'"),
        ("MLA:1 GDN ATT", "only one"),
        ("MLA:8 GDN", "layer 8"),
        ("MLA:1 ATT:1 GDN", "layer 1"),
        ("MLA:x GDN", "'x'"),
        ("MLA:1,2", "[0, 3, 4, 5, 6, 7]"),
        ("MLA: GDN", "not a layer index"),
        ("MLA:5-2 GDN", "5-2"),
        ("", "8MLA22GDN"),
        (["mla"] * 7, "7 layers"),
        (["mla"] * 7 + ["foo"], "'foo'"),
    ],
)
def test_refused(layout: str | list[str], named: str) -> None:
    with pytest.raises(HyLoError) as error:
        parse_layout(layout, 8)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
