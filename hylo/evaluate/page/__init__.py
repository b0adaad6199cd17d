"""The page of a run or of results: one HTML file that needs nothing else."""

from hylo.evaluate.page.build import report_page
from hylo.evaluate.page.sources import Sources, read_sources

__all__ = ["Sources", "read_sources", "report_page"]
