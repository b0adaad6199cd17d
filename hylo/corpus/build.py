"""Builds a corpus, step by step: extract, clean, split, exercise, tokenise, report.

    OUTPUT/train/GROUP/SOURCE.jsonl.zst   rows of `name` and `text`, or `messages`
    OUTPUT/held-out/SOURCE.jsonl.zst      the same, kept for evaluation
    OUTPUT/held-out-exercises/            and exercises on it
    OUTPUT/tokens/GROUP/SOURCE/           the training text as `hylo.data.store` keeps it
    OUTPUT/corpus.json                    what it is made of, and what was left out and why
    OUTPUT/.cache/                        packages, and what was read of them; may be removed

Each source is extracted once. Then what is held out is cleaned, and after it the training text: of two copies the first
is kept, so that nothing held out has a copy in training, and no source has what an earlier one has.
"""

import datetime
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hylo.corpus.clean import Cleaner, Losses
from hylo.corpus.evaluations import evaluation_sets
from hylo.corpus.exercises import write_exercises
from hylo.corpus.extract import Draft, Extracted, extract
from hylo.corpus.overlap import Labelled, RunIndex, SeenRuns
from hylo.corpus.packages import MissingPackageError
from hylo.corpus.rows import SUFFIX, writing
from hylo.corpus.spec import CorpusSpec, PackageSource
from hylo.data.documents import unit_hash
from hylo.errors import HyLoError
from hylo.progress import bar, console

HELD_OUT = "held-out of this corpus"


@dataclass
class SourceAccount:
    """What became of a source.

    Attributes:
        extracted: as it was read; None where its package could not be had.
        missing: why it could not.
        losses: what was taken out.
        documents, characters: in the training text.
        held_out_documents, held_out_characters: kept for evaluation.
    """

    source: PackageSource
    extracted: Extracted | None = None
    missing: str = ""
    losses: Losses = field(default_factory=Losses)
    documents: int = 0
    characters: int = 0
    held_out_documents: int = 0
    held_out_characters: int = 0

    def told(self) -> dict[str, Any]:
        """For `corpus.json`."""
        source, read = self.source, self.extracted
        about: dict[str, Any] = {"name": source.title, "group": source.group, "licence": source.licence}
        if read is None:
            return about | {"package": source.package, "missing": self.missing}
        about |= {key: value for key, value in asdict(read).items() if key != "path"}
        about["read_characters"] = about.pop("characters")
        about["read_documents"] = about.pop("documents")
        if source.reference and read.package != source.package:
            about["asked_for"] = source.package
        return about | {
            "documents": self.documents,
            "characters": self.characters,
            "held_out_documents": self.held_out_documents,
            "held_out_characters": self.held_out_characters,
            "dropped_documents": self.losses.documents,
            "dropped_characters": dict(self.losses.characters),
        }


@dataclass(frozen=True)
class Folders:
    """Where things are in an output folder."""

    output: Path

    @property
    def cache(self) -> Path:
        return self.output / ".cache"

    def training(self, source: PackageSource) -> Path:
        return self.output / "train" / source.group / f"{source.title}{SUFFIX}"

    def held_out(self, source: PackageSource) -> Path:
        return self.output / "held-out" / f"{source.title}{SUFFIX}"


def build(
    spec: CorpusSpec,
    output: Path,
    *,
    cache: Path | None = None,
    processes: int = 2,
    strict: bool = False,
    evaluations: Sequence[Labelled] | None = None,
    written: Callable[[Path], None] = lambda path: None,
) -> dict[str, Any]:
    """Writes the text of a corpus and returns what `corpus.json` says of it, without the tokens.

    Args:
        cache: of packages and what was read of them; `output/.cache` by default.
        processes: that read packages at once; 1 for this one.
        strict: fail where a package cannot be had, instead of leaving it out.
        evaluations: what no text may share 13 words in a row with; `evaluation_sets()` by default.
        written: told of each file of training text that is whole, in the order in which they are written.

    Raises:
        HyLoError: where a source is not understood, no text is left, or `strict` and a package cannot be had.
    """
    folders = Folders(output)
    output.mkdir(parents=True, exist_ok=True)
    accounts = extract_all(spec, cache or folders.cache, processes=processes, strict=strict)
    there = [account for account in accounts if account.extracted is not None]
    if not there:
        raise HyLoError("none of the packages could be had")
    for name in ("train", "held-out", "held-out-exercises", "held-out-exercises-chats", "tokens"):
        shutil.rmtree(output / name, ignore_errors=True)
    sets = list(evaluations) if evaluations is not None else evaluation_sets()
    console.print(f"{len(sets)} evaluation sets", highlight=False)
    seen = SeenRuns.of(sum(account.extracted.characters for account in there if account.extracted))
    held_out = _held_out(spec, there, folders, Cleaner(RunIndex(sets), seen))
    _train(spec, there, folders, Cleaner(RunIndex([*sets, held_out]), seen), written)
    exercises = write_exercises(spec, output)
    runs: Counter[str] = sum((account.losses.runs for account in there), Counter())
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": spec.seed,
        "held_out_share": spec.held_out,
        "missing_packages": sum(account.extracted is None for account in accounts),
        "evaluation_sets": {
            one.name: {
                "texts": len(one.texts),
                "characters": sum(map(len, one.texts)),
                "runs_found": runs.get(one.name, 0),
            }
            for one in sets
        },
        "held_out_runs_found": runs.get(HELD_OUT, 0),
        "sources": [account.told() for account in accounts],
        "exercises": exercises,
    }


def extract_all(spec: CorpusSpec, cache: Path, *, processes: int, strict: bool) -> list[SourceAccount]:
    """Reads every source, several at once.

    Raises HyLoError where one cannot be read, or `strict` and a package cannot be had.
    """
    cache.mkdir(parents=True, exist_ok=True)
    accounts = [SourceAccount(source) for source in spec.sources]
    with bar("read packages", len(accounts), "packages") as shown, ExitStack() as stack:
        reading: Iterable[tuple[SourceAccount, Callable[[], Extracted]]]
        if processes == 1:
            reading = ((account, partial(extract, account.source, cache)) for account in accounts)
        else:
            pool = ProcessPoolExecutor(processes, get_context("forkserver"))
            # Not waited for where one fails: what is being read is in the cache when it is done.
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            waiting = {pool.submit(extract, account.source, cache): account for account in accounts}
            reading = ((waiting[done], done.result) for done in as_completed(waiting))
        for account, result in reading:
            try:
                account.extracted = result()
            except MissingPackageError as error:
                if strict:
                    raise
                account.missing = str(error)
                console.print(f"left out: {error}", highlight=False, markup=False)
            shown.advance(1, account.source.title)
    return accounts


def _held_out(spec: CorpusSpec, accounts: Sequence[SourceAccount], folders: Folders, cleaner: Cleaner) -> Labelled:
    """Writes what is held out of every source, without what evaluation has and what an earlier source has."""
    texts: list[str] = []
    with bar("hold out", len(accounts), "sources") as shown:
        for account in accounts:
            drafts = [draft for draft in _drafts(account) if is_held_out(draft.name, spec)]
            cleaned = [(draft, cleaner.clean(draft, account.source.group, account.losses)) for draft in drafts]
            rows = [{"name": draft.name, "text": text} for draft, text in cleaned if text is not None]
            if rows:
                with writing(folders.held_out(account.source)) as written:
                    for row in rows:
                        written.write(row)
            texts += [row["text"] for row in rows]
            account.held_out_documents = len(rows)
            account.held_out_characters = sum(len(row["text"]) for row in rows)
            shown.advance(1, account.source.title)
    return Labelled(HELD_OUT, texts)


def _train(
    spec: CorpusSpec,
    accounts: Sequence[SourceAccount],
    folders: Folders,
    cleaner: Cleaner,
    written: Callable[[Path], None],
) -> None:
    """Writes what is trained on, of every source in turn."""
    total = sum(account.extracted.characters for account in accounts if account.extracted)
    with bar("clean", total, "characters") as shown:
        for account in accounts:
            path = folders.training(account.source)
            with writing(path) as rows:
                for draft in _drafts(account):
                    shown.advance(sum(map(len, draft.parts)), account.source.title)
                    if is_held_out(draft.name, spec):
                        continue
                    text = cleaner.clean(draft, account.source.group, account.losses)
                    if text is not None:
                        account.documents += 1
                        account.characters += len(text)
                        rows.write({"name": draft.name, "text": text})
            if account.documents:
                written(path)
            else:
                path.unlink()


def _drafts(account: SourceAccount) -> Iterator[Draft]:
    assert account.extracted is not None
    return account.extracted.drafts()


def is_held_out(name: str, spec: CorpusSpec) -> bool:
    """By its name alone: the same whatever else is in the corpus."""
    return unit_hash(name) < spec.held_out


def training_files(output: Path) -> Iterator[tuple[str, Path]]:
    """Group and file of each source of a corpus."""
    for path in sorted((output / "train").glob(f"*/*{SUFFIX}")):
        yield path.parent.name, path
