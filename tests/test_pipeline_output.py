"""Where a run may be written: what it writes is not to be read as its text."""

from pathlib import Path

import pytest
from stages import make_recipe
from tiny import sentences, write_texts

from hylo.errors import HyLoError
from hylo.pipeline import UpcycleRun


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_an_output_that_would_be_read_as_text(base_folder: Path, tmp_path: Path, pattern: str) -> None:
    write_texts(tmp_path, 3)
    (tmp_path / "below").mkdir()
    recipe = make_recipe(base_folder, tmp_path / pattern)
    with pytest.raises(HyLoError, match=r"below/run is inside .*, all of which is read as text; choose another"):
        UpcycleRun(recipe, tmp_path / "below" / "run").run()
    assert not (tmp_path / "below" / "run").exists()


@pytest.mark.parametrize(
    ("pattern", "refused"),
    [
        ("runs/*/*/*.txt", True),
        ("runs/*/stage1/*.txt", True),
        ("runs/mine/model/[mv]*.txt", True),
        ("*/*/.stage?.checkpoints/*.txt", True),
        ("runs/*/*", True),
        ("runs/*/*.txt", False),
        ("runs/*/texts/*.txt", False),
        ("runs/other*/*/*.txt", False),
        ("*/*.txt", False),
        ("runs/*/model/**/*.txt", True),
        ("runs/*/texts/**/*.txt", False),
        ("*/other/texts/**/*.txt", False),
        ("linked/*/*.txt", True),
        ("linked/texts/*.txt", False),
    ],
)
def test_an_output_that_a_pattern_would_read(base_folder: Path, tmp_path: Path, pattern: str, refused: bool) -> None:
    """What the run writes would be other text to the command that goes on with it."""
    recipe = make_recipe(base_folder, tmp_path / pattern)
    for name in ("", "runs", "runs/other", "runs/other/texts", "runs/other/stage1", "runs/other/.stage1.checkpoints"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        write_texts(tmp_path / name, 3)
    (tmp_path / "runs" / "mine" / "model").mkdir(parents=True)
    (tmp_path / "linked" / "texts").mkdir(parents=True)
    write_texts(tmp_path / "linked" / "texts", 3)
    (tmp_path / "linked" / "elsewhere").symlink_to(tmp_path / "runs" / "mine" / "model")
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    for name in ("merges.txt", "vocab.txt"):
        (tmp_path / "runs" / "mine" / "model" / name).write_text(sentences(5))
    run = UpcycleRun(recipe, tmp_path / "runs" / "mine")
    if refused:
        with pytest.raises(HyLoError, match=r"would read as text what the run writes to .*mine; choose another output"):
            run._check_output()
    else:
        run._check_output()


def test_an_output_that_a_link_leads_to(base_folder: Path, tmp_path: Path) -> None:
    for name in ("texts", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "runs")
    recipe = make_recipe(base_folder, write_texts(tmp_path / "texts", 3))
    with pytest.raises(HyLoError, match=r"runs/run is inside .*/runs, all of which is read as text"):
        UpcycleRun(recipe, tmp_path / "runs" / "run").run()
