"""Where uploads live: a private folder of this server, each under a name that the server
makes, for an hour after it was last used.
"""

from __future__ import annotations

import re
import secrets
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from consilience.progress import printable
from consilience.types import ConsilienceError

UPLOAD = 20_000_000
"""Bytes of an image at most."""
UPLOADS = 2_000
"""Images at most, and `ROOM` bytes together."""
ROOM = 2_000_000_000
EXPIRES = 3600.0
KINDS = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\x00", ".tif"),
    (b"MM\x00*", ".tif"),
)


class TooMuchError(ConsilienceError):
    """The shelter is full."""


@dataclass
class Upload:
    """An image that somebody gave."""

    number: str
    name: str
    path: Path
    size: int
    used: float = field(default_factory=time.time)


def suffix_of(content: bytes) -> str:
    """The suffix of an image by its first bytes; `ConsilienceError` where it is none that
    the workbench reads.
    """
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    for start, suffix in KINDS:
        if content.startswith(start):
            return suffix
    raise ConsilienceError(
        "this is no image that the workbench reads; there is: JPEG, PNG, GIF, BMP, TIFF, WebP"
    )


class Shelter:
    """The private folder, with ``uploads`` and a folder a job."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="consilience-"))
        self.folder.chmod(0o700)
        self._uploads: dict[str, Upload] = {}
        self._lock = threading.Lock()
        (self.folder / "uploads").mkdir(exist_ok=True)

    def put(self, name: str, content: bytes) -> Upload:
        """Keep an upload; its type is told by its content."""
        if len(content) > UPLOAD:
            raise ConsilienceError(
                f"an image may have {UPLOAD / 1e6:.0f} MB; this has "
                f"{len(content) / 1e6:.1f}"
            )
        suffix = suffix_of(content)
        with self._lock:
            self._refuse_more(len(content))
            number = secrets.token_urlsafe(9)
            path = self.folder / "uploads" / f"{number}{suffix}"
            path.write_bytes(content)
            one = Upload(number, clean_name(name), path, len(content))
            self._uploads[number] = one
            return one

    def reserve(self, name: str, suffix: str) -> Upload:
        """A place that a worker writes an image of the server's own folder to."""
        number = secrets.token_urlsafe(9)
        path = self.folder / "uploads" / f"{number}{suffix}"
        one = Upload(number, clean_name(name), path, 0)
        with self._lock:
            self._refuse_more(0)
            self._uploads[number] = one
        return one

    def get(self, number: str) -> Upload:
        """An upload by its number; `ConsilienceError` where it is gone."""
        with self._lock:
            self._expire()
            one = self._uploads.get(number)
            if one is None:
                raise ConsilienceError(
                    "this image is not here, or not any more; give it again"
                )
            one.used = time.time()
            return one

    def drop(self, number: str) -> None:
        """Forget an upload."""
        with self._lock:
            one = self._uploads.pop(number, None)
        if one is not None:
            one.path.unlink(missing_ok=True)

    def _refuse_more(self, size: int) -> None:
        self._expire()
        room = sum(one.size for one in self._uploads.values())
        if len(self._uploads) >= UPLOADS or room + size > ROOM:
            raise TooMuchError("the workbench holds too many images; try later")

    def _expire(self) -> None:
        end = time.time() - EXPIRES
        for number, one in list(self._uploads.items()):
            if one.used < end:
                one.path.unlink(missing_ok=True)
                del self._uploads[number]

    def job_folder(self, number: str) -> Path:
        """Where a job's run goes."""
        return self.folder / "jobs" / number

    def clear(self, number: str) -> None:
        """Remove what a job left."""
        shutil.rmtree(self.job_folder(number), ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def clean_name(name: str) -> str:
    """A name for people: the last part of a path, printable, without its suffix, at most
    80 letters.
    """
    last = re.split(r"[/\\]", printable(name))[-1].strip()
    stem = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", last)
    return (stem or last or "image")[:80]


def apart(names: list[str]) -> list[str]:
    """Names of which no two are alike."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found
