"""What a run of many images costs, part by part, and whether the parts add up: measured
here, in one process, against the bare passes of the same engines.

    python benchmarks/scale.py IMAGES [--lime 100] [--work DIR]

Prints the rates, the shares, the bytes an explanation, the memory at each size, and how
far the cost model of docs/scale.md is from the measured runs.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import consilience as cs
from consilience.image_files import find_images
from consilience.runs.explain import How

SIZES = (100, 300, 1000)


def seconds(work, repeats=5):
    work()
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return median(took)


def bare(model):
    """Images a second: forward by the engine in full batches, forward and back by torch
    at the best batch and layout.
    """
    batch = torch.rand(model.batch, 3, *model.frame)
    forward = model.batch / seconds(lambda: model.scores(batch))
    module, best = model.module, 0.0
    for layout in (torch.contiguous_format, torch.channels_last):
        module.to(memory_format=layout)
        for count in (1, 3, 8, 16):
            pixels = batch[:count].clone().contiguous(memory_format=layout)
            pixels.requires_grad_()

            def both(pixels=pixels):
                torch.autograd.grad(module(pixels)[:, 3].sum(), pixels)

            best = max(best, count / seconds(both, 3))
    module.to(memory_format=torch.contiguous_format)
    return forward, best


def linked(files, count, folder):
    """So many images: the files again and again, each under a name of its own."""
    folder.mkdir(parents=True)
    for number in range(count):
        file = files[number % len(files)]
        (folder / f"{number:06d}{file.suffix}").symlink_to(file)
    return folder


def run_apart(images, by, output):
    """(seconds of making, of all, peak bytes) of a run in a process of its own, without
    loading and starting."""
    code = (
        "import sys, time, resource\n"
        "import consilience as cs\n"
        "from consilience.runs.explain import How\n"
        "model = cs.load_model('efficientnet_lite0')\n"
        "first = sorted(__import__('pathlib').Path(sys.argv[1]).iterdir())[0]\n"
        "cs.run(model, str(first), sys.argv[3:], output=sys.argv[2] + '-warm')\n"
        "start = time.perf_counter()\n"
        "run = cs.run(model, sys.argv[1], sys.argv[3:], output=sys.argv[2], how=How())\n"
        "print(run.manifest['seconds'], time.perf_counter() - start,\n"
        "      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(images), str(output), *by],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return tuple(map(float, said.split()[-3:]))


def kept(run):
    """Bytes an explanation in maps."""
    total = sum(file.stat().st_size for file in (run.folder / "maps").iterdir())
    return total / len(run)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("images")
    parser.add_argument("--lime", type=int, default=100)
    parser.add_argument("--work", default=None)
    asked = parser.parse_args()
    work = Path(asked.work or tempfile.mkdtemp())
    shutil.rmtree(work, ignore_errors=True)
    files = [file.resolve() for file in find_images([asked.images])]
    model = cs.load_model("efficientnet_lite0")
    forward, both = bare(model)
    read = seconds(lambda: [cs.read_image(file) for file in files[:30]]) / 30
    print(f"read and decode: {1000 * read:.1f} ms an image")
    print(f"bare forward {forward:.1f}, forward and back {both:.1f} images a second")

    rows = {}
    for count in SIZES:
        images = linked(files, count, work / f"images-{count}")
        made, whole, memory = run_apart(
            images, ["gradcam", "random"], work / f"r{count}"
        )
        rows[count] = (made, whole, memory)
        size = kept(cs.Run(work / f"r{count}"))
        report = (work / f"r{count}" / "report.html").stat().st_size
        print(
            f"{count} images, Grad-CAM and random: making {made:.1f} s "
            f"({count / made:.1f} images a second, {count / made / both:.2f} of forward and "
            f"back), all {whole:.1f} s, memory {memory / 1e6:.0f} MB, {size / 1000:.1f} kB an "
            f"explanation, report {report / 1e6:.1f} MB"
        )
    small, large = SIZES[0], SIZES[1]
    a_image = (rows[large][0] - rows[small][0]) / (large - small)
    for count in SIZES:
        told = rows[small][0] + (count - small) * a_image
        off = told / rows[count][0] - 1
        print(
            f"model of making: {count} images {told:.1f} s, measured {rows[count][0]:.1f} s "
            f"({off:+.1%}); tables and report {rows[count][1] - rows[count][0]:.1f} s"
        )
    for _ in range(3):
        shutil.rmtree(work / "cam", ignore_errors=True)
        made, _, _ = run_apart(work / f"images-{SIZES[0]}", ["gradcam"], work / "cam")
        share = SIZES[0] / made / both
        print(
            f"Grad-CAM alone: {1000 * made / SIZES[0]:.1f} ms an image, {share:.2f}"
        )
        shutil.rmtree(work / "cam-warm", ignore_errors=True)
    if not asked.lime:
        return
    images = linked(files, asked.lime, work / "lime")
    before = bare(model)[0]
    made, whole, memory = run_apart(
        images, ["gradcam", "lime:samples=256"], work / "lime-run"
    )
    rate = (before + bare(model)[0]) / 2
    passes = asked.lime * 258
    print(
        f"{asked.lime} images, Grad-CAM and LIME (256): {made:.1f} s; the bare passes "
        f"{passes / rate:.1f} s: {passes / rate / made:.3f} of their rate; memory "
        f"{memory / 1e6:.0f} MB; {kept(cs.Run(work / 'lime-run')) / 1000:.1f} kB an explanation"
    )
    print(f"here {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:.0f} MB")
    how = {"one process": How(), "two workers": How(workers=2)}
    for name, one in how.items():
        start = time.perf_counter()
        cs.run(
            model,
            str(linked(files, 40, work / f"w-{name[:3]}")),
            ["gradcam", "lime:samples=128"],
            output=work / f"run-{name[:3]}",
            how=one,
        )
        print(f"{name}, 40 images: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
