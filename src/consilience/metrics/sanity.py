"""Sanity: does the map depend on what the network has learnt, and on the class that is
asked about?

A method that gives the same map of a network with random weights, or of another class,
does not explain this network's answer. Weights are made random in a copy; the user's
module is not touched. Every similarity stands beside the one that random maps would
have (``facts.random``): that, not 0, is what an independent map scores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, ClassVar, Literal

import numpy as np
import scipy
import torch
from torch import Tensor, nn

from consilience.metrics.explained_again import (
    chance_similarity,
    explained_maps,
    explainer_of,
    needs_module,
)
from consilience.metrics.similarity import MapSimilarity, alike
from consilience.metrics.stability import noisy
from consilience.models.layers import weights_changed
from consilience.registry import metrics, option
from consilience.types import (
    Array,
    ClassTarget,
    Explainer,
    Explanation,
    Model,
    NotApplicable,
    Score,
    View,
    as_probabilities,
)

RandomizationOrder = Literal["top-down", "bottom-up", "independent"]
How = Literal["reset", "normal", "permute"]

# ---- random weights


def randomised_layers(model: Any, view: View) -> list[str]:
    """Names of the modules that hold weights, in the order in which a pass reaches
    them.

    A module that is never called itself (the projection inside torch's attention) comes
    with the one that holds it.
    """
    scratch = copy.deepcopy(model.module)
    starts: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            starts.setdefault(name, len(starts))

        return hook

    for name, part in scratch.named_modules():
        part.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        model.with_module(scratch).logits(view.pixels)
    holding = [name for name, part in scratch.named_modules() if own_tensors(part)]
    return sorted(holding, key=lambda name: _reached(name, starts))


def _reached(name: str, starts: dict[str, int]) -> int:
    while name and name not in starts:
        name = name.rpartition(".")[0]
    return starts.get(name, -1)


def own_tensors(part: nn.Module) -> list[Tensor]:
    """The weights, and what else is learnt, that a module holds itself: parameters and
    the running statistics of a norm.
    """
    running = (
        [part.running_mean, part.running_var]
        if isinstance(part, nn.modules.batchnorm._NormBase)
        else []
    )
    return [
        tensor
        for tensor in (*part.parameters(recurse=False), *running)
        if tensor is not None
    ]


def randomise(part: nn.Module, name: str, how: How, seed: int) -> None:
    """Give a module other weights in place, the same for a name and seed whatever else
    is random.

    ``reset`` draws them as the layer does when it is made, and as ``normal`` where it
    has no way to; ``normal`` keeps every tensor's mean and standard deviation,
    ``permute`` its values.
    """
    tensors = own_tensors(part)
    cuda = sorted(
        {
            tensor.device.index or 0
            for tensor in tensors
            if tensor.device.type == "cuda"
        }
    )
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(
            int.from_bytes(
                blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "big"
            )
        )
        reset = getattr(part, "reset_parameters", None)
        if how == "reset" and callable(reset):
            reset()
            return
        for tensor in tensors:
            tensor.copy_(_permuted(tensor) if how == "permute" else _redrawn(tensor))


def _permuted(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return flat[torch.randperm(len(flat)).to(tensor.device)].view_as(tensor)


def _redrawn(tensor: Tensor) -> Tensor:
    """Normal numbers of the tensor's own mean and deviation; variances stay above 0 by
    folding.
    """
    wide = tensor.double()
    spread = wide.std(correction=0) if tensor.numel() > 1 else wide.abs().mean()
    drawn = wide.mean() + spread * torch.randn(tensor.shape, dtype=torch.float64).to(
        tensor.device
    )
    return (drawn.abs() if bool((tensor >= 0).all()) else drawn).to(tensor)


@dataclass(frozen=True, eq=False)
class Stage:
    """A network in which ``layers`` are random, the last ones of them since the stage
    before.
    """

    model: Any
    layers: tuple[str, ...]


def stages(
    model: Any, view: View, order: RandomizationOrder, steps: int, how: How, seed: int
) -> Iterator[Stage]:
    """The network with more and more random layers (with ``independent``, one group at
    a time), ``steps`` groups in all.

    It is one copy, changed in place: a stage holds until the next is asked for. It runs
    in torch, since no engine is worth being made for it. ``steps`` 0 takes every layer
    by itself.
    """
    names = randomised_layers(model, view)
    if not names:
        raise NotApplicable(code="no-weights", model=model.id)
    if order == "top-down":
        names = names[::-1]
    groups = np.array_split(
        np.array(names, dtype=object), min(steps or len(names), len(names))
    )
    yield from _stages(
        model, [[str(name) for name in group] for group in groups], order, how, seed
    )


def _stages(
    model: Any,
    groups: Sequence[Sequence[str]],
    order: RandomizationOrder,
    how: How,
    seed: int,
) -> Iterator[Stage]:
    scratch = copy.deepcopy(model.module)
    parts, originals = (
        dict(scratch.named_modules()),
        dict(model.module.named_modules()),
    )
    network = model.with_module(scratch).using(engine="torch")
    done: list[str] = []
    for group in groups:
        if order == "independent":
            for name in done:
                _restore(parts[name], originals[name])
            done.clear()
        for name in group:
            randomise(parts[name], name, how, seed)
        done += group
        weights_changed(scratch)
        yield Stage(network, tuple(done))


def _restore(part: nn.Module, original: nn.Module) -> None:
    with torch.no_grad():
        for tensor, value in zip(
            own_tensors(part), own_tensors(original), strict=True
        ):
            tensor.copy_(value)


# ---- MPRT


@metrics.register("mprt")
@dataclass(frozen=True)
class MPRT:
    """Model parameter randomisation test (Adebayo et al., NeurIPS 2018, section 3): the
    map beside those of random networks.

    ``mean_l s(E(f), E(f_l))`` over the stages l of the network with more and more
    random layers; ``curve`` has the stages, ``facts.layers`` the layer at which each
    ends and ``facts.last`` the similarity at the last. ``order`` is cascading
    ``top-down`` from the output (the paper's) or ``bottom-up`` from the input, which
    end in the same network, or ``independent``, one group of layers at a time (the
    paper's section 3.2). A top-down cascade preserves much of the lower layers' part of
    a map (Binder et al. 2023), and with a similarity of values so does any map that
    follows the image: look at several orders, and at `emprt`. ``magnitude`` compares
    absolute values, as half of the paper's figures do. Fewer ``steps`` show some points
    of the same curve: what a layer draws depends on its name and the seed alone.

    -1 to 1, lower is better: a map that depends on what was learnt changes. Memory: one
    copy of the network.
    """

    higher_is_better: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    label: ClassVar[str] = "MPRT"
    cost: ClassVar[str] = "steps explanations"
    order: RandomizationOrder = option(
        "top-down", help="where randomising begins, or one group of layers at a time"
    )
    similarity: MapSimilarity = option(
        "spearman", help="spearman, pearson, cosine, ssim or iou-at-20"
    )
    steps: int = option(
        8, help="stages; 0 is one for every layer with weights", least=0
    )
    how: How = option(
        "reset",
        help="the layer's own initialisation, normal numbers of its mean and spread, or its values permuted",
    )
    magnitude: bool = option(False, help="compare absolute values")
    seed: int = option(0, help="seed of the weights", least=0)

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The mean similarity over the stages."""
        network, explainer = needs_module(model, "mprt"), explainer_of(explanation)
        still = self._still(network, explainer, view, explanation)
        same, layers = [], []
        for stage in stages(
            network, view, self.order, self.steps, self.how, self.seed
        ):
            values = self._map(stage.model, explainer, view, explanation)
            same.append(alike(still, values, self.similarity, self.magnitude))
            layers.append(stage.layers[-1])
        line = chance_similarity(
            replace(explanation, values=still), view, self.similarity, self.magnitude
        )
        facts = {
            "layers": layers,
            "last": same[-1],
            "similarity": self.similarity,
            **line,
        }
        return Score(float(np.mean(same)), np.array(same), facts)

    def _still(
        self, model: Any, explainer: Explainer, view: View, explanation: Explanation
    ) -> Array:
        """The map of the network as it is."""
        return explanation.values

    def _map(
        self, model: Any, explainer: Explainer, view: View, explanation: Explanation
    ) -> Array:
        """The map of a network with random layers."""
        return next(
            explained_maps(explainer, model, [(view, explanation.target)], 1, "mprt")
        )


@metrics.register("smooth-mprt")
@dataclass(frozen=True)
class SmoothMPRT(MPRT):
    """Smooth MPRT (Hedström et al. 2024, arXiv 2405.02383): `mprt` on maps averaged
    over noisy images.

    ``mean_l s(mean_i E(f, x + e_i), mean_i E(f_l, x + e_i))`` with e_i normal: what is
    noise in gradients, and lowers the similarity of any two of them, is averaged away
    before maps are compared.

    -1 to 1, lower is better.
    """

    samples: int = option(10, help="noisy images whose maps are averaged", least=1)
    noise: float = option(
        0.1,
        help="standard deviation of the noise, of the pixels' range 0 to 1",
        least=0,
        most=1,
    )
    label: ClassVar[str] = "Smooth MPRT"
    cost: ClassVar[str] = "(steps + 1) samples explanations"

    def _still(
        self, model: Any, explainer: Explainer, view: View, explanation: Explanation
    ) -> Array:
        """The mean map of the network as it is."""
        return self._map(model, explainer, view, explanation)

    def _map(
        self, model: Any, explainer: Explainer, view: View, explanation: Explanation
    ) -> Array:
        """The mean of the noisy images' maps."""
        cases = (
            (copied, explanation.target)
            for copied in noisy(view, self.samples, self.noise, self.seed, "normal")
        )
        total = np.zeros(explanation.values.shape)
        for values in explained_maps(
            explainer, model, cases, self.samples, "smooth-mprt"
        ):
            total += values
        return np.asarray(total / self.samples, dtype=np.float32)


@metrics.register("emprt")
@dataclass(frozen=True)
class EfficientMPRT:
    """Efficient MPRT (Hedström et al. 2024, arXiv 2405.02383): the map's complexity
    when the whole network is made random.

    ``(H(E(f')) - H(E(f))) / H(E(f))`` with H the entropy of the histogram of a map's
    values, ``bins`` bins from its lowest to its highest. A random network's map should
    be less ordered. No similarity and no order of layers has to be chosen, and one
    explanation is enough. ``facts``: both entropies, and those of the model's
    probabilities, which say what the network itself lost. 100 bins are the authors'
    default; their rules for the number of bins take a map's dimensions for its pixels.
    `NotApplicable` for a flat map, whose entropy is 0.

    -1 and up, higher is better.
    """

    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1.0, float("inf"))
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    label: ClassVar[str] = "Efficient MPRT"
    cost: ClassVar[str] = "1 explanation and 2 passes"
    bins: int = option(100, help="bins of the histogram", least=2)
    how: How = option(
        "reset",
        help="the layer's own initialisation, normal numbers of its mean and spread, or its values permuted",
    )
    seed: int = option(0, help="seed of the weights", least=0)

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The relative rise."""
        network = needs_module(model, "emprt")
        before = histogram_entropy(explanation.values, self.bins)
        if before == 0:
            raise NotApplicable(code="entropy-zero", explainer=explanation.explainer)
        (stage,) = stages(network, view, "bottom-up", 1, self.how, self.seed)
        cases = [(view, explanation.target)]
        after = histogram_entropy(
            next(
                explained_maps(
                    explainer_of(explanation), stage.model, cases, 1, "emprt"
                )
            ),
            self.bins,
        )
        heard = {
            "model_before": output_entropy(network, view),
            "model_after": output_entropy(stage.model, view),
        }
        return Score(
            (after - before) / before,
            facts={"before": before, "after": after, **heard},
        )


def histogram_entropy(values: Array, bins: int) -> float:
    """Entropy in nats of the histogram of a map; 0 for a flat one.

    Not changed by scaling or adding.
    """
    if values.min() == values.max():
        return 0.0
    counts, _ = np.histogram(values.astype(np.float64), bins=bins)
    return float(scipy.stats.entropy(counts))


def output_entropy(model: Any, view: View) -> float:
    """Entropy in nats of a model's probabilities of one image; NaN for bare values."""
    with torch.no_grad():
        row = model.logits(view.pixels)[0].double()
    if model.outputs == "values":
        return float("nan")
    p = as_probabilities(row, model.outputs)
    return float(scipy.stats.entropy(p.cpu().numpy()))


# ---- another class


@metrics.register("random-logit")
@dataclass(frozen=True)
class RandomLogit:
    """Random logit test (Sixt, Granz & Landgraf, ICML 2020, section 4.2): similarity of
    the map and of other classes' maps.

    ``mean_k s(E(f, c), E(f, k))`` over ``classes`` classes k drawn without c and
    without repetition, the same for every method; ``curve`` has them, ``facts.classes``
    which. The paper takes one class and SSIM. Quantus flattens maps before SSIM, so
    that its windows run over strings of pixels.

    -1 to 1, lower is better: a map that explains a class is not that of another one.
    `NotApplicable` where the target is not a class or there is only one.
    """

    higher_is_better: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    needs: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str] = "Random logit"
    cost: ClassVar[str] = "classes explanations"
    similarity: MapSimilarity = option(
        "ssim", help="spearman, pearson, cosine, ssim or iou-at-20"
    )
    classes: int = option(
        5,
        help="other classes that are explained; at most those that there are",
        least=1,
    )
    magnitude: bool = option(False, help="compare absolute values")
    seed: int = option(0, help="seed of the draw of classes", least=0)

    def score(self, model: Model, view: View, explanation: Explanation) -> Score:
        """The mean similarity over the classes drawn."""
        targets = self._others(model, explanation)
        found = explained_maps(
            explainer_of(explanation),
            model,
            [(view, target) for target in targets],
            len(targets),
            "random-logit",
        )
        same = [
            alike(explanation.values, values, self.similarity, self.magnitude)
            for values in found
        ]
        line = chance_similarity(explanation, view, self.similarity, self.magnitude)
        facts = {
            "classes": [target.index for target in targets],
            "similarity": self.similarity,
            **line,
        }
        return Score(float(np.mean(same)), np.array(same), facts)

    def _others(self, model: Model, explanation: Explanation) -> list[ClassTarget]:
        target = explanation.target
        if not isinstance(target, ClassTarget):
            raise NotApplicable(code="random-logit-no-class", target=target.name)
        others = [
            index for index in range(len(model.classes)) if index != target.index
        ]
        if not others:
            raise NotApplicable(code="random-logit-one-class", model=model.id)
        rng = np.random.default_rng(
            [self.seed, int(explanation.sample.digest, 16), target.index]
        )
        drawn = rng.permutation(others)[: self.classes].tolist()
        return [
            replace(target, index=index, name=model.classes[index]) for index in drawn
        ]
