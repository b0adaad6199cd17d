"""Safetensors tensor by tensor: a checkpoint of any size passes through the memory of its largest tensor."""

import json
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hylo.errors import HyLoError
from hylo.files import read_json

_WHOLE = "model.safetensors"
_INDEX = f"{_WHOLE}.index.json"
# In the order in which safetensors stores them: the widest first, so that every value is aligned.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class TensorReader:
    """The tensors of all safetensors files of a folder, each read when it is asked for.

    Use as a context manager; the files stay open inside it.

    Attributes:
        tensors: every tensor there is, by name.

    Raises:
        HyLoError: where the folder holds no safetensors, or a file is cut off or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()
        for file in _weight_files(folder):
            self._read_header(file)

    def _read_header(self, file: Path) -> None:
        try:
            opened = self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise HyLoError(f"{file} is not a whole safetensors file: {error}") from None
        for name in opened.keys():  # noqa: SIM118
            stored = opened.get_slice(name)
            if stored.get_dtype() not in _DTYPES:
                raise HyLoError(f"{file}: {name} is {stored.get_dtype()}; expected one of {', '.join(_DTYPES)}")
            self.tensors[name] = TensorInfo(torch.Size(stored.get_shape()), _DTYPES[stored.get_dtype()])
            self._file_of[name] = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self._file_of[name]].get_tensor(name)


def read_weight_map(folder: Path) -> dict[str, Path] | None:
    """The file of each tensor, where a folder has an index and no file of all; as transformers reads them.

    Raises HyLoError where that is none.
    """
    if (folder / _WHOLE).is_file() or not (folder / _INDEX).is_file():
        return None
    index = read_json(folder / _INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise HyLoError(f"{folder / _INDEX} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise HyLoError(f"{folder / _INDEX}: {name} is in {file!r}; expected the name of a file")
    return {name: folder / file for name, file in weight_map.items()}


def files_without_index(folder: Path) -> list[Path]:
    """The file of all tensors, where there is one: another beside it may be an adapter, or the same once more."""
    whole = folder / _WHOLE
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _weight_files(folder: Path) -> list[Path]:
    """One file, or the shards that the index names."""
    weight_map = read_weight_map(folder)
    if weight_map is not None:
        return sorted(set(weight_map.values()))
    files = files_without_index(folder)
    if not files:
        raise HyLoError(f"{folder} holds no *.safetensors")
    return files


class TensorWriter:
    """Writes one safetensors file whose tensors are known beforehand, and come one by one, in any order.

    Use as a context manager. The file equals, byte for byte, what `safetensors.torch.save_file` makes of them.
    """

    def __init__(self, file: Path, tensors: Mapping[str, TensorInfo]) -> None:
        """Raises HyLoError on a dtype that is no floating point of 16 bits or more."""
        self._tensors = dict(tensors)
        self._missing = set(tensors)
        header, self._offsets = _layout(self._tensors)
        self._start = 8 + len(header)
        self._file = file.open("wb")
        self._file.write(struct.pack("<Q", len(header)) + header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception: type[BaseException] | None, *rest: object) -> None:
        self._file.close()
        if exception is None and self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, among them {min(self._missing)}")

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError where the tensor is not what was announced, or was written before."""
        announced = self._tensors[name]
        if name not in self._missing:
            raise ValueError(f"{name} was written before")
        if TensorInfo(tensor.shape, tensor.dtype) != announced:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, announced as {announced}")
        self._file.seek(self._start + self._offsets[name])
        self._file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._missing.remove(name)


def _layout(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The header, padded to 8 bytes, and where each tensor starts after it."""
    order = list(_DTYPES.values())
    for name, tensor in tensors.items():
        if tensor.dtype not in order:
            raise HyLoError(f"{name} is {tensor.dtype}; expected one of {', '.join(map(str, order))}")
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name)):
        tensor = tensors[name]
        offsets[name], end = end, end + tensor.size_bytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offsets[name], end],
        }
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8), offsets
