"""Layouts: which token mixer each layer gets.

Three ways to write one, for a base of 16 layers:

- counts and block names: `4MLA12GDN`, with the MLA layers where they were published, else every block evenly spaced
- index lists, the block without indices taking the rest: `MLA:1,5,10,14 GDN` (ranges such as `0-3` allowed)
- in a recipe, also a list with one mixer or block name a layer
"""

import re
from collections.abc import Sequence

from hylo.errors import HyLoError
from hylo.mixers import MIXERS, mixer_class
from hylo.upcycle.published import published_mla_layers

BLOCKS = {mixer.block: name for name, mixer in MIXERS.items()}


def parse_layout(layout: str | Sequence[str], num_layers: int) -> list[str]:
    """One mixer name a layer. Raises HyLoError naming what does not fit."""
    if not isinstance(layout, str):
        names = [BLOCKS.get(str(name).upper()) or mixer_class(str(name)).name for name in layout]
        if len(names) != num_layers:
            raise HyLoError(f"the layout names {len(names)} layers; the base has {num_layers}")
        return names
    text = layout.strip()
    if text[:1].isdigit():
        return _from_counts(text, num_layers)
    return _from_indices(text, num_layers)


def format_layout(token_mixers: Sequence[str]) -> str:
    """The short name of a layout: counts and block names, fewest layers first (`8MLA22GDN`)."""
    counts = {name: list(token_mixers).count(name) for name in dict.fromkeys(token_mixers)}
    return "".join(f"{n}{mixer_class(name).block}" for name, n in sorted(counts.items(), key=lambda item: item[1]))


def _block(text: str) -> str:
    try:
        return BLOCKS[text.upper()]
    except KeyError:
        raise HyLoError(f"layout: unknown block {text!r}; expected one of {', '.join(BLOCKS)}") from None


def _from_counts(text: str, num_layers: int) -> list[str]:
    # A block name may hold digits (M2), a count never follows a digit: read the longest known name first.
    names = "|".join(sorted((re.escape(block) for block in BLOCKS), key=len, reverse=True))
    parts = re.findall(rf"(\d+)({names})", text, flags=re.IGNORECASE)
    if "".join(count + block for count, block in parts) != text:
        raise HyLoError(f"layout {text!r}: expected counts and block names such as 8MLA22GDN, of {', '.join(BLOCKS)}")
    counts: dict[str, int] = {}
    for count, block in parts:
        name = _block(block)
        if name in counts:
            raise HyLoError(f"layout {text!r} names {block} twice")
        counts[name] = int(count)
    if sum(counts.values()) != num_layers:
        raise HyLoError(f"layout {text!r} has {sum(counts.values())} layers; the base has {num_layers}")
    return _published(counts) or spread_evenly(counts)


def _published(counts: dict[str, int]) -> list[str] | None:
    """MLA and one linear block, the MLA layers where a published layout has as many; or None."""
    others = [name for name in counts if name != "mla"]
    if len(others) != 1 or "mla" not in counts or mixer_class(others[0]).layer_type != "linear_attention":
        return None
    num_layers = sum(counts.values())
    positions = published_mla_layers(num_layers, counts["mla"])
    if positions is None:
        return None
    return ["mla" if i in positions else others[0] for i in range(num_layers)]


def spread_evenly(counts: dict[str, int]) -> list[str]:
    """Spreads each block, fewest layers first, evenly over the positions that are left."""
    layout = [""] * sum(counts.values())
    for name, count in sorted(counts.items(), key=lambda item: item[1]):
        free = [position for position, taken in enumerate(layout) if not taken]
        # The middles of `count` equal stretches; a middle between two positions takes the lower.
        for i in range(count):
            layout[free[((2 * i + 1) * len(free) - count) // (2 * count)]] = name
    return layout


def _from_indices(text: str, num_layers: int) -> list[str]:
    layout: list[str | None] = [None] * num_layers
    rest: str | None = None
    for part in text.split():
        block, colon, indices = part.partition(":")
        name = _block(block)
        if not colon:
            if rest is not None:
                raise HyLoError(f"layout {text!r}: only one block may take the rest, both {rest} and {name} do")
            rest = name
            continue
        for index in _indices(indices, text, num_layers):
            if layout[index] is not None:
                raise HyLoError(f"layout {text!r}: layer {index} is named twice")
            layout[index] = name
    filled = [name or rest for name in layout]
    if not text or None in filled:
        missing = [i for i, name in enumerate(filled) if name is None]
        raise HyLoError(
            f"layout {text!r}: nothing for layers {missing}; expected 8MLA22GDN, or MLA:1,5,9 GDN for index lists"
        )
    return [name for name in filled if name is not None]


def _indices(text: str, layout: str, num_layers: int) -> list[int]:
    indices: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if match is None:
            raise HyLoError(f"layout {layout!r}: {item!r} is not a layer index; expected lists such as 1,5,10-14")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise HyLoError(f"layout {layout!r}: {item!r} runs backwards; expected ranges such as 10-14")
        if last >= num_layers:
            raise HyLoError(f"layout {layout!r}: layer {last}, where the base has layers 0 to {num_layers - 1}")
        indices.extend(range(first, last + 1))
    return indices
