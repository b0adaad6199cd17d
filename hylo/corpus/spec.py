"""What a corpus is made of: a YAML file of packages, and how each is read."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from hylo.data.sections import Number, Positive, Section
from hylo.errors import HyLoError

KINDS = ("debian", "pypi", "npm")
Group = Literal["prose", "manuals", "api", "code"]
_REFERENCE = re.compile(rf"({'|'.join(KINDS)}):([^=\s]+)=(\S+)")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[list[str], BeforeValidator(_as_list)]


class PackageSource(Section):
    """One package, and what of it is text.

    Attributes:
        package: `debian:NAME=VERSION`, `pypi:NAME=VERSION` or `npm:NAME=VERSION`; or `python:topics`, `python:stdlib`,
            which are in every Python installation.
        licence: of its text, as its authors name it.
        group: `prose`, `manuals`, `api` (reference made from code) or `code`.
        read: a reader of `hylo.corpus.readers`.
        files: patterns of the files that are read, from the package's root.
        skip: patterns of files that are not.
        join: files are joined, in the order of their names and the numbers in them, to documents of about
            `document_characters`.
        contents: the same in reading order: the page with which a manual begins, whose links give the order.
        document_characters: of a joined document.
        keep: share of the documents, chosen by a hash of their names: thins what is repetitive or large.
        name: of its files in the corpus; the package's name by default.
    """

    package: str
    licence: str = Field(min_length=1)
    group: Group
    read: str
    files: Patterns = Field(default_factory=list)
    skip: Patterns = Field(default_factory=list)
    join: bool = False
    contents: str | None = None
    document_characters: Positive = 500_000
    keep: Number = Field(default=1.0, gt=0, le=1)
    name: str = ""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.package.startswith("python:") and not _REFERENCE.fullmatch(self.package):
            raise ValueError(f"{self.package!r} is no package; expected debian:NAME=VERSION, pypi: or npm:")
        return self

    @property
    def reference(self) -> tuple[str, str, str] | None:
        """Kind, name and version; None for what is in every Python installation."""
        found = _REFERENCE.fullmatch(self.package)
        return (found[1], found[2], found[3]) if found else None

    @property
    def title(self) -> str:
        if self.name:
            return self.name
        named = self.reference[1] if self.reference else self.package
        return re.sub(r"[^\w.+-]+", "-", named).strip("-")


class TaskSection(Section):
    """Synthetic tasks.

    Attributes:
        tokens: of all of them together, about.
        lengths: of one, in tokens, about; each gets the same share of the tokens.
        chats: share of the exercises that are written as chats.
    """

    tokens: int = Field(default=0, ge=0)
    lengths: list[Positive] = Field(default=[1024, 2048, 4096, 8192, 16384, 32768], min_length=1)
    chats: Number = Field(default=0.3, ge=0, le=1)


class CorpusSpec(Section):
    """A corpus.

    Attributes:
        seed: of the synthetic tasks.
        held_out: share of each source's documents that is kept for evaluation, by a hash of their names.
        sources: in order of preference: of two copies of a text, the earlier source keeps its own.
        tasks: synthetic exercises on distractor text of the corpus.
    """

    seed: int = 0
    held_out: Number = Field(default=0.005, gt=0, lt=1)
    sources: list[PackageSource] = Field(min_length=1)
    tasks: TaskSection = TaskSection()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        titles = [source.title for source in self.sources]
        twice = sorted({title for title in titles if titles.count(title) > 1})
        if twice:
            raise ValueError(f"two sources are called {twice[0]!r}; give one of them a name:")
        return self


def load_spec(path: Path) -> CorpusSpec:
    """Raises HyLoError, naming the key, where the file is missing or says something that is not understood."""
    try:
        return CorpusSpec.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise HyLoError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise HyLoError(f"{path} is no YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise HyLoError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
