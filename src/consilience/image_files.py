"""Which files an argument stands for: files, folders and patterns.

Nothing is opened here, and neither torch nor an image library is imported, so that a
path that does not exist is refused at once.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from consilience.types import ConsilienceError

SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".png",
        ".apng",
        ".gif",
        ".bmp",
        ".dib",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".avif",
        ".heic",
        ".heif",
        ".jp2",
        ".j2k",
        ".jpx",
        ".qoi",
        ".dcm",
    }
)
"""What is taken for an image inside a folder."""


def is_data_set(given: str | Path) -> bool:
    """Whether it spells a data set (``torchvision:NAME,...``, ``datasets:FOLDER``)."""
    return str(given).startswith(("torchvision:", "datasets:"))


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Files behind files, folders and patterns, in the order given, each once.

    Folders are searched recursively for files with an image's suffix, sorted, without
    hidden ones and without the folders of runs that lie in them. A file that is named is tried whatever its suffix.
    Raises `ConsilienceError` for whatever stands for no image at all.
    """
    found = {str(path): _expand(str(path)) for path in paths}
    empty = [name for name, files in found.items() if not files]
    if empty or not found:
        suffixes = " ".join(sorted(SUFFIXES))
        looked = ", ".join(_looked_for(name) for name in empty) or "no path was given"
        raise ConsilienceError(
            f"no images: {looked}; looked for files, for patterns, and in folders for "
            f"{suffixes}"
        )
    once = {
        os.path.abspath(file): file  # noqa: PTH100 - resolve() would follow links
        for files in reversed(found.values())
        for file in reversed(files)
    }
    return list(reversed(once.values()))


def passed_over(paths: Sequence[str | Path]) -> str | None:
    """What folders hold besides images, by suffix with a count, in a line; None where
    there is nothing.
    """
    counts: Counter[str] = Counter()
    for path in paths:
        if os.path.isdir(path):  # noqa: PTH112
            for here, folders, files in os.walk(path):
                folders[:] = [
                    name
                    for name in folders
                    if not name.startswith(".") and not _is_run(Path(here, name))
                ]
                others = (Path(name) for name in files if not name.startswith("."))
                counts.update(
                    other.suffix.lower() or "no suffix"
                    for other in others
                    if not _is_image(other)
                )
    if not counts:
        return None
    listed = ", ".join(
        f"{count} {suffix}"
        for suffix, count in sorted(counts.items(), key=_frequent)[:6]
    )
    more = ", ..." if len(counts) > 6 else ""
    total = counts.total()
    return f"passed over {total} other file{'s' if total > 1 else ''}: {listed}{more}"


def _frequent(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _looked_for(name: str) -> str:
    if os.path.isdir(name):  # noqa: PTH112
        return f"folder {name} holds none"
    return (
        f"pattern {name} matches none"
        if glob.has_magic(name)
        else f"{name} does not exist"
    )


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if os.path.isdir(name):  # noqa: PTH112 - Path.is_dir raises for a name too long
        return _walk(path)
    if os.path.lexists(name) or not glob.has_magic(name):
        return [path] if os.path.lexists(name) else []
    if path.parent.is_dir():  # brackets in the folder's own name are no pattern
        name = str(Path(glob.escape(str(path.parent)), path.name))
    suffix = path.suffix
    literal = bool(suffix) and not glob.has_magic(suffix)
    found: list[Path] = []
    for match in map(Path, sorted(glob.glob(name, recursive=True))):  # noqa: PTH207 - Path.glob takes no absolute pattern
        if match.is_dir():
            found += [] if "**" in name else _walk(match)
        elif literal or _is_image(match):
            found.append(match)
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _walk(folder: Path) -> list[Path]:
    """Images below a folder; linked folders are followed, each real one once, so that a
    loop of links ends.
    """
    seen: set[str] = set()
    found: list[Path] = []
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not _is_run(Path(here, name))
        ]
        found += [
            path for path in (Path(here, name) for name in files) if _is_image(path)
        ]
    return sorted(found, key=lambda path: path.parts)


def _is_run(folder: Path) -> bool:
    """A run's own folder: its panels are not images of the folder that it lies in."""
    return (folder / "job.json").is_file()


def _refuse(error: OSError) -> None:
    raise ConsilienceError(
        f"{error.filename}: the folder cannot be read ({error.strerror})"
    )
