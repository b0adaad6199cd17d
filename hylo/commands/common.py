"""What several commands share: where they print, and options that mean the same everywhere."""

import sys
from enum import StrEnum

from rich.console import Console

# A log has no width: tables are printed whole there.
out = Console(width=None if sys.stdout.isatty() else 160)

LAYOUT_HELP = (
    "Which mixer each layer gets: 4MLA12GDN counts blocks (published positions, else evenly spread); "
    "'MLA:1,5,10-12 GDN' lists layers, GDN takes the rest."
)
GEOMETRY_HELP = "A mixer size such as mla.kv_lora_rank=96 (may be repeated), or `paper` for the published sizes."


class DtypeName(StrEnum):
    """What weights are stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
