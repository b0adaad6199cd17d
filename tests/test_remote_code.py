"""A checkpoint loads where nobody imported this package, if remote code is allowed. In processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import hybrid_config, make_tokenizer, random_hybrid

from hylo import HyLoConfig
from hylo.remote_code import AUTO_MAP, write_remote_code

LOAD = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
assert "hylo" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
assert type(model).__module__ == "hylo.modeling", type(model)
tokenizer = AutoTokenizer.from_pretrained({folder!r})
ids = tokenizer("bado mila", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[0].tolist())
assert type(AutoModel.from_pretrained({folder!r}, trust_remote_code=True)).__name__ == "HyLoModel"
model.save_pretrained({again!r})
"""
IMPORTED = """
import hylo
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
assert type(model).__module__ == "hylo.modeling", type(model)
"""
NOT_ALLOWED = """
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=False)
"""
# As where the package is not installed.
NOT_INSTALLED = """
import sys
sys.modules["hylo"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
"""
MODEL_FILE = """
from transformers.dynamic_module_utils import get_class_from_dynamic_module
for reference in {references!r}:
    print(get_class_from_dynamic_module(reference, {folder!r}).__name__)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote") / "model"
    random_hybrid(["mla", "gdn", "attention"]).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    write_remote_code(path)
    return path


def run(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}
    # Nobody answers questions.
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_without_importing_the_package(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    result = run(LOAD.format(folder=str(folder), again=str(again)), tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)) > 5
    # Saving again copies no source of the package.
    assert sorted(path.name for path in again.glob("*.py")) == ["configuration_hylo.py", "modeling_hylo.py"]
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_with_the_package_imported_nothing_is_asked_or_said(folder: Path, tmp_path: Path) -> None:
    result = run(IMPORTED.format(folder=str(folder)), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "remote" not in result.stderr
    assert "custom code" not in result.stderr + result.stdout
    assert not (tmp_path / "home" / "modules").exists()


def test_without_leave_it_is_refused(folder: Path, tmp_path: Path) -> None:
    result = run(NOT_ALLOWED.format(folder=str(folder)), tmp_path)
    assert result.returncode != 0
    assert "trust_remote_code=True" in result.stderr


def test_a_missing_package_is_named(folder: Path, tmp_path: Path) -> None:
    result = run(NOT_INSTALLED.format(folder=str(folder)), tmp_path)
    assert result.returncode != 0
    assert "this checkpoint needs the package hylo" in result.stderr
    # PyPI's package of that name, if there is one, is not this.
    assert "pip install hylo" not in result.stderr


def test_every_class_is_where_the_map_says(folder: Path, tmp_path: Path) -> None:
    """transformers finds the models by their config; other programs read the map."""
    result = run(MODEL_FILE.format(references=list(AUTO_MAP.values()), folder=str(folder)), tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["HyLoConfig", "HyLoModel", "HyLoForCausalLM"]


def test_the_map_passes_through_the_config(tmp_path: Path) -> None:
    config = hybrid_config(["mla", "gdn"])
    config.auto_map = dict(AUTO_MAP)
    config.save_pretrained(tmp_path)
    assert HyLoConfig.from_pretrained(tmp_path).auto_map == AUTO_MAP
