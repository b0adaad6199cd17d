"""A recipe: one YAML file that says everything about an upcycling run, checked before anything is done."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from hylo.data.documents import is_unicode
from hylo.data.sections import DataSection, Number, Positive, Section, SourceSection
from hylo.errors import HyLoError
from hylo.precision import Precision


def _not_other_text(value: Any) -> Any:
    if isinstance(value, str) and value != "paper":
        raise ValueError(f"{value!r}; expected 'paper' or sizes by mixer")
    return value


def _prompt(value: str) -> str:
    if not value.strip():
        raise ValueError("the prompt is empty; expected text to continue, or no prompt")
    if not is_unicode(value):
        raise ValueError("the prompt holds half of a surrogate pair; expected text that UTF-8 can hold")
    return value


# Keys of a stage that only spare memory.
_MEMORY = ("gradient_checkpointing", "mlp_chunk", "offload")
# Of tokens a window: one predicts nothing.
Length = Annotated[int, Field(gt=1)]


class CalibrationSection(Section):
    """Closed-form solution of the output projections, and of more where asked for.

    Attributes:
        tokens: how much text.
        length: tokens a window.
        batch_size: windows at a time.
        ridge: the penalty, relative to the mean square of a feature.
        sequential: each layer on the student's own hidden states, rather than the teacher's.
        latents: make the queries, latents and rotary keys of MLA layers from the teacher's attention on that text.
        pairs: with `latents`, choose the rotary pairs of MLA layers by what they gain, in place of the geometry's.
        gates: set output gates and value convolutions of linear layers from it as well.
        averages: let heads of linear layers read averages, where that leaves a layer less error.
        mlp: let the MLPs above make up for what new mixers lack.
    """

    tokens: Positive = 200_000
    length: Length = 2048
    batch_size: Positive = 4
    ridge: Number = Field(default=1e-3, gt=0)
    sequential: bool = True
    latents: bool = False
    pairs: bool = False
    gates: bool = False
    averages: bool = False
    mlp: bool = False

    @model_validator(mode="after")
    def _makes_anew(self) -> "CalibrationSection":
        if self.pairs and not self.latents:
            raise ValueError("pairs is true; expected latents to be true as well, which makes the weights anew")
        return self


class RopeScalingSection(Section):
    """YaRN (arXiv 2309.00071): rotary frequencies interpolated for more positions than the base was trained on.

    Attributes:
        factor: by how much the length grows.
        original_max_position_embeddings: the length that grows, in tokens.
    """

    factor: Number = Field(gt=1)
    original_max_position_embeddings: Positive

    @property
    def reach(self) -> int:
        """The length that is grown to, in tokens."""
        return int(self.factor * self.original_max_position_embeddings)


class StageSection(Section):
    """One stage of training.

    Attributes:
        name: of the stage, its folder and its row in the report.
        objective: `layerwise` (stage 1: each layer on the teacher's input) or `kl` (stage 2: end to end).
        length: tokens a window.
        tokens: how many to train on.
        learning_rate: the peak; cosine decay after `warmup`.
        batch_size: windows at a time, on a device.
        accumulation: batches a step. Over several devices a step is made of the same windows, so each makes fewer.
        warmup: share of the steps.
        weight_decay: AdamW's.
        max_grad_norm: gradients are scaled down to this norm; by default 1 for `kl`, and not at all for `layerwise`,
            where one norm over all layers would tie together layers that train each for itself.
        train: `mixers` of the replaced layers alone, or `all` parameters. Stage 1 trains mixers.
        gradient_checkpointing: recompute each layer in the backward pass, to save memory.
        rope_scaling: YaRN that the student is set to when the stage begins, and keeps from then on; by default it keeps
            what it has.
        cross_entropy: weight of the cross-entropy of the next token, added to the KL of a `kl` stage.
        teacher_length: tokens of a document that the teacher of a `kl` stage reads; those beyond are learnt by
            cross-entropy alone. By default what the teacher was made for.
        optimizer: `adamw`; `adamw_8bit` with moments in 8 bits (needs torchao); or `muon`, which is Muon for the linear
            maps of replaced mixers and AdamW for the rest.
        mlp_chunk: tokens that pass an MLP at a time, which is then made again in the backward pass.
        offload: what waits in the CPU's memory: `activations` between forward and backward pass; the `teacher`, on one
            GPU.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    objective: Literal["layerwise", "kl"]
    length: Length
    tokens: Positive
    learning_rate: Number = Field(gt=0)
    batch_size: Positive = 1
    accumulation: Positive = 1
    warmup: Number = Field(default=0.01, ge=0, lt=1)
    weight_decay: Number = Field(default=0.0, ge=0)
    max_grad_norm: Number | None = Field(default=None, gt=0)
    train: Literal["mixers", "all"] = "mixers"
    gradient_checkpointing: bool = False
    rope_scaling: RopeScalingSection | None = None
    cross_entropy: Number = Field(default=0.0, ge=0)
    teacher_length: Length | None = None
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    mlp_chunk: Positive | None = None
    offload: list[Literal["activations", "teacher"]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits(self) -> "StageSection":
        if self.objective == "layerwise" and self.train != "mixers":
            raise ValueError("a layerwise stage trains 'mixers'; 'all' needs objective kl")
        if self.objective == "layerwise" and self.cross_entropy:
            raise ValueError("a layerwise stage predicts no tokens; cross_entropy needs objective kl")
        if self.objective == "layerwise" and self.teacher_length is not None:
            raise ValueError("a layerwise stage has the base as its teacher; teacher_length needs objective kl")
        scaling = self.rope_scaling
        if scaling is not None and self.length > scaling.reach:
            raise ValueError(f"rope_scaling reaches {scaling.reach} tokens, less than a window of {self.length}")
        if self.tokens < self.tokens_per_step:
            raise ValueError(f"tokens is {self.tokens}, less than one step of {self.tokens_per_step}")
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this stage from one that trains to other weights: all but what spares memory, and changes rounding
        alone."""
        spared = {name: type(self).model_fields[name].get_default(call_default_factory=True) for name in _MEMORY}
        return self.model_copy(update=spared).model_dump()

    @property
    def tokens_per_step(self) -> int:
        return self.length * self.batch_size * self.accumulation

    @property
    def clip_norm(self) -> float:
        """0 where gradients are not clipped."""
        if self.max_grad_norm is not None:
            return self.max_grad_norm
        return 1.0 if self.objective == "kl" else 0.0

    @property
    def steps(self) -> int:
        """However many devices there are."""
        return -(-self.tokens // self.tokens_per_step)


class EvaluationSection(Section):
    """Perplexity, KL and agreement on held-out text.

    Attributes:
        tokens: how much text at most.
        length: tokens a window.
        prompt: what the finished model and the base continue in the report; none by default.
        new_tokens: how far they continue it.
    """

    tokens: Positive = 100_000
    length: Length = 2048
    prompt: Annotated[str, AfterValidator(_prompt)] | None = None
    new_tokens: Positive = 48


class CheckpointsSection(Section):
    """What a stage that was stopped goes on from.

    Attributes:
        minutes: between two checkpoints of a stage; null for none by time.
        steps: between two checkpoints; both may be given.
        keep: how many of the newest are kept.
    """

    minutes: Number | None = Field(default=15.0, gt=0)
    steps: Positive | None = None
    keep: Positive = 1


class Recipe(Section):
    """Everything about a run.

    Attributes:
        base: a model folder, a hub id, a GGUF file, or package:NAME.
        teacher: of the `kl` stages; the base by default. Stage 1 and calibration always use the base.
        layout: 8MLA22GDN, `MLA:1,5,9 GDN`, or a list with one mixer name a layer.
        student: in place of a layout, a hybrid of this base that is trained further; then geometry, start,
            rope_scaling and calibration, which are for new ones, are not given. A stage may still scale its rotations.
        geometry: mixer sizes that differ from those derived from the base, by mixer name; or `paper`, the published
            sizes for a base that has some.
        start: what the mixers begin as: `aligned`, near attention, or `paper`, as published.
        rope_scaling: YaRN, in place of the base's own scaling; the base's own by default.
        data, calibration, stages, evaluation: see their sections; without calibration that step is left out.
        seed: fixes the order of the text and everything random.
        precision: what matrix products are computed in; weights are kept in float32 while training.
        save_dtype: of the finished checkpoint.
        checkpoints: see its section. From here on: how a run is carried out, which may change while it goes on.
        on_anomaly: what to do about a step whose loss or gradient norm is not finite or leaps: `stop`, or `skip` it.
        spike_factor: how many times the median of recent steps is a leap; null for none.
        report_to: where metrics go besides `metrics.jsonl`; by default to TensorBoard where it is installed.
    """

    base: str
    teacher: str | None = None
    layout: str | list[str] | None = None
    student: str | None = None
    geometry: Annotated[dict[str, dict[str, Any]] | Literal["paper"], BeforeValidator(_not_other_text)] = Field(
        default_factory=dict
    )
    start: Literal["aligned", "paper"] = "aligned"
    rope_scaling: RopeScalingSection | None = None
    data: DataSection
    calibration: CalibrationSection | None = None
    stages: list[StageSection] = Field(default_factory=list)
    evaluation: EvaluationSection = EvaluationSection()
    seed: int = Field(default=0, ge=0, lt=2**32 - 1000)
    precision: Precision = "auto"
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    checkpoints: CheckpointsSection = CheckpointsSection()
    on_anomaly: Literal["stop", "skip"] = "stop"
    spike_factor: Number | None = Field(default=20.0, gt=1)
    report_to: list[Literal["tensorboard", "wandb"]] | None = None

    @model_validator(mode="after")
    def _begins_somewhere(self) -> "Recipe":
        if self.student is None:
            if self.layout is None:
                raise ValueError("layout is missing; expected one such as 8MLA22GDN, or a student to train further")
            return self
        begins = ("layout", "geometry", "start", "rope_scaling", "calibration")
        given = [
            name
            for name in begins
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)
        ]
        if given:
            raise ValueError(f"{given[0]} is for a new hybrid; student {self.student} has its own")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        taken = {"base", "teacher", "student", "convert", "calibrate", "model", "evaluate", "report", "tensorboard"}
        for name in names:
            if names.count(name) > 1 or name in taken:
                raise ValueError(
                    f"stage name {name!r} is taken; expected names that differ, other than {sorted(taken)}"
                )
        return self


class _Loader(yaml.SafeLoader):
    """YAML as `safe_load` reads it, but a key given twice is a HyLoError, and so is a value that looks like a number or
    date and is none."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not where mappings are made of nodes: those that `<<` brings in may be given again.
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault((key.tag, key.value), key) is not key:
                lines = first[key.tag, key.value].start_mark.line + 1, key.start_mark.line + 1
                raise HyLoError(f"{key.value}: given twice, in lines {lines[0]} and {lines[1]}; expected once")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except HyLoError:
            raise
        # What Python's numbers and dates raise: PyYAML takes text for one by its first look.
        except (ValueError, ArithmeticError, LookupError, AttributeError):
            line, kind = node.start_mark.line + 1, node.tag.rpartition(":")[2]
            raise HyLoError(f"line {line}: {str(node.value)[:40]!r} is no {kind}; expected one, or quotes") from None


def load_recipe(path: str | Path) -> Recipe:
    """Reads and checks a recipe. Raises HyLoError, one line, naming the key that is wrong and what was expected."""
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise HyLoError(f"recipe {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HyLoError(f"recipe {path} cannot be read: {error}") from None
    except HyLoError as error:
        raise HyLoError(f"{path}: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise HyLoError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    return parse_recipe(values, str(path))


def parse_recipe(values: Any, where: str = "recipe") -> Recipe:
    """From parsed YAML. Raises HyLoError as `load_recipe`."""
    if not isinstance(values, Mapping):
        raise HyLoError(f"{where}: expected keys and values such as 'base: ...', not {type(values).__name__}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise HyLoError(f"{where}: {_describe(first)}") from None


def _describe(error: Any) -> str:
    """One line for one pydantic error: where, what, and what was expected."""
    # Where a value may be of several types, pydantic adds the type that it tried: not a key.
    keys = [part for part in error["loc"] if part not in _TYPE_TAGS]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in keys).lstrip(".")
    if error["type"] == "extra_forbidden":
        *parents, _ = error["loc"]
        section: type[BaseModel] = Recipe
        for part in parents:
            if isinstance(part, str):
                section = _SECTIONS.get(part, section)
        return f"{place}: unknown key; expected one of {', '.join(section.model_fields)}"
    if error["type"] == "missing":
        return f"{place}: missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{place}: {message}" if place else message
    return f"{place}: {_shown(error['input'])}; {message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    # Of more digits than Python writes out; YAML may have them in another base.
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


_TYPE_TAGS = ("str", "list[str]", "constrained-float", "dict[str,dict[str,any]]", "literal['paper']")
_SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataSection,
    "train": SourceSection,
    "eval": SourceSection,
    "rope_scaling": RopeScalingSection,
    "calibration": CalibrationSection,
    "stages": StageSection,
    "evaluation": EvaluationSection,
    "checkpoints": CheckpointsSection,
}
