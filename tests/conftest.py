"""Fixtures that many tests share. Nothing here or in the tests reaches a network."""

import os
import tempfile

# Before transformers is imported: a hub id in a test must fail at once, not be looked up.
os.environ["HF_HUB_OFFLINE"] = "1"
# The laws are held on the CPU; tests/gpu asks for a GPU by this variable.
if not os.environ.get("HYLO_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tokens of the tests' texts are kept no longer than the tests run.
_cache = tempfile.TemporaryDirectory(prefix="hylo-tests-")
os.environ["HYLO_CACHE"] = _cache.name
# Before torch is: threads that spin while they wait make small products hundreds of times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import MIXED_LAYOUT, convert_base, write_base, write_texts
from transformers import LlamaForCausalLM
from transformers.utils import logging

from hylo import HyLoForCausalLM
from hylo.upcycle.bases import load_model
from hylo.upcycle.convert import ConversionPlan

logging.disable_progress_bar()
# Tiny products are slower on several threads than on one.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers, 4 heads and 2 KV heads, with a tokenizer."""
    return write_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def one_kv_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one KV head, where MLA can be exact."""
    return write_base(tmp_path_factory.mktemp("one_kv") / "llama", num_key_value_heads=1, num_hidden_layers=2)


@pytest.fixture(scope="session")
def mixed_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base converted to a layout with every mixer."""
    folder = tmp_path_factory.mktemp("mixed") / "hybrid"
    convert_base(base_folder, folder, MIXED_LAYOUT)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve text files that share no sentence."""
    return write_texts(tmp_path_factory.mktemp("texts"), 12)


@pytest.fixture
def teacher(base_folder: Path) -> LlamaForCausalLM:
    return load_model(base_folder, torch.float32)


@pytest.fixture
def student(mixed_folder: Path) -> HyLoForCausalLM:
    return load_model(mixed_folder, torch.float32)


@pytest.fixture
def to_layout(base_folder: Path, tmp_path: Path) -> Callable[..., tuple[ConversionPlan, Path]]:
    """Converts the base to a layout in a new folder; returns the plan and the folder."""
    made: list[Path] = []

    def convert(
        layout: str | list[str], geometry: dict | None = None, **options: object
    ) -> tuple[ConversionPlan, Path]:
        made.append(tmp_path / f"hybrid{len(made)}")
        return convert_base(base_folder, made[-1], layout, geometry, **options), made[-1]

    return convert
