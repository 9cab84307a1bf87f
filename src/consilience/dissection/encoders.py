"""Pairs of encoders that put images and words into one space, and the store that keeps
what they said.

``open_clip:ViT-B-16,pretrained=openai`` loads a CLIP through open_clip (extra
``clip``); ``package.module:factory`` takes any other pair. An embedding is kept on disk
under the content it is of: the image's or the text's digest and the encoder's id.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from consilience import progress, registry
from consilience.files import digest_of_data, write_atomically
from consilience.models import digest
from consilience.models import weights as files
from consilience.models.engines import plan
from consilience.registry import Registry, option
from consilience.types import Array, ConsilienceError, Sample

BATCH = 64
_FACTORY = "PACKAGE.MODULE:FACTORY"

encoders = Registry("encoder")


@runtime_checkable
class Encoder(Protocol):
    """An image encoder and a text encoder of one space; rows need no particular length."""

    @property
    def id(self) -> str | None:
        """Name and digest of the weights; None where nobody can say, and then nothing
        is kept on disk.
        """

    def images(self, images: Sequence[Array]) -> Tensor:
        """Embeddings (n, d) of images, each (H, W, 3) uint8 RGB."""

    def words(self, words: Sequence[str]) -> Tensor:
        """Embeddings (n, d) of texts."""


@dataclass(frozen=True, eq=False)
class EncoderPair:
    """Two functions as an encoder: ``(n images) -> (n, d)`` and ``(n texts) -> (n,
    d)``.
    """

    of_images: Callable[[Sequence[Array]], Tensor]
    of_words: Callable[[Sequence[str]], Tensor]
    id: str | None = None

    def images(self, images: Sequence[Array]) -> Tensor:
        """Embeddings (n, d)."""
        return self.of_images(images)

    def words(self, words: Sequence[str]) -> Tensor:
        """Embeddings (n, d)."""
        return self.of_words(words)


def load_encoder(spec: str | Encoder | tuple[Any, Any]) -> Encoder:
    """An encoder by its spelling: ``open_clip:NAME,pretrained=TAG|FILE`` or
    ``package.module:factory``.

    A factory returns an `Encoder`, or a pair of functions. Raises `ConsilienceError`.
    """
    if not isinstance(spec, str):
        return _as_encoder(spec, "what was given")
    parsed = registry.parse(spec)
    if parsed.name in encoders.names():
        loaded: Encoder = encoders.build(parsed).load()
        return loaded
    if len(parsed.args) != 1 or not isinstance(parsed.args[0], str) or parsed.options:
        known = ", ".join(encoders.names())
        raise ConsilienceError(
            f"{spec!r} is not an encoder; there is: {known}, or {_FACTORY}"
        )
    return _as_encoder(_factory(parsed.name, parsed.args[0])(), spec)


def _as_encoder(made: Any, where: str) -> Encoder:
    if (
        isinstance(made, tuple)
        and len(made) == 2
        and all(callable(part) for part in made)
    ):
        return EncoderPair(*made)
    if isinstance(made, Encoder):
        return made
    raise ConsilienceError(
        f"{where} gives {type(made).__name__}; an encoder has id, images and words, or is a "
        f"pair of functions"
    )


def _factory(package: str, name: str) -> Callable[[], Any]:
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name and package.split(".")[0] == error.name.split(".")[0]:
            known = ", ".join(encoders.names())
            raise ConsilienceError(
                f"no encoder {package!r}; there is: {known}, or {_FACTORY}"
            ) from None
        raise
    finally:
        sys.path.remove(here)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ConsilienceError(f"{package} has no function {name!r}")
    return factory  # type: ignore[no-any-return]


# ---- CLIP


@encoders.register("open_clip")
@dataclass(frozen=True)
class OpenClip:
    """A CLIP by open_clip's name for it (extra ``clip``).

    CLIP-Dissect used OpenAI's ViT-B/16: the default.

    ``pretrained`` is a tag of open_clip, downloaded on first use, or a file of weights;
    there is no default of random weights. ``view`` says what it is shown of an image
    that is not square: ``squash`` the whole, as dissection shows it to the model;
    ``crop`` the centre, as CLIP was trained.
    """

    name: str = option("ViT-B-16", help="architecture, as open_clip spells it")
    pretrained: str = option(
        "openai", help="a tag of open_clip, or a file of weights"
    )
    view: Literal["squash", "crop"] = option(
        "squash", help="the whole image, or its centre as CLIP was trained"
    )
    quick_gelu: bool = option(
        False, help="for a file of OpenAI's own weights; a tag knows it"
    )
    device: str = option("auto", help="auto, cpu, cuda, mps")

    def load(self) -> Clip:
        """Build, fill and prepare; raises `ConsilienceError` where open_clip or the
        weights are not there.
        """
        clip = _open_clip()
        if self.name not in clip.list_models():
            raise ConsilienceError(
                registry.unknown(
                    "CLIP in open_clip", self.name, clip.list_models(), limit=20
                )
            )
        there = plan.resolve_device(self.device)
        module, prepare, tokens = self._filled(clip, there)
        made = f"{registry.spell(self)} {prepare}"
        return Clip(
            module.eval(),
            prepare,
            tokens,
            f"{self.name}@{digest.module_digest(module, made)}",
            there,
        )

    def _filled(self, clip: Any, device: torch.device) -> tuple[nn.Module, Any, Any]:
        mode = "squash" if self.view == "squash" else None
        settings: dict[str, Any] = {
            "device": device,
            "image_resize_mode": mode,
            "force_quick_gelu": self._gelu(clip),
        }
        with _weights_at_hand(clip, self.name, self.pretrained):
            try:
                module, _, prepare = clip.create_model_and_transforms(
                    self.name, pretrained=self.pretrained, **settings
                )
                return module, prepare, clip.get_tokenizer(self.name)
            except (
                RuntimeError,
                OSError,
                ValueError,
                KeyError,
                EOFError,
                AssertionError,
                pickle.UnpicklingError,
            ) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ConsilienceError(
                    f"{self.pretrained} does not load as {self.name} of open_clip: {reason}"
                ) from None

    def _gelu(self, clip: Any) -> bool:
        return self.quick_gelu or bool(
            _tag(clip, self.name, self.pretrained).get("quick_gelu")
        )


def _open_clip() -> Any:
    try:
        return importlib.import_module("open_clip")
    except ImportError:
        raise ConsilienceError(
            "open_clip is not installed; pip install 'consilience[clip]'"
        ) from None


def _tag(clip: Any, name: str, pretrained: str) -> dict[str, Any]:
    """What open_clip knows of a tag of weights; nothing where it is not a tag of this
    architecture.
    """
    return dict(clip.pretrained.get_pretrained_cfg(name, pretrained) or {})


def _weights_at_hand(clip: Any, name: str, pretrained: str) -> Any:
    """A context in which open_clip finds the weights: a file that is there, or a tag
    that is on disk or can be fetched.
    """
    from contextlib import nullcontext

    known = _tag(clip, name, pretrained)
    if not known:
        if not Path(pretrained).expanduser().is_file():
            tags = clip.list_pretrained_tags_by_model(name)
            raise ConsilienceError(
                f"{registry.unknown(f'weights of {name}', pretrained, tags)}; or a file"
            )
        return nullcontext()
    hub, url = str(known.get("hf_hub", "")), str(known.get("url", ""))
    if hub and clip.pretrained.has_hf_hub():
        repository, _, file = hub.rpartition("/")
        wanted = (
            (file,)
            if file
            else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        )
        files.fetch_hub(repository, wanted, f"{name} ({pretrained})")
        return nullcontext()
    wanted_url = f"the weights of {name} ({pretrained}): {url}"
    return files.network(url, wanted_url, "give pretrained=FILE")


@dataclass(frozen=True, eq=False)
class Clip:
    """A loaded CLIP as an `Encoder`."""

    module: nn.Module
    prepare: Callable[[Image.Image], Tensor]
    tokens: Callable[[list[str]], Tensor]
    id: str
    device: torch.device

    def images(self, images: Sequence[Array]) -> Tensor:
        """Embeddings (n, d) on the CPU."""
        batch = torch.stack(
            [self.prepare(Image.fromarray(image)) for image in images]
        ).to(self.device)
        with torch.inference_mode():
            return self.module.encode_image(batch).float().cpu()  # type: ignore[operator, no-any-return]

    def words(self, words: Sequence[str]) -> Tensor:
        """Embeddings (n, d) on the CPU."""
        with torch.inference_mode():
            tokens = self.tokens(list(words)).to(self.device)
            return self.module.encode_text(tokens).float().cpu()  # type: ignore[operator, no-any-return]


# ---- what was said, kept by content


def digest_of_text(text: str) -> str:
    """Hex digest of a text's bytes."""
    return blake2b(text.encode(), digest_size=16).hexdigest()


def image_embeddings(
    encoder: Encoder, samples: Sequence[Sample], batch: int = BATCH
) -> Array:
    """Unit-length embeddings (n, d) float32 of samples; encoded once, then read from
    disk by the images' digests.
    """
    keys = [sample.digest for sample in samples]
    return _embedded(
        encoder,
        "images",
        keys,
        lambda at: encoder.images([samples[i].pixels for i in at]),
        batch,
    )


def word_embeddings(
    encoder: Encoder, texts: Sequence[str], batch: int = 4 * BATCH
) -> Array:
    """Unit-length embeddings (n, d) float32 of texts; encoded once, then read from disk
    by the texts' digests.
    """
    keys = [digest_of_text(text) for text in texts]
    return _embedded(
        encoder,
        "words",
        keys,
        lambda at: encoder.words([texts[i] for i in at]),
        batch,
    )


def _embedded(
    encoder: Encoder,
    what: str,
    keys: Sequence[str],
    make: Callable[[list[int]], Any],
    batch: int,
) -> Array:
    store = None if encoder.id is None else Store(encoder.id, what)
    known = {} if store is None else store.read(set(keys))
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    missing = [place for key, place in first.items() if key not in known]
    missing.sort()
    with progress.task(f"encoding {what}", len(missing)) as running:
        for start in range(0, len(missing), batch):
            at = missing[start : start + batch]
            rows = _checked(make(at), len(at), what)
            fresh = {keys[place]: row for place, row in zip(at, rows, strict=True)}
            if store is not None:
                store.write(fresh)
            known |= fresh
            running.advance(len(at))
    return _of_one_length([known[key] for key in keys], what)


def _checked(made: Any, count: int, what: str) -> Array:
    """Rows of unit length, float32."""
    rows = np.asarray(
        made.detach().cpu() if isinstance(made, Tensor) else made, dtype=np.float32
    )
    if rows.ndim != 2 or len(rows) != count:
        raise ConsilienceError(
            f"the encoder gives {rows.shape} for {count} {what}; embeddings are (n, d)"
        )
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and lengths.all()):
        raise ConsilienceError(
            f"the encoder gives {what} an embedding that has no direction (zero, or no number)"
        )
    unit: Array = (rows / lengths).astype(np.float32)
    return unit


def _of_one_length(rows: Sequence[Array], what: str) -> Array:
    sizes = {len(row) for row in rows}
    if len(sizes) > 1:
        raise ConsilienceError(
            f"the encoder gives {what} embeddings of {' and '.join(map(str, sorted(sizes)))} "
            f"numbers"
        )
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)


@dataclass(frozen=True)
class Store:
    """Embeddings of one encoder on disk: .npz files of keys and rows, written whole,
    read without unpickling.
    """

    encoder: str
    what: Literal["images", "words"] | str

    @property
    def folder(self) -> Path:
        """Where they are."""
        return (
            plan.cache_folder()
            / "embeddings"
            / digest_of_data([self.encoder, self.what])
        )

    def read(self, wanted: set[str]) -> dict[str, Array]:
        """Rows by key, of those that are wanted and there.

        A damaged file counts as absent.
        """
        return {
            key: row
            for keys, rows in self._files(wanted)
            for key, row in zip(keys, rows, strict=True)
            if key in wanted
        }

    def write(self, rows: dict[str, Array]) -> None:
        """Keep rows; where the folder cannot be written to, say so and go on."""
        arrays = {"keys": np.array(list(rows)), "rows": np.stack(list(rows.values()))}
        path = self.folder / f"{digest_of_data(sorted(rows))}.npz"
        try:
            write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        except OSError as error:
            progress.say(f"embeddings cannot be kept: {error}")

    def _files(self, wanted: set[str]) -> Iterator[tuple[list[str], Array]]:
        for path in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as file:
                    keys = [str(key) for key in file["keys"]]
                    if wanted.isdisjoint(keys):
                        continue
                    rows = file["rows"]
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                progress.say(
                    f"{path} is damaged and not used ({type(error).__name__})"
                )
                continue
            if rows.ndim == 2 and len(rows) == len(keys):
                yield keys, rows
