"""Checkpoints as they are saved load as they are; a tensor that is not what it should be is named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")

from released import write_released
from served_engine import TOLERANCE, engine, greedy, random_prompts, save_hybrid, worst_difference

from hylo.upcycle.bases import load_model
from hylo.upcycle.interop import import_released


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refuses(folder: Path, message: str) -> None:
    with pytest.raises(Exception, match=message), engine(folder):
        pass


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_hybrid(tmp_path, "gdn")
    edit(tmp_path, lambda tensors: tensors.pop("model.layers.1.mixer.k_conv1d.weight"))
    refuses(tmp_path, r"checkpoint: model\.layers\.1\.mixer\.k_conv1d\.weight is missing$")


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    save_hybrid(tmp_path, "mla")
    name = "model.layers.0.mixer.kv_b_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: torch.zeros(24, 9)}))
    refuses(tmp_path, r"checkpoint: model\.layers\.0\.mixer\.kv_b_proj\.weight is \[24, 9\]; expected \[24, 10\]")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    save_hybrid(tmp_path, "mamba2")
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.0.mixer.extra": torch.zeros(2)}))
    refuses(tmp_path, r"checkpoint: model\.layers\.0\.mixer\.extra is no tensor of this model")


@pytest.mark.parametrize(("family", "linear"), [("llama", "gdn"), ("qwen3", "mamba")])
def test_an_imported_checkpoint(family: str, linear: str, tmp_path: Path) -> None:
    """The released format, through `hylo import`."""
    import_released(write_released(tmp_path / "released", family, linear), tmp_path / "hybrid")
    prompts = random_prompts([5, 60, 33])
    with engine(tmp_path / "hybrid", max_num_batched_tokens=32) as llm:
        answers = greedy(llm, prompts, [9, 9, 9])
    assert worst_difference(load_model(tmp_path / "hybrid", torch.float32), prompts, answers) < TOLERANCE


def test_tied_embeddings(tmp_path: Path) -> None:
    model = save_hybrid(tmp_path, "mix", tie_word_embeddings=True)
    prompts = random_prompts([7, 30])
    with engine(tmp_path) as llm:
        answers = greedy(llm, prompts, [8, 8])
    assert worst_difference(model, prompts, answers) < TOLERANCE
