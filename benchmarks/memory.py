"""Peak memory of one explanation above the model's own footprint, each in a process of
its own.

python benchmarks/memory.py
"""

from __future__ import annotations

import json
import subprocess
import sys

CASES = {
    "scorecam, EfficientNet-Lite0 blocks.6": (
        "ours",
        "efficientnet_lite0",
        "scorecam:layer=blocks.6",
    ),
    "scorecam, EfficientNet-Lite0 blocks.6, grad-cam": (
        "peer",
        "efficientnet_lite0",
        "ScoreCAM blocks.6",
    ),
    "lime 700, EfficientNet-Lite0": (
        "ours",
        "efficientnet_lite0",
        "lime:samples=700,seed=1",
    ),
    "ablationcam, EfficientNet-Lite0 blocks.6": (
        "ours",
        "efficientnet_lite0",
        "ablationcam:blocks.6",
    ),
    "integrated gradients, 50 steps, EfficientNet-Lite0": (
        "plain",
        "efficientnet_lite0",
        "integrated-gradients:steps=50",
    ),
    "integrated gradients, 500 steps, EfficientNet-Lite0": (
        "plain",
        "efficientnet_lite0",
        "integrated-gradients:steps=500",
    ),
    "integrated gradients, 50 steps at once, captum": (
        "captum",
        "efficientnet_lite0",
        "50",
    ),
    "SmoothGrad, 50 draws, EfficientNet-Lite0": (
        "plain",
        "efficientnet_lite0",
        "smoothgrad:samples=50",
    ),
    "integrated gradients, 50 steps, ResNet-50": (
        "plain",
        "timm:resnet50,weights=random",
        "integrated-gradients:steps=50",
    ),
    "1,000 Grad-CAMs in a row, EfficientNet-Lite0": (
        "thousand",
        "efficientnet_lite0",
        "gradcam",
    ),
}


def resident() -> float:
    """MB now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def watched(call) -> float:
    """Highest MB above the start while ``call`` runs, sampled every few milliseconds."""
    import threading

    start, high, done = resident(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.003):
            high[0] = max(high[0], resident() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    call()
    done.set()
    thread.join()
    return max(high[0], resident() - start)


def one(kind: str, name: str, what: str) -> float:
    import torch
    from bench import image, peer_cam, predicted, shown

    from consilience import api
    from consilience.models.load import load_model

    model = (
        load_model(name, engine="torch")
        if kind in ("plain", "captum")
        else load_model(name)
    )
    view, normalised = shown(model)
    index = predicted(model, view)
    if kind == "peer":
        import pytorch_grad_cam

        cls, layer = what.split()
        with torch.no_grad():
            model.module(normalised.expand(16, -1, -1, -1))
        return watched(
            lambda: peer_cam(
                getattr(pytorch_grad_cam, cls),
                model,
                layer,
                normalised,
                index,
                batch=16,
            )
        )
    if kind == "captum":
        from captum.attr import IntegratedGradients

        black = model.recipe.normalised(torch.zeros_like(view.pixels))
        peer = IntegratedGradients(model.module)
        return watched(
            lambda: peer.attribute(normalised, black, target=index, n_steps=int(what))
        )
    if kind == "plain":
        return watched(lambda: api.explain(model, image(), what, target=index))
    if kind == "thousand":
        for _ in range(20):
            api.explain(model, image(), what, target=index)
        before = resident()
        for _ in range(1000):
            api.explain(model, image(), what, target=index)
        return resident() - before
    model.scores(view.pixels.expand(model.batch, -1, -1, -1).contiguous())
    return watched(lambda: api.explain(model, image(), what, target=index))


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(one(*sys.argv[1:])))
        return
    print("| what | MB above the model's own |\n|---|---|")
    for what, case in CASES.items():
        done = subprocess.run(
            [sys.executable, __file__, *case],
            capture_output=True,
            text=True,
            check=False,
        )
        last = (
            done.stdout.strip().splitlines()[-1]
            if done.returncode == 0
            else done.stderr.strip().splitlines()[-1]
        )
        print(
            f"| {what} | {float(last):.0f} |"
            if done.returncode == 0
            else f"| {what} | {last} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
