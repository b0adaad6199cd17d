"""Rotary pairs by what they gain: which are chosen, and that the model is theirs from then on."""

from pathlib import Path

import pytest
import torch
from tiny import convert_base, random_ids, statistics_of
from torch import Tensor
from transformers import LlamaForCausalLM

from hylo import HyLoConfig, HyLoError
from hylo.mixers.mla import MLAGeometry
from hylo.upcycle.bases import load_model
from hylo.upcycle.calibrate import calibrate, calibrate_checkpoint
from hylo.upcycle.initialise.activation import ActivationDecomposition
from hylo.upcycle.pairs import pairs_by_gain

SIZES = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "kv_lora_rank": 6, "rope_pairs": [2, 3]}
GEOMETRY = MLAGeometry(6, 4, 4, 8, rope_pairs=(2, 3))


def batches_of(count: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": random_ids(2, 24), "attention_mask": torch.ones(2, 24).long()} for _ in range(count)]


@pytest.mark.parametrize("layers", [[0], [1, 3], [0, 1, 2, 3]])
@torch.no_grad()
def test_chosen_are_those_that_gain_most(teacher: LlamaForCausalLM, layers: list[int]) -> None:
    batches = batches_of(3)
    gains = torch.zeros(4, dtype=torch.float64)
    for i in layers:
        gains += ActivationDecomposition(statistics_of(teacher, *batches, layer=i), GEOMETRY).pair_gains
    assert pairs_by_gain(teacher, batches, GEOMETRY, layers) == sorted(gains.topk(2).indices.tolist())


@torch.no_grad()
def test_the_model_is_of_the_chosen_pairs_from_then_on(
    base_folder: Path, tmp_path: Path, teacher: LlamaForCausalLM
) -> None:
    """Its config says them, and what is saved and loaded again computes the same."""
    convert_base(base_folder, tmp_path / "hybrid", "2MLA2GDN", {"mla": SIZES})
    student = load_model(tmp_path / "hybrid", torch.float32)
    batches = batches_of(4)
    mla = [i for i, mixer in enumerate(student.config.token_mixers) if mixer == "mla"]
    chosen = pairs_by_gain(teacher, batches, GEOMETRY, mla)
    assert chosen != SIZES["rope_pairs"]
    calibrate(student, teacher, batches, latents=True, pairs=True)
    assert student.config.mixer_geometry["mla"]["rope_pairs"] == chosen
    assert all(student.model.layers[i].mixer.geometry.rope_pairs == tuple(chosen) for i in mla)
    student.save_pretrained(tmp_path / "calibrated")
    ids = random_ids(2, 30)
    again = load_model(tmp_path / "calibrated", torch.float32)
    torch.testing.assert_close(again(ids).logits, student(ids).logits, rtol=0, atol=1e-6)

    # As if the pairs had been the geometry's from the beginning.
    convert_base(base_folder, tmp_path / "told", "2MLA2GDN", {"mla": SIZES | {"rope_pairs": chosen}})
    told = load_model(tmp_path / "told", torch.float32)
    calibrate(told, teacher, batches, latents=True)
    torch.testing.assert_close(told(ids).logits, student(ids).logits, rtol=0, atol=1e-4)


def test_a_checkpoint_keeps_them(base_folder: Path, tmp_path: Path) -> None:
    from hylo.data.windows import Windows

    convert_base(base_folder, tmp_path / "hybrid", "2MLA2GDN", {"mla": SIZES})
    windows = Windows([random_ids(1, 24)[0].tolist() for _ in range(6)], 24)
    (tmp_path / "out").mkdir()
    arguments = (tmp_path / "hybrid", base_folder, windows, tmp_path / "out")
    calibrate_checkpoint(*arguments, dtype=torch.float32, latents=True, pairs=True)
    told = HyLoConfig.from_pretrained(tmp_path / "out").mixer_geometry
    assert told is not None
    assert told["mla"]["rope_pairs"] == [0, 1]


@torch.no_grad()
def test_values_that_are_not_finite_are_told(teacher: LlamaForCausalLM) -> None:
    teacher.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(HyLoError, match="not finite; are the base's weights sound"):
        pairs_by_gain(teacher, batches_of(1), GEOMETRY, [0, 1])


def test_pairs_need_weights_made_anew(base_folder: Path, tmp_path: Path, teacher: LlamaForCausalLM) -> None:
    convert_base(base_folder, tmp_path / "hybrid", "2MLA2GDN", {"mla": SIZES})
    with pytest.raises(HyLoError, match="expected latents to be true"):
        calibrate(load_model(tmp_path / "hybrid"), teacher, batches_of(1), pairs=True)
