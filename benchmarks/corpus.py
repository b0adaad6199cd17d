"""What the corpus of a recipe is made of, as a result with a plot; and a second look at whether it is clean.

python recipes/smollm2-135m/corpus.py --output corpus --packs 2
python benchmarks/corpus.py --corpus corpus --name corpus-smollm2

The second look: documents drawn from the training text are compared with all evaluation sets, and with what the corpus
holds out, by the code that keeps evaluation text out of every run (`hylo.data.held_out`) and not by the corpus's own.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, circumstances, write_result

from hylo.corpus.build import training_files
from hylo.corpus.evaluations import evaluation_sets
from hylo.corpus.rows import reading
from hylo.data.documents import Document
from hylo.data.held_out import HeldOut
from hylo.data.sources import read_documents
from hylo.files import read_json


def second_look(corpus: Path, count: int, seed: int = 0) -> dict[str, int]:
    """How many of `count` documents share 13 words in a row with what is evaluated on."""
    rng = random.Random(seed)
    drawn: list[Document] = []
    files = list(training_files(corpus))
    for group, path in files:
        if group.startswith("exercises"):
            continue
        rows = [Document(row["name"], row["text"]) for row in reading(path)]
        drawn += rng.sample(rows, min(len(rows), -(-count // len(files))))
    held_out = read_documents([str(corpus / "held-out")])
    texts = [Document(one.name, text) for one in evaluation_sets() for text in one.texts]
    judge = HeldOut([*texts, *held_out])
    sharing = [document.name for document in drawn if judge.training(document) is not document]
    for name in sharing:
        print(f"shares 13 words with evaluation text: {name}", file=sys.stderr)
    return {
        "documents": len(drawn),
        "characters": sum(len(document.text) for document in drawn),
        "documents_that_share_13_words": len(sharing),
    }


def plot(tokens: dict[str, Any], path: Path) -> None:
    """Tokens by length of document, and by group."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    lengths = tokens["lengths"]
    names = [_short(row["from_tokens"]) for row in lengths]
    labels = [f"{a}–{b}" for a, b in zip(names, [*names[1:], ""], strict=True)]
    left.bar(labels, [row["tokens"] / 1e6 for row in lengths], color="#3b6ea5")
    left.set(title="by length of document", xlabel="tokens a document", ylabel="million tokens")
    left.tick_params(axis="x", rotation=45)
    for at, row in enumerate(lengths):
        left.text(at, row["tokens"] / 1e6, f"{row['documents']:,}", ha="center", va="bottom", fontsize=7)
    groups = sorted(tokens["groups"].items(), key=lambda item: item[1]["tokens"])
    right.barh([name for name, _ in groups], [one["tokens"] / 1e6 for _, one in groups], color="#7a9e4f")
    right.set(title="by group", xlabel="million tokens")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.text(0.02, 0.95, "numbers: documents", transform=left.transAxes, fontsize=7, va="top")
    figure.savefig(path, dpi=150)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder that the recipe's script wrote")
    parser.add_argument("--name", default="corpus-smollm2", help="of the result files")
    parser.add_argument("--documents", type=int, default=1000, help="to look at a second time")
    arguments = parser.parse_args()
    told = read_json(arguments.corpus / "corpus.json")
    told["second_look"] = second_look(arguments.corpus, arguments.documents)
    write_result(RESULTS / f"{arguments.name}.json", {"made": told.pop("date")} | circumstances() | told)
    plot(told["tokens"], RESULTS / f"{arguments.name}.png")
    print(json.dumps({key: told[key] for key in ("tokens", "second_look")}, indent=2))
    if told["second_look"]["documents_that_share_13_words"]:
        sys.exit("expected no training text that shares 13 words in a row with what is evaluated on")


if __name__ == "__main__":
    main()
