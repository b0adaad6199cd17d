"""`hylo upcycle`: the whole road from a base to a scored hybrid, in steps that are done once.

Each step writes one folder of the run, whole or not at all, with a `step.json` that holds a fingerprint of everything
the step depends on. A step whose folder is there and whose fingerprint fits is not done again; one whose fingerprint
does not fit is refused, unless it is asked for by name. A stage that was stopped goes on from its last checkpoint, in
`.NAME.checkpoints` beside its folder.
"""

import gc
import hashlib
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from hylo.config import HyLoConfig
from hylo.data.folders import folders_read, is_recursive, reaches_into, roots_of_pattern
from hylo.data.prepare import Corpus
from hylo.data.tokens import PREFIX as TOKENS
from hylo.data.windows import Windows, make_windows
from hylo.distill import parallel
from hylo.distill.checkpoints import Checkpoints
from hylo.distill.recipe import Recipe, StageSection
from hylo.distill.teacher import as_hybrid
from hylo.distill.trainer import Carrying, resolve_report_to, train_stage
from hylo.errors import HyLoError
from hylo.evaluate.agreement import Reference, Scores, evaluate, make_reference
from hylo.evaluate.report import write_report
from hylo.files import atomic_directory, expand_user, partial_of, read_json, sync_tree, write_json
from hylo.generate import check_prompt, continue_prompt
from hylo.lock import LOCK_FILE, locked
from hylo.modeling import HyLoForCausalLM
from hylo.precision import autocast, default_device, resolve_precision
from hylo.progress import console
from hylo.upcycle.bases import (
    Base,
    base_digest,
    check_same_vocabulary,
    load_model,
    load_text_config,
    load_tokenizer,
    model_folder,
    resolve_base,
    save_checkpoint,
)
from hylo.upcycle.calibrate import calibrate_checkpoint, check_latents
from hylo.upcycle.convert import DTYPES, plan_conversion, write_checkpoint
from hylo.upcycle.student import student_config
from hylo.version import __version__

_STEP_FILE = "step.json"
# Marks a folder as a run, and says by which recipe it was last carried out.
_RUN_FILE = "run.json"


@dataclass(frozen=True)
class Step:
    """A step of a run: its name, what it depends on besides the steps before it, and what it does.

    `action` gets the folder to fill; its result is kept in the step's `step.json`. Where a run has several ranks, the
    first one does the step while the others wait, or all do it `together`.
    """

    name: str
    depends_on: Any
    action: Callable[[Path], dict[str, Any]]
    together: bool = False


@contextmanager
def _of(section: str) -> Iterator[None]:
    """Says of which section of the recipe an error is."""
    try:
        yield
    except HyLoError as error:
        raise HyLoError(f"{section}: {error}") from None


def _remove(folder: Path) -> None:
    """At once, as far as its name goes; of a link the link alone. Raises HyLoError where it cannot be removed."""
    try:
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            doomed = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
            folder.replace(doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise HyLoError(f"cannot remove {folder}, which is to be made again: {error.strerror}") from None


def _folders_of(source: str) -> list[Path]:
    """The folders all of which a source reads."""
    path = expand_user(source.removeprefix(TOKENS))
    if path.is_dir():
        return [path, *folders_read(path)]
    if not is_recursive(path):
        return []
    return [folder for root in roots_of_pattern(path) for folder in folders_read(root)]


class UpcycleRun:
    """A recipe being carried out in a folder.

    Args:
        recipe: what to do.
        output: the run's folder; made where it does not exist.
    """

    def __init__(self, recipe: Recipe, output: Path) -> None:
        self.recipe, self.output = recipe, Path(output)
        self.device = default_device()
        self.dtype = resolve_precision(recipe.precision)

    # What several steps read.

    @cached_property
    def base_folder(self) -> Path:
        return model_folder(self.recipe.base, self.output / "base")

    @cached_property
    def teacher_folder(self) -> Path:
        if self.recipe.teacher is None:
            return self.base_folder
        return model_folder(self.recipe.teacher, self.output / "teacher")

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base_folder)

    @cached_property
    def corpus(self) -> Corpus:
        """What the run trains and is evaluated on, disjoint in text."""
        return Corpus(
            self.recipe.data,
            lambda: self.tokenizer,
            load_vocabulary=lambda: self._vocabulary,
            evaluation_tokens=self.recipe.evaluation.tokens,
        )

    @cached_property
    def _vocabulary(self) -> int:
        """How many ids the base has embeddings for, and so the hybrid."""
        with Base.open(self.base_folder) as base:
            return int(base.config.vocab_size)

    @property
    def _rope_scaling(self) -> dict[str, Any] | None:
        return self.recipe.rope_scaling.model_dump() if self.recipe.rope_scaling else None

    @cached_property
    def _base_digest(self) -> str:
        return base_digest(resolve_base(self.recipe.base))

    @cached_property
    def _teacher_digest(self) -> str | None:
        return base_digest(resolve_base(self.recipe.teacher)) if self.recipe.teacher is not None else None

    @property
    def _data(self) -> list[Any]:
        """What steps that read text depend on."""
        return [self.recipe.data.model_dump(), self.corpus.digest]

    def _model(self, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return load_model(folder, dtype).to(self.device)

    def _trained_model(self, folder: Path) -> PreTrainedModel:
        """Of several ranks each puts its own part of a layer on its GPU, so that none needs room for the whole."""
        return load_model(folder, torch.float32) if parallel.world_size() > 1 else self._model(folder)

    # The steps.

    @property
    def steps(self) -> list[Step]:
        recipe = self.recipe
        training = [self._stage_step(i, stage) for i, stage in enumerate(recipe.stages)]
        data = self._data
        if recipe.student is not None:
            # The base is what it is compared with, and taught by unless there is a teacher.
            digest = base_digest(resolve_base(recipe.student))
            steps = [Step("student", [self._base_digest, digest], self._take_student)]
        else:
            begins = [self._base_digest, recipe.layout, recipe.geometry, recipe.start, self._rope_scaling]
            steps = [Step("convert", begins, self._convert)]
        if recipe.calibration is not None:
            depends = [recipe.calibration.model_dump(), data, recipe.seed, str(self.dtype)]
            steps.append(Step("calibrate", depends, self._calibrate))
        steps += training
        steps.append(Step("model", recipe.save_dtype, self._save))
        depends = [recipe.evaluation.model_dump(), data, self._teacher_digest, recipe.seed, str(self.dtype)]
        steps.append(Step("evaluate", depends, self._evaluate))
        steps.append(Step("report", None, self._report))
        return steps

    @property
    def step_names(self) -> list[str]:
        return [step.name for step in self.steps]

    @property
    def checkpoints(self) -> list[str]:
        """The steps that leave a checkpoint of the hybrid, in order, before the finished model."""
        return [name for name in self.step_names if name not in ("model", "evaluate", "report")]

    def _previous(self, name: str) -> Path:
        """The checkpoint that a step starts from."""
        before = self.step_names[: self.step_names.index(name)]
        return self.output / [step for step in before if step in self.checkpoints][-1]

    def _take_student(self, folder: Path) -> dict[str, Any]:
        assert self.recipe.student is not None
        model = load_model(resolve_base(self.recipe.student), torch.float32)
        save_checkpoint(model, folder, self.base_folder)
        return {"parameters": model.num_parameters()}

    def _convert(self, folder: Path) -> dict[str, Any]:
        assert self.recipe.layout is not None
        with Base.open(self.base_folder) as base:
            plan = plan_conversion(
                base,
                self.recipe.layout,
                self.recipe.geometry,
                start=self.recipe.start,
                dtype="float32",
                solve_output=self.recipe.calibration is not None,
                solve_latents=self.recipe.calibration is not None and self.recipe.calibration.latents,
                source_name=self.recipe.base,
                rope_scaling=self._rope_scaling,
            )
            write_checkpoint(plan, base, folder)
        return {"parameters": plan.parameters}

    def _calibration_windows(self) -> Windows | None:
        section = self.recipe.calibration
        if section is None:
            return None
        return self.corpus.calibration(tokens=section.tokens, length=section.length, seed=self.recipe.seed)

    def _calibrate(self, folder: Path) -> dict[str, Any]:
        section, windows = self.recipe.calibration, self._calibration_windows()
        assert section is not None and windows is not None
        calibrate_checkpoint(
            self._previous("calibrate"),
            self.base_folder,
            windows,
            folder,
            dtype=self.dtype,
            batch_size=section.batch_size,
            ridge=section.ridge,
            sequential=section.sequential,
            latents=section.latents,
            pairs=section.pairs,
            gates=section.gates,
            averages=section.averages,
            mlp=section.mlp,
        )
        return {"tokens": windows.tokens}

    def _stage_step(self, index: int, stage: StageSection) -> Step:
        recipe = self.recipe
        depends = [stage.identity, self._teacher_digest, self._data, recipe.seed, str(self.dtype)]
        # Calibration has the recipe's seed; each stage its own, and so other windows of the text.
        return Step(
            stage.name, depends, lambda folder: self._stage(stage, folder, recipe.seed + 1 + index), together=True
        )

    def _stage(self, stage: StageSection, folder: Path, seed: int) -> dict[str, Any]:
        checkpoints = self._stage_checkpoints(stage.name)
        # Before the models are read, which takes a while.
        resume = checkpoints.latest()
        set_seed(seed)
        tokens = stage.steps * stage.tokens_per_step
        windows = parallel.main_first(lambda: self.corpus.prepare(tokens=tokens, length=stage.length, seed=seed))
        student = self._trained_model(self._previous(stage.name))
        teacher = self._stage_teacher(stage)
        carrying = Carrying(
            checkpoints=checkpoints,
            when=self.recipe.checkpoints,
            on_anomaly=self.recipe.on_anomaly,
            spike_factor=self.recipe.spike_factor,
            report_to=resolve_report_to(self.recipe),
            logs=self.output / "tensorboard" / stage.name,
            run_name=f"{self.output.name}-{stage.name}",
        )
        logs = train_stage(
            stage, student, teacher, windows, folder, dtype=self.dtype, seed=seed, carrying=carrying, resume=resume
        )
        finished = parallel.whole(student)
        if parallel.is_main():
            save_checkpoint(finished, folder, self.base_folder)
        result = {"tokens": windows.tokens, "sources": [asdict(source) for source in windows.sources], "logs": logs}
        return result if resume is None else result | {"seconds_before": round(resume.state["seconds"], 1)}

    def _stage_teacher(self, stage: StageSection) -> PreTrainedModel:
        """On the CPU where it is read as a hybrid: the stage puts it where it is to be, which may be there."""
        if stage.objective == "layerwise":
            teacher = as_hybrid(load_model(self.base_folder, torch.float32))
        else:
            # Frozen, so it is kept in what it computes in.
            teacher = as_hybrid(load_model(self.teacher_folder, self.dtype))
        # Others are asked for their logits first.
        own = isinstance(teacher, HyLoForCausalLM) or parallel.world_size() > 1
        return teacher if own else teacher.to(self.device)

    def _stage_checkpoints(self, name: str) -> Checkpoints:
        root = self.output / f".{name}.checkpoints"
        return Checkpoints(name, root, self._fingerprints[name], self.recipe.checkpoints.keep)

    def _save(self, folder: Path) -> dict[str, Any]:
        model = self._model(self._previous("model"))
        with _of("save_dtype"):
            save_checkpoint(model, folder, self.base_folder, DTYPES[self.recipe.save_dtype])
        return {}

    def _evaluate(self, folder: Path) -> dict[str, Any]:
        section = self.recipe.evaluation
        windows = make_windows(
            self.corpus.evaluation,
            self.tokenizer,
            section.length,
            limit_tokens=section.tokens,
            seed=self.recipe.seed,
            vocabulary=self._vocabulary,
        )
        batches = windows.batches(2)
        with autocast(self.device, self.dtype):
            reference, scored = self._score_base(batches)
            told = {"base": scored} | {name: self._score(name, batches, reference) for name in self.checkpoints}
        samples = {"base": scored[1], "hybrid": told[self.checkpoints[-1]][1]}
        result = {
            "tokens": windows.tokens,
            "documents": windows.documents,
            "scores": {name: score.as_dict() for name, (score, _) in told.items()},
            "samples": {name: text for name, text in samples.items() if text},
        }
        write_json(folder / "scores.json", result)
        return result

    # Each of these lets go of its model before the next one is read.

    def _score_base(self, batches: list[dict[str, Tensor]]) -> tuple[Reference, tuple[Scores, str]]:
        """What the teacher makes of the text, and the base's scores with its sample."""
        model = self._model(self.teacher_folder)
        reference = make_reference(model, batches)
        if self.recipe.teacher is not None:
            del model
            model = self._model(self.base_folder)
        return reference, (evaluate(model, batches, reference, description="evaluate base"), self._sample(model))

    def _score(self, name: str, batches: list[dict[str, Tensor]], reference: Reference) -> tuple[Scores, str]:
        """Of a checkpoint; the last one is scored as it is handed over, in its saved precision, and has a sample."""
        last = name == self.checkpoints[-1]
        model = self._model(self.output / ("model" if last else name))
        scores = evaluate(model, batches, reference, description=f"evaluate {name}")
        return scores, self._sample(model) if last else ""

    def _sample(self, model: PreTrainedModel) -> str:
        section = self.recipe.evaluation
        if section.prompt is None:
            return ""
        return continue_prompt(model, self.tokenizer, section.prompt, max_new_tokens=section.new_tokens)

    def _report(self, folder: Path) -> dict[str, Any]:
        steps = {name: read_json(self.output / name / _STEP_FILE) for name in self.step_names[:-1]}
        return write_report(folder, self.recipe, steps, self.output / "model", self.base_folder, self.dtype)

    # Carrying them out.

    def check(self) -> None:
        """Everything that can be found wrong before long work: base, layout, geometry, text. Raises HyLoError."""
        for package, needed_by in (("accelerate", self.recipe.stages), ("matplotlib", True)):
            if needed_by and importlib.util.find_spec(package) is None:
                raise HyLoError(f"upcycling needs {package}; install it with: pip install 'hylo[train]'")
        resolve_report_to(self.recipe)
        for stage in self.recipe.stages:
            parallel.share_of_rank(stage)
            if stage.optimizer == "adamw_8bit" and importlib.util.find_spec("torchao") is None:
                raise HyLoError(
                    f"{stage.name}: optimizer adamw_8bit needs torchao; install it with: pip install 'hylo[optim]'"
                )
        self.corpus.check()
        resolve_base(self.recipe.base)
        if self.recipe.teacher is not None:
            resolve_base(self.recipe.teacher)
        self._check_steps(self._hybrid_config())
        if self.recipe.teacher is not None:
            check_same_vocabulary(self.tokenizer, load_tokenizer(self.teacher_folder))
            with Base.open(self.base_folder) as base:
                teacher = load_text_config(self.teacher_folder)
                if base.config.vocab_size != teacher.vocab_size:
                    raise HyLoError(
                        f"teacher {self.recipe.teacher} has a head of {teacher.vocab_size} words, the base one of "
                        f"{base.config.vocab_size}"
                    )

    def _hybrid_config(self) -> HyLoConfig:
        """Of what the run begins with. Raises HyLoError where it cannot be made, or does not fit the base."""
        recipe = self.recipe
        with Base.open(self.base_folder) as base:
            if recipe.student is None:
                assert recipe.layout is not None
                plan = plan_conversion(
                    base, recipe.layout, recipe.geometry, start=recipe.start, rope_scaling=self._rope_scaling
                )
                return plan.config
            layerwise = any(stage.objective == "layerwise" for stage in recipe.stages)
            return student_config(recipe.student, base.config, layerwise)

    def _check_steps(self, config: HyLoConfig) -> None:
        """What later steps would refuse of the hybrid, and of text: too short for windows, or none that is left."""
        recipe = self.recipe
        if recipe.calibration is not None and recipe.calibration.latents:
            check_latents(config)
        replaces = any(config.mixer_of(i).replaces_attention for i in range(config.num_hidden_layers))
        if recipe.stages and not replaces:
            raise HyLoError(
                f"{recipe.stages[0].name}: every layer of the layout is attention; there is nothing to train"
            )
        with _of("evaluation"):
            if recipe.evaluation.prompt is not None:
                check_prompt(self.tokenizer, recipe.evaluation.prompt, self._vocabulary)
            # One window tells, unless an id may be beyond what the model has embeddings for.
            make_windows(
                self.corpus.evaluation,
                self.tokenizer,
                recipe.evaluation.length,
                limit_tokens=recipe.evaluation.tokens if self.corpus.encoder.may_exceed else 1,
                seed=recipe.seed,
                vocabulary=self._vocabulary,
            )
        with _of("calibration"):
            self._calibration_windows()
        for stage in recipe.stages:
            with _of(stage.name):
                self._check_text(stage)

    def _check_text(self, stage: StageSection) -> None:
        """Raises HyLoError where no windows can be made for a stage, or no tokens be kept."""

        def prepare(tokens: int) -> None:
            self.corpus.prepare(tokens=tokens, length=stage.length, seed=self.recipe.seed)

        try:
            # One window tells.
            prepare(stage.length)
        except HyLoError:
            # Unless it is what stands first that cannot be used.
            prepare(stage.steps * stage.tokens_per_step)

    def run(self, first: str | None = None, until: str | None = None) -> dict[str, Any]:
        """Does the steps that are not done yet. Returns what each step kept, by name.

        Args:
            first: do this step and those after it again, whatever is there. Where a run was stopped that was asked for
                the same, of the same recipe, it is gone on with.
            until: stop after this step.

        Raises:
            HyLoError: on bad input, where a step was done with another recipe, or another run is at work in the output.
        """
        parallel.begin()
        results = {}
        with ExitStack() as held:
            self._fingerprints = parallel.on_main(lambda: self._prepare(first, until, held))
            for step in self.steps:
                results[step.name] = self._do(step)
                if step.name == until:
                    break
            if first is not None:
                parallel.on_main(lambda: self._write_run_file(None))
        return results

    def _prepare(self, first: str | None, until: str | None, held: ExitStack) -> dict[str, str]:
        """Checks everything, locks the output and clears what is to be done again. Returns the steps' fingerprints."""
        names = self.step_names
        for name in (first, until):
            if name is not None and name not in names:
                raise HyLoError(f"no step {name!r}; expected one of {', '.join(names)}")
        if first and until and names.index(until) < names.index(first):
            raise HyLoError(f"--until {until} comes before --from {first}; expected a step after it")
        self._check_output()
        existed = self.output.is_dir()
        if existed:
            held.enter_context(locked(self.output))
        fingerprints = self._fingerprints
        redo = names[names.index(first) :] if first else []
        asked = {"from": first, "until": until, "fingerprint": fingerprints[names[-1]]} if first else None
        if asked is not None and self._begun() == asked:
            line = f"going on with what --from {first} began; once finished, the same command begins anew"
            console.print(line, style="dim", highlight=False, markup=False)
            redo = []
        self._check_fingerprints(fingerprints, redo)
        self.check()
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HyLoError(f"cannot write to {self.output}: {error.strerror}") from None
        if not existed:
            held.enter_context(locked(self.output))
        self._write_run_file(None)
        # What a run that was killed had begun.
        for leftover in self.output.glob(".*.partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for name in redo:
            _remove(self.output / name)
            _remove(self._stage_checkpoints(name).root)
        # Only now that what was there is gone.
        self._write_run_file(asked)
        return fingerprints

    def _write_run_file(self, redo: dict[str, Any] | None) -> None:
        """Says by which recipe the run was last carried out, and which steps it is doing again."""
        told = {"hylo": __version__, "recipe": self.recipe.model_dump(), "redo": redo}
        write_json(self.output / _RUN_FILE, told)

    def _begun(self) -> dict[str, Any] | None:
        """Which steps a run was doing again when it was stopped."""
        file = self.output / _RUN_FILE
        return read_json(file).get("redo") if file.is_file() else None

    def _check_output(self) -> None:
        """Raises HyLoError where the output is not a folder of runs: nothing of the user's own is written over."""
        if self.output.exists() and not self.output.is_dir():
            raise HyLoError(f"{self.output} is a file; expected a folder for the run")
        if self.output.is_dir() and not (self.output / _RUN_FILE).is_file():
            # A first run that stopped early may have left a dequantised model, or part of one, or of its own file.
            names = sorted(entry.name for entry in self.output.iterdir())
            ours = ("base", "teacher", LOCK_FILE, partial_of(self.output / _RUN_FILE).name)
            foreign = [name for name in names if name not in ours and ".partial-" not in name]
            if foreign:
                raise HyLoError(f"{self.output} holds {foreign[0]} and is no run of hylo; choose another output")
        steps = self.step_names
        # What a run keeps beside the folders of its steps.
        folders = [*steps, *(f".{name}.checkpoints" for name in steps), "base", "teacher", "tensorboard"]
        for source in [*self.recipe.data.train, *(self.recipe.data.eval or [])]:
            for folder in _folders_of(source.source):
                if self.output.resolve().is_relative_to(folder.resolve()):
                    raise HyLoError(
                        f"{self.output} is inside {folder}, all of which is read as text; choose another output"
                    )
            path = expand_user(source.source)
            if not path.exists() and reaches_into(path, self.output, [_RUN_FILE], folders):
                raise HyLoError(
                    f"{source.source!r} would read as text what the run writes to {self.output}; choose another output"
                )

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        """Of each step: a hash over what it and the steps before it depend on."""
        fingerprints, sofar = {}, ""
        for step in self.steps:
            sofar = hashlib.sha256((sofar + json.dumps([step.name, step.depends_on])).encode()).hexdigest()
            fingerprints[step.name] = sofar
        return fingerprints

    def _check_fingerprints(self, fingerprints: dict[str, str], redo: list[str]) -> None:
        for name, fingerprint in fingerprints.items():
            file = self.output / name / _STEP_FILE
            if name not in redo and file.is_file() and read_json(file)["fingerprint"] != fingerprint:
                raise HyLoError(
                    f"{self.output / name} was made by another recipe or from other text; "
                    f"pass --from {name} to make it again, or choose another output"
                )

    def _do(self, step: Step) -> dict[str, Any]:
        done = parallel.on_main(lambda: self._done(step))
        if done is not None:
            return done
        return self._carry_out(step) if step.together else parallel.on_main(lambda: self._carry_out(step))

    def _done(self, step: Step) -> dict[str, Any] | None:
        """What a step kept that is done already; else None."""
        target = self.output / step.name
        file = target / _STEP_FILE
        kept = read_json(file) if file.is_file() else None
        if kept is None or kept["fingerprint"] != self._fingerprints[step.name]:
            return None
        console.print(f"{step.name}: already done, in {target}", style="dim", highlight=False, markup=False)
        # Where the run was killed as it removed them.
        self._stage_checkpoints(step.name).clear()
        return kept["result"]

    def _carry_out(self, step: Step) -> dict[str, Any]:
        start = time.monotonic()
        # Models of the step before may be held in circles.
        gc.collect()
        with ExitStack() as stack:

            def begin() -> Path:
                return stack.enter_context(atomic_directory(self.output / step.name, overwrite=True))

            work = parallel.on_main(begin) if step.together else begin()
            result = step.action(work)
            if parallel.is_main():
                seconds = round(time.monotonic() - start + result.get("seconds_before", 0.0), 1)
                kept = {"fingerprint": self._fingerprints[step.name], "seconds": seconds, "result": result}
                write_json(work / _STEP_FILE, kept)
                sync_tree(work)
        if parallel.is_main():
            # Only now that what they led to is on the disk.
            sync_tree(self.output, recursive=False)
            self._stage_checkpoints(step.name).clear()
        return result
