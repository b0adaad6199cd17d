"""MLA from attention and what it does on text: nothing is cut without regard to what reads it.

The score of head h (of KV head g) is sum_p Re(q_hp conj(k_gp) e^(i theta_p D)), over rotary pairs p as complex numbers,
D the distance. All means below are weighed by what an error costs (`hylo.upcycle.activations`).

- The rotary key c_p that all KV heads share is u^H E^1/2 k_p, with u the leading eigenvector of
  E^1/2 <k_p k_p^H> E^1/2 and E the diagonal of the energies <|q_hp|^2> summed over the query heads of each KV head.
  No other complex combination leaves less error of the scores. k_gp becomes beta_g c_p, beta = E^-1/2 u, and the
  queries take conj(beta_g): a complex factor commutes with the rotation.
- What c_p leaves of its pair, and the other pairs, are scored without rotation, in the nope part; in place of the
  rotation stands its mean <e^(i theta_p D)> over the distances at which the head looks.
- The latent is the best in the metric of what reads it: keys as the queries read them, values as the output projection
  does, after attention.
"""

import math
from functools import cached_property

import torch
from torch import Tensor, nn

from hylo.mixers.mla import MLAGeometry, MultiHeadLatentAttention
from hylo.upcycle.activations import AttentionStatistics, as_complex, as_real
from hylo.upcycle.initialise.low_rank import low_rank, symmetric_root
from hylo.upcycle.initialise.nope import scale_nope

# How much the relative error of the scores counts beside that of the outputs, found by measurement.
_KEY_WEIGHT = 8.0
# Of the mean eigenvalue: directions that the text hardly has are not left without any weight.
_FLOOR = 1e-5
# Of the mean eigenvalue of a latent's Gram matrix: least squares stay as they are, and have a solution.
_SINGULAR = 1e-10


class ActivationDecomposition:
    """MLA's matrices of one layer. `rope_pairs` must be given, each pair once.

    Args:
        statistics: of the attention layer, on text.
        geometry: of the MLA layer.
    """

    def __init__(self, statistics: AttentionStatistics, geometry: MLAGeometry) -> None:
        self.statistics, self.weights, self.geometry = statistics, statistics.weights, geometry
        head_dim = self.weights.query.shape[1]
        step = head_dim // geometry.qk_rope_head_dim
        self.pairs = list(geometry.rope_pairs or range(0, head_dim // 2, step))
        self.scale = math.sqrt(geometry.qk_head_dim / head_dim)

    def _by_group(self, values: Tensor) -> Tensor:
        """Sums over the query heads of each KV head."""
        return values.unflatten(0, (-1, self.weights.groups)).sum(1)

    @cached_property
    def _query(self) -> Tensor:
        """Complex `[H, hd / 2, d + 1]`, the bias as the last column."""
        weights = self.weights
        return as_complex(torch.cat([weights.query, weights.query_bias[..., None]], -1).double(), dim=1)

    @cached_property
    def _key(self) -> Tensor:
        """Complex `[Hkv, hd / 2, d + 1]`, the bias as the last column."""
        weights = self.weights
        return as_complex(torch.cat([weights.key, weights.key_bias[..., None]], -1).double(), dim=1)

    @cached_property
    def _key_moment(self) -> Tensor:
        return _floored(self.statistics.keys)

    @cached_property
    def _shared(self) -> tuple[Tensor, Tensor]:
        """The rotary keys `[rope / 2, d + 1]` and the factor beta of each KV head `[rope / 2, Hkv]`, complex."""
        energies = self.statistics.queries.diagonal(dim1=1, dim2=2).unflatten(1, (2, -1)).sum(1)
        energy = self._by_group(energies).T[self.pairs]
        # A KV head whose queries never ask still has a weight, so that nothing is divided by zero.
        root = (energy + 1e-12 * energy.mean() + 1e-30).sqrt()
        keys = self._key[:, self.pairs].transpose(0, 1)
        moment = keys[..., :-1] @ self._key_moment.to(keys.dtype) @ keys[..., :-1].mH
        _, vectors = torch.linalg.eigh(moment * root[:, :, None] * root[:, None])
        leading = vectors[..., -1]
        combined = torch.einsum("pg,pgd->pd", leading.conj() * root, keys)
        # Keys of their own size: the factor is balanced between both sides.
        size = root.mean(1, keepdim=True)
        return combined / size, leading / root * size

    @property
    def pair_gains(self) -> Tensor:
        """What each of the base's hd / 2 pairs gains by being rotary rather than nope, as a share of all score energy.

        The energy that one shared complex key carries, times what the mean rotation loses of it.
        """
        energies = self.statistics.queries.diagonal(dim1=1, dim2=2).unflatten(1, (2, -1)).sum(1)
        keys = self._key[..., :-1].transpose(0, 1)
        root = self._by_group(energies).T.sqrt()
        moment = keys @ self._key_moment.to(keys.dtype) @ keys.mH * root[:, :, None] * root[:, None]
        captured = torch.linalg.eigvalsh(moment)
        cost = self.statistics.cost[:, None]
        turn = self._mean_rotation / self.statistics.attention_factor**2
        coherence = (turn.abs().square() * cost).sum(0) / cost.sum().clamp_min(1e-30)
        return captured[:, -1] * (1 - coherence) / captured.sum().clamp_min(1e-30)

    @cached_property
    def _rest_key(self) -> Tensor:
        """What the rotary key leaves, `[Hkv, hd, d]`; its bias cancels in the softmax."""
        shared, beta = self._shared
        rest = self._key.clone()
        rest[:, self.pairs] -= torch.einsum("pg,pd->gpd", beta, shared)
        return as_real(rest[..., :-1], dim=1)

    @cached_property
    def _mean_rotation(self) -> Tensor:
        """Complex `[H, hd / 2]`, times the square of the base's factor on cos and sin."""
        return self.statistics.rotation / self.statistics.cost[:, None].clamp_min(1e-30)

    @cached_property
    def _rest_query(self) -> Tensor:
        """The queries under the mean rotation, `[H, hd, d + 1]`."""
        return as_real(self._query * self._mean_rotation[..., None], dim=1)

    @cached_property
    def _rest_metric(self) -> Tensor:
        """How much the queries of each KV head ask of its keys, `[Hkv, hd, hd]`; its trace is an output's size."""
        turn = self._mean_rotation
        real, imag = torch.diag_embed(turn.real), torch.diag_embed(turn.imag)
        rotation = torch.cat([torch.cat([real, -imag], 2), torch.cat([imag, real], 2)], 1)
        asked = rotation @ self.statistics.queries @ rotation.mT
        return self._by_group(asked) * self.weights.scale**2

    @cached_property
    def _read_moment(self) -> Tensor:
        return _floored(self.statistics.read)

    @cached_property
    def _latent(self) -> Tensor:
        """The latent's rows, `[r, d]`."""
        metrics = self._by_group(self.weights.output_metric.double())
        values = self.weights.value.double()
        keys = torch.cat([symmetric_root(a)[0] @ k for a, k in zip(self._rest_metric, self._rest_key, strict=True)])
        reads = torch.cat([symmetric_root(a)[0] @ v for a, v in zip(metrics, values, strict=True)])
        # Each of the two as a share of its own whole, whatever its units.
        whole_keys, whole_reads = (
            (rows @ moment * rows).sum() for rows, moment in ((keys, self._key_moment), (reads, self._read_moment))
        )
        keys = keys * (_KEY_WEIGHT * (self._key_moment.trace() / whole_keys.clamp_min(1e-30)).sqrt())
        reads = reads * (self._read_moment.trace() / whole_reads.clamp_min(1e-30)).sqrt()
        if not self.geometry.qk_nope_head_dim:
            keys = torch.zeros_like(keys)
        # One metric of inputs for both: what keys are read with, and what values are read with.
        moments = (moment / moment.trace() for moment in (self._key_moment, self._read_moment))
        root, inverse = symmetric_root(sum(moments, torch.zeros_like(self._key_moment)))
        return low_rank(torch.cat([keys, reads]) @ root, self.geometry.kv_lora_rank)[1] @ inverse

    def _from_latent(self, rows: Tensor, moment: Tensor) -> Tensor:
        """The least-squares map `[n, r]` from the latent to `rows` of the input, `[n, d]`."""
        latent = self._latent
        gram = latent @ moment @ latent.T
        # Where keys and values are of a lower rank than the latent, as with a head that is all zero.
        gram.diagonal().add_((_SINGULAR * gram.diagonal().mean()).clamp_min(1e-30))
        return torch.linalg.solve(gram, latent @ moment @ rows.T).T

    @cached_property
    def _nope(self) -> tuple[Tensor, Tensor]:
        """Of each KV head, the best factors of its scores: queries' `[Hkv, nope, hd]` and keys' `[Hkv, nope, r]`."""
        latent, size = self._latent, self.geometry.qk_nope_head_dim
        root, inverse = symmetric_root(latent @ self._key_moment @ latent.T)
        ask, read = [], []
        for metric, rest in zip(self._rest_metric, self._rest_key, strict=True):
            asked, unasked = symmetric_root(metric)
            scores = asked @ self._from_latent(rest, self._key_moment) @ root
            left, right = low_rank(scores, min(size, *scores.shape))
            missing = size - left.shape[1]
            ask.append(nn.functional.pad((unasked @ left).T, (0, 0, 0, missing)))
            read.append(nn.functional.pad(right @ inverse, (0, 0, 0, missing)))
        return torch.stack(ask), torch.stack(read)

    @cached_property
    def _student_query(self) -> Tensor:
        """`[H * (nope + rope), d + 1]`, the bias as the last column."""
        groups, (_, beta) = self.weights.groups, self._shared
        factors = beta.conj().T.repeat_interleave(groups, 0)[..., None]
        rotary = as_real(self._query[:, self.pairs] * factors, dim=1)
        nope = self._nope[0].repeat_interleave(groups, 0) @ self._rest_query
        # The softmax scale is that of the new head size.
        return (torch.cat([nope, rotary], 1) * self.scale).flatten(0, 1)

    @torch.no_grad()
    def apply_to(self, mixer: MultiHeadLatentAttention) -> None:
        """Sets all of the mixer but its output projection and that one's bias."""
        query, (shared, _) = self._student_query, self._shared
        rotary = as_real(shared, dim=0)
        if mixer.geometry.q_lora_rank is None:
            last = mixer.q_proj
            last.weight.copy_(query[:, :-1])
        else:
            last = mixer.q_b_proj
            root, inverse = symmetric_root(_floored(self.statistics.inputs))
            up, down = low_rank(query[:, :-1] @ root, mixer.geometry.q_lora_rank)
            last.weight.copy_(up)
            mixer.q_a_proj.weight.copy_(down @ inverse)
        if last.bias is not None:
            last.bias.copy_(query[:, -1])
        mixer.kv_a_proj_with_mqa.weight.copy_(torch.cat([self._latent, rotary[:, :-1]]))
        if mixer.kv_a_proj_with_mqa.bias is not None:
            bias = mixer.kv_a_proj_with_mqa.bias
            bias.copy_(nn.functional.pad(rotary[:, -1], (len(self._latent), 0)))
        values = [self._from_latent(value, self._read_moment) for value in self.weights.value.double()]
        mixer.kv_b_proj.weight.copy_(torch.cat([self._nope[1], torch.stack(values)], 1).flatten(0, 1))
        # As what it rotates is.
        factor = mixer.rotary_embedding(mixer.config).attention_scaling
        scale_nope(mixer, (factor / self.statistics.attention_factor) ** 2)


def _floored(moment: Tensor) -> Tensor:
    """Relative to its mean eigenvalue, which becomes about one; no direction without any weight."""
    moment = moment / moment.diagonal().mean().clamp_min(1e-30)
    return moment + _FLOOR * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
