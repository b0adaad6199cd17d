"""Plans for people: numbers as they are written, and the layer map."""

import io

import pytest
from rich.console import Console

from hylo.errors import HyLoError
from hylo.mixers import MIXERS
from hylo.plan.quantities import GIB, format_tokens, parse_contexts, parse_gib
from hylo.plan.show import layer_map


def drawn(layers: list[str]) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(layer_map(layers))
    return console.file.getvalue().splitlines()


def test_layer_map_reads_without_colour() -> None:
    *rows, legend = drawn(["mla", "gdn"] * 9 + ["mamba2", "kda", "attention"])
    assert [row.split() for row in rows] == [["0", *"MGMGMGMGMGMGMGMG"], ["16", *"MG2KA"]]
    assert " ".join(legend.split()) == "M 9 MLA G 9 GDN 2 1 M2 K 1 KDA A 1 ATT"


def test_every_mixer_has_a_letter_of_its_own() -> None:
    letters = [drawn([name])[0].split()[1] for name in MIXERS]
    assert len(set(letters)) == len(letters)
    assert "?" not in letters


def test_tokens_as_people_write_them() -> None:
    assert parse_contexts("8192, 8k,64K,1M") == [8192, 8192, 65536, 2**20]
    assert [format_tokens(tokens) for tokens in (8192, 2**21, 1000, 12_345)] == ["8K", "2M", "1,000", "12,345"]
    for wrong in ("", "8G", "0", "8K,", "-8", "1.5K", "9" * 5000, "٣"):
        with pytest.raises(HyLoError, match="--context"):
            parse_contexts(wrong)
        with pytest.raises(HyLoError, match="--load"):
            parse_contexts(wrong, "--load")


def test_memory_as_people_write_it() -> None:
    assert (
        parse_gib("80", "--gpu-memory")
        == parse_gib("80GiB", "--gpu-memory")
        == parse_gib("80 gib", "--gpu-memory")
        == 80 * GIB
    )
    assert parse_gib("0.5", "--gpu-memory") == GIB // 2
    for wrong in ("", "80GB", "much", "0", "-1", "9" * 400, "٣"):
        with pytest.raises(HyLoError, match="--gpu-memory"):
            parse_gib(wrong, "--gpu-memory")
