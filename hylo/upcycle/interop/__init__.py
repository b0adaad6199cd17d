"""Released HyLo checkpoints: read into this package's format, and written from it."""

from hylo.upcycle.interop.transfer import Transfer, export_released, import_released

__all__ = ["Transfer", "export_released", "import_released"]
