"""The last layer of a classifier: found by what it returns, read before, and fitted to
another question on the network's own frozen features.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from consilience.models.layers import as_outputs, borrowed, hooked
from consilience.models.network import TorchNetwork
from consilience.types import Array, ConsilienceError, unexpected

SHRINKAGE = 0.5
SURE = 3.0
"""The median logit of what was fitted: a probability of .95, sure and not saturated."""


@dataclass(frozen=True)
class ClassHead:
    """The linear layer that gives a network's outputs: its name, and whether the
    network squashes what it gives (softmax) before it returns it.
    """

    name: str
    squashed: bool


def class_head(network: TorchNetwork) -> ClassHead:
    """The linear layer (or 1 x 1 convolution) whose outputs are the network's class
    outputs, as they are or under a softmax.

    Raises `ConsilienceError` where there is none: several branches, a head that is no
    linear layer, outputs that are computed from it.
    """
    calls: list[tuple[str, Tensor]] = []
    parts = [
        (name, part)
        for name, part in network.module.named_modules()
        if type(part) in (nn.Linear, nn.Conv2d)
        and part.weight.shape[0] == network.module_outputs
    ]
    pixels = torch.rand(
        1,
        network.channels,
        *network.frame,
        device=network.device,
        generator=torch.Generator(network.device).manual_seed(0),
    )

    def keep(name: str) -> Any:
        def hook(_part: nn.Module, _inputs: Any, output: Tensor) -> None:
            calls.append((name, output))

        return hook

    prepared = network.prepared(pixels)
    hooks = [(part, keep(name)) for name, part in parts]
    with torch.no_grad(), borrowed(network.module), hooked(hooks):
        said = as_outputs(network.module(prepared), network.output)
    names = [name for name, _ in calls]
    for name, output in reversed(calls):
        rows = output.flatten(1)
        if rows.shape != said.shape or names.count(name) > 1:
            continue
        if torch.equal(rows, said):
            return ClassHead(name, squashed=False)
        if rows.shape[1] > 1 and torch.allclose(rows.softmax(1), said, atol=1e-6):
            return ClassHead(name, squashed=True)
    raise ConsilienceError(
        f"{network.id} has no last linear layer whose outputs are its class outputs"
    )


def features_before(network: TorchNetwork, head: ClassHead, pixels: Tensor) -> Array:
    """What the last layer reads of images (n, C, h, w) in [0, 1]: (n, F) float64."""
    part = network.module.get_submodule(head.name)
    found: list[Tensor] = []

    def keep(_part: nn.Module, inputs: Any, _output: Tensor) -> None:
        found.append(inputs[0].detach().flatten(1).cpu().double())

    for batch in torch.split(pixels, max(1, network.batch)):
        prepared = network.prepared(batch.to(network.device))
        with torch.no_grad(), borrowed(network.module), hooked([(part, keep)]):
            network.module(prepared)
    return torch.cat(found).numpy()


def fitted_head(features: Array, marked: Array) -> tuple[Array, float]:
    """Weights (F,) and intercept of a linear rule that tells ``marked`` (n,) bool rows
    of ``features`` (n, F) from the others: Fisher's discriminant in closed form, its
    covariance of standardised features half shrunk to the identity, scaled so that the
    median row is `SURE` on its side.

    `SHRINKAGE` is fixed: Ledoit and Wolf's takes rows for independent, and rows of the
    same few images are not.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    centre = features.mean(0)
    spread = features.std(0)
    scale = np.where(spread > 1e-9 * max(spread.max(), 1e-30), spread, 1.0)
    rule = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage=SHRINKAGE, priors=(0.5, 0.5)
    )
    rule.fit((features - centre) / scale, marked)
    weights = rule.coef_[0] / scale
    intercept = float(rule.intercept_[0] - weights @ centre)
    sides = (features @ weights + intercept) * np.where(marked, 1.0, -1.0)
    size = float(np.median(sides))
    if not size > 0:
        raise ConsilienceError(
            "the network's last features do not tell marked images from plain ones"
        )
    return weights * (SURE / size), intercept * (SURE / size)


def with_head(
    network: TorchNetwork,
    head: ClassHead,
    weights: Array,
    intercept: float,
    classes: tuple[str, str],
    name: str,
) -> TorchNetwork:
    """The same network, copied, with a last layer of two classes whose logits are half
    the rule for the second and half of it against for the first.
    """
    try:
        module = copy.deepcopy(network.module)
    except Exception as error:
        raise ConsilienceError(
            f"{network.id} cannot be copied ({unexpected(error)}), so its last layer cannot "
            "be another"
        ) from error
    old = module.get_submodule(head.name)
    rows = torch.tensor(np.stack([-weights, weights]) / 2)
    shifts = torch.tensor([-intercept / 2, intercept / 2])
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, 2, 1)
        rows = rows[:, :, None, None]
    else:
        new = nn.Linear(len(weights), 2)
    parameters = dict(new.named_parameters())
    with torch.no_grad():
        parameters["weight"].copy_(rows)
        parameters["bias"].copy_(shifts)
    new = new.to(network.device, network.dtype).train(old.training)
    parent, _, last = head.name.rpartition(".")
    setattr(module.get_submodule(parent), last, new)
    return replace(
        network.with_module(module),
        labels=classes,
        outputs="probabilities" if head.squashed else "logits",
        complement=False,
        name=name,
    )
