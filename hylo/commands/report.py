"""`hylo report`: runs and results as one page, and the model card of a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from hylo.commands.common import out
from hylo.errors import HyLoError


def register(app: typer.Typer) -> None:
    """Adds `report` to a command line."""
    app.command()(report)


def report(
    places: Annotated[
        list[Path], typer.Argument(help="Folders of runs, results.json files of `hylo eval`, or folders of these.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Of the page. [default: base and layout]")] = None,
    card: Annotated[
        Path | None, typer.Option("--card", help="Also write the model card, README.md, into this checkpoint.")
    ] = None,
) -> None:
    """Put runs and results on one HTML page that needs no network: layers, memory, losses, scores, RULER.

    Example: hylo report runs/mine eval/results.json --output mine.html --card runs/mine/model
    """
    from hylo.evaluate.card import made_card
    from hylo.evaluate.page import read_sources, report_page
    from hylo.files import write_text

    if output.is_dir():
        raise HyLoError(f"{output} is a folder; expected a file such as {output / 'report.html'}")
    if output.is_file() and not _is_page(output):
        raise HyLoError(f"{output} is no page; expected a new file, or one that was made here")
    try:
        page = report_page(places, title)
        files = [(output, page)] + ([made_card(card, read_sources(places))] if card is not None else [])
    except HyLoError:
        raise
    # What was read is looked at where it is shown: whoever edits such a file can make it anything.
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        named = ", ".join(map(str, places))
        raise HyLoError(
            f"{named}: not as hylo writes it: {type(error).__name__} {' '.join(str(error).split())}"
        ) from error
    for path, text in files:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        except OSError as error:
            raise HyLoError(f"cannot write {path}: {error.strerror}") from None
    out.print(
        f"page       {output} ({len(page.encode()) / 1024:,.0f} KiB)", highlight=False, markup=False, soft_wrap=True
    )
    for path, _ in files[1:]:
        out.print(f"card       {path}", highlight=False, markup=False, soft_wrap=True)


def _is_page(file: Path) -> bool:
    """Whether a file may be replaced: an empty one, or HTML."""
    with file.open("rb") as opened:
        start = opened.read(256).lstrip().lower()
    return not start or start.startswith((b"<!doctype html", b"<html"))
