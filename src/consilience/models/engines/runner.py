"""Runs a network by the engine that was planned, proven against torch on its first
images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from consilience.models.digest import ModuleWatch, module_digest
from consilience.models.engines.openvino import OpenVINOEngine
from consilience.models.engines.openvino_gradients import (
    Differentiable,
    OpenVINOGradients,
    Read,
    by_torch,
    check,
)
from consilience.models.engines.plan import (
    ENGINE_TOLERANCE,
    TINY,
    Engine,
    Runnable,
    plan_engine,
    record_pass,
)
from consilience.models.engines.torch import CompiledEngine, TorchEngine
from consilience.progress import say
from consilience.types import ConsilienceError

# ---- running


class Runner:
    """The engine of one network: made when first needed, made anew when its weights
    have changed.
    """

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._made_for = ""
        self._watch: ModuleWatch | None = None
        self._digest = ""
        self._held = 0
        self.views: dict[Any, Any] | None = None
        self._lock = RLock()
        self._gradients: dict[Any, OpenVINOGradients | None] = {}

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Who is inside changes no weight: the digest is not looked after meanwhile,
        which takes some milliseconds each time.
        """
        with self._lock:
            self._watch = None  # looked at once more
            self._held += 1
            self.views = {}
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1
                self.views = self.views if self._held else None

    def digest(
        self, module: nn.Module, settings: str, volatile: frozenset[str] = frozenset()
    ) -> str:
        """`digest`, computed again only where `Watch` sees a change: it is asked for at
        every batch.
        """
        if self._held and self._digest and self._watch is not None:
            return self._digest
        with self._lock:
            known = self._watch is not None
            if not known or not (self._held or self._watch.same()):  # type: ignore[union-attr]
                watch = ModuleWatch(module, volatile)
                self._digest = module_digest(module, settings, volatile)
                self._watch = watch  # last: who sees it may read the digest
            return self._digest

    def facts(self, network: Runnable) -> dict[str, Any]:
        """What ran, or will."""
        if self._engine is not None:
            return dict(self._engine.facts)
        return plan_engine(network.engine, network.precision, network.device)

    def scores(self, network: Runnable, pixels: Tensor) -> Tensor:
        """Raw outputs (N, K) float32.

        Which engine scores an image depends on the number of images alone, never on
        what ran before: whole batches and long rests go to the engine, a few images
        straight to torch, for which no batch has to be filled.
        """
        with self._lock:
            plain = TorchEngine(network)
            if not len(pixels):
                return plain(pixels.new_zeros(1, *pixels.shape[1:]))[:0]
            parts = [
                self._part(network, plain, chunk)
                for chunk in torch.split(pixels, network.batch)
            ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def gradients(
        self,
        network: Differentiable,
        pixels: Tensor,
        batch: int,
        read: Read,
        row: Tensor,
    ) -> tuple[Tensor, Tensor] | None:
        """Outputs and gradients of the sum of scores ``row`` (K,) times what is read, by
        OpenVINO, held against torch's on its first images; None where it cannot.
        """
        weights = row.expand(len(pixels), -1)
        with self._lock:
            key = network.digest, read, batch
            if key not in self._gradients:
                kept = {
                    one: made
                    for one, made in self._gradients.items()
                    if one[0] == key[0]
                }
                self._gradients = {
                    **kept,
                    key: _make_gradients(network, pixels, weights, read, batch),
                }
            made = self._gradients[key]
            return None if made is None else made(pixels, weights)

    def _part(self, network: Runnable, plain: Engine, pixels: Tensor) -> Tensor:
        fits = tuple(pixels.shape[2:]) == network.frame
        small = not fits or len(pixels) <= min(TINY, network.batch - 1)
        engine = plain if small else self._ready(network, plain, pixels)
        outputs = engine(pixels)
        record_pass(engine.facts["engine"], engine.facts["precision"])
        return outputs

    def _ready(self, network: Runnable, plain: Engine, pixels: Tensor) -> Engine:
        digest = network.digest
        if self._engine is None or self._made_for != digest:
            self._engine, self._made_for = _make(network, plain, pixels), digest
        return self._engine


def _make(network: Runnable, plain: Engine, pixels: Tensor) -> Engine:
    """The engine that was asked for, proven on a few of the images at hand."""
    planned = plan_engine(network.engine, network.precision, network.device)
    if planned["engine"] == "torch":
        return plain
    try:
        engine: Engine = (
            OpenVINOEngine if planned["engine"] == "openvino" else CompiledEngine
        )(network, planned)
        _verify(
            engine, TorchEngine(network, "f32"), pixels, engine.facts["precision"]
        )
    except (
        Exception
    ) as error:  # whatever a converter trips over, torch can run the model
        why = first_cause(error)
        if network.engine == "openvino":
            raise ConsilienceError(
                f"engine {network.engine} cannot run this model: {why}; take engine=torch"
            ) from error
        say(f"{planned['engine']} cannot run this model, torch does: {why}")
        plain.facts["note"] = f"{planned['engine']} was tried: {why}"
        return plain
    return engine


def _make_gradients(
    network: Differentiable, pixels: Tensor, weights: Tensor, read: Read, batch: int
) -> OpenVINOGradients | None:
    try:
        made = OpenVINOGradients(network, read, batch)
        check(made(pixels, weights), by_torch(network, pixels, weights, read))
    except Exception as error:  # whatever a converter trips over, torch can do it
        say(f"gradients stay with torch: {first_cause(error)}")
        return None
    return made


def first_cause(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _verify(engine: Engine, plain: Engine, pixels: Tensor, precision: str) -> None:
    got = engine(pixels)[[0, -1]]
    expected = plain(pixels[[0, -1]])
    scale = float(expected.abs().max().clamp(min=1e-3))
    apart = float((got - expected).abs().max()) / scale
    if not apart <= ENGINE_TOLERANCE[precision]:
        raise ConsilienceError(
            f"its outputs are {apart:.1e} of their size away from torch's, "
            f"{ENGINE_TOLERANCE[precision]:.0e} allowed"
        )
