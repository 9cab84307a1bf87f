"""A classifier behind an address: ``http://host/path``, which only scores.

The array protocol: a POST with the images as the bytes of a ``.npy`` file, (n, C, h, w)
float32 (``layout=nhwc``: channels last), answered by a ``.npy`` file (n, K) or by JSON
``{"scores": [[...], ...]}``. A path with ``/v2/models/NAME`` is asked by KServe's open
inference protocol, version 2, in JSON. Nothing is unpickled.
"""

from __future__ import annotations

import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from consilience import registry
from consilience.models.callable import (
    BlackBox,
    Layout,
    as_nhwc,
    digest_of_parts,
    is_yes_or_no,
    run_backend,
    settle_classes,
    settle_outputs,
    trial_images,
)
from consilience.models.engines import plan
from consilience.models.network import Recipe, per_channel
from consilience.models.sources import ModuleOptions, class_names, pair_of
from consilience.registry import Spec, option
from consilience.types import Array, ConsilienceError

KSERVE = "/v2/models/"
LARGEST_ANSWER = 256 << 20
"""Bytes of an answer that are read: a million classes for 64 images."""
WAITS = (0.5, 2.0)
"""Seconds before a second and a third try."""


@dataclass(frozen=True)
class HttpModel(ModuleOptions):
    """``http://host/path`` and its options; ``mean`` and ``std`` are 0 and 1 unless told,
    so that the server is sent images in [0, 1].
    """

    address: str
    layout: Layout = "nchw"
    batch: int = option(32, help="images of a request", least=1)
    timeout: float = option(30.0, help="seconds that an answer may take", above=0)

    spelled = "http"


class HttpsModel(HttpModel):
    """The same over TLS."""

    spelled = "https"


def load_remote(spec: Spec) -> BlackBox:
    """The model of an ``http://`` or ``https://`` spelling.

    It is tried once on plain images, which shows its outputs. Raises `ConsilienceError`
    in one line where it does not answer as it should.
    """
    kind = HttpsModel if spec.name == "https" else HttpModel
    options: HttpModel = registry.construct(kind, spec)
    address = f"{spec.name}:{options.address}"
    if not urlsplit(address).netloc:
        raise ConsilienceError(f"{address} has no host; write http://host/path")
    if options.device or options.engine or options.precision:
        raise ConsilienceError(
            f"{address} runs where and how it does; device=, engine= and precision= are not "
            f"for it"
        )
    frame = pair_of(options.size) or (224, 224)
    given = next((len(one) for one in (options.mean, options.std) if one), 3)
    channels = options.channels or given
    recipe = Recipe(
        size=frame,
        resized=(options.resize,) * 2 if options.resize else frame,
        interpolation=options.interpolation or "bilinear",
        mean=per_channel(options.mean or (0.0,) * channels, channels, "mean"),
        std=per_channel(options.std or (1.0,) * channels, channels, "std"),
    )
    backend = _Server(address, options.layout, options.timeout, options.output)
    name = urlsplit(address).netloc + urlsplit(address).path
    prepared = recipe.normalised(trial_images(frame, channels))
    trial = run_backend(backend, prepared, options.batch, name)
    outputs, how = settle_outputs(options.outputs, trial, name)
    single = is_yes_or_no(trial, outputs)
    model = BlackBox(
        backend,
        recipe,
        settle_classes(class_names(options), trial.shape[1], name, single),
        outputs,
        name,
        digest_of_parts(address, recipe, outputs, trial.numpy().tobytes()),
        {"outputs": f"{outputs}, {how}", "weights": "the server's"},
        most=options.batch,
        mode=options.view,
        memory=plan.bytes_of(options.memory) if options.memory else plan.MEMORY,
        complement=single,
    )
    return replace(model, spec=registry.render(spec))


@dataclass(frozen=True, eq=False)
class _Server:
    """A server as a backend."""

    address: str
    layout: Layout
    timeout: float
    output: str | None = None
    fixed = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """Where it runs."""
        protocol = "KServe V2" if self._kserve else "npy"
        return {
            "engine": f"http ({protocol})",
            "precision": "its own",
            "device": urlsplit(self.address).netloc,
        }

    @property
    def _kserve(self) -> bool:
        return KSERVE in urlsplit(self.address).path

    def __call__(self, pixels: Tensor) -> Tensor:
        """Raw outputs of prepared images."""
        array: Array = pixels.numpy() if self.layout == "nchw" else as_nhwc(pixels)
        array = np.ascontiguousarray(array, dtype=np.float32)
        said = self._infer(array) if self._kserve else self._arrays(array)
        return torch.from_numpy(np.ascontiguousarray(said, dtype=np.float32))

    def on(self, device: str | None, engine: str | None) -> _Server:
        """It runs where it does."""
        if device not in (None, "auto", "cpu") or engine not in (None, "auto"):
            raise ConsilienceError(
                f"{self.address} runs where and how it does; device= and engine= are not for "
                f"it"
            )
        return self

    def _arrays(self, array: Array) -> Array:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        content = self._post(buffer.getvalue(), "application/octet-stream")
        if content.startswith(b"\x93NUMPY"):
            try:
                return np.asarray(np.load(io.BytesIO(content), allow_pickle=False))
            except (ValueError, EOFError) as error:
                raise self._wrong(f"an array that cannot be read ({error})") from None
        said = self._json(content)
        if not isinstance(said, dict) or "scores" not in said:
            raise self._wrong("neither a .npy file nor JSON with scores")
        return self._numbers(said["scores"])

    def _infer(self, array: Array) -> Array:
        path = (
            self.address
            if self.address.endswith("/infer")
            else f"{self.address}/infer"
        )
        asked = {
            "inputs": [
                {
                    "name": self._input_name,
                    "shape": list(array.shape),
                    "datatype": "FP32",
                    "data": array.ravel().tolist(),
                }
            ]
        }
        said = self._json(
            self._post(json.dumps(asked).encode(), "application/json", path)
        )
        outputs = said.get("outputs") if isinstance(said, dict) else None
        if not isinstance(outputs, list) or not outputs:
            raise self._wrong("no outputs")
        named = {
            str(one.get("name")): one for one in outputs if isinstance(one, dict)
        }
        if self.output is None and len(named) > 1:
            raise self._wrong(
                f"{len(named)} outputs; name one with output=: {', '.join(named)}"
            )
        chosen = named.get(self.output) if self.output else next(iter(named.values()))
        if chosen is None:
            raise self._wrong(f"no output {self.output!r}, but {', '.join(named)}")
        try:
            return self._numbers(chosen["data"]).reshape(chosen["shape"])
        except (KeyError, ValueError, TypeError):
            raise self._wrong("an output whose data have not its shape") from None

    @cached_property
    def _input_name(self) -> str:
        """What the server calls its input, by its own description (KServe's model
        metadata); ``input`` where it does not say.
        """
        return self._described_input() or "input"

    def _described_input(self) -> str | None:
        address = self.address.removesuffix("/infer")
        try:
            with urllib.request.urlopen(address, timeout=self.timeout) as answer:
                said = json.loads(answer.read(LARGEST_ANSWER))
            return str(said["inputs"][0]["name"])
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return None  # the description is optional in the protocol

    def _json(self, content: bytes) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise self._wrong("neither a .npy file nor JSON") from None

    def _numbers(self, values: Any) -> Array:
        try:
            return np.asarray(values, dtype=np.float32)
        except (TypeError, ValueError):
            raise self._wrong("scores that are not numbers in rows") from None

    def _wrong(self, what: str) -> ConsilienceError:
        return ConsilienceError(f"{self.address} answers with {what}")

    def _post(self, body: bytes, kind: str, address: str = "") -> bytes:
        """An answer; what a moment may mend (no connection, a busy server) is tried three
        times.
        """
        request = urllib.request.Request(
            address or self.address, body, {"Content-Type": kind}, method="POST"
        )
        reason = ""
        for wait in (*WAITS, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    content: bytes = answer.read(LARGEST_ANSWER + 1)
                if len(content) > LARGEST_ANSWER:
                    raise self._wrong(f"more than {LARGEST_ANSWER:,} bytes")
                return content
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(400).decode(errors="replace").split())
                reason = f"HTTP {error.code} {said}".strip()
                if error.code < 500 and error.code != 429:
                    break
            except (OSError, urllib.error.URLError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if wait is not None:
                time.sleep(wait)
        raise ConsilienceError(f"{self.address} does not answer: {reason}")
