"""A worker of the workbench: a process that holds networks, reads uploads and does one
task after another.

It is told a task as a plain dict over a pipe and answers with events, plain dicts too:
``ready`` once, then for each task ``progress``, ``tile``, ``image`` and at its end
``done`` or ``failed``. A thread listens for what is to be stopped.
"""

from __future__ import annotations

import base64
import io
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice, product
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import torch

from consilience import api, data, images, progress, registry
from consilience.evaluation.columns import columns_of
from consilience.inputs import Shown
from consilience.models.load import load_model
from consilience.runs import explain as runs
from consilience.runs.folder import Run
from consilience.runs.making import kept_explanation, said_of
from consilience.runs.sources import read_ahead, source_of
from consilience.show import html
from consilience.show.colours import overlay
from consilience.show.tiles import Tile, map_tile, tiles
from consilience.spec import Spec, parse
from consilience.targets.classes import class_name
from consilience.types import (
    Array,
    ConsilienceError,
    Explanation,
    Sample,
    as_probabilities,
    unexpected,
)
from consilience.web.columns import titles
from consilience.web.desk import Setting

EVERY = 0.15
"""Seconds between two lines of progress."""
MOST = 20_000
"""The largest whole number that a method's option may have here: a request from a page
must not ask for a day of work or all of the memory.
"""
TOP = 5
VIEWS = 16
QUICK_PASSES = 24
"""Forward passes of the quick suite for a map: two curves of ten steps, two masks."""
PICTURES = 500
"""Wrong images of a folder that are shown small."""
LOOKED_AT = 32
"""Images of a folder that are read ahead and asked about together."""


@dataclass(eq=False)
class Reporter:
    """Progress as events; raises `Cancelled` where the task is to be stopped."""

    send: Callable[[dict[str, Any]], None]
    stopped: Callable[[], bool]
    _tasks: dict[int, list[Any]] = field(default_factory=dict)
    _next: int = 0
    _told: float = 0.0
    _lock: Lock = field(default_factory=Lock)

    def start(self, label: str, total: int) -> int:
        """See `progress.Reporter`."""
        with self._lock:
            self._next += 1
            self._tasks[self._next] = [label, 0, total]
            key = self._next
        self._tell()
        return key

    def advance(self, task: int, steps: int) -> None:
        """See `progress.Reporter`."""
        if self.stopped():
            raise progress.Cancelled
        with self._lock:
            if task in self._tasks:
                self._tasks[task][1] += steps
        self._tell()

    def finish(self, task: int) -> None:
        """See `progress.Reporter`."""
        with self._lock:
            self._tasks.pop(task, None)

    def say(self, message: str) -> None:
        """See `progress.Reporter`."""
        self.send({"kind": "said", "text": message})

    def _tell(self) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._told < EVERY:
                return
            self._told = now
            tasks = [
                {"label": label, "done": done, "total": total}
                for label, done, total in self._tasks.values()
            ]
        self.send({"kind": "progress", "tasks": tasks})


@dataclass(eq=False)
class Worker:
    """Does tasks; ``send`` takes its events."""

    setting: Setting
    send: Callable[[dict[str, Any]], None]
    _models: dict[str, Any] = field(default_factory=dict)
    _views: dict[tuple[str, str], Any] = field(default_factory=dict)
    _said: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    """Passes a second of each network, in batches, as it warmed up."""
    _stop: dict[str, Event] = field(default_factory=dict)

    def said(self, task: Mapping[str, Any], model: Any, view: Any) -> torch.Tensor:
        """What the network says of an unchanged image, asked once."""
        key = (task["model"], task["path"])
        if key not in self._said:
            if len(self._said) >= VIEWS:
                self._said.pop(next(iter(self._said)))
            self._said[key] = _probabilities(model, view)
        return self._said[key]

    def view(self, task: Mapping[str, Any], model: Any) -> Any:
        """An upload as a network sees it; the last ones are kept."""
        key = (task["model"], task["path"])
        if key not in self._views:
            if len(self._views) >= VIEWS:
                self._views.pop(next(iter(self._views)))
            sample = images.read_sample(
                task["path"], "image", Shown.of(model).channels
            )
            self._views[key] = model.view(sample)
        return self._views[key]

    def model(self, name: str) -> Any:
        """A network of the setting, loaded once."""
        if name not in self.setting.models:
            there = self.setting.models
            raise ConsilienceError(registry.unknown("model", name, there))
        if name not in self._models:
            self._models[name] = load_model(
                name, labels=self.setting.labels, device=self.setting.device
            )
        return self._models[name]

    def stop(self, task: str) -> None:
        """Have a task stop at its next step."""
        self._stop.setdefault(task, Event()).set()

    def do(self, task: Mapping[str, Any]) -> None:
        """One task, whatever happens answered with ``done`` or ``failed``."""
        number = task["task"]
        stop = self._stop.setdefault(number, Event())

        def send(event: dict[str, Any]) -> None:
            self.send({**event, "task": number})

        try:
            with progress.listening(Reporter(send, stop.is_set)):
                answer = TASKS[task["do"]](self, task, send)
            send({"kind": "done", "answer": answer})
        except progress.Cancelled:
            send({"kind": "failed", "reason": "cancelled", "cancelled": True})
        except ConsilienceError as error:
            send({"kind": "failed", "reason": str(error)})
        except MemoryError:
            send({"kind": "failed", "reason": "this needs more memory than is left"})
        except Exception as error:  # whatever a network or a plug-in raises
            send({"kind": "failed", "reason": unexpected(error)})
        finally:
            self._stop.pop(number, None)


# ---- tasks


def catalogue(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """What forms are made from: networks, explainers with their options, fills."""
    return {
        "models": [
            {
                "name": name,
                "classes": len(worker.model(name).classes),
                "weights": str(worker.model(name).facts.get("weights", "")),
            }
            for name in worker.setting.models
        ],
        "explainers": [
            _form_of(registry.explainers, name)
            for name in registry.explainers.names()
        ],
        "fills": [name for name in registry.fills.names() if name != "mean"],
        "images": worker.setting.images is not None,
        "plugins": [Path(path).name for path in worker.setting.plugins],
    }


def _form_of(of: registry.Registry, name: str) -> dict[str, Any]:
    cls = of.get(name)
    return {
        "name": name,
        "label": str(getattr(cls, "label", name)),
        "what": registry.summary_of(cls).replace("``", ""),
        "needs": sorted(getattr(cls, "needs", ())),
        "options": [
            {
                "name": item.name,
                "default": registry.spelled_default(item),
                "help": str(item.metadata.get("help", "")),
            }
            for item in registry.options_of(cls)
        ],
    }


def look(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """Decode an upload once: its size, what had to be decided, and a small picture."""
    sample = images.read_sample(task["path"], task["name"])
    height, width = sample.pixels.shape[:2]
    small = html.picture_uri(sample.rgb, 320)
    return {
        "height": height,
        "width": width,
        "notes": list(sample.notes),
        "small": small,
    }


def explain(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """A run of uploads, whose maps are sent one by one as they are made."""
    for spelled in task["by"]:
        _refuse_large(spelled)
    job, models = _job_of(worker, task)
    model = models[0]
    channels = Shown.of(model).channels
    samples: list[Sample] = []
    places: dict[str, int] = {}  # among those that were asked for
    for place, one in enumerate(task["images"]):
        try:
            samples.append(images.read_sample(one["path"], one["name"], channels))
            places[one["name"]] = place
        except ConsilienceError as error:
            send({"kind": "failure", "image": one["name"], "reason": str(error)})
    if not samples:
        raise ConsilienceError("none of the images could be read")
    order = [column.label for column in job.columns]
    by_label = {column.label: column for column in job.columns}
    begun: set[str] = set()
    lock = Lock()

    def made(sample: Sample, label: str, explanation: Explanation) -> None:
        with lock:
            if sample.name not in begun:
                begun.add(sample.name)
                send(_image_event(places[sample.name], sample, explanation, model))
        item = kept_explanation(by_label[label], explanation)
        view = model.view(sample, job.columns[0].view)
        base = (view.rgb * 255).round().astype(np.uint8)
        tile = map_tile(base, item)
        shown = replace(
            html.embed(tile, {}),
            column=order.index(label),
            data=html.viewer_data(item),
        )
        send(
            {
                "kind": "tile",
                "image": places[sample.name],
                "column": order.index(label),
                "html": html.tile_html(shown),
                "score": explanation.provenance.get("score"),
                "target": explanation.target.name,
                "seconds": explanation.provenance.get("seconds"),
            }
        )

    run = runs.run_explanations(
        job,
        samples,
        task["folder"],
        command=task["command"],
        models=models,
        made=made,
    )
    assert run is not None
    run.report()
    return {**_of_run(run), "suite_seconds": _suite_seconds(worker, task, run)}


def _job_of(
    worker: Worker, task: Mapping[str, Any]
) -> tuple[runs.ExplanationJob, list[Any]]:
    """The job of a task with the networks of its columns."""
    base = runs.job_from_specs(
        task["by"], None, task["targets"][0], task["view"], task["title"]
    )
    several = len(task["targets"]) > 1
    combined = list(product(task["models"], task["targets"], base.columns))
    names = titles(
        [column.label for column in base.columns], task["models"], task["targets"]
    )
    columns = tuple(
        replace(column, label=label, model=model, target=target if several else None)
        for label, (model, target, column) in zip(names, combined, strict=True)
    )
    # put side by side on purpose: what cannot be compared is marked as such
    mixed = several or len(task["models"]) > 1
    job = replace(base, columns=columns, allow_mismatch=mixed)
    return job, [worker.model(model) for model, _, _ in combined]


def _image_event(
    place: int, sample: Sample, explanation: Explanation, model: Any
) -> dict[str, Any]:
    said = explanation.provenance.get("prediction") or {}
    view = model.view(sample, explanation.provenance.get("view"))
    base = (view.rgb * 255).round().astype(np.uint8)
    tile = Tile(base, "image", f"{sample.name}, as the model saw it")
    return {
        "kind": "image",
        "image": place,
        "name": sample.name,
        "predicted": said.get("name"),
        "probability": said.get("probability"),
        "notes": list(sample.notes),
        "html": html.tile_html(html.embed(tile, {})),
    }


def _suite_seconds(worker: Worker, task: Mapping[str, Any], run: Run) -> float | None:
    """How long the quick suite may take on a run: the passes of its maps, of the controls
    beside them and of each method's map of another class, which is made as the first was;
    None where no rate is known.
    """
    rates = [worker.rates.get(name) for name in task["models"]]
    known = [rate for rate in rates if rate]
    if not known:
        return None
    named = [(one["name"], one["explainer"]) for one in run.manifest["columns"]]
    columns = columns_of(named)
    passes = len(run.samples) * len(columns) * QUICK_PASSES
    times = run.explanations.groupby("column")["seconds"].sum()
    again = sum(float(times[one.of]) for one in columns if one.of is not None)
    return passes / min(known) + again


def _of_run(run: Run) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "summary": run.manifest["summary"],
        "findings": [
            {
                "code": one.code,
                "severity": one.severity,
                "message": one.message,
                "advice": one.advice,
                "where": one.where,
            }
            for one in run.audit
        ],
        "failures": run.manifest.get("failures") or [],
        "samples": run.samples,
        "columns": [column["name"] for column in run.manifest["columns"]],
    }


def _refuse_large(spelled: str) -> None:
    for number in _numbers_in(parse(spelled)):
        if abs(number) > MOST:
            raise ConsilienceError(
                f"{spelled}: the workbench takes numbers up to {MOST:,}; use the command "
                f"line for more"
            )


def _numbers_in(value: Any) -> Iterator[float]:
    """Every number of a specification, however deep."""
    if isinstance(value, Spec):
        for part in (*value.args, *(option for _, option in value.options)):
            yield from _numbers_in(part)
    elif isinstance(value, tuple):
        for part in value:
            yield from _numbers_in(part)
    else:
        with suppress(ValueError):
            yield float(value)


def evaluate(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """The quick suite on a run of this server; its report is written anew."""
    from consilience.metrics.suites import asked_metrics
    from consilience.runs.evaluate import Asked, evaluate_run

    metrics = asked_metrics((), "quick")
    found = evaluate_run(Asked(metrics, "quick", 0), task["folder"])
    Run(task["folder"]).report()
    from consilience.show.console import evaluation_as_json

    return {"evaluation": evaluation_as_json(found)}


def planted(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """Methods where the truth is known, beside controls, without metrics of metrics."""
    from consilience.runs.planted import run_planted

    for spelled in task["by"]:
        _refuse_large(spelled)
    found, _ = run_planted(
        list(task["by"]), ["relevance-mass"], task["planted_in"], 0, ""
    )
    return {"planted": found["methods"], "worlds": found["worlds"]}


def ask(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """What a network says of an image with a region taken away or kept alone."""
    model = worker.model(task["model"])
    view = worker.view(task, model)
    height, width = view.pixels.shape[-2:]
    region = mask_of(task["region"], task["height"], task["width"])
    if region.shape != (height, width):
        rows = np.arange(height) * region.shape[0] // height
        region = region[rows][:, np.arange(width) * region.shape[1] // width]
    on = torch.from_numpy(region).to(view.pixels.device)
    changed = on if task["mode"] == "remove" else ~on
    fill = registry.fills.build(task["fill"]).image(view, None)
    pixels = torch.where(changed, fill, view.pixels)
    before = worker.said(task, model, view)
    after = _probabilities(model, replace(view, pixels=pixels))
    first = before.topk(min(TOP, len(before))).indices.tolist()
    new = after.topk(min(2, len(after))).indices.tolist()
    shown = list(dict.fromkeys([*first, *new]))
    return {
        "classes": [
            {
                "index": index,
                "name": class_name(model, index),
                "before": float(before[index]),
                "after": float(after[index]),
            }
            for index in shown
        ],
        "share": float(region.mean()),
        "image": html.picture_uri(_as_image(pixels), 448)
        if task["picture"]
        else None,
    }


def _probabilities(model: Any, view: Any) -> torch.Tensor:
    """(K,), as the head means them."""
    return as_probabilities(api.raw_outputs(model, view)[0], model.outputs)


def frame(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """An upload as a network sees it."""
    model = worker.model(task["model"])
    view = worker.view(task, model)
    height, width = view.pixels.shape[-2:]
    return {
        "height": height,
        "width": width,
        "image": html.picture_uri((view.rgb * 255).round().astype(np.uint8), 640),
    }


def _as_image(pixels: Any) -> Array:
    array: Array = pixels[0].detach().cpu().permute(1, 2, 0).numpy()
    return np.clip(np.round(array[..., :3] * 255), 0, 255).astype(np.uint8)


def mask_of(text: str, height: int, width: int) -> Array:
    """A region as a browser sends it: base64 of eight pixels a byte, the first highest."""
    try:
        bits = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    except ValueError:
        raise ConsilienceError(
            "region is base64 of a mask, eight pixels a byte"
        ) from None
    if (
        not 0 < height <= 4096
        or not 0 < width <= 4096
        or len(bits) != -(-height * width // 8)
    ):
        raise ConsilienceError(
            f"region has {len(bits)} bytes; {height} x {width} pixels need "
            f"{-(-height * width // 8)}"
        )
    return np.unpackbits(bits)[: height * width].reshape(height, width).astype(bool)


def units(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """Units whose maps answer to a painted region of one image: by how much their mean
    inside lies above that outside, in standard deviations of the unit's map.
    """
    model = worker.model(task["model"])
    if not hasattr(model, "activations"):
        raise ConsilienceError("this model shows no units")
    view = worker.view(task, model)
    layer = task["layer"] or model.target_layer()
    with torch.inference_mode():
        maps = model.activations(view.pixels, [layer])[layer][0].float()
    if maps.ndim != 3:
        raise ConsilienceError(f"{layer} has no maps; name another layer")
    region = mask_of(task["region"], task["height"], task["width"]).astype(np.float32)
    small = torch.nn.functional.interpolate(
        torch.from_numpy(region)[None, None], maps.shape[-2:], mode="area"
    )[0, 0]
    if not 0 < float(small.sum()) < small.numel():
        raise ConsilienceError("paint a part of the image, not none or all of it")
    inside = (maps * small).sum((1, 2)) / small.sum()
    outside = (maps * (1 - small)).sum((1, 2)) / (1 - small).sum()
    contrast = (inside - outside) / maps.std((1, 2)).clamp_min(1e-6)
    best = contrast.topk(min(12, len(contrast))).indices.tolist()
    base = (view.rgb * 255).round().astype(np.uint8)

    found = []
    for unit in best:
        values = images.enlarge(maps[unit], base.shape[:2]).numpy()
        found.append(
            {
                "unit": unit,
                "contrast": float(contrast[unit]),
                "image": html.picture_uri(overlay(base, values), 224),
            }
        )
    return {"layer": layer, "units": found}


def predict(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """What a network says of every image of the server's folder, in full passes, and how
    many are right.
    """
    if worker.setting.images is None:
        raise ConsilienceError("the server was started without --images FOLDER")
    model = worker.model(task["model"])
    source = source_of(
        [worker.setting.images], None, model.classes, Shown.of(model).channels
    )
    rows: list[dict[str, Any]] = []
    pictures = 0
    read = read_ahead(source, range(len(source.names)), LOOKED_AT, threads=2)
    with progress.task("images", len(source.names)) as running:
        while chunk := list(islice(read, LOOKED_AT)):
            there = [one for _, one in chunk if isinstance(one, Sample)]
            told = iter(said_of(model, there, None))
            for place, sample in chunk:
                if isinstance(sample, data.Failure):
                    row = {"name": sample.name, "reason": sample.reason}
                else:
                    row = _row(model, sample, next(told))
                    if not row.get("right") and pictures < PICTURES:
                        pictures += 1
                        row["small"] = html.picture_uri(sample.rgb, 96)
                rows.append({"place": place, **row})
                running.advance()
    known = [row for row in rows if row.get("right") is not None]
    return {
        "images": len(rows),
        "known": len(known),
        "right": sum(bool(row["right"]) for row in known),
        "rows": rows,
    }


def _row(model: Any, sample: Sample, outputs: torch.Tensor | None) -> dict[str, Any]:
    """What is said of one image; the reason where nothing can be."""
    try:
        if outputs is None:  # no pass of many takes it
            outputs = api.raw_outputs(model, model.view(sample))
    except ConsilienceError as error:
        return {"name": sample.name, "reason": str(error)}
    said, true = api.predict(model, outputs), sample.label
    return {
        "name": sample.name,
        "predicted": said.name,
        "probability": said.probability,
        "true": None if true is None else class_name(model, true),
        "right": None if true is None else true == said.index,
    }


def fetch(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """Copies images of the server's folder, by their places, to uploads."""
    if worker.setting.images is None:
        raise ConsilienceError("the server was started without --images FOLDER")
    source = source_of([worker.setting.images], None, ())
    found = []
    for place, target in zip(task["places"], task["targets"], strict=True):
        if not 0 <= place < len(source.names):
            raise ConsilienceError(
                f"there are {len(source.names)} images; got place {place}"
            )
        sample = source.read(place)
        if isinstance(sample, data.Failure):
            raise ConsilienceError(f"{sample.name}: {sample.reason}")
        content = Path(sample.source).read_bytes()
        Path(target).write_bytes(content)
        found.append(
            {"name": sample.name, "small": html.picture_uri(sample.rgb, 320)}
        )
    return {"images": found}


def panel(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """A drawing of one image of a run as PNG, SVG or PDF."""
    from consilience.show.figures import tiles_figure  # draws, which takes a second

    run = Run(task["folder"])
    shown = run.load(task["image"])
    figure = tiles_figure(tiles(shown), shown.name)
    content = io.BytesIO()
    figure.savefig(content, format=task["format"], dpi=200)
    return {"content": content.getvalue()}


def table(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """A table of a run as CSV."""
    run = Run(task["folder"])
    tables = {
        "agreement": lambda: run.agreement,
        "explanations": lambda: run.explanations,
    }
    return {"content": tables[task["table"]]().to_csv(index=False).encode()}


def samples(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """The names of a run's images, in order."""
    return {"samples": Run(task["folder"]).samples}


def report(worker: Worker, task: Mapping[str, Any], send: Any) -> dict[str, Any]:
    """The report of a run or dissection, written where there is none."""
    from consilience.runs.folder import run_kind

    folder = Path(task["folder"])
    if not (folder / "report.html").is_file():
        if run_kind(folder) != "explanations":
            raise ConsilienceError(
                f"{folder.name} has no report; consilience report makes it"
            )
        Run(folder).report()
    return {}


TASKS: dict[str, Callable[[Worker, Mapping[str, Any], Any], dict[str, Any]]] = {
    "catalogue": catalogue,
    "look": look,
    "explain": explain,
    "evaluate": evaluate,
    "planted": planted,
    "ask": ask,
    "frame": frame,
    "units": units,
    "predict": predict,
    "fetch": fetch,
    "panel": panel,
    "table": table,
    "report": report,
    "samples": samples,
}


def warm(worker: Worker) -> None:
    """Have every network find its engines and its fastest gradients before somebody waits
    for it.
    """
    plain = Sample("plain", np.full((64, 64, 3), 127, np.uint8))
    for name in worker.setting.models:
        with suppress(Exception):  # whoever needs it meets it again
            model = worker.model(name)
            api.explain(model, plain, "gradcam")
            view = model.view(plain)
            _probabilities(model, view)
            batch = view.pixels.expand(QUICK_PASSES, -1, -1, -1).contiguous()
            model.scores(batch)
            begun = time.perf_counter()
            model.scores(batch)
            worker.rates[name] = QUICK_PASSES / (time.perf_counter() - begun)


def serve(connection: Connection, setting: Setting) -> None:
    """The worker's process: tasks from the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server stops its workers
    lock = Lock()

    def send(event: dict[str, Any]) -> None:
        with lock:
            connection.send(event)

    waiting: SimpleQueue[Any] = SimpleQueue()
    worker = Worker(setting, send)

    def listen() -> None:
        while True:
            try:
                told = connection.recv()
            except (EOFError, OSError):
                waiting.put(None)
                return
            if told.get("do") == "stop":
                worker.stop(told["task"])
            else:
                waiting.put(told)

    try:
        for path in setting.plugins:
            registry.load_plugin(path)
        known = catalogue(worker, {}, send)
    except (
        Exception
    ) as error:  # a plug-in that does not load, a network that is not there
        reason = (
            str(error) if isinstance(error, ConsilienceError) else unexpected(error)
        )
        send({"kind": "broken", "reason": reason})
        return
    send({"kind": "ready", "catalogue": known})
    warm(worker)
    Thread(target=listen, daemon=True).start()
    while (told := waiting.get()) is not None:
        try:
            worker.do(told)
        except (BrokenPipeError, OSError):
            return
