"""Gates and convolutions of linear mixers from what the attention that they replace does on text.

- Output gate. Of head h let z be what attention reads, o what the linear head reads before its gate, O the head's part
  of the output projection. The scalar r = <O z, O o> / |O o|^2 brings O o nearest to O z: it is small where attention
  rests on its sink. It is regressed on the layer's input, r ~ u_h x, and the gate of all of the head's channels follows
  u_h x: SiLU(2 u_h x / mean) of Gated DeltaNet, sigmoid(2 u_h x / mean - 2) of Kimi Delta Attention, both near
  proportional to it. Mamba-2 norms what it has gated, which takes a scalar away: its gate is held open, SiLU(3 u x)
  with u x regressed on one (inputs after an RMS norm nearly always have such a direction).
- Convolution of values: half the identity, half the mean attention at the distances that it spans, as shares.
"""

from functools import cached_property

import torch
from torch import Tensor, nn

from hylo.mixers.base import TokenMixer
from hylo.mixers.delta import DeltaNet
from hylo.mixers.gated_deltanet import GatedDeltaNet
from hylo.mixers.kda import KimiDeltaAttention
from hylo.mixers.mamba2 import Mamba2
from hylo.upcycle.activations import AttentionWeights, LagStatistics
from hylo.upcycle.ridge import RidgeRegression

# Of the mean square of an input's value.
_PENALTY = 1e-2
# What holds a gate open: SiLU(3) = 2.9, sigmoid(3) = 0.95.
_OPEN = 3.0
# Of a head's largest possible size: where it read next to nothing, no factor is asked of it.
_FLOOR = 1e-2


def has_gates(mixer: TokenMixer) -> bool:
    """Whether a mixer is linear and its heads stand one for one for those of attention."""
    if isinstance(mixer, DeltaNet):
        config, sizes = mixer.config, mixer.geometry
        aligned = (sizes.num_heads, sizes.head_v_dim) == (config.num_attention_heads, config.head_dim)
        return aligned and not (isinstance(mixer, KimiDeltaAttention) and _rank(mixer) < sizes.num_heads)
    return isinstance(mixer, Mamba2)


def _rank(mixer: KimiDeltaAttention) -> int:
    weight = mixer.g_proj.get_parameter("0.weight")
    return len(weight)


def conv_size(mixer: TokenMixer) -> int:
    """Taps of its convolutions."""
    taps = mixer.get_parameter("conv1d.weight" if isinstance(mixer, Mamba2) else "v_conv1d.weight")
    return taps.shape[-1]


class GateStatistics:
    """Sums over the text for the gates of one linear layer, and what is set from them."""

    def __init__(self, mixer: TokenMixer, weights: AttentionWeights) -> None:
        assert has_gates(mixer)
        self.mixer, self.weights = mixer, weights
        self._regression = RidgeRegression()
        self._sums = torch.zeros(3, len(weights.query), dtype=torch.float64, device=weights.query.device)

    @torch.no_grad()
    def add(self, inputs: Tensor, attended: Tensor, read: Tensor, weight: float = 1.0) -> None:
        """More text, which counts `weight` times.

        Args:
            inputs: the layer's normed input, `[N, d]`.
            attended: what the heads of attention read, `[N, H, hd]`.
            read: what the heads of the linear mixer read, before norm and gate, `[N, H, hd]`.
        """
        with torch.autocast(inputs.device.type, enabled=False):
            ratio = self._ratio(attended.float(), read.float())
            self._regression.add(inputs, ratio, weight)
            wide = ratio.double()
            self._sums += torch.stack([torch.ones_like(wide), wide, wide.square()]).sum(1) * weight

    def _ratio(self, attended: Tensor, read: Tensor) -> Tensor:
        """`[N, H]`."""
        if isinstance(self.mixer, Mamba2):
            return torch.ones(read.shape[:2], device=read.device)
        metric = self.weights.output_metric
        read = nn.functional.rms_norm(read, read.shape[-1:], eps=1e-5)
        of_read = torch.einsum("nhi,hij->nhj", read, metric)
        floor = _FLOOR * metric.diagonal(dim1=1, dim2=2).sum(-1)
        return (of_read * attended).sum(-1) / ((of_read * read).sum(-1) + floor)

    @cached_property
    def _rows(self) -> Tensor:
        """u_h over its mean, `[H, d]`, so that u_h x is about one."""
        count, total, squares = self._sums
        mean = total / count
        spread = (squares / count - mean.square()).clamp_min(0).sqrt()
        # A head of no clear sign keeps a factor of a sensible size.
        size = torch.maximum(mean.abs(), spread / 2).clamp_min(1e-30)
        return self._regression.solve(_PENALTY) / torch.where(mean < 0, -size, size)[:, None]

    @torch.no_grad()
    def apply(self) -> None:
        """Sets the mixer's output gate."""
        mixer, rows = self.mixer, self._rows
        if isinstance(mixer, GatedDeltaNet):
            assert isinstance(mixer.g_proj, nn.Linear)
            mixer.g_proj.weight.copy_(2 * rows.repeat_interleave(mixer.geometry.head_v_dim, 0))
        elif isinstance(mixer, KimiDeltaAttention):
            down, up = (mixer.g_proj.get_parameter(name) for name in ("0.weight", "1.weight"))
            heads = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
            down[: len(rows)].copy_(2 * rows)
            up.zero_()
            up[:, : len(rows)] = heads.repeat_interleave(mixer.geometry.head_v_dim, 0).to(up.dtype)
            mixer.g_proj.get_parameter("1.bias").fill_(-2)
        else:
            hold_open(mixer, rows[0])


@torch.no_grad()
def hold_open(mixer: TokenMixer, constant: Tensor) -> None:
    """Lets all of a linear mixer's heads pass its output gate, whatever the input.

    Args:
        constant: u of u x ~ 1, x the layer's normed input, `[d]`.
    """
    if isinstance(mixer, GatedDeltaNet):
        mixer.get_parameter("g_proj.weight").copy_(_OPEN * constant)
    elif isinstance(mixer, KimiDeltaAttention):
        mixer.get_parameter("g_proj.1.weight").zero_()
        mixer.get_parameter("g_proj.1.bias").fill_(_OPEN)
    elif isinstance(mixer, Mamba2):
        gate = mixer.geometry.inner_size
        mixer.in_proj.weight[:gate] = (_OPEN * constant).to(mixer.in_proj.weight.dtype)
        if mixer.in_proj.bias is not None:
            mixer.in_proj.bias[:gate] = 0


@torch.no_grad()
def set_value_taps(mixer: TokenMixer, lags: LagStatistics) -> None:
    """Half identity, half attention's shares of the distances that the convolution spans; their scale is kept."""
    shares = lags.shares.float()
    if isinstance(mixer, Mamba2):
        sizes = mixer.geometry
        taps = mixer.conv1d.weight[: sizes.group_size, 0]
        shares = shares.unflatten(0, (sizes.num_kv_heads, -1)).mean(1)
        channels = sizes.head_dim
    else:
        assert isinstance(mixer, DeltaNet)
        taps, channels = mixer.v_conv1d.weight[:, 0], mixer.geometry.head_v_dim
    # The newest tap is the last.
    spread = shares.flip(1).repeat_interleave(channels, 0).to(taps.dtype)
    taps.copy_(taps / 2 + spread * taps.sum(1, keepdim=True) / 2)
