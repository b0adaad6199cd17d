"""Where configs come from, and one line for what is none."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from base_configs import LLAMA_1B, LLAMA_3B, QWEN, write_config

from hylo.errors import HyLoError
from hylo.plan import source
from hylo.plan.source import read_config


def test_folders_and_files(base_folder: Path, tmp_path: Path) -> None:
    assert read_config(str(base_folder)).hidden_size == 32
    assert read_config(str(base_folder / "config.json")).hidden_size == 32
    assert read_config(str(write_config(tmp_path, QWEN))).model_type == "qwen3"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_families(tmp_path: Path, family: str) -> None:
    config = read_config(str(write_config(tmp_path, LLAMA_3B, model_type=family, rope_scaling=None)))
    assert config.model_type == family


def test_a_hub_id_downloads_its_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, asked = write_config(tmp_path, LLAMA_1B), []
    revisions: list[str | None] = []

    def download(*arguments: str, revision: str | None) -> str:
        asked.append(arguments)
        revisions.append(revision)
        return str(file)

    monkeypatch.setattr(source, "hf_hub_download", download)
    assert read_config(LLAMA_1B).num_hidden_layers == 16
    assert asked == [(LLAMA_1B, "config.json")]
    read_config(LLAMA_1B, "v2")
    assert revisions == [None, "v2"]
    assert source.hf_hub_download is not huggingface_hub.hf_hub_download


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"model_type": "gpt2"}', "'gpt2' family is not supported; expected llama, mistral, qwen2, qwen3"),
        ('{"model_type": "unheard-of"}', "'unheard-of' family"),
        ("{}", "None family"),
        ("[]", "JSON object"),
        ("{", "not readable JSON"),
        (json.dumps({"model_type": "llama", "num_hidden_layers": 0}), "num_hidden_layers is 0"),
        (json.dumps({"model_type": "llama", "hidden_size": "wide"}), "config.json"),
    ],
)
def test_refused(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(HyLoError, match=named) as error:
        read_config(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("reference", "named"),
    [
        ("./nowhere", "./nowhere does not exist"),
        ("nobody/nothing", "nobody/nothing is no local path"),
        ("nowhere.gguf", "nowhere.gguf does not exist"),
        ("a/b/c", "a/b/c does not exist"),
    ],
)
def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, named: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HyLoError, match=named):
        read_config(reference)
    with pytest.raises(HyLoError, match=r"holds no config\.json"):
        read_config(str(tmp_path))
