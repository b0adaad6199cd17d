"""Published figures, to stand beside measured ones: HyLo, arXiv 2604.24715."""

from dataclasses import dataclass

SOURCE = "arXiv 2604.24715"
RULER_LENGTHS = (8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Published:
    """One published model, in percent.

    Attributes:
        cache: of the base's.
        commonsense: mean of the seven tasks, 0-shot.
        ruler: mean of the thirteen tasks, by length in tokens.
    """

    name: str
    cache: float
    commonsense: float
    gsm8k: float
    ruler: dict[int, float]

    @property
    def base(self) -> str:
        """What it was made from, as the names of that model's checkpoints have it."""
        return self.name.split()[0]

    def is_of(self, reference: str) -> bool:
        """Whether a folder or a hub id is named after its base."""
        return self.base.lower() in reference.lower()


def _model(name: str, cache: float, commonsense: float, gsm8k: float, *ruler: float) -> Published:
    return Published(name, cache, commonsense, gsm8k, dict(zip(RULER_LENGTHS, ruler, strict=True)))


PUBLISHED = (
    _model("Llama-3.2-1B 4MLA12GDN, 8K", 3.9, 53.1, 51.9, 55.1, 11.9, 2.4, 0.8),
    _model("Llama-3.2-1B 4MLA12GDN, 64K", 3.9, 51.2, 37.5, 52.5, 48.3, 44.5, 40.8),
    _model("Llama-3.2-3B 14MLA14GDN, 64K", 4.7, 57.9, 58.9, 73.2, 69.7, 62.9, 52.0),
    _model("Qwen3-1.7B 14MLA14M2, 64K", 7.8, 55.7, 73.5, 73.9, 62.6, 46.2, 33.1),
)
