"""Names and things that exercises are about, drawn without repetition."""

# ruff: noqa: SIM905

import random
from collections.abc import Callable, Sequence

FIRST = (
    "Ada Anton Beatrix Bruno Carla Cedric Dora Edgar Elin Felix Frida Georg Greta Hugo Ida Ivan Jana Jonas Klara Lars "
    "Lena Magnus Mira Nadia Nils Olga Oskar Paula Pavel Petra Quentin Rosa Rufus Selma Simon Tara Tilda Ulrich Vera "
    "Viktor Wanda Xenia Yann Yvonne Zora"
).split()
LAST = (
    "Abbott Brandt Castell Dahl Eklund Farrow Grieg Holm Ibsen Jansen Keller Lindqvist Marlow Novak Oakes Petrov Quist "
    "Rask Sandoval Thorne Ueda Varga Westcott Yates Zeller Birk Corbin Drexler Engel Falk Garnet Hale Irving Joyner"
).split()
THINGS = (
    "anvil barometer bellows candlestick chisel compass crowbar decanter drum easel fiddle flask globe goblet hammer "
    "hourglass inkwell jug kettle lantern ledger locket loom mallet mirror necklace oar paddle pendulum pitcher quill "
    "rope rudder saddle scythe sextant sickle spade spindle sundial telescope teapot thimble trowel trumpet typewriter "
    "umbrella violin wheelbarrow whistle"
).split()
KINDS = "brass bronze carved copper cracked gilded lacquered marble painted pewter pine silver steel tin velvet".split()
TOWNS = (
    "Aldermoor Brackenford Calderby Dunmere Eastwick Fennholt Garrowby Hazelden Inverley Kelsmere Larkhill Mossgate "
    "Netherby Oakhaven Pinehurst Quarrydale Ravensby Stonebeck Thistledown Umberley Wexbridge Yarrowfield"
).split()
FIRMS = "Bakery Brewery Foundry Glassworks Mill Nursery Pottery Press Sawmill Shipyard Tannery Weavers".split()
COLOURS = "black blue brown green grey orange purple red white yellow".split()
SETTINGS = (
    "archive backup batch buffer cache channel cluster cursor digest driver export filter gateway index journal limit "
    "logger mirror network parser pool proxy queue reader report router sampler scheduler session shard socket storage "
    "stream thread timer token upload worker writer"
).split()


def person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


def thing(rng: random.Random) -> str:
    return f"{rng.choice(KINDS)} {rng.choice(THINGS)}"


def firm(rng: random.Random) -> str:
    return f"{rng.choice(LAST)} {rng.choice(FIRMS)}"


def code(rng: random.Random) -> str:
    return f"{rng.choice('ABCDEFGHJKLMNPRSTUVWXYZ')}{rng.randint(100, 99999)}"


def number(rng: random.Random) -> str:
    """Of 4 to 9 digits."""
    return str(rng.randint(1000, 10 ** rng.randint(4, 9) - 1))


def serial(rng: random.Random) -> str:
    """Longer than anyone remembers: hexadecimal, in groups or whole, letters and digits in groups, or digits."""
    kind = rng.randrange(4)
    if kind == 0:
        return "-".join(_drawn(rng, "0123456789abcdef", size) for size in (8, 4, 4, 4, 12))
    if kind == 1:
        return _drawn(rng, "0123456789abcdef", rng.choice((16, 24, 32, 40)))
    if kind == 2:
        return "-".join(_drawn(rng, "ABCDEFGHJKLMNPQRSTUVWXYZ23456789", 5) for _ in range(rng.randint(3, 5)))
    return _drawn(rng, "0123456789", rng.randint(10, 20))


def _drawn(rng: random.Random, letters: str, count: int) -> str:
    return "".join(rng.choices(letters, k=count))


def setting(rng: random.Random) -> str:
    return f"{rng.choice(SETTINGS)}.{rng.choice(SETTINGS)}_{rng.choice(SETTINGS)}"


def variable(rng: random.Random) -> str:
    return f"{rng.choice(SETTINGS)}_{rng.choice(THINGS)}"


def distinct(rng: random.Random, draw: Callable[[random.Random], str], count: int) -> list[str]:
    """Draws of which none comes twice; there must be enough of them."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)


def scattered(rng: random.Random, texts: Sequence[str], facts: Sequence[str]) -> str:
    """Paragraphs, with the facts between them in their order, each as a paragraph or at a paragraph's end."""
    places = sorted(rng.choices(range(len(texts) + 1), k=len(facts)))
    parts: list[str] = []
    done = 0
    for place, fact in zip(places, facts, strict=True):
        parts += texts[done:place]
        done = place
        line = "\n" not in fact and bool(parts) and "\n" not in parts[-1] and parts[-1].endswith(".")
        if line and rng.random() < 0.4:
            parts[-1] += f" {fact}"
        else:
            parts.append(fact)
    return "\n\n".join([*parts, *texts[done:]])
