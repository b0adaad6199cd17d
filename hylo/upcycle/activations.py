"""What an attention layer does on text, as sums: what of its keys, values and queries its output depends on.

One layer at a time, batch by batch. With p the softmax weights of a head, v the values, O the head's part of the output
projection, and m_t = sum_j p_tj v_j, a small error e of the score of query t and key j moves the output by
p_tj e O (v_j - m_t). So

    w_tj = p_tj^2 |O (v_j - m_t)|^2

is what the square of that error costs. It weighs all that is summed about queries, keys and distances.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from hylo.errors import HyLoError

# How many scores are held at a time, on a CPU and on a GPU; of one head at least.
_SCORES_TOGETHER = (2**18, 2**26)


@dataclass(frozen=True)
class AttentionWeights:
    """One attention layer's maps, float32: H query heads, Hkv KV heads, hd values a head, d hidden values.

    Attributes:
        query: `[H, hd, d]`.
        key, value: `[Hkv, hd, d]`.
        output: `[d, H * hd]`.
        query_bias, key_bias, value_bias: `[H or Hkv, hd]`, zeros where there is none.
        scale: of the scores, before the softmax.
        window: how many tokens a query sees, itself among them; None for all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    query_bias: Tensor
    key_bias: Tensor
    value_bias: Tensor
    scale: float
    window: int | None

    @classmethod
    def of(cls, attention: nn.Module) -> "AttentionWeights":
        """Of a transformers attention layer of Llama's kind, without norms of query and key heads."""
        head_dim = attention.head_dim
        assert isinstance(head_dim, int)

        def part(name: str) -> tuple[Tensor, Tensor]:
            projection = attention.get_submodule(name)
            assert isinstance(projection, nn.Linear)
            weight = projection.weight.detach().float()
            bias = weight.new_zeros(len(weight)) if projection.bias is None else projection.bias.detach().float()
            return weight.unflatten(0, (-1, head_dim)), bias.unflatten(0, (-1, head_dim))

        (query, query_bias), (key, key_bias), (value, value_bias) = map(part, ("q_proj", "k_proj", "v_proj"))
        output = attention.get_submodule("o_proj")
        assert isinstance(output, nn.Linear)
        # Mistral's layers leave it to the config; Qwen's each have their own, which may be none.
        has_own = hasattr(attention, "sliding_window")
        window = getattr(attention if has_own else attention.config, "sliding_window", None)
        return cls(
            query=query,
            key=key,
            value=value,
            output=output.weight.detach().float(),
            query_bias=query_bias,
            key_bias=key_bias,
            value_bias=value_bias,
            scale=head_dim**-0.5,
            window=window,
        )

    @property
    def groups(self) -> int:
        """Query heads a KV head."""
        return len(self.query) // len(self.key)

    @cached_property
    def output_metric(self) -> Tensor:
        """O^T O of each query head, `[H, hd, hd]`: the squared size of what a value becomes."""
        heads = self.output.unflatten(1, (len(self.query), -1))
        return torch.einsum("dhi,dhj->hij", heads, heads)


class AttentionStatistics:
    """The sums, float64, and what is read from them. Memory: three matrices of d by d.

    Attributes:
        cost: sum of w over all queries and keys, `[H]`.
        queries: sum of w q q^T, `[H, hd, hd]`, before rotation.
        rotation: sum of w times the rotation from key to query of each pair, complex `[H, hd / 2]`.
        attention_factor: on the base's cos and sin, as YaRN has one; `rotation` holds its square.
        keys: sum of w x x^T over keys, all heads together, `[d, d]`, x the layer's normed input.
        read: sum over queries and heads of z z^T, `[d, d]`, z = sum_j p_tj x_j: what reaches the values.
        inputs: sum of x x^T, `[d, d]`.

    A token that is alone sees itself: z = x, and no error of a score costs anything.
    """

    def __init__(self, weights: AttentionWeights) -> None:
        self.weights = weights
        heads, head_dim, hidden = weights.query.shape
        like = torch.zeros((), dtype=torch.float64, device=weights.query.device)
        self.cost = like.new_zeros(heads)
        self.queries = like.new_zeros(heads, head_dim, head_dim)
        self.rotation = like.new_zeros(heads, head_dim // 2, dtype=torch.complex128)
        self.keys, self.read, self.inputs = (like.new_zeros(hidden, hidden) for _ in range(3))
        self.attention_factor = 1.0

    def check(self) -> None:
        """Raises HyLoError where a sum is not finite."""
        if not all(bool(torch.isfinite(x).all()) for x in (self.cost, self.keys, self.read)):
            raise HyLoError("calibration: a layer's values are not finite; are the base's weights sound?")

    @torch.no_grad()
    def add_alone(self, inputs: Tensor, weight: float = 1.0) -> None:
        """Tokens that are alone, each a text of its own, `[N, d]`; each counts `weight` times."""
        with torch.autocast(inputs.device.type, enabled=False):
            gram = (inputs.float().T @ inputs.float()).double() * weight
            self.inputs += gram
            self.read += gram * len(self.weights.query)

    @torch.no_grad()
    def add(self, inputs: Tensor, mask: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> None:
        """More text. Padding may stand on the right only.

        Args:
            inputs: the layer's normed input, `[B, T, d]`.
            mask: of real tokens, bool `[B, T]`.
            position_embeddings: the base's cos and sin, `[B or 1, T, hd]` each.
        """
        with torch.autocast(inputs.device.type, enabled=False):
            cos, sin = (x.float().expand(len(inputs), -1, -1) for x in position_embeddings)
            half = cos.shape[-1] // 2
            self.attention_factor = torch.hypot(cos[0, 0, 0], sin[0, 0, 0]).item()
            for row in range(len(inputs)):
                length = int(mask[row].sum())
                turn = torch.complex(cos[row, :length, :half], sin[row, :length, :half])
                self._add_sequence(inputs[row, :length].float(), turn)

    def _add_sequence(self, x: Tensor, turn: Tensor) -> None:
        """x `[T, d]`, turn complex `[T, hd / 2]`."""
        weights, length = self.weights, len(x)
        self.inputs += x.T @ x
        received = x.new_zeros(length)
        # Many heads at once on a GPU, which is slow at many small steps; one on a CPU, whose caches are small. Of one
        # head as many queries, so that memory does not grow with the square of the length.
        limit = _SCORES_TOGETHER[x.device.type == "cuda"]
        together, block = max(1, limit // length**2), max(1, limit // length)
        positions = torch.arange(length, device=x.device)
        for heads in torch.arange(len(weights.query), device=x.device).split(together):
            groups = heads // weights.groups
            query = x @ weights.query[heads].mT + weights.query_bias[heads][:, None]
            key = _turned(x @ weights.key[groups].mT + weights.key_bias[groups][:, None], turn)
            # Of values only differences count, and a bias has none.
            value = x @ weights.value[groups].mT
            metric = weights.output_metric[heads]
            size = (value @ metric * value).sum(-1)
            for rows in positions.split(block):
                asked, turned = query[:, rows], turn[rows]
                scores = (_turned(asked, turned) @ key.mT) * weights.scale
                hidden = _unseen(rows, positions, weights.window)
                attention = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
                mean = attention @ value
                sizes = size[:, None] + (mean @ metric * mean).sum(-1)[..., None]
                cost = (sizes - 2 * (mean @ metric) @ value.mT).clamp_min_(0).mul_(attention.square())
                sent = cost.sum(2)
                received += cost.sum((0, 1))
                self.cost[heads] += sent.sum(1)
                self.queries[heads] += (asked * sent[..., None]).mT @ asked
                past = torch.complex(cost @ turn.real, -(cost @ turn.imag))
                self.rotation[heads] += (turned * past).sum(1)
                read = (attention @ x).flatten(0, 1)
                self.read += read.T @ read
        self.keys += (x * received[:, None]).T @ x


class LagStatistics:
    """How much attention each head of a layer pays to tokens at distances 0 to `count` - 1, on text."""

    def __init__(self, weights: AttentionWeights, count: int) -> None:
        self.weights = weights
        self.mass = torch.zeros(len(weights.query), count, dtype=torch.float64, device=weights.query.device)

    @torch.no_grad()
    def add(self, inputs: Tensor, mask: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> None:
        """More text, as `AttentionStatistics.add`. The first `count` tokens are left out: they see no further."""
        weights, count = self.weights, self.mass.shape[1]
        groups = torch.arange(len(weights.query), device=inputs.device) // weights.groups
        with torch.autocast(inputs.device.type, enabled=False):
            cos, sin = (x.float().expand(len(inputs), -1, -1) for x in position_embeddings)
            half = cos.shape[-1] // 2
            turn = torch.complex(cos[..., :half], sin[..., :half])[:, None]
            x = inputs.float()[:, None]
            query = _turned(x @ weights.query.mT + weights.query_bias[:, None], turn)
            key = _turned(x @ weights.key.mT + weights.key_bias[:, None], turn)
            positions = torch.arange(x.shape[-2], device=x.device)
            for head, group in enumerate(groups.tolist()):
                scores = query[:, head] @ key[:, group].mT * weights.scale
                attention = scores.masked_fill_(_unseen(positions, positions, weights.window), -torch.inf).softmax(-1)
                for lag in range(count):
                    at = attention.diagonal(-lag, 1, 2)[:, count - lag :]
                    self.mass[head, lag] += (at * mask[:, count:]).sum()

    @property
    def shares(self) -> Tensor:
        """`[H, count]`, each head's sum one."""
        return self.mass / self.mass.sum(1, keepdim=True).clamp_min(1e-30)


def _unseen(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys a query does not see, bool `[Q, K]`, by their positions."""
    distance = queries[:, None] - keys
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def as_complex(values: Tensor, dim: int = -1) -> Tensor:
    """The pairs (i, i + n/2) of `dim` as complex numbers."""
    return torch.complex(*(part.contiguous() for part in values.chunk(2, dim=dim)))


def as_real(values: Tensor, dim: int = -1) -> Tensor:
    """Undoes `as_complex`."""
    return torch.cat([values.real, values.imag], dim=dim)


def _turned(values: Tensor, turn: Tensor) -> Tensor:
    return as_real(as_complex(values) * turn)
