"""Linear heads that read averages of values, as attention does, in place of sums.

Softmax weights sum to one: a first token reads its own value whole, later ones a mean over many. A linear head's norm
takes away the size of what it reads, whatever the number of tokens, so that both cannot be right at once. So one value
of each head is made constant, and larger than the rest together. The state sums values with some weights w; what is
read of the constant is the constant times sum w, and the norm divides by it: sum w v / sum w, the normaliser of linear
attention (arXiv 2006.16236, equation 9).

- Constant: c u x, u regressed on one (inputs after an RMS norm nearly always have such a direction).
- The rest: of each head's values, all but one of the directions P^T M^1/2 V that reach most of the output on text, with
  M = O^T O, scaled to one in total. The output projection, which is solved after, takes up the rotation.
- Taps are the identity, and output gates are held open: all of a head's channels pass with the same factor.
"""

import torch
from torch import Tensor

from hylo.mixers.base import TokenMixer
from hylo.mixers.delta import DeltaNet
from hylo.mixers.mamba2 import Mamba2
from hylo.upcycle.activations import AttentionWeights
from hylo.upcycle.initialise.gates import has_gates, hold_open
from hylo.upcycle.initialise.low_rank import symmetric_root
from hylo.upcycle.ridge import RidgeRegression

# Of the constant before SiLU, against one for all other values of a head together, which SiLU halves.
_CONSTANT = 2.0
# Of the mean square of an input's value.
_PENALTY = 1e-3


class AverageStatistics:
    """Sums over the text for one linear layer whose heads stand for attention's, and what is set from them."""

    def __init__(self, mixer: TokenMixer, weights: AttentionWeights) -> None:
        assert has_gates(mixer)
        self.mixer, self.weights = mixer, weights
        self._constant = RidgeRegression()

    @torch.no_grad()
    def add(self, inputs: Tensor, weight: float = 1.0) -> None:
        """The layer's normed input, `[N, d]`, which counts `weight` times."""
        self._constant.add(inputs, inputs.new_ones(len(inputs), 1), weight)

    @torch.no_grad()
    def apply(self) -> None:
        """Sets the mixer's values, their convolution and its output gate."""
        mixer, constant = self.mixer, self._constant.solve(_PENALTY)[0]
        values, taps = _value_rows(mixer)
        values.copy_(self._values(constant, len(values) // self.weights.value.shape[1]))
        taps.zero_()
        taps[:, -1] = 1
        hold_open(mixer, constant)

    def _values(self, constant: Tensor, heads: int) -> Tensor:
        """Rows of the values of `heads` heads, which share the KV heads in order, `[heads * hd, d]`."""
        moment = self._constant.mean_square
        # What each of the heads reaches of the output; where they are KV heads, all of their query heads together.
        metrics = self.weights.output_metric.double().unflatten(0, (heads, -1)).sum(1)
        sources = self.weights.value.double().repeat_interleave(heads // len(self.weights.value), 0)
        rows = []
        for metric, value in zip(metrics, sources, strict=True):
            reached = symmetric_root(metric)[0] @ value
            # In rising order: the least is left out.
            directions = torch.linalg.eigh(reached @ moment @ reached.T).eigenvectors[:, 1:].flip(1)
            rest = directions.T @ reached
            size = (rest @ moment * rest).sum().clamp_min(1e-30).sqrt()
            rows += [rest / size, _CONSTANT * constant[None]]
        return torch.cat(rows)


def _value_rows(mixer: TokenMixer) -> tuple[Tensor, Tensor]:
    """The weights that make values `[heads * hd, d]`, and their taps `[heads * hd, W]`, to be written to."""
    if isinstance(mixer, Mamba2):
        start, size = mixer.geometry.inner_size, mixer.geometry.group_size
        return mixer.in_proj.weight[start : start + size], mixer.conv1d.weight[:size, 0]
    assert isinstance(mixer, DeltaNet)
    return mixer.v_proj.weight, mixer.v_conv1d.weight[:, 0]
