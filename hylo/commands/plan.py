"""`hylo plan`: what a conversion would cost, before anything is spent."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hylo.commands.common import GEOMETRY_HELP, LAYOUT_HELP, DtypeName, out
from hylo.errors import HyLoError

_ELEMENT_SIZES = {DtypeName.float32: 4, DtypeName.bfloat16: 2, DtypeName.float16: 2}


def register(app: typer.Typer) -> None:
    """Adds `plan` to a command line."""
    app.command()(plan)


def plan(
    base: Annotated[
        str | None,
        typer.Argument(help="A hub id (its config.json alone is downloaded), a folder, a config.json or a .gguf file."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A bare config.json, in place of BASE.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Plan for a recipe, its training too. Other options win over it.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="In place of the recipe's: a hub id, folder or config.json.")
    ] = None,
    layout: Annotated[str | None, typer.Option("--layout", "-l", help=LAYOUT_HELP)] = None,
    geometry: Annotated[list[str] | None, typer.Option("--geometry", "-g", help=GEOMETRY_HELP)] = None,
    context: Annotated[str, typer.Option(help="Tokens a sequence, such as 8192 or 8K,64K,1M.")] = "8K,64K,1M",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    gpu_memory: Annotated[str | None, typer.Option(help="GiB of one GPU, such as 80: says what fits.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Its name, for the time that a --recipe takes: H100, A100, L40S, ... [default: H100]"),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="The share of its peak that a --recipe is taken to use. [default: 0.3]"),
    ] = None,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens of a prompt that are read at a time.")] = 8192,
    dtype: Annotated[DtypeName, typer.Option(help="Of weights and cache when serving.")] = DtypeName.bfloat16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a conversion would cost: parameters, cache, memory to serve and to train, and time. Reads no weights.

    Example: hylo plan meta-llama/Llama-3.2-1B-Instruct --layout 4MLA12GDN --geometry paper --gpu-memory 80
    """
    from hylo.distill.recipe import load_recipe
    from hylo.plan.duration import Pace
    from hylo.plan.inference import Serving
    from hylo.plan.quantities import parse_contexts, parse_gib
    from hylo.plan.report import plan_dense, plan_pair, plan_report, training_report
    from hylo.plan.show import plan_view
    from hylo.plan.source import read_config
    from hylo.upcycle.geometry import parse_geometry

    contexts = parse_contexts(context)
    serving = Serving(
        batch, gpus, parse_gib(gpu_memory, "--gpu-memory") if gpu_memory else None, prefill_chunk, _ELEMENT_SIZES[dtype]
    )
    if base is not None and config is not None:
        raise HyLoError(f"plan takes BASE or --config, not both: {base} and {config}")
    for option, value in (("--teacher", teacher), ("--gpu", gpu), ("--mfu", mfu)):
        if value is not None and recipe is None:
            raise HyLoError(f"{option} {value} is for the training that a --recipe tells of; none is given")
    given: dict[str, Any] = {"gpu": gpu, "mfu": mfu}
    pace = Pace(**{name: value for name, value in given.items() if value is not None})
    spec = load_recipe(recipe) if recipe is not None else None
    named = (spec.student or spec.base) if spec is not None else None
    source = base or (str(config) if config is not None else named)
    if source is None:
        raise HyLoError("plan needs a BASE, a --config or a --recipe")
    sizes = parse_geometry(geometry) if geometry else spec.geometry if spec is not None else {}
    chosen = layout or (spec.layout if spec is not None else None)
    base_config = read_config(source)
    scaling = spec.rope_scaling.model_dump() if spec is not None and spec.rope_scaling is not None else None
    hybrid, dense = plan_pair(base_config, chosen, sizes, source, scaling)
    report = plan_report(hybrid, dense, contexts, serving)
    if spec is not None and spec.stages:
        guide = teacher or spec.teacher
        taught_by = plan_dense(read_config(guide), guide) if guide is not None else dense
        report["training"] = training_report(spec, hybrid, dense, taught_by, serving, pace)
    if as_json:
        out.print(json.dumps(report), soft_wrap=True, highlight=False, markup=False)
    else:
        out.print(plan_view(report), highlight=False)
