"""The report: a run as one self-contained HTML file."""

from consilience.report.page import Reported, page, write

__all__ = ["Reported", "page", "write"]
