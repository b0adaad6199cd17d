"""`hylo import` and `hylo export`: released HyLo checkpoints, in and out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hylo.commands.common import out

SOURCE_HELP = "A released checkpoint: a folder with hybrid_config.json, or its hub id."
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]


def register(app: typer.Typer) -> None:
    """Adds both commands to a command line."""
    app.command(name="import")(import_command)
    app.command(name="export")(export_command)


def import_command(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    output: Annotated[Path, typer.Argument(help="Folder for the checkpoint.")],
    overwrite: OverwriteOption = False,
) -> None:
    """Read a released HyLo checkpoint: bit for bit, with its rotary rows in this package's order.

    Example: hylo import ./released ./hybrid
    """
    from hylo.upcycle.bases import resolve_base
    from hylo.upcycle.interop import import_released

    _print(output, import_released(resolve_base(source), output, overwrite=overwrite))


def export_command(
    source: Annotated[Path, typer.Argument(help="A hybrid's folder.")],
    output: Annotated[Path, typer.Argument(help="Folder for the released format.")],
    overwrite: OverwriteOption = False,
) -> None:
    """Write a hybrid in the format of the released HyLo checkpoints: one file, bit for bit.

    Example: hylo export runs/mine/model ./released
    """
    from hylo.upcycle.interop import export_released

    _print(output, export_released(source, output, overwrite=overwrite))


def _print(output: Path, written: Any) -> None:
    from hylo.upcycle.layout import format_layout

    layout = format_layout(written.config.token_mixers)
    out.print(f"{output}: {layout}, {written.parameters:,} parameters", highlight=False, markup=False, soft_wrap=True)
