"""The report: a run as one self-contained HTML file."""

from consilience.report.html import Reported, page, write

__all__ = ["Reported", "page", "write"]
