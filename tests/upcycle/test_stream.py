"""Safetensors one tensor at a time: the files are those of the library, and broken ones are named."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hylo.errors import HyLoError
from hylo.upcycle.stream import TensorInfo, TensorReader, TensorWriter

TENSORS = {
    "b.weight": torch.randn(3, 5),
    "a.weight": torch.randn(7, 2).bfloat16(),
    "half": torch.randn(3).half(),
    "wide": torch.randn(2, 1, 4, dtype=torch.float64),
    "scalar": torch.tensor(2.5),
    "empty": torch.ones(0, 4),
    "ünïcode": torch.randn(1),
}
INFOS = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}


def test_the_file_is_what_the_library_writes(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "ours.safetensors", INFOS) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_view_is_written_as_its_values(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6, requires_grad=True)
    with TensorWriter(tmp_path / "file.safetensors", {"t": TensorInfo(torch.Size([3, 4]), tensor.dtype)}) as writer:
        writer.write("t", tensor.T[1:4])
    assert torch.equal(load_file(tmp_path / "file.safetensors")["t"], tensor.T[1:4])


def test_what_was_announced_must_come(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="6 tensors were not written"), TensorWriter(tmp_path / "f", INFOS) as writer:
        writer.write("half", TENSORS["half"])
    for wrong in (torch.ones(4).half(), torch.ones(3)):
        with pytest.raises(ValueError, match="announced"), TensorWriter(tmp_path / "f", INFOS) as writer:
            writer.write("half", wrong)
    with pytest.raises(ValueError, match="written before"), TensorWriter(tmp_path / "f", INFOS) as writer:
        writer.write("half", TENSORS["half"])
        writer.write("half", TENSORS["half"])
    with pytest.raises(HyLoError, match="int8"):
        TensorWriter(tmp_path / "f", {"t": TensorInfo(torch.Size([1]), torch.int8)})


def test_an_error_inside_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TensorWriter(tmp_path / "f", INFOS):
        raise KeyboardInterrupt


def test_reading_one_file_and_shards(tmp_path: Path) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    for folder in (whole, sharded):
        folder.mkdir()
    save_file(TENSORS, whole / "model.safetensors")
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, sharded / f"part{number}.safetensors")
        weight_map[name] = f"part{number}.safetensors"
    # A file that the index does not name is no part of the checkpoint.
    save_file({"other": torch.ones(1)}, sharded / "other.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for folder in (whole, sharded):
        with TensorReader(folder) as reader:
            assert reader.tensors == INFOS
            assert "half" in reader
            assert "other" not in reader
            for name, tensor in TENSORS.items():
                assert torch.equal(reader[name], tensor)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(HyLoError, match=r"holds no \*.safetensors"):
        TensorReader(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", 700)
    with pytest.raises(HyLoError, match=r"model\.safetensors is not a whole"):
        TensorReader(tmp_path)
    save_file({"t": torch.ones(2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(HyLoError, match="t is I32; expected one of F64"):
        TensorReader(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t": "gone.safetensors"}}))
    with pytest.raises(HyLoError, match=r"gone\.safetensors"):
        TensorReader(tmp_path)
    index.write_text("[]")
    with pytest.raises(HyLoError, match="weight_map"):
        TensorReader(tmp_path)
