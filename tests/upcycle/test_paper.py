"""The published start: which rows MLA takes, and what is random."""

from pathlib import Path

import pytest
import torch
from tiny import convert_base

from hylo.errors import HyLoError
from hylo.upcycle.bases import Base, load_model
from hylo.upcycle.convert import convert, plan_conversion

STANDARD = {"mla": {"rope_pairs": None}}


def converted(base_folder: Path, tmp_path: Path, layout: str) -> dict[str, torch.Tensor]:
    with Base.open(base_folder) as base:
        geometry = STANDARD if "MLA" in layout else {}
        convert(plan_conversion(base, layout, geometry, start="paper"), base, tmp_path / "paper")
    return load_model(tmp_path / "paper", torch.float32).state_dict()


def test_mla_takes_the_last_rows_as_rotary(base_folder: Path, tmp_path: Path) -> None:
    made = converted(base_folder, tmp_path, "4MLA")
    source = load_model(base_folder, torch.float32).model.layers[2].self_attn
    mixer = {name.removeprefix("model.layers.2.mixer."): value for name, value in made.items()}
    assert torch.equal(mixer["q_proj.weight"], source.q_proj.weight)
    keys = source.k_proj.weight.unflatten(0, (-1, source.head_dim))[:, source.head_dim // 2 :]
    rope = keys.shape[1]
    torch.testing.assert_close(mixer["kv_a_proj_with_mqa.weight"][-rope:], keys.mean(0))


@pytest.mark.parametrize("block", ["GDN", "M2"])
def test_linear_mixers_are_copied_and_the_rest_is_random(base_folder: Path, tmp_path: Path, block: str) -> None:
    made = converted(base_folder, tmp_path, f"4{block}")
    convert_base(base_folder, tmp_path / "aligned", f"4{block}")
    aligned = load_model(tmp_path / "aligned", torch.float32).state_dict()
    same = {name.split("mixer.")[1] for name in made if "mixer" in name and torch.equal(made[name], aligned[name])}
    if block == "GDN":
        assert same == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_norm.weight", "o_proj.weight"}
    else:
        assert same == {"conv1d.bias", "norm.weight", "out_proj.weight"}
        heads = len(made["model.layers.0.mixer.A_log"])
        rows, ours = (x["model.layers.0.mixer.in_proj.weight"] for x in (made, aligned))
        gate = made["model.layers.0.mixer.norm.weight"].numel()
        assert torch.equal(rows[gate:-heads], ours[gate:-heads])
        assert not torch.equal(rows[:gate], ours[:gate])
        assert rows[-heads:].abs().min() > 0
    rate = made["model.layers.0.mixer.A_log"].exp()
    step = torch.nn.functional.softplus(made["model.layers.0.mixer.dt_bias"])
    assert ((rate >= 1) & (rate <= 16)).all() and ((step > 9e-4) & (step < 0.11)).all()


def test_what_was_not_published_is_refused(base_folder: Path) -> None:
    with Base.open(base_folder) as base:
        with pytest.raises(HyLoError, match="KDA"):
            plan_conversion(base, "4KDA", start="paper")
        with pytest.raises(HyLoError, match="rope_pairs"):
            plan_conversion(base, "4MLA", start="paper")
