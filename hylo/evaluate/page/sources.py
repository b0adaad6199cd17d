"""What a page is made from: folders of runs, and results of `hylo eval`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hylo.errors import HyLoError
from hylo.evaluate.page.columns import columns
from hylo.evaluate.suites import FORMAT
from hylo.files import read_json

_Read = TypeVar("_Read")

_RUN_FILE = "run.json"
_REPORT_FILE = Path("report") / "report.json"


@dataclass(frozen=True)
class Run:
    """A run of `hylo upcycle`, finished or not.

    Attributes:
        name: of its folder.
        recipe: what it was asked to do.
        report: what its last step wrote; None before that.
        losses: by stage, the lines of its metrics.jsonl that have a loss.
        folder: where it lies, and its model in it; None where that is not known.
    """

    name: str
    recipe: dict[str, Any]
    report: dict[str, Any] | None
    losses: dict[str, list[dict[str, Any]]]
    folder: Path | None = None


@dataclass
class Sources:
    """Everything that one page shows.

    Attributes:
        evaluations: what `hylo eval` wrote, whole.
    """

    runs: list[Run] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def results(self) -> list[dict[str, Any]]:
        """A column for every model that was scored and every way of scoring it; see `columns`."""
        return columns(self.evaluations)


def read_sources(places: Sequence[Path]) -> Sources:
    """Reads folders of runs, folders with a results.json, and result files.

    Raises HyLoError where a place is none of these.
    """
    if not places:
        raise HyLoError("expected a run's folder, or a results.json of `hylo eval`")
    sources = Sources()
    for place in places:
        path = Path(place)
        if not path.exists():
            raise HyLoError(f"{path} does not exist; expected a run's folder, or a results.json of `hylo eval`")
        if path.is_dir():
            _read_folder(path, sources)
        else:
            _read_file(path, sources)
    return sources


def _checked(file: Path, read: Callable[[], _Read]) -> _Read:
    """What `read` makes of a file that may be of another program, or of another version."""
    try:
        return read()
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise HyLoError(f"{file} is not as hylo writes it: {type(error).__name__} {error}") from None


def _read_folder(folder: Path, sources: Sources) -> None:
    is_run = (folder / _RUN_FILE).is_file() or (folder / _REPORT_FILE).is_file()
    results = [file for file in (folder / "results.json", folder / "eval" / "results.json") if file.is_file()]
    if not is_run and not results:
        raise HyLoError(f"{folder} holds neither run.json nor results.json; expected a run, or results of `hylo eval`")
    if is_run:
        sources.runs.append(_checked(folder / _RUN_FILE, lambda: _read_run(folder)))
    for file in results:
        _read_file(file, sources)


def _read_run(folder: Path) -> Run:
    report = read_json(folder / _REPORT_FILE) if (folder / _REPORT_FILE).is_file() else None
    recipe = report["recipe"] if report is not None else read_json(folder / _RUN_FILE)["recipe"]
    losses = {}
    for stage in recipe["stages"]:
        lines = _metrics(folder / stage["name"] / "metrics.jsonl")
        if not lines and report is not None:
            lines = report["training"][stage["name"]]["logs"]
        losses[stage["name"]] = [line for line in lines if line.get("loss") is not None]
    return Run(folder.absolute().name, recipe, report, losses, folder)


def _metrics(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = []
    for line in file.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            # The last line of a run that is being written.
            continue
    return lines


def _read_file(file: Path, sources: Sources) -> None:
    value = read_json(file)
    if isinstance(value, dict) and value.get("format") == FORMAT:
        # Pages and cards are made of these.
        _checked(file, lambda: [(value["settings"], result.get("suites")) for result in value["results"]])
        sources.evaluations.append(value)
    elif isinstance(value, dict) and {"token_mixers", "recipe", "training", "scores"} <= value.keys():
        losses = _checked(file, lambda: {name: stage["logs"] for name, stage in value["training"].items()})
        sources.runs.append(Run(file.stem, value["recipe"], value, losses, file.absolute().parent.parent))
    else:
        raise HyLoError(f"{file} is no result; expected a results.json of `hylo eval`, or a run's report.json")
