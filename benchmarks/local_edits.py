"""Would occlusion be faster if only what an edit reaches were computed?

    python benchmarks/local_edits.py

An occluding square of ``SIZE`` pixels changes, of the maps of an early stage, what lies
within the stage's receptive field. So a stage could run on a crop round the square, its
output be pasted into the maps of the whole image, and only the later stages run whole. The
bound printed here is as good as that can get: the early stages on a crop of the smallest
size that is exact, the later stages on whole maps, both as networks of their own in
OpenVINO in the batch of a run, and a paste. It is held against the whole network in the
same engine. Networks have random weights, which take the same time.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import timm
import torch
from torch import Tensor, nn

SIDE, BATCH, REPEATS = 224, 32, 5
SIZES = (16, 32, 64)


class Early(nn.Module):
    """The parts of a network up to a cut."""

    def __init__(self, parts: list[Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def lite0() -> list[tuple[str, Any]]:
    net = timm.create_model("tf_efficientnet_lite0").eval()
    head = nn.Sequential(net.conv_head, net.bn2, net.global_pool, net.classifier)
    stem = nn.Sequential(net.conv_stem, net.bn1)
    stages = [(f"blocks.{place}", stage) for place, stage in enumerate(net.blocks)]
    return [("stem", stem), *stages, ("head", head)]


def resnet(name: str) -> list[tuple[str, Any]]:
    net = timm.create_model(name).eval()
    stem = nn.Sequential(net.conv1, net.bn1, net.act1, net.maxpool)
    stages = [
        (f"layer{place}", getattr(net, f"layer{place}")) for place in (1, 2, 3, 4)
    ]
    return [("stem", stem), *stages, ("head", nn.Sequential(net.global_pool, net.fc))]


NETWORKS: dict[str, Callable[[], list[tuple[str, Any]]]] = {
    "EfficientNet-Lite0": lite0,
    "ResNet-18": lambda: resnet("resnet18"),
    "ResNet-50": lambda: resnet("resnet50"),
}


def reach(early: nn.Module) -> tuple[int, int]:
    """Stride of a stage, and how many pixels to one side an output looks: seen by what a
    pixel that is not a number makes of the output.
    """
    image = torch.zeros(1, 3, SIDE, SIDE)
    image[..., SIDE // 2, SIDE // 2] = torch.nan
    with torch.no_grad():
        out = early(image)
    rows = out.isnan().any(dim=1)[0].any(dim=1).nonzero()[:, 0]
    stride = SIDE // out.shape[-1]
    return stride, -(-len(rows) * stride // 2)


def compiled(module: nn.Module, shape: tuple[int, ...]) -> Callable[[], object]:
    """A network of its own in OpenVINO; a call runs it."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        graph = openvino.convert_model(module, example_input=torch.rand(shape))
    graph.reshape(list(shape))
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    made = openvino.Core().compile_model(graph, "CPU", hints)
    given = np.random.default_rng(0).random(shape, dtype=np.float32)
    return lambda: made(given, share_inputs=True, share_outputs=True)


def timed(*calls: Callable[[], object]) -> list[float]:
    """Medians of interleaved repeats."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(REPEATS + 1):
        for place, call in enumerate(calls):
            begun = time.perf_counter()
            call()
            if repeat:
                seconds[place].append(time.perf_counter() - begun)
    return [statistics.median(one) for one in seconds]


def main() -> None:
    print(
        "| network | square | cut behind | crop | share of the whole network's time |"
    )
    print("|---|---|---|---|---|", flush=True)
    for name, make in NETWORKS.items():
        whole = compiled(Early([part for _, part in make()]), (BATCH, 3, SIDE, SIDE))
        found: dict[int, list[tuple[float, str, int]]] = {size: [] for size in SIZES}
        for cut in range(1, len(make()) - 1):
            parts = make()
            early, later = (
                Early([part for _, part in some])
                for some in (parts[:cut], parts[cut:])
            )
            with torch.no_grad():
                maps = early(torch.rand(1, 3, SIDE, SIDE))
            shape = (BATCH, *maps.shape[1:])
            stride, margin = reach(Early([part for _, part in make()[:cut]]))
            rest = compiled(later, shape)
            for size in SIZES:
                # all outputs that the square reaches, and all that those look at
                side = size + 4 * margin
                side += -side % stride
                if side >= SIDE:
                    continue
                crop = compiled(early, (BATCH, 3, side, side))
                target = torch.rand(shape)
                inner = min((size + 2 * margin) // stride + 1, shape[-1])
                patch = torch.rand(*shape[:2], inner, inner)

                def paste(target: Tensor = target, patch: Tensor = patch) -> None:
                    # every edit starts from the maps of the untouched image
                    target.copy_(target[:1].expand_as(target).clone())
                    target[..., : patch.shape[-1], : patch.shape[-1]] = patch

                *pieces, all_of_it = timed(crop, rest, paste, whole)
                found[size].append((sum(pieces) / all_of_it, parts[cut - 1][0], side))
        for size, bounds in found.items():
            if not bounds:
                print(f"| {name} | {size} | none: the crop is the image | | |")
                continue
            share, where, side = min(bounds)
            print(f"| {name} | {size} | {where} | {side} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
