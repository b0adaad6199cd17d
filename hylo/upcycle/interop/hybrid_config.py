"""hybrid_config.json: the layer plan and the mixer sizes of a released checkpoint."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hylo.errors import HyLoError
from hylo.files import read_json

FILE = "hybrid_config.json"
Positive = Annotated[int, Field(gt=0)]
Index = Annotated[int, Field(ge=0)]


class RopeScaling(BaseModel):
    """YaRN. Nothing else may stand here: betas or a scale of the softmax would change what is computed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rope_type: Literal["yarn"]
    factor: float = Field(ge=1)
    original_max_position_embeddings: Positive


class StateSpace(BaseModel):
    """Mamba-2's sizes: one group a head, `d_state` values a head."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    expand: Positive = 1
    ngroups: Positive
    d_state: Positive
    repeat_kv_before_conv: Literal[False] = False


class HybridConfig(BaseModel):
    """The file, key by key.

    A key that is not known here is passed over: no size can hide in it, since the shape of every tensor is checked.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    hidden_size: Positive
    intermediate_size: Positive
    hidden_act: Literal["silu"] = "silu"
    n_layer: Positive
    mla_layers: list[Index] = Field(min_length=1)
    rms_norm_eps: float

    num_attention_heads: Positive
    num_key_value_heads: Positive
    kv_lora_rank: Positive
    q_lora_rank: Positive
    use_lora_layer_norm: Literal[False] = False
    use_full_kv_head: Literal[False] = False
    qk_rope_head_dim: Positive
    qk_nope_head_dim: Index
    v_head_dim: Positive
    qkv_rank_divisor: Positive = 8
    max_position_embeddings: Positive
    rope_theta: float = Field(gt=0)
    rope_scaling: RopeScaling | None
    # Of a model that rope_scaling leaves alone it says nothing.
    rope_type: Literal["yarn", "default"] = "yarn"
    attention_bias: Literal[False] = False
    attention_dropout: float = 0.0

    # Of Mamba-2; Gated DeltaNet checkpoints carry them too.
    d_model: Positive | None = None
    ssm_cfg: StateSpace | None = None
    d_inner: Positive | None = None
    d_xb: Positive | None = None

    # Of Gated DeltaNet, and only in its checkpoints.
    gdn_num_heads: Positive | None = None
    gdn_head_dim: Positive | None = None

    @classmethod
    def parse(cls, values: Any, where: str) -> "HybridConfig":
        """Raises HyLoError, one line, naming the first key that is missing or wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the file"
            message = first["msg"]
            if first["type"] == "missing":
                raise HyLoError(f"{where}: {key}: missing") from None
            raise HyLoError(f"{where}: {key}: {first['input']!r}; {message[0].lower()}{message[1:]}") from None

    @classmethod
    def read(cls, folder: Path) -> "HybridConfig":
        """Raises HyLoError as `parse`, and where the folder has no such file."""
        return cls.parse(read_json(folder / FILE), str(folder / FILE))

    def to_json(self) -> dict[str, Any]:
        """What the file holds: Gated DeltaNet's keys only where there are such layers."""
        values = self.model_dump()
        return {key: value for key, value in values.items() if not (key.startswith("gdn_") and value is None)}
