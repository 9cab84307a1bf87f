"""The images of a run: how many, what they are called, what they are by content, and each
one when it is its turn.

A source is read by place, so that any worker can make any image; what it needs to be read
elsewhere is plain data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from consilience import data, inputs, progress
from consilience.ahead import ahead
from consilience.files import digest_of_data
from consilience.runs.folder import file_content, files_content
from consilience.types import ConsilienceError, Sample

MOST_READ = 10_000
"""Files beyond which a job knows them by name and size, not by every byte: each image's
own digest is in its record all the same."""


class Source(Protocol):
    """Images by place."""

    @property
    def names(self) -> Sequence[str]:
        """What they are called, each once."""

    def parts(self) -> dict[str, Any]:
        """What they are for the job: content, by name."""

    def read(self, place: int) -> Sample | data.Failure:
        """One of them."""


def refuse_twins(names: Sequence[str]) -> None:
    """Names tell images apart."""
    met: set[str] = set()
    for name in names:
        if name in met:
            raise ConsilienceError(f"two images are called {name!r}")
        met.add(name)


class Files:
    """Files of images, with labels and boxes where they are known."""

    def __init__(
        self,
        given: Sequence[str | Path],
        truth: str | Path | None,
        classes: Sequence[str],
        channels: int = 3,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        patterns = [str(one) for one in given]
        self.files = data.find_images(patterns)
        self.names = data.names_of(self.files)
        self._classes, self._channels, self._range = classes, channels, value_range
        self._truth_file = truth
        self._truth = data.read_truth(truth, classes) if truth is not None else None
        if (left := data.passed_over(patterns)) is not None:
            progress.say(left)
        if self._truth is not None:
            unmatched = self._truth.unmatched_note(self.files)
            for note in (*self._truth.notes, *([unmatched] if unmatched else [])):
                progress.say(note)

    def parts(self) -> dict[str, Any]:
        """By name the digest of a file, or of many files one of names and sizes."""
        images = content_of(self.files, self.names)
        return {"images": images, "truth": file_content(self._truth_file)}

    def read(self, place: int) -> Sample | data.Failure:
        """One of them; one that is gone, or a link that leads nowhere, is a failure."""
        return data.read_file(
            self.files[place],
            self.names[place],
            self._truth,
            self._classes,
            self._channels,
            self._range,
        )


def content_of(files: Sequence[Path], names: Sequence[str]) -> dict[str, Any]:
    """Files as part of a job: by name the digest of each; of more than `MOST_READ` one
    of all names and sizes.
    """
    if len(files) <= MOST_READ:
        return dict(files_content(files, names))
    sizes = [_size(file) for file in files]
    return {
        "count": len(sizes),
        "names and sizes digest": digest_of_data([list(names), sizes]),
    }


def _size(file: Path) -> int:
    try:
        return os.stat(file).st_size  # noqa: PTH116 - a million times
    except OSError:
        return -1


class Samples:
    """Samples that are in memory."""

    def __init__(self, given: Sequence[Sample]) -> None:
        self._given, self.names = list(given), [one.name for one in given]
        refuse_twins(self.names)

    def parts(self) -> dict[str, Any]:
        """By name their digest."""
        return {
            "images": {one.name: one.digest for one in self._given},
            "truth": None,
        }

    def read(self, place: int) -> Sample | data.Failure:
        """One of them."""
        return self._given[place]


class OnceMore:
    """A data set or loader of a person's own, gone through again and again in its order:
    places are asked for in order.
    """

    def __init__(self, again: inputs.Again) -> None:
        self._again, self._known = again, dict[str, str]()
        for one in again:
            known = one.digest if isinstance(one, Sample) else one.reason
            if one.name in self._known:
                raise ConsilienceError(f"two images are called {one.name!r}")
            self._known[one.name] = known
        self.names = list(self._known)
        self._next, self._items = 0, iter(again)

    def parts(self) -> dict[str, Any]:
        """By name their digest."""
        return {"images": self._known, "truth": None}

    def read(self, place: int) -> Sample | data.Failure:
        """One of them."""
        if place < self._next:
            self._next, self._items = 0, iter(self._again)
        for _ in range(self._next, place):
            next(self._items)
        self._next = place + 1
        return next(self._items)


class Joined:
    """Several sources as one."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.names = [name for source in sources for name in source.names]
        if len(set(self.names)) < len(self.names):
            twice = sorted(
                {name for name in self.names if self.names.count(name) > 1}
            )
            raise ConsilienceError(f"two images are called {twice[0]!r}")

    def parts(self) -> dict[str, Any]:
        """Those of all."""
        parts = [source.parts() for source in self.sources]
        truths = [part["truth"] for part in parts if part["truth"]]
        images = {
            key: value for part in parts for key, value in part["images"].items()
        }
        return {"images": images, "truth": truths[0] if truths else None}

    def read(self, place: int) -> Sample | data.Failure:
        """One of them."""
        for source in self.sources:
            if place < len(source.names):
                return source.read(place)
            place -= len(source.names)
        raise IndexError(place)


def source_of(
    given: Sequence[str | Path | Sample],
    truth: str | Path | None,
    classes: Sequence[str],
    channels: int = 3,
    again: inputs.Again | None = None,
    value_range: tuple[float, float] | None = None,
) -> Source:
    """The images behind what was given: files, folders, patterns, tar shards, tables of
    paths, samples, data sets.
    """
    from consilience.runs.datasets import listed_source

    there = [one for one in given if isinstance(one, Sample)]
    paths = [one for one in given if not isinstance(one, Sample)]
    sources: list[Source] = []
    plain: list[str | Path] = []
    for path in paths:
        found = listed_source(path, classes, channels, value_range)
        if found is None:
            plain.append(path)
        else:
            sources.append(found)
    if plain or not (sources or there or again is not None):
        sources.insert(0, Files(plain, truth, classes, channels, value_range))
    elif truth is not None:
        raise ConsilienceError(
            "--truth goes with files of images; these have their own"
        )
    if there:
        sources.append(Samples(there))
    if again is not None:
        sources.append(OnceMore(again))
    return sources[0] if len(sources) == 1 else Joined(sources)


# ---- ahead of the engine


def read_ahead(
    source: Source,
    places: Sequence[int],
    depth: int,
    threads: int,
    then: Callable[[Sample], object] = lambda sample: None,
) -> Iterator[tuple[int, Sample | data.Failure]]:
    """Images in the order of ``places``, read by ``threads`` while others are explained;
    ``depth`` are in memory at most. Without threads each is read when it is asked for.
    ``then`` is done with each image by the thread that read it.
    """
    if threads < 1 or not _by_place(source):
        for place in places:
            yield place, source.read(place)
        return

    def read(place: int) -> tuple[int, Sample | data.Failure]:
        sample = source.read(place)
        if isinstance(sample, Sample):
            then(sample)
        return place, sample

    yield from ahead(read, places, threads, depth)


def _by_place(source: Source) -> bool:
    """Whether any place can be read at any time, by several threads."""
    if isinstance(source, Joined):
        return all(map(_by_place, source.sources))
    return not isinstance(source, OnceMore)
