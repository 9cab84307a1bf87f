"""Results of the planted suite in a folder: numbers and a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consilience import api
from consilience.files import write_atomically, write_json
from consilience.show.planted_page import planted_page
from consilience.types import ConsilienceError

RESULTS, REPORT = "planted.json", "report.html"
PLANTED_FILES = frozenset({RESULTS, REPORT})


def write_planted(
    found: Mapping[str, Any], folder: str | Path, command: str = ""
) -> Path:
    """Keep the suite's results in a folder, ``planted.json`` and a page; returns the
    page's path.

    Raises `ConsilienceError` where the folder holds anything but an earlier result of
    this suite.
    """
    place = Path(folder)
    if place.exists() and (
        not place.is_dir()
        or any(path.name not in PLANTED_FILES for path in place.iterdir())
    ):
        raise ConsilienceError(
            f"{place} holds something else than results of the planted suite; name another "
            f"folder with -o"
        )
    version = api.versions()["consilience"]
    write_json(place / RESULTS, {"version": version, "command": command, **found})
    text = planted_page(found, version, command).encode()
    write_atomically(place / REPORT, lambda file: file.write(text))
    return place / REPORT
