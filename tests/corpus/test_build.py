"""A corpus from beginning to end, of packages made here and of the text that every Python installation has."""

import json
import lzma
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_overlap import prose, shared_runs
from tiny import make_tokenizer

from hylo.corpus.build import build
from hylo.corpus.overlap import Labelled
from hylo.corpus.pack import write_packs
from hylo.corpus.packages import MissingPackageError, fetch
from hylo.corpus.rows import reading, writing
from hylo.corpus.spec import CorpusSpec, PackageSource, load_spec
from hylo.corpus.tokens import histogram, tokenise, totals
from hylo.data.encode import Encoder
from hylo.data.prepare import Corpus
from hylo.data.sections import DataSection
from hylo.errors import HyLoError
from hylo.files import read_json

EXAM = " ".join(prose(99).split()[:80])


def wheel(cache: Path, name: str, version: str, files: dict[str, str]) -> None:
    folder = cache / "packages" / "pypi"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def spec(**changes: Any) -> CorpusSpec:
    sources = [
        {"package": "pypi:novels=1.0", "licence": "MIT", "group": "prose", "read": "text", "files": "*.txt"},
        {
            "package": "pypi:manual=2.0",
            "licence": "MIT",
            "group": "manuals",
            "read": "text",
            "files": "*.txt",
            "join": True,
            "document_characters": 9000,
        },
        {"package": "python:topics", "licence": "PSF-2.0", "group": "manuals", "read": "text"},
    ]
    # The tokenizer of the tests has no chat template.
    tasks = {"tokens": 60_000, "lengths": [1024, 2048], "chats": 0}
    return CorpusSpec.model_validate({"held_out": 0.1, "sources": sources, "tasks": tasks} | changes)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Novels of which two are copies and one quotes an exam, a manual, and Python's topics."""
    output = tmp_path_factory.mktemp("corpus")
    novels = {f"n/{i}.txt": prose(i, 900) for i in range(40)}
    novels |= {"n/copy.txt": prose(3, 900), "n/near.txt": prose(4, 900).replace("lamp", "light", 3)}
    novels["n/quote.txt"] = f"{prose(50, 600)}\n\nThe exam asked: {EXAM}\n\n{prose(51, 600)}"
    wheel(output / ".cache", "novels", "1.0", novels)
    wheel(output / ".cache", "manual", "2.0", {f"m/page{i}.txt": prose(100 + i, 400) for i in range(12)})
    return output, build(spec(), output, processes=1, evaluations=[Labelled("exam", [EXAM])])


def rows(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.jsonl.zst"))
    return {row["name"]: row["text"] for file in files for row in reading(file) if "text" in row}


def test_copies_and_exams_are_left_out(built: tuple[Path, dict[str, Any]]) -> None:
    output, told = built
    every = rows(output / "train") | rows(output / "held-out")
    novels = {name for name in every if name.startswith("novels/")}
    assert len(novels) == 41
    assert len({"novels/n/3.txt", "novels/n/copy.txt"} & novels) == 1
    assert all(shared_runs(text, EXAM) == 0 for text in every.values())
    quote = every["novels/n/quote.txt"]
    assert prose(50, 600).strip() in quote
    assert "The exam asked" not in quote
    first = told["sources"][0]
    assert first["dropped_characters"]["copied pages"] > 8000
    assert told["evaluation_sets"]["exam"]["runs_found"] == len(EXAM.split()) - 12


def test_the_split_is_by_document_and_shares_nothing(built: tuple[Path, dict[str, Any]]) -> None:
    output, told = built
    held_out, training = rows(output / "held-out"), rows(output / "train")
    assert 3 <= len(held_out) < 60
    assert not set(held_out) & set(training)
    assert rows(output / "held-out-exercises")
    for text in held_out.values():
        assert not any(shared_runs(text, other) for name, other in training.items() if "exercises" not in name)
    assert sum(one["held_out_documents"] for one in told["sources"]) == len(held_out)
    assert sum(one["documents"] for one in told["sources"]) + len(rows(output / "train" / "exercises")) == len(training)


def test_a_manual_is_joined_in_order(built: tuple[Path, dict[str, Any]]) -> None:
    output, _ = built
    every = rows(output / "train") | rows(output / "held-out")
    manual = [every[name] for name in sorted(every) if name.startswith("manual/")]
    assert len(manual) > 1
    joined = "\n\n".join(manual)
    places = [joined.index(prose(100 + i, 400)[:60]) for i in range(12)]
    assert places == sorted(places)


def test_a_build_can_be_repeated(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    output, told = built
    again = build(spec(), tmp_path, cache=output / ".cache", processes=1, evaluations=[Labelled("exam", [EXAM])])
    assert again | {"date": told["date"]} == told
    for folder in ("train", "held-out"):
        assert rows(tmp_path / folder) == rows(output / folder)


def test_tokens_and_packs_are_read_by_recipes(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    output, _ = built
    encoder = Encoder(make_tokenizer())
    stores = tokenise(output, encoder)
    told = totals(stores)
    texts = rows(output / "train")
    assert told["documents"] == len(texts)
    assert told["groups"]["prose"]["tokens"] == sum(
        len(encoder.tokenizer(text)["input_ids"]) for name, text in texts.items() if name.startswith("novels/")
    )
    packs = write_packs(stores, encoder, tmp_path, pieces=2, tokens=told["tokens"] // 3, largest_bytes=40_000)
    assert [pack["tokens"] // 1000 for pack in packs] == pytest.approx([told["tokens"] // 3000] * 2, rel=0.15)
    parts = packs[0]["files"]
    assert len(parts) > 1
    assert all(part["bytes"] <= 40_000 for part in parts)
    for pack in packs:
        content = b"".join((tmp_path / part["name"]).read_bytes() for part in pack["files"])
        (tmp_path / "whole.tar").write_bytes(lzma.decompress(content))
        with tarfile.open(tmp_path / "whole.tar") as archive:
            archive.extractall(tmp_path, filter="data")
    # Both packs in one folder are one corpus, and no document is in it twice.
    sections = [{"source": f"tokens:{tmp_path}/tokens/{group}", "weight": 1} for group in ("prose", "exercises")]
    section = DataSection.model_validate({"train": sections, "eval": [str(output / "held-out")]})
    corpus = Corpus(section, make_tokenizer, cache=tmp_path / "cache")
    corpus.check()
    windows = corpus.prepare(tokens=None, length=256, seed=0)
    prose_store = windows.stores[0]
    assert prose_store.tokens == sum(pack["groups"].get("prose", {"tokens": 0})["tokens"] for pack in packs)
    begins = np.cumsum(prose_store.lengths) - prose_store.lengths
    found = [
        encoder.tokenizer.decode(prose_store.read(int(begin), int(size))[0])
        for begin, size in zip(begins, prose_store.lengths, strict=True)
    ]
    known = {encoder.tokenizer.decode(encoder.tokenizer(text)["input_ids"]) for text in texts.values()}
    assert len(set(found)) == len(found)
    assert set(found) <= known


def test_lengths_are_counted() -> None:
    told = histogram(np.array([5, 255, 256, 70_000, 10**6]))
    assert sum(row["documents"] for row in told) == 5
    assert told[0] == {"from_tokens": 0, "documents": 2, "tokens": 260}
    assert {row["from_tokens"]: row["documents"] for row in told}[65536] == 1
    assert told[-1]["tokens"] == 10**6


def test_a_package_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hylo.corpus.packages._command", lambda *_: ["no-such-program"])
    missing = {"package": "npm:gone=1.0", "licence": "MIT", "group": "prose", "read": "text", "files": "*"}
    wheel(tmp_path / ".cache", "novels", "1.1", {f"n/{i}.txt": prose(i, 900) for i in range(6)})
    there = spec().sources[0].model_dump()
    with_missing = spec(sources=[there, missing], tasks={})
    with pytest.raises(MissingPackageError, match=r"npm:gone cannot be had: no-such-program is not installed"):
        fetch(PackageSource.model_validate(missing), tmp_path)
    told = build(with_missing, tmp_path, evaluations=[], processes=1)
    assert told["missing_packages"] == 1
    # Another version than was asked for does, and is told.
    assert told["sources"][0]["package"] == "pypi:novels=1.1"
    assert told["sources"][0]["asked_for"] == "pypi:novels=1.0"
    assert "not installed" in told["sources"][1]["missing"]
    with pytest.raises(MissingPackageError, match="npm:gone cannot be had"):
        build(with_missing, tmp_path, evaluations=[], processes=1, strict=True)


def test_what_is_wrong_with_a_source_is_told(tmp_path: Path) -> None:
    wheel(tmp_path, "novels", "1.0", {"a.txt": prose(1)})
    source = spec().sources[0].model_dump()
    for changes, message in (
        ({"files": ["*.html"]}, r"novels: no file of novels-1.0-py3-none-any.whl is named like \*\.html"),
        ({"read": "runes"}, "novels: no reader 'runes'; expected one of html"),
    ):
        with pytest.raises(HyLoError, match=message):
            build(spec(sources=[source | changes]), tmp_path, cache=tmp_path, processes=1, evaluations=[])
    file = tmp_path / "spec.yaml"
    for text, message in (
        (
            "sources: [{package: pip=1, licence: MIT, group: prose, read: text}]",
            "is no package; expected debian:NAME=VERSION",
        ),
        ("seed: [", "is no YAML"),
        ("sources: []", "sources: List should have at least 1 item"),
    ):
        file.write_text(text)
        with pytest.raises(HyLoError, match=message):
            load_spec(file)


def test_rows_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    with pytest.raises(RuntimeError), writing(path) as out:
        out.write({"text": "a"})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with writing(path) as out:
        out.write({"text": "ä"})
    assert list(reading(path)) == [{"text": "ä"}]


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    wheel(tmp_path / ".cache", "novels", "1.0", {f"n/{i}.txt": prose(i, 900) for i in range(6)})
    build(spec(sources=[spec().sources[0].model_dump()], tasks={}), tmp_path, evaluations=[], processes=1)
    tokenise(tmp_path, Encoder(make_tokenizer()))
    source = f"tokens:{tmp_path}/tokens/train"
    store = next((tmp_path / "tokens").rglob("store.json"))
    held_out = (
        {"eval": [str(tmp_path / "held-out")]} if (tmp_path / "held-out").exists() else {"eval": ["python:topics"]}
    )
    corpus = Corpus(DataSection.model_validate({"train": [source]} | held_out), make_tokenizer, cache=tmp_path)
    corpus.check()
    store.write_text(json.dumps(read_json(store) | {"vocabulary": "other"}))
    with pytest.raises(HyLoError, match="expected tokens of the base's tokenizer"):
        corpus.check()
    store.write_text("[]")
    with pytest.raises(HyLoError, match=r"store\.json does not say how its tokens were made"):
        corpus.check()
    alone = Corpus(DataSection.model_validate({"train": [source]}), make_tokenizer, cache=tmp_path)
    with pytest.raises(HyLoError, match="hold no text to evaluate on; give some with eval:"):
        alone.check()
    with pytest.raises(HyLoError, match=r"holds no tokens; expected a folder with store\.json"):
        Corpus(DataSection.model_validate({"train": [f"tokens:{tmp_path}/train"]}), make_tokenizer).check()


def test_the_recipe_is_understood() -> None:
    found = load_spec(Path(__file__).parents[2] / "recipes" / "smollm2-135m" / "corpus.yaml")
    assert len(found.sources) > 100
    assert all(source.reference or source.package.startswith("python:") for source in found.sources)
