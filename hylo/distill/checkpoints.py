"""Checkpoints inside a stage: a folder is there whole or not at all, and is looked over before it is used.

They lie beside the stage's own folder, under a fingerprint of what the stage depends on, so that another recipe finds
none of them. A new one is written under a temporary name, flushed to the disk and renamed; only then do older ones go.
"""

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hylo.distill import parallel
from hylo.errors import HyLoError
from hylo.files import read_json, sync_tree, write_json
from hylo.progress import console

# Written last: the step, every file's size, and what the caller wants back.
_MANIFEST = "checkpoint.json"
_PREFIX = "checkpoint-"
_PARTIAL = ".partial-"
_TORCH_WRITERS = ("inline_container", "StreamWriter", "basic_ios", "iostream error")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the steps done, and what was kept beside the trainer's own files."""

    folder: Path
    step: int
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        stage: its name, for messages.
        root: the folder for checkpoints of this stage, whatever they were made with; made with the first.
        fingerprint: of what the stage depends on.
        keep: how many of the newest stay.
    """

    def __init__(self, stage: str, root: Path, fingerprint: str, keep: int = 1) -> None:
        self.stage, self.root, self.keep = stage, root, keep
        self.folder = root / fingerprint[:16]

    def _steps(self) -> list[int]:
        """The steps that there are checkpoints of, whole or not, the newest first."""
        found = [path.name.removeprefix(_PREFIX) for path in self.folder.glob(f"{_PREFIX}*")]
        return sorted((int(step) for step in found if step.isdigit()), reverse=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step}"

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; None where there is none at all. What a killed run had begun is removed.

        Raises HyLoError where there are some, all damaged.
        """
        return parallel.on_main(self._latest)

    def _latest(self) -> Checkpoint | None:
        for leftover in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        steps = self._steps()
        for i, step in enumerate(steps):
            try:
                found = _opened(self._path(step), step)
                # A damaged one in front would count as the newest when older ones go.
                for damaged in steps[:i]:
                    self._remove(self._path(damaged))
                return found
            except (HyLoError, OSError, KeyError, SafetensorError, zipfile.BadZipFile) as error:
                damage = f"{self.stage}: checkpoint {self._path(step)} is damaged ({_reason(error)})"
                if i + 1 == len(steps):
                    raise HyLoError(
                        f"{damage}, and there is no other; remove {self.root} to begin the stage anew"
                    ) from None
                self._say(f"{damage}; trying the one at step {steps[i + 1]}")
        self._say_what_is_ignored()
        return None

    def _say_what_is_ignored(self) -> None:
        others = [path for path in self.root.glob("*") if path != self.folder]
        if others:
            self._say(
                f"{self.stage}: checkpoints in {self.root} are of another recipe or text, and are not used; "
                "they go when the stage is done"
            )

    def _say(self, line: str) -> None:
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def writing(self, step: int, state: dict[str, Any]) -> Iterator[Path]:
        """A folder to make `checkpoint-STEP` in; it becomes a checkpoint when the block ends well.

        Args:
            state: to be kept with it, as JSON.

        Raises:
            HyLoError: where it cannot be written; the checkpoints that were there stay.
        """
        work = self._work(step)
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            yield work
            made = work / f"{_PREFIX}{step}"
            sizes = {str(path.relative_to(made)): path.stat().st_size for path in made.rglob("*") if path.is_file()}
            write_json(made / _MANIFEST, {"step": step, "files": sizes, "state": state})
            sync_tree(made)
            target = self._path(step)
            if target.exists():
                self._remove(target)
            made.replace(target)
            sync_tree(self.folder, recursive=False)
        except BaseException as error:
            shutil.rmtree(work, ignore_errors=True)
            for folder in (self.folder, self.root):
                with suppress(OSError):
                    folder.rmdir()
            if isinstance(error, OSError | SafetensorError) or _is_torch_writers(error):
                last = [f"; the one at step {earlier} stays" for earlier in self._steps()[:1]]
                raise HyLoError(
                    f"{self.stage}: the checkpoint at step {step} cannot be written to {self.folder} "
                    f"({_reason(error)}){''.join(last)}"
                ) from None
            raise
        shutil.rmtree(work, ignore_errors=True)
        for older in self._steps()[self.keep :]:
            self._remove(self._path(older))

    @contextmanager
    def writing_together(self, step: int, state: dict[str, Any]) -> Iterator[Path]:
        """As `writing`, by all ranks of a run: the folder `checkpoint-STEP` itself, for each to put its part in.

        Args:
            state: the first rank's is kept.
        """
        made = self._work(step) / f"{_PREFIX}{step}"
        with ExitStack() as stack:

            def begin() -> None:
                stack.enter_context(self.writing(step, state))
                made.mkdir()

            parallel.on_main(begin)
            yield made
            # The first rank goes on when all parts are there.
            parallel.barrier()
        parallel.barrier()

    def _work(self, step: int) -> Path:
        return self.folder / f"{_PARTIAL}{step}"

    def _remove(self, path: Path) -> None:
        """At once, as far as names go: a run killed meanwhile leaves no half of it."""
        doomed = path.with_name(f"{_PARTIAL}{path.name}")
        path.replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def clear(self) -> None:
        """Removes all checkpoints of the stage."""
        shutil.rmtree(self.root, ignore_errors=True)


def _opened(folder: Path, step: int) -> Checkpoint:
    """Looks a checkpoint over without reading it through: every file there, of its size, with its own kind of head."""
    manifest = read_json(folder / _MANIFEST)
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise HyLoError(f"{name} is missing")
        if path.stat().st_size != size:
            raise HyLoError(f"{name} has {path.stat().st_size:,} bytes, not {size:,}")
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth"):
            # torch's archives; nothing in them is unpickled here.
            with zipfile.ZipFile(path):
                pass
        elif path.suffix == ".json":
            read_json(path)
    return Checkpoint(folder, step, manifest["state"])


def _is_torch_writers(error: BaseException) -> bool:
    """torch.save raises a bare RuntimeError where it cannot write: with a line of its source, or C++'s words."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _TORCH_WRITERS)


def _reason(error: BaseException) -> str:
    if _is_torch_writers(error):
        return "torch.save failed, as on a full disk"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{_MANIFEST} lacks {error}"
    # Python names a file by its path, safetensors a system error by its number: the line stays one either way.
    return " ".join(str(error).split())[:200] or type(error).__name__
