"""`hylo bench`: a hybrid against its base, on the same vLLM."""

from pathlib import Path
from typing import Annotated

import typer

from hylo.commands.common import DtypeName, out


def register(app: typer.Typer) -> None:
    """Adds `bench` to a command line."""
    app.command()(bench)


def bench(
    model: Annotated[str, typer.Argument(help="A hybrid's folder or hub id.")],
    vs: Annotated[str | None, typer.Option("--vs", help="Its base, measured likewise.")] = None,
    contexts: Annotated[str, typer.Option(help="Tokens of the prompts, such as 8K,64K,1M.")] = "8K,64K",
    answer: Annotated[int, typer.Option(min=4, help="Tokens of the answers that are timed.")] = 64,
    load: Annotated[str, typer.Option(help="Tokens of prompts and answers under load, such as 8K,512.")] = "8K,512",
    waves: Annotated[float, typer.Option(min=0, help="How often the cache is filled under load; 0 for no load.")] = 1.5,
    requests: Annotated[int, typer.Option(min=1, help="Requests at a time, at most.")] = 128,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share a model.")] = 1,
    memory: Annotated[
        float | None, typer.Option(min=0.05, max=1, help="Share of the GPU's memory for vLLM. [vLLM's own choice]")
    ] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Of weights and cache.")] = DtypeName.bfloat16,
    eager: Annotated[bool, typer.Option("--eager", help="Without compilation and CUDA graphs.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for bench.json and bench.png.")] = Path(
        "bench"
    ),
) -> None:
    """Measure serving: time to the first token, time a token, throughput under load, tokens that the cache holds.

    Example: hylo bench runs/mine/model --vs ./Llama-3.2-1B-Instruct --contexts 8K,64K,256K --output bench
    """
    from rich.table import Table

    from hylo.errors import HyLoError
    from hylo.plan.quantities import parse_contexts
    from hylo.serve.bench.measure import Plan
    from hylo.serve.bench.run import bench as measure_both
    from hylo.serve.bench.run import table_rows

    loads = parse_contexts(load, "--load")
    if len(loads) != 2:
        raise HyLoError(f"--load {load!r}: expected tokens of a prompt and of an answer, such as 8K,512")
    plan = Plan(
        model=model,
        contexts=parse_contexts(contexts, "--contexts"),
        answer=answer,
        load_context=loads[0],
        load_answer=loads[1],
        load_waves=waves,
        requests=requests,
        gpus=gpus,
        memory=memory,
        eager=eager,
        dtype=dtype.value,
    )
    result = measure_both(plan, vs, output)
    table = Table("", "hybrid", "base", "times")
    for row in table_rows(result):
        table.add_row(*row)
    out.print(table)
    out.print(f"results    {output / 'bench.json'}\nplot       {output / 'bench.png'}", highlight=False, markup=False)
