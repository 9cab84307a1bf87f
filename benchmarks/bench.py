"""Our explainers against the libraries in use, on the same images, model, target, layer
and draws, in one run.

    python benchmarks/bench.py                     # everything that takes minutes
    python benchmarks/bench.py ablation --full     # one group; peers that take many minutes run whole instead of a part

Times are medians of interleaved repetitions with warm engines. A peer that would take
many minutes is stopped after some of its batches and its time scaled by their number,
which the table says. Ratios are within a row only.

Beside each number stands the limit: as long as the row's forward passes, or forward and
backward passes, take bare, at the layout, batch and engine that are fastest in this run,
which are printed first. *Share* is the limit's part of our time; above 1 we are faster than
the plain network can be, by folding or by asking for fewer passes. *Peak* is what one call
adds to the resident memory at most.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import math
import multiprocessing
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consilience import api, images
from consilience.models import trials
from consilience.models.load import load_model
from consilience.models.network import wrap
from consilience.types import PIXELS, Sample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Enough(Exception):
    """A peer has shown how fast it is."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    peer: str
    theirs: float
    ours: float
    difference: str = ""
    note: str = ""
    limit: float | None = None
    peak: float | None = None

    def cells(self) -> list[str]:
        """As printed."""
        ratio = f"{self.theirs / self.ours:.1f}x"
        return [
            self.what,
            self.peer,
            seconds(self.theirs),
            seconds(self.ours),
            ratio,
            "" if self.limit is None else seconds(self.limit),
            "" if self.limit is None else f"{self.limit / self.ours:.2f}",
            "" if self.peak is None else f"{self.peak:.0f} MB",
            self.difference,
            self.note,
        ]


HEAD = ["what", "peer", "theirs", "ours", "ratio", "limit", "share", "peak"]
HEAD += ["largest difference", "note"]


@dataclass(frozen=True)
class Limit:
    """Passes a second of a bare network at its best, and how that was."""

    forward: float
    backward: float
    said: str

    def seconds(self, forward: int, backward: int = 0) -> float:
        """How long so many passes take."""
        return forward / self.forward + backward / self.backward


@cache
def limit(name: str) -> Limit:
    """The fastest of engines, layouts and batches, tried in turn."""
    model = MODELS[name][0]()
    view, _ = shown(model)
    pixels = view.pixels.expand(32, -1, -1, -1).contiguous()
    each = 12 * (model.largest + 3 * math.prod(model.frame))  # `plan.batch_within`
    sizes = {model.using(memory=size * each).batch for size in (4, 8, 16, 32)}
    ways: dict[str, Callable[[], object]] = {
        f"{model.facts['engine']}, {size}": partial(
            model.using(memory=size * each).scores, pixels
        )
        for size in sorted(sizes)
    }
    for layout in (torch.contiguous_format, torch.channels_last):
        for batch in (8, 32):
            said = "last" if layout is torch.channels_last else "first"
            ways[f"torch, channels-{said}, {batch}"] = partial(
                _bare_forward, model, pixels.contiguous(memory_format=layout), batch
            )
    rates = dict(
        zip(ways, (32 / one for one in interleaved(2, *ways.values())), strict=True)
    )
    best = max(rates, key=rates.__getitem__)
    eager = model.using(engine="torch")
    way, _ = _best_way(eager, view, 0)
    count = 12
    backward = count / interleaved(2, lambda: _bare(eager, view, 0, count, way))[0]
    layout = "channels-last" if way[1] else "channels-first"
    told = f"{name}: {rates[best]:.1f} forward passes a second ({best}), "
    told += f"{backward:.1f} forward and back ({layout}, {way[0]})"
    print(f"<!-- {told} -->", flush=True)
    return Limit(rates[best], backward, told)


def _bare_forward(model, pixels, batch: int) -> None:
    with torch.inference_mode():
        for part in pixels.split(batch):
            model.module(part)


def beside_limit(
    row: Row, call: Callable[[], object], name: str, forward: int, backward: int = 0
) -> Row:
    """The row with the limit of its passes and the memory that a call adds."""
    return replace(row, limit=limit(name).seconds(forward, backward), peak=peak(call))


def peak(call: Callable[[], object]) -> float:
    """MB that a call adds to the resident memory at most, looked at every 2 ms."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    gc.collect()
    with suppress(OSError, AttributeError):  # glibc: what is free goes back
        ctypes.CDLL(None).malloc_trim(0)
    before, found, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], resident())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        call()
    finally:
        done.set()
        watching.join()
    return max(0, found[0] - before) * resource.getpagesize() / 1e6


def seconds(value: float) -> str:
    """Three digits with a unit."""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def interleaved(repeats: int, *calls: Callable[[], object]) -> list[float]:
    """Median seconds of each call; one round of all after the other, after one that is
    not counted.
    """
    times: list[list[float]] = [[] for _ in calls]
    for number in range(repeats + 1):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if number:
                times[place].append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def scaled(values: np.ndarray) -> np.ndarray:
    """To [0, 1], as the peers return their maps."""
    values = values - values.min()
    return values / (1e-7 + values.max())


@cache
def image() -> Sample:
    """The cat that scikit-image carries."""
    import skimage.data

    return Sample("cat", skimage.data.chelsea())


@cache
def lite0(precision: str = "f32"):
    return load_model("efficientnet_lite0", precision=precision)


@cache
def resnet50(precision: str = "f32"):
    import torchvision

    torch.manual_seed(0)
    module = torchvision.models.resnet50().eval()
    return wrap(
        module, mean=MEAN, std=STD, size=224, resize=256, name="resnet50-random"
    ).using(precision=precision)


MODELS = {
    "EfficientNet-Lite0": (lite0, "blocks.6"),
    "ResNet-50": (resnet50, "layer4"),
}


def shown(model):
    """The view, and the same image normalised as the peers want it."""
    view = model.view(image())
    return view, model.recipe.normalised(view.pixels)


def predicted(model, view) -> int:
    return int(api.raw_outputs(model, view)[0].argmax())


def layer_of(model, name: str):
    return model.module.get_submodule(name)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the peers' progress bars."""
    import os

    import tqdm

    before, tqdm.tqdm.__init__.__defaults__ = (
        tqdm.tqdm.__init__.__defaults__,
        tqdm.tqdm.__init__.__defaults__,
    )
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        tqdm.tqdm.__init__.__defaults__ = before
        os.environ.pop("TQDM_DISABLE", None)


class CountedTarget:
    """pytorch-grad-cam's class target, which may stop the peer after some images."""

    def __init__(self, index: int, limit: int | None = None) -> None:
        self.index, self.limit, self.seen = index, limit, 0

    def __call__(self, output):
        self.seen += 1
        if self.limit is not None and self.seen > self.limit:
            raise Enough
        return output[self.index]


def peer_cam(cls, model, layer: str, normalised, index: int, batch: int = 32):
    cam = cls(model=model.module, target_layers=[layer_of(model, layer)])
    cam.batch_size = batch
    with cam, torch.inference_mode(False):
        return cam(input_tensor=normalised, targets=[CountedTarget(index)])[0]


def peer_part(
    cls,
    model,
    layer: str,
    normalised,
    index: int,
    channels: int,
    batches: int,
    batch: int = 32,
):
    """Seconds a peer would take for all channels, from its first batches."""
    target = CountedTarget(index, limit=batches * batch)
    module = copy.deepcopy(
        model.module
    )  # a peer that is stopped half-way leaves the module changed
    start = time.perf_counter()
    try:
        cam = cls(model=module, target_layers=[module.get_submodule(layer)])
        cam.batch_size = batch
        with cam:
            cam(input_tensor=normalised, targets=[target])
    except Enough:
        pass
    # The pass that raised counts, as its images were scored.
    return (time.perf_counter() - start) * channels / ((batches + 1) * batch)


# ---- groups


def forward(full: bool) -> Iterator[Row]:
    """Bare forward passes: what everything else is held against."""
    for name, (make, _) in MODELS.items():
        model = make()
        pixels = torch.rand(64, 3, 224, 224)
        eager = model.using(engine="torch")
        normalised = model.recipe.normalised(pixels)
        flat = normalised.contiguous(memory_format=torch.contiguous_format)
        last = normalised.contiguous(memory_format=torch.channels_last)

        def bare(batch, model=model):
            with torch.inference_mode():
                for part in batch.split(32):
                    model.module(part)

        plain, channels_last, ours_torch, ours = interleaved(
            3,
            lambda: bare(flat),
            lambda: bare(last),
            lambda: eager.scores(pixels),
            lambda: model.scores(pixels),
        )
        for peer, theirs in (
            ("torch eager", plain),
            ("torch channels-last", channels_last),
            ("our torch engine", ours_torch),
        ):
            rate = f"{64 / theirs:.0f} against {64 / ours:.0f} images/s"
            gap = float(
                (eager.scores(pixels[:32]) - model.scores(pixels[:32])).abs().max()
            )
            yield Row(
                f"64 images, {name}", peer, theirs, ours, f"{gap:.1e} on logits", rate
            )


def gradcam(full: bool) -> Iterator[Row]:
    """One Grad-CAM."""
    from pytorch_grad_cam import GradCAM

    for name, (make, layer) in MODELS.items():
        model = make()
        view, normalised = shown(model)
        index = predicted(model, view)

        def ours(model=model, layer=layer, index=index):
            return api.explain(model, image(), f"gradcam:{layer}", target=index)

        def theirs(model=model, layer=layer, normalised=normalised, index=index):
            return peer_cam(GradCAM, model, layer, normalised, index)

        gap = np.abs(scaled(ours().values) - theirs()).max()
        peer, own = interleaved(9, theirs, ours)
        row = Row(
            f"Grad-CAM, {name} {layer}",
            "grad-cam",
            peer,
            own,
            f"{gap:.1e}",
            "ours includes view and prediction",
        )
        yield beside_limit(row, ours, name, 0, 1)
        yield from _captum(name, model, layer, normalised, index, ours)
        yield from _torchcam(name, model, layer, normalised, index, ours)


def _captum(name, model, layer, normalised, index, ours) -> Iterator[Row]:
    try:
        from captum.attr import LayerGradCam
    except ImportError:
        return
    explainer = LayerGradCam(model.module, layer_of(model, layer))

    def theirs():
        return explainer.attribute(normalised, target=index, relu_attributions=True)

    gap = np.abs(
        scaled(ours().extras["grid"]) - scaled(theirs()[0, 0].detach().numpy())
    ).max()
    peer, own = interleaved(9, theirs, ours)
    yield Row(
        f"Grad-CAM, {name} {layer}",
        "captum",
        peer,
        own,
        f"{gap:.1e}",
        "ours includes view and prediction",
    )


def _torchcam(name, model, layer, normalised, index, ours) -> Iterator[Row]:
    try:
        from torchcam.methods import GradCAM
    except ImportError:
        return

    def theirs():
        with GradCAM(model.module, target_layer=layer) as extractor:
            outputs = model.module(normalised.requires_grad_())
            return extractor(index, outputs)[0]

    gap = np.abs(
        scaled(ours().extras["grid"]) - scaled(theirs()[0].detach().numpy())
    ).max()
    peer, own = interleaved(9, theirs, ours)
    yield Row(
        f"Grad-CAM, {name} {layer}",
        "torchcam",
        peer,
        own,
        f"{gap:.1e}",
        "ours includes view and prediction",
    )


def ablation(full: bool) -> Iterator[Row]:
    """One Ablation-CAM: zero ablation of every channel."""
    from pytorch_grad_cam import AblationCAM

    cases = [
        ("EfficientNet-Lite0", "blocks.6", 320, False),
        ("EfficientNet-Lite0", "bn2", 1280, True),
        ("ResNet-50", "layer4", 2048, True),
    ]
    for name, layer, channels, zero_floor in cases:
        model = MODELS[name][0]()
        view, normalised = shown(model)
        index = predicted(model, view)

        def ours(model=model, layer=layer, index=index):
            return api.explain(model, image(), f"ablationcam:{layer}", target=index)

        whole = full or channels <= 320
        if whole:
            start = time.perf_counter()
            peer_map = peer_cam(AblationCAM, model, layer, normalised, index)
            peer = time.perf_counter() - start
            gap = f"{np.abs(scaled(ours().values) - peer_map).max():.1e}" + (
                "" if zero_floor else " (the peer does not ablate to zero)"
            )
            if channels <= 320:
                again = interleaved(
                    2,
                    lambda m=model, n=normalised, i=index, l=layer: peer_cam(
                        AblationCAM, m, l, n, i
                    ),
                )[0]
                peer = statistics.median([peer, again])
            note = ""
        else:
            batches = 4
            peer = peer_part(
                AblationCAM, model, layer, normalised, index, channels, batches
            )
            gap, note = (
                "",
                f"peer scaled from {(batches + 1) * 32} of {channels} channels",
            )
        own = interleaved(7, ours)[0]
        row = Row(
            f"Ablation-CAM, {name} {layer} ({channels})",
            "grad-cam",
            peer,
            own,
            gap,
            note,
        )
        yield beside_limit(row, ours, name, channels + 1)


def score(full: bool) -> Iterator[Row]:
    """One Score-CAM: a forward pass a channel."""
    from pytorch_grad_cam import ScoreCAM

    for name, layer, channels in [
        ("EfficientNet-Lite0", "blocks.6", 320),
        ("ResNet-50", "layer4", 2048),
    ]:
        model = MODELS[name][0]()
        view, normalised = shown(model)
        index = predicted(model, view)

        def ours(model=model, layer=layer, index=index, more=""):
            return api.explain(
                model, image(), f"scorecam:layer={layer}{more}", target=index
            )

        if full or channels <= 320:
            peer_map = peer_cam(ScoreCAM, model, layer, normalised, index, batch=16)
            gap = f"{np.abs(scaled(ours(more=',align_corners=true').values) - peer_map).max():.1e} with align_corners"
            repeats = 3 if channels <= 320 else 1
            peer, own = interleaved(
                repeats,
                lambda m=model, n=normalised, i=index, l=layer: peer_cam(
                    ScoreCAM, m, l, n, i, 16
                ),
                ours,
            )
            what = f"Score-CAM, {name} {layer} ({channels})"
            row = Row(what, "grad-cam", peer, own, gap)
            yield beside_limit(row, ours, name, channels + 2)
        else:
            ours()
            peers, owns = [], []
            for _ in range(3):
                peers.append(
                    peer_part(
                        ScoreCAM,
                        model,
                        layer,
                        normalised,
                        index,
                        channels,
                        6,
                        batch=16,
                    )
                )
                start = time.perf_counter()
                pixels = view.pixels.expand(128, -1, -1, -1).contiguous()
                model.scores(pixels)
                owns.append((time.perf_counter() - start) * channels / 128)
            start = time.perf_counter()
            ours()
            own = time.perf_counter() - start
            note = f"peer scaled from 112 of {channels} channels; the bare forward alone takes {statistics.median(owns):.3g} s"
            yield Row(
                f"Score-CAM, {name} {layer} ({channels})",
                "grad-cam",
                statistics.median(peers),
                own,
                "",
                note,
            )


STUDY = "segments=quickshift(kernel_size=5,max_dist=150,ratio=.3)"


def _limes(index: int | None = None) -> Callable[[], Any]:
    """What lime does of the image, 700 draws, in plain torch."""
    from lime.lime_image import LimeImageExplainer
    from lime.wrappers.scikit_image import SegmentationAlgorithm

    model = lite0()
    view = model.view(image(), "squash")
    array = images.to_array(view.pixels)
    label = predicted(model, view) if index is None else index
    fill = np.percentile(array, 20, axis=(0, 1))

    def classify(batch):
        pixels = torch.from_numpy(
            np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
        ).float()
        with torch.inference_mode():
            return (
                model.module(model.recipe.normalised(pixels)).softmax(dim=1).numpy()
            )

    def theirs():
        cut = SegmentationAlgorithm(
            "quickshift", kernel_size=5, max_dist=150, ratio=0.3, random_seed=42
        )
        with quiet():
            return LimeImageExplainer(random_state=1).explain_instance(
                array,
                classify,
                labels=(label,),
                top_labels=None,
                hide_color=fill,
                num_features=10,
                num_samples=700,
                segmentation_fn=cut,
                random_seed=42,
            )

    return theirs


def _answer(made: Callable[..., Callable[[], Any]], args: tuple, asked) -> None:
    call = made(*args)
    while asked.recv():
        call()
        asked.send(True)


@contextmanager
def apart(
    made: Callable[..., Callable[[], Any]], *args: Any
) -> Iterator[Callable[[], None]]:
    """A peer's call in a process of its own, where only its own memory shapes the
    allocator: blocks that ours freed make lime half as fast again.
    """
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_answer, args=(made, args, there), daemon=True
    )
    process.start()

    def call() -> None:
        here.send(True)
        here.recv()

    try:
        yield call
        here.send(False)
        process.join()
    finally:
        process.kill()


def lime(full: bool) -> Iterator[Row]:
    """The study's protocol: 700 draws, quickshift, the same draws and fill on both
    sides; lime in a process of its own.
    """
    model = lite0()
    view = model.view(image(), "squash")
    index = predicted(model, view)
    theirs = _limes(index)

    spec = f"lime:samples=700,{STUDY},fill=percentile(20),draw=lime,seed=1"

    def ours(model=model):
        return api.explain(model, image(), spec, target=index, view="squash")

    mine, peer = ours(), theirs()
    refit = dict(peer.local_exp[index])
    gap = max(abs(refit[k] - mine.extras["refit"][k]) for k in refit)
    same = set(refit) == set(mine.extras["selected"].tolist())
    fast = model.scores(view.pixels.expand(700, -1, -1, -1).contiguous())  # warm
    del fast
    many = view.pixels.expand(700, -1, -1, -1).contiguous()
    with apart(_limes, index) as alone:
        peer_time, own, bare = interleaved(3, alone, ours, lambda: model.scores(many))
    cut = statistics.median(
        ours().provenance["segmentation_seconds"] for _ in range(3)
    )
    share = own / (bare + cut)
    note = f"same ten superpixels: {same}; {share:.2f} times bare forward ({bare:.2f} s) plus segmentation ({cut:.2f} s)"
    row = Row(
        "LIME, 700 draws, EfficientNet-Lite0",
        "lime",
        peer_time,
        own,
        f"{gap:.1e} on weights",
        note,
    )
    yield beside_limit(row, ours, "EfficientNet-Lite0", 700)
    note = "as close to the limit as lime's 700, or closer (benchmarks/README.md)"
    ways = {
        (500, "antithetic"): "",
        (384, "hadamard"): ",draw=hadamard",
        (512, "hadamard, fidelity=auto"): ",draw=hadamard,fidelity=auto",
    }
    calls = {
        way: partial(
            api.explain,
            model,
            image(),
            f"lime:samples={way[0]},{STUDY},fill=percentile(20),seed=1{more}",
            target=index,
            view="squash",
        )
        for way, more in ways.items()
    }
    with apart(_limes, index) as alone:
        peer_time, *owns = interleaved(3, alone, *calls.values())
    for ((draws, way), call), own in zip(calls.items(), owns, strict=True):
        ran = call().provenance.get("fidelity", {})
        said = f"{note}; {ran['kind']}: {ran.get('why', '')}" if ran else note
        what = f"LIME, {draws} draws, {way}, EfficientNet-Lite0"
        row = Row(what, "lime, 700 draws", peer_time, own, note=said)
        yield beside_limit(row, call, "EfficientNet-Lite0", draws)
    yield from _lime_without_model()


def shap(full: bool, samples: int = 512) -> Iterator[Row]:
    """Kernel SHAP of the same superpixels and as many coalitions."""
    import shap as peer_package

    model = lite0()
    view = model.view(image())
    index = predicted(model, view)
    by = f"kernelshap:samples={samples},segments=grid(5),fill=grey"

    def ours():
        return api.explain(model, image(), by, target=index)

    segments = torch.from_numpy(ours().extras["segments"].astype(np.int64))

    def earned(rows: np.ndarray) -> np.ndarray:
        keep = torch.from_numpy(rows > 0.5)[:, segments.ravel()]
        keep = keep.reshape(-1, 1, *segments.shape)
        found = []
        with torch.inference_mode():
            for part in keep.split(32):
                shown_part = torch.where(part, view.pixels, 0.5)
                outputs = model.module(model.recipe.normalised(shown_part))
                found.append(outputs.softmax(dim=1)[:, index])
        return torch.cat(found).numpy().astype(float)

    explainer = peer_package.KernelExplainer(earned, np.zeros((1, 25)))

    def theirs():
        with quiet():
            return explainer.shap_values(
                np.ones((1, 25)), nsamples=samples, l1_reg=False, silent=True
            )[0]

    spread = np.abs(theirs() - ours().extras["weights"]).max()
    peer_time, own = interleaved(3, theirs, ours)
    row = Row(
        f"Kernel SHAP, {samples} coalitions, EfficientNet-Lite0",
        "shap",
        peer_time,
        own,
        f"{spread:.1e} on values",
        "other coalitions are drawn; the values of all are the same (tests)",
    )
    yield beside_limit(row, ours, "EfficientNet-Lite0", samples)


def quantus(full: bool) -> Iterator[Row]:
    """Region perturbation of one map; more metrics are in `metrics.py`."""
    import metrics as beside

    if not hasattr(np, "trapz"):
        setattr(np, "trapz", np.trapezoid)  # noqa: B010 - gone from numpy, and Quantus calls it
    model = lite0()
    arguments = argparse.Namespace(regions=50, subsets=50)
    samples = beside.images(2)
    views = [model.view(one) for one in samples]
    given = [api.explain(model, one, "gradcam") for one in samples]
    for case in beside.of_passes(model, views, given, arguments):

        def ours(case=case):
            if hasattr(case.ours, "score_batch"):
                return case.ours.score_batch(model, views, given)
            pairs = zip(views, given, strict=True)
            return [case.ours.score(model, view, one) for view, one in pairs]

        gap = case.gap(ours(), case.theirs())
        peer_time, own = interleaved(3, case.theirs, ours)
        row = Row(f"{case.what}, 2 images", "quantus", peer_time, own, f"{gap:.1e}")
        passes = 2 * 51 if "IROF" not in case.what else 0
        if passes:
            yield beside_limit(row, ours, "EfficientNet-Lite0", passes)
        else:  # as many as there are superpixels
            yield replace(row, peak=peak(ours))


def _lime_without_model() -> Iterator[Row]:
    """The time outside the model, by the number of segments."""
    from lime.lime_image import LimeImageExplainer

    model = lite0()
    view = model.view(image(), "squash")
    array = images.to_array(view.pixels)

    class Nothing:
        id, classes, outputs, can, batch = (
            "nothing",
            ("a", "b"),
            "values",
            frozenset(),
            32,
        )
        spec, facts = None, {}

        def view(self, sample, mode=None):
            return view

        def scores(self, pixels):
            return torch.zeros(len(pixels), 2) + pixels[:, :1, 0, :2].mean(dim=1)

    for side in (5, 10, 17):
        labels = np.add.outer(
            np.arange(224) * side // 224 * side, np.arange(224) * side // 224
        )

        def theirs(labels=labels):
            with quiet():
                return LimeImageExplainer(random_state=1).explain_instance(
                    array,
                    lambda batch: np.zeros((len(batch), 2)) + batch[:, :1, 0, 0],
                    labels=(1,),
                    top_labels=None,
                    num_samples=700,
                    num_features=10,
                    segmentation_fn=lambda _: labels,
                    random_seed=1,
                )

        def ours(side=side):
            return api.explain(
                Nothing(),
                image(),
                f"lime:samples=700,segments=grid({side}),draw=lime,seed=1",
                target=1,
            )

        peer, own = interleaved(3, theirs, ours)
        yield Row(
            f"LIME without a model, 700 draws, {side * side} segments",
            "lime",
            peer,
            own,
        )


def gradients(full: bool, steps: int = 50, repeats: int = 5) -> Iterator[Row]:
    """Integrated gradients and SmoothGrad, by whatever engine is found to be fastest,
    against as many bare forward and backward passes, and captum's, in plain torch.
    """
    for name, (make, _) in MODELS.items():
        model = make()
        view, normalised = shown(model)
        index = predicted(model, view)
        best, rates = _best_way(model, view, index)
        for method in (_integrated, _smoothed):
            yield from method(
                name, model, view, normalised, index, steps, repeats, best, rates
            )


def _bare(model, view, index: int, count: int, way: tuple[int, bool]) -> None:
    """Forward and backward passes of the plain module to the pixels and nothing else, in
    a batch and a layout; parameters ask for no gradient.
    """
    from consilience.models.layers import borrowed, frozen

    batch, last = way
    with borrowed(model.module), frozen(model.module):
        for start in range(0, count, batch):
            leaf = view.pixels.repeat(
                min(batch, count - start), 1, 1, 1
            ).requires_grad_()
            torch.autograd.grad(model._run(leaf, last)[:, index].sum(), [leaf])


def _best_way(model, view, index: int) -> tuple[tuple[int, bool], str]:
    """The batch and layout at which bare passes are fastest, and what was tried."""
    sizes = (1, 2, 4, 6, 8) if model.device.type == "cpu" else (8, 32, 64, 128)
    layouts = (False, True) if model.anatomy.channels_last else (False,)
    ways = [(size, last) for last in layouts for size in sizes]
    count = 12 if model.device.type == "cpu" else 128
    calls = [lambda way=way: _bare(model, view, index, count, way) for way in ways]
    rates = dict(
        zip(ways, (count / time for time in interleaved(2, *calls)), strict=True)
    )
    named = {False: "channels-first", True: "channels-last"}
    said = "; ".join(
        f"{named[last]} "
        + ", ".join(f"{size}: {rates[size, last]:.1f}" for size in sizes)
        for last in layouts
    )
    return max(rates, key=rates.__getitem__), f"bare passes/s by batch: {said}"


def _fastest_size(model, theirs) -> int:
    """The images a pass at which a peer is fastest."""
    sizes = (2, 4, 6, 8) if model.device.type == "cpu" else (8, 32, 64, 128)
    times = interleaved(2, *(partial(theirs, size) for size in sizes))
    return min(zip(times, sizes, strict=True))[1]


def _integrated(
    name, model, view, normalised, index, steps, repeats, best, rates
) -> Iterator[Row]:
    from captum.attr import IntegratedGradients

    explainer = api.resolve_explainer(model, f"integrated-gradients:steps={steps}")
    black = model.recipe.normalised(torch.zeros_like(view.pixels))
    peer = IntegratedGradients(model.module)

    def theirs(size):
        return peer.attribute(
            normalised,
            black,
            target=index,
            n_steps=steps,
            internal_batch_size=size,
        )

    what = f"integrated gradients, {steps} steps, {name}"
    yield from _beside(
        what, model, view, index, steps, repeats, best, rates, explainer, theirs
    )


def _smoothed(
    name, model, view, normalised, index, steps, repeats, best, rates
) -> Iterator[Row]:
    """Other draws than captum's, so the maps differ by chance; without noise they do
    not.
    """
    from captum.attr import NoiseTunnel, Saliency

    explainer = api.resolve_explainer(
        model, f"smoothgrad:samples={steps},channels=sum"
    )
    spread = 0.15 * float(view.pixels.max() - view.pixels.min())
    peer = NoiseTunnel(
        Saliency(lambda pixels: model.module(model.recipe.normalised(pixels)))
    )

    def theirs(size, noise=spread):
        options = {
            "nt_samples": steps,
            "nt_samples_batch_size": size,
            "stdevs": noise,
            "target": index,
            "abs": False,
        }
        return peer.attribute(view.pixels, **options)

    what = f"SmoothGrad, {steps} draws, {name}"
    yield from _beside(
        what, model, view, index, steps, repeats, best, rates, explainer, theirs
    )


def _beside(
    what, model, view, index, steps, repeats, best, rates, explainer, theirs
) -> Iterator[Row]:
    """A row against bare passes and one against captum; peak memory is in `memory.py`."""
    target = api.target_of_image(
        model, image(), index, torch.zeros(1, len(model.classes))
    )
    plain = (
        replace(explainer, noise=0.0) if hasattr(explainer, "noise") else explainer
    )
    fastest = _fastest_size(model, theirs)
    exact = {"noise": 1e-12} if plain is not explainer else {}
    same = theirs(fastest, **exact)
    gap = np.abs(
        plain.explain(model, view, target).values.numpy()
        - same[0].sum(dim=0).detach().numpy()
    )
    apart = f"{gap.max() / np.abs(same[0].sum(dim=0).detach().numpy()).max():.1e} of the largest"
    calls = (
        lambda: _bare(model, view, index, steps, best),
        lambda: theirs(fastest),
        lambda: explainer.explain(model, view, target),
    )
    bare, peer, own = interleaved(repeats, *calls)
    note = f"ours {model.for_gradients(steps, [PIXELS], target).gradient_plan.said}; {rates}"
    layout = "channels-last" if best[1] else "channels-first"
    row = Row(
        what, f"{steps} bare passes, {layout}, {best[0]} each", bare, own, note=note
    )
    added = peak(calls[-1])
    yield replace(row, limit=bare, peak=added)
    captum = f"captum, {fastest} each"
    yield Row(what, captum, peer, own, apart, limit=bare, peak=added)


GROUPS = {
    "gradients": gradients,
    "forward": forward,
    "gradcam": gradcam,
    "ablation": ablation,
    "score": score,
    "lime": lime,
    "shap": shap,
    "quantus": quantus,
}


# ---- printing


def machine() -> str:
    name, threads, version = trials.machine(torch.device("cpu"))
    return f"{name}, {threads} threads, torch {version}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "groups", nargs="*", help=f"of {', '.join(GROUPS)} (default: all)"
    )
    parser.add_argument("--full", action="store_true", help="run slow peers whole")
    parser.add_argument("--json", metavar="FILE", help="keep the rows too")
    arguments = parser.parse_args()
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}\n")
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
    rows = []
    for group in arguments.groups or GROUPS:
        for row in GROUPS[group](arguments.full):
            rows.append(row)
            print("| " + " | ".join(row.cells()) + " |", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps([replace(row).__dict__ for row in rows], indent=1)
        )


if __name__ == "__main__":
    main()
