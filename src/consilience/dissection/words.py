"""Words for units: CLIP-Dissect (Oikarinen & Weng, ICLR 2023) over any list of words
and any probe images.

A unit is what it says of N probe images, q (N,): the mean of its map on each. A word is
how near it is to each image, P (N,): the inner product of their embeddings. A
similarity holds the two against each other; the unit is given the word that fits best,
with the runner-up and how far it is behind. The probe images need no labels.

Memory: 4 (N (U + d) + W d) bytes for the summaries and embeddings (d numbers each), 8 U
W for the scores of a layer (143 MB for 896 units and 20,000 words), and one block of P
(`BLOCK`). P as a whole is never made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp

from consilience import progress
from consilience.dissection.encoders import Encoder, image_embeddings, word_embeddings
from consilience.files import read_text
from consilience.registry import Registry, option, spell
from consilience.types import Array, ConsilienceError, Network, Sample, ViewMode

Floats = NDArray[np.float64]
SIMILARITY_BYTES = 32 << 20
"""Bytes of a block of P (images x words, float64)."""

similarities = Registry("similarity", contract=("scores",))


# ---- images against words


@dataclass(frozen=True, eq=False)
class Space:
    """Unit-length embeddings of images (N, d) and words (W, d), and blocks of their
    inner products P (N, W).
    """

    images: Array
    words: Array

    def __post_init__(self) -> None:
        if self.images.shape[1:] != self.words.shape[1:]:
            raise ConsilienceError(
                f"the encoder gives images {self.images.shape[1]} numbers and words "
                f"{self.words.shape[1]}: no common space"
            )

    def block(self, rows: Any, columns: Any = slice(None)) -> Floats:
        """P of some images and words, float64."""
        product: Floats = (
            self.images[rows].astype(np.float64)
            @ self.words[columns].astype(np.float64).T
        )
        return product

    def mean(self) -> Floats:
        """Mean of P over the images, (W,): the words' product with the mean image."""
        average: Floats = self.words.astype(np.float64) @ self.images.astype(
            np.float64
        ).mean(axis=0)
        return average

    def by_images(self) -> Iterator[tuple[slice, Floats]]:
        """All of P, some images at a time."""
        for rows in _slices(len(self.images), len(self.words)):
            yield rows, self.block(rows)


def _slices(count: int, width: int) -> list[slice]:
    """``count`` rows of ``width`` float64 in blocks of at most `BLOCK` bytes."""
    step = max(1, SIMILARITY_BYTES // (8 * max(1, width)))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def highest(units: Array, count: int) -> NDArray[np.int64]:
    """The images (count, U) on which each unit of q (N, U) is highest, the highest
    first; ties in order of the images.
    """
    order = np.argsort(-units.astype(np.float64), axis=0, kind="stable")
    return order[: min(count, len(units))]


# ---- the five similarities


class WordSimilarity(Protocol):
    """A frozen dataclass that holds units against words."""

    def scores(self, units: Array, space: Space) -> Floats:
        """Scores (U, W) of q (N, U) against P (N, W); higher fits better, within a
        unit.
        """


@similarities.register("soft-wpmi")
@dataclass(frozen=True)
class SoftWPMI:
    """Soft weighted pointwise mutual information (CLIP-Dissect, section 3.2): ``log
    E[p(t|B)] - lam log p(t)``.

    ``log E[p(t|B)] = sum_x log(1 + p(x in B) (p(t|x) - 1))`` over the ``top`` images,
    whose chance to belong to the unit's set B falls linearly with their rank from
    ``first`` towards ``last``, and is 0 for all others; ``p(t|x)`` is the softmax over
    the words of ``scale`` P. ``p(t)`` is the mean of ``E[p(t|B)]`` over the layer's
    units (without those that say the same of every image).
    """

    top: int = option(100, help="images that may belong to a unit's set", least=1)
    scale: float = option(10.0, help="a: temperature of the softmax over words")
    lam: float = option(1.0, help="weight of the prior")
    first: float = option(
        0.998, help="chance that the highest image belongs to the set"
    )
    last: float = option(0.97, help="where that chance falls to after the last one")

    def __post_init__(self) -> None:
        if not 0 <= self.last <= self.first < 1:
            raise ConsilienceError(
                f"soft-wpmi: 0 <= last <= first < 1; got first {self.first:g}, last "
                f"{self.last:g}"
            )

    def scores(self, units: Array, space: Space) -> Floats:
        """(U, W)."""
        top = highest(units, self.top)
        belongs = self.first - (self.first - self.last) * np.arange(len(top)) / len(
            top
        )

        def gain(less: Floats, ranks: Array) -> Floats:
            gains: Floats = np.log1p(belongs[ranks][:, None] * less)
            return gains

        return _informed(top, space, self.scale, self.lam, np.expm1, gain)


@similarities.register("wpmi")
@dataclass(frozen=True)
class WPMI:
    """Weighted pointwise mutual information (CLIP-Dissect, section 3.2): ``log p(t|B) -
    lam log p(t)``.

    ``log p(t|B) = sum over the top images of log p(t|x)``; the rest as for
    ``soft-wpmi``.
    """

    top: int = option(28, help="images in a unit's set", least=1)
    scale: float = option(2.0, help="a: temperature of the softmax over words")
    lam: float = option(0.6, help="weight of the prior")

    def scores(self, units: Array, space: Space) -> Floats:
        """(U, W)."""
        return _informed(
            highest(units, self.top),
            space,
            self.scale,
            self.lam,
            lambda log_p: log_p,
            lambda log_p, _: log_p,
        )


def _informed(
    top: Array, space: Space, scale: float, lam: float, once: Any, gain: Any
) -> Floats:
    """Sums (U, W) of ``gain(once(log p(t|x)), rank)`` over each unit's ``top`` images
    (K, U), less ``lam`` times the log prior. ``once`` is taken for an image,
    ``gain`` for every unit that has it.
    """
    units = top.shape[1]
    if lam and units < 2:
        raise ConsilienceError(
            "the prior is a mean over a layer's units and needs two of them; take lam=0 for "
            "one unit"
        )
    sums = np.zeros((units, len(space.words)))
    ranks, owners = np.divmod(np.arange(top.size), units)
    flat = top.ravel()
    with progress.task("weighing words", top.size) as running:
        for rows, block in space.by_images():
            log_p = scale * block
            log_p -= logsumexp(log_p, axis=1, keepdims=True)
            near = once(log_p)
            here = np.flatnonzero((flat >= rows.start) & (flat < rows.stop))
            for part in _split(here, len(space.words)):
                for owner, gains in zip(
                    owners[part],
                    gain(near[flat[part] - rows.start], ranks[part]),
                    strict=True,
                ):
                    sums[owner] += gains
            running.advance(len(here))
    if not lam:
        return sums
    prior = logsumexp(sums, axis=0) - math.log(units)
    informed: Floats = sums - lam * prior
    return informed


def _split(indices: Array, width: int) -> Iterator[Array]:
    for part in _slices(len(indices), width):
        yield indices[part]


@similarities.register("rank-reorder")
@dataclass(frozen=True)
class RankReorder:
    """Rank reorder (CLIP-Dissect, section 3.2): ``-||q' - q||_p`` over the images on
    which the unit is highest.

    ``q'`` are the unit's own values put in the order of the word's: where the word
    ranks images as the unit does, nothing moves and the score is 0. ``power`` is p;
    ``share`` of all images are looked at, one at least.
    """

    power: float = option(3.0, help="p of the norm", least=1)
    share: float = option(
        0.05, help="share of the images, the highest ones", above=0, most=1
    )

    def scores(self, units: Array, space: Space) -> Floats:
        """(U, W)."""
        top = highest(units, max(1, int(self.share * len(units))))
        scores = np.empty((units.shape[1], len(space.words)))
        with progress.task("weighing words", units.shape[1]) as running:
            for unit in range(units.shape[1]):
                values = units[top[:, unit], unit].astype(np.float64)
                for words in _slices(len(space.words), len(top)):
                    scores[unit, words] = -self._moved(
                        values, space.block(top[:, unit], words)
                    )
                running.advance()
        return scores

    def _moved(self, values: Floats, near: Floats) -> Floats:
        """``||q' - q||`` (W,) of a unit's values (K,), highest first, against its
        images' nearness (K, W) to words.
        """
        order = np.argsort(-near, axis=0, kind="stable")
        reordered = np.empty_like(near)
        np.put_along_axis(
            reordered, order, np.broadcast_to(values[:, None], near.shape), axis=0
        )
        distance: Floats = (np.abs(reordered - values[:, None]) ** self.power).sum(
            axis=0
        ) ** (1 / self.power)
        return distance


@similarities.register("cos")
@dataclass(frozen=True)
class CosineSimilarity:
    """Cosine of q and P over all images (CLIP-Dissect, section 3.2)."""

    def scores(self, units: Array, space: Space) -> Floats:
        """(U, W)."""
        zero = np.zeros(len(space.words))
        return _cosine(units.astype(np.float64), space, zero, 1)


@similarities.register("cos-cubed")
@dataclass(frozen=True)
class CosineCubed:
    """Cosine of q and P with their means taken off and cubed, so that high images count
    most (CLIP-Dissect, section 3.2).
    """

    def scores(self, units: Array, space: Space) -> Floats:
        """(U, W)."""
        centred = units.astype(np.float64)
        return _cosine((centred - centred.mean(axis=0)) ** 3, space, space.mean(), 3)


def _cosine(units: Floats, space: Space, middle: Floats, power: int) -> Floats:
    """Cosines (U, W) of units (N, U) and (P - middle) ** power; 0 where either has no
    length.
    """
    products, squares = (
        np.zeros((units.shape[1], len(space.words))),
        np.zeros(len(space.words)),
    )
    with progress.task("weighing words", len(units)) as running:
        for rows, block in space.by_images():
            near = (block - middle) ** power
            products += units[rows].T @ near
            squares += (near**2).sum(axis=0)
            running.advance(len(block))
    lengths = np.linalg.norm(units, axis=0)[:, None] * np.sqrt(squares)
    cosines: Floats = np.divide(
        products, lengths, out=np.zeros_like(products), where=lengths > 0
    )
    return cosines


# ---- what units say of images


def summaries(
    model: Network,
    layers: Sequence[str],
    samples: Sequence[Sample],
    view: ViewMode | None = "squash",
) -> dict[str, Array]:
    """By layer the mean of every unit's map on every image, (N, U) float32;
    ``model.batch`` images a pass.
    """
    found: dict[str, list[Array]] = {name: [] for name in layers}
    size = max(1, model.batch)
    with progress.task("showing probe images", len(samples)) as running:
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            pixels = torch.cat([model.view(sample, view).pixels for sample in part])
            for name, maps in model.activations(pixels, layers).items():
                found[name].append(maps.mean(dim=(2, 3)).float().cpu().numpy())
            running.advance(len(part))
    return {name: np.concatenate(parts) for name, parts in found.items()}


# ---- the words


@dataclass(frozen=True, eq=False)
class NamedUnits:
    """The word of every unit: a row a unit (`COLUMNS`), and what it was made with."""

    rows: pd.DataFrame
    similarity: str
    encoder: str | None
    count: int
    images: int

    def table(self) -> pd.DataFrame:
        """``layer``, ``unit``, ``word``, ``word_score``, ``runner_up``,
        ``runner_up_score``, ``margin``.
        """
        return self.rows

    @property
    def facts(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        made = {
            "similarity": self.similarity,
            "encoder": self.encoder,
            "words": self.count,
            "images": self.images,
        }
        return {**made, "unnamed": int((self.rows["word"] == "").sum())}


WORD_COLUMNS = (
    "layer",
    "unit",
    "word",
    "word_score",
    "runner_up",
    "runner_up_score",
    "margin",
)


def name_units(
    model: Network,
    layers: Sequence[str],
    words: str | Path | Iterable[str],
    samples: Sequence[Sample],
    encoder: Encoder,
    similarity: str | WordSimilarity = "soft-wpmi",
    prompt: str = "{}",
    view: ViewMode | None = "squash",
) -> NamedUnits:
    """CLIP-Dissect: the word of ``words`` (a file, one a line, or a sequence) that fits
    each unit of ``layers`` best.

    ``samples`` are the probe images, ``prompt`` what a word is put into (``"a photo of
    {}"``; the paper takes bare words). A unit that says the same of every image has no
    word. Raises `ConsilienceError`.
    """
    vocabulary = read_words(words)
    means = summaries(model, layers, samples, view)
    space = _space(encoder, samples, vocabulary, prompt)
    kind: WordSimilarity = similarities.build(similarity)
    tables = [
        _layer_rows(name, vocabulary, _scored(kind, values, space))
        for name, values in means.items()
    ]
    rows = (
        pd.concat(tables, ignore_index=True)
        if tables
        else pd.DataFrame(columns=list(WORD_COLUMNS))
    )
    return NamedUnits(rows, spell(kind), encoder.id, len(vocabulary), len(samples))


def _space(
    encoder: Encoder,
    samples: Sequence[Sample],
    vocabulary: Sequence[str],
    prompt: str,
) -> Space:
    if "{}" not in prompt:
        raise ConsilienceError(
            f"a prompt has {{}} where the word goes; got {prompt!r}"
        )
    if len(samples) < 2:
        raise ConsilienceError(
            f"words are told by how images differ; got {len(samples)} probe images"
        )
    texts = [prompt.replace("{}", word) for word in vocabulary]
    return Space(image_embeddings(encoder, samples), word_embeddings(encoder, texts))


def _scored(kind: WordSimilarity, values: Array, space: Space) -> Floats:
    """Scores (U, W) of a layer; NaN for units that say the same of every image."""
    if not np.isfinite(values).all():
        raise ConsilienceError("the layer gives activations that are not finite")
    scores = np.full((values.shape[1], len(space.words)), np.nan)
    varies = np.ptp(values, axis=0) > 0
    if varies.any():
        scores[varies] = kind.scores(values[:, varies], space)
    return scores


def _layer_rows(
    layer: str, vocabulary: Sequence[str], scores: Floats
) -> pd.DataFrame:
    """A row a unit: the best word, the next, and the margin between them."""
    alike = np.isnan(scores[:, 0])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :2]
    best, second = (
        np.take_along_axis(scores, order[:, [place]], axis=1)[:, 0]
        for place in (0, 1)
    )
    names = np.array(vocabulary, dtype=object)[order]
    table = pd.DataFrame(
        {
            "layer": layer,
            "unit": np.arange(len(scores)),
            "word": names[:, 0],
            "word_score": best,
            "runner_up": names[:, 1],
            "runner_up_score": second,
            "margin": best - second,
        }
    )
    table.loc[alike, ["word", "runner_up"]] = ""
    table.loc[alike, ["word_score", "runner_up_score", "margin"]] = np.nan
    return table


def read_words(words: str | Path | Iterable[str]) -> tuple[str, ...]:
    """A word list: a text file with one a line, or any sequence of strings; blank lines
    and repeats are left out.

    Raises `ConsilienceError` where fewer than two words are left: there must be a
    runner-up.
    """
    if isinstance(words, str | Path):
        file = Path(words).expanduser()
        lines: Iterable[str] = read_text(file, "words").splitlines()
    else:
        lines = words
    listed = tuple(
        dict.fromkeys(word for word in (line.strip() for line in lines) if word)
    )
    if len(listed) < 2:
        raise ConsilienceError(
            f"a word list has at least two words; got {len(listed)}"
        )
    return listed


def beside(words: pd.DataFrame, dissection: pd.DataFrame) -> pd.DataFrame:
    """Words and the concepts that IoU gives, a row a unit that has either, in the
    dissection's order; both tables have ``layer`` and ``unit``.

    ``same`` says whether word and concept share a name (`names.same`); None where one
    of them is missing.
    """
    from consilience.dissection.class_groups import same_name

    both = dissection.assign(_place=range(len(dissection))).merge(
        words, on=["layer", "unit"], how="outer", validate="one_to_one"
    )
    joined = both.sort_values("_place", kind="stable", ignore_index=True).drop(
        columns="_place"
    )
    pairs: Sequence[Mapping[Any, Any]] = joined.to_dict("records")
    named = [(row["concept"], row["word"]) for row in pairs]
    alike = [
        same_name(*pair)
        if all(isinstance(name, str) and name for name in pair)
        else None
        for pair in named
    ]
    return joined.assign(same=pd.Series(alike, index=joined.index, dtype=object))
