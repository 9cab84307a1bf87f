"""The workbench's pages and its HTTP interface, which the pages themselves use.

No part of a request is ever a path: images, jobs and runs go by numbers that the server
made, files of a run by fixed names.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import secrets
import shlex
import time
import zipfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    Response,
    StreamingResponse,
)
from markupsafe import Markup
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from consilience.runs.folder import CALLED, REPORT, record_path, run_kind
from consilience.show import html
from consilience.types import ConsilienceError, unexpected
from consilience.web.columns import titles
from consilience.web.desk import LIMIT, Desk, FullError, Setting, Task
from consilience.web.guard import LOOPBACK, Guard
from consilience.web.shelter import Shelter, TooMuchError, apart

IMAGES, COLUMNS = 64, 12
"""Images and methods of one job at most."""
SIDE = 4096
FORMATS = {
    "png": "image/png",
    "svg": "image/svg+xml",
    "pdf": "application/pdf",
}


class Explanations(BaseModel):
    """What is asked of a job of explanations."""

    images: list[str] = Field(
        description="numbers of uploaded images", min_length=1, max_length=IMAGES
    )
    by: list[str] = Field(
        default=["gradcam"],
        description='explainers as spelled, as "lime:samples=700,seed=1"',
        min_length=1,
        max_length=COLUMNS,
    )
    model: str = Field(
        default="", description="a network of this server", max_length=200
    )
    target: str = Field(
        default="predicted",
        description="predicted, a class's name or number, or difference:a,b",
        max_length=200,
    )
    also_models: list[str] = Field(
        default=[], description="networks beside the first", max_length=3
    )
    also_targets: list[str] = Field(
        default=[], description="classes beside the first", max_length=3
    )
    view: Literal["crop", "squash"] | None = None


class Region(BaseModel):
    """A painted region of an image."""

    image: str = Field(description="number of an uploaded image", max_length=40)
    region: str = Field(
        description="base64 of the region, eight pixels a byte, the first the highest bit",
        max_length=4_000_000,
    )
    height: int = Field(ge=1, le=SIDE)
    width: int = Field(ge=1, le=SIDE)
    model: str = Field(default="", max_length=200)


class Question(Region):
    """A region of an image that is taken away or kept alone."""

    mode: Literal["remove", "keep"] = "remove"
    fill: str = Field(default="blur", max_length=80)
    picture: bool = Field(default=False, description="answer with the changed image")


class UnitsQuestion(Region):
    """A region whose units are looked for."""

    layer: str = Field(default="", max_length=200)


class PlantedTest(BaseModel):
    """Methods that are scored where the truth is known."""

    by: list[str] = Field(min_length=1, max_length=COLUMNS)


class Predictions(BaseModel):
    """A look through the server's folder of images."""

    model: str = Field(default="", max_length=200)


class Places(BaseModel):
    """Images of the server's folder, by their places in the list of predictions."""

    places: list[int] = Field(min_length=1, max_length=IMAGES)


@dataclass(frozen=True)
class Options:
    """What ``consilience serve`` was told."""

    setting: Setting
    runs: tuple[str, ...] = ()
    token: str | None = None
    hosts: tuple[str, ...] = LOOPBACK
    limit: float = LIMIT


def create_app(options: Options) -> Any:
    """The application, with its workers, which start at once and end with it."""
    shelter = Shelter()
    desk = Desk(
        options.setting, options.limit, lambda task: shelter.clear(task.number)
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        desk.close()
        shelter.close()

    app = FastAPI(
        title="consilience",
        description="Explanations of vision models, compared. Every request that changes "
        "something carries the header X-Consilience; where the server has a token, "
        "Authorization: Bearer TOKEN.",
        version=_version(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.desk, app.state.shelter = desk, shelter
    bench = Bench(options, desk, shelter)
    _add_errors(app)
    _add_interface(app, bench)
    _add_files(app, bench)
    _add_pages(app, bench)
    guarded = Guard(app, options.hosts, options.token)
    guarded.state = app.state  # type: ignore[attr-defined]
    return guarded


def _version() -> str:
    from importlib.metadata import version

    return version("consilience")


# ---- what the routes work on


class Bench:
    """Jobs and runs by their numbers."""

    def __init__(self, options: Options, desk: Desk, shelter: Shelter) -> None:
        self.options, self.desk, self.shelter = options, desk, shelter
        self.runs = {
            f"{place}-{_slug(Path(path).name)}": Path(path)
            for place, path in enumerate(options.runs, 1)
        }

    def model(self, name: str) -> str:
        """A network's name, the first where none is said."""
        there = self.options.setting.models
        if name and name not in there:
            raise ConsilienceError(
                f"this server has no network {name!r}; there is: {', '.join(there)}"
            )
        return name or there[0]

    def task(self, number: str) -> Task:
        """A job; 404 where there is none."""
        task = self.desk.tasks.get(number)
        if task is None:
            raise HTTPException(404, "there is no such job here, or not any more")
        return task

    def explain(self, asked: Explanations) -> Task:
        """Queue a job of explanations."""
        uploads = [self.shelter.get(number) for number in dict.fromkeys(asked.images)]
        names = apart([one.name for one in uploads])
        models = _apart(
            [self.model(one) for one in (asked.model, *asked.also_models)]
        )
        targets = _apart([asked.target, *asked.also_targets])
        if len(asked.by) * len(models) * len(targets) > COLUMNS:
            raise ConsilienceError(
                f"{len(asked.by)} methods, {len(models)} networks and {len(targets)} "
                f"classes make more than {COLUMNS} columns"
            )
        number = secrets.token_urlsafe(8)
        commands = []
        for model in models:
            for target in targets:
                words = ["consilience", "explain", *names, "-m", model]
                words += [part for by in asked.by for part in ("--by", by)]
                words += ["--target", target] if target != "predicted" else []
                words += ["--view", asked.view] if asked.view else []
                commands.append(shlex.join(words))
        return self.desk.start(
            {
                "do": "explain",
                "images": [
                    {"path": str(one.path), "name": name}
                    for one, name in zip(uploads, names, strict=True)
                ],
                "uploads": [one.number for one in uploads],
                "by": list(asked.by),
                "models": models,
                "targets": targets,
                "view": asked.view,
                "title": ", ".join(names[:3]) + (" …" if names[3:] else ""),
                "folder": str(self.shelter.job_folder(number)),
                "command": "; ".join(commands),
            },
            number,
        )

    def asked_of(self, do: str, asked: Region) -> dict[str, Any]:
        """The answer to a question about a region."""
        return self.desk.question(
            {
                **asked.model_dump(exclude={"image"}),
                "do": do,
                "path": str(self.shelter.get(asked.image).path),
                "model": self.model(asked.model),
            }
        )

    def planted_scores(self) -> dict[str, dict[str, Any]]:
        """The rows of all planted tests so far, by method and control."""
        return {
            row["method"]: row
            for task in list(self.desk.tasks.values())
            if task.asked["do"] == "planted" and task.state == "done" and task.answer
            for row in task.answer["planted"]
        }

    def facts(self, task: Task) -> dict[str, Any]:
        """A job as plain data."""
        asked = task.asked
        return {
            "job": task.number,
            "do": asked["do"],
            "state": task.state,
            "reason": task.reason,
            "waiting": self.desk.waiting(task) if task.state == "waiting" else 0,
            "asked": {
                "title": asked["title"],
                "by": list(asked.get("by", ())),
                "models": list(asked.get("models", ())) or [asked.get("model", "")],
                "targets": list(asked.get("targets", ())),
                "view": asked.get("view"),
                "command": asked.get("command", ""),
                "of": asked.get("of", ""),
            },
            "images": [one["name"] for one in asked.get("images", ())],
            "uploads": asked.get("uploads", []),
            "seconds": None
            if task.begun_at is None
            else (task.ended_at or time.time()) - task.begun_at,
            "answer": {
                key: value
                for key, value in (task.answer or {}).items()
                if key != "folder"
            },
        }

    def folder(self, number: str) -> Path:
        """The folder of a finished job or of a run that the server was started with."""
        if number in self.runs:
            return self.runs[number]
        task = self.task(number)
        if task.state != "done" or "folder" not in (task.answer or {}):
            raise HTTPException(409, f"this job is {task.state}; it has no run")
        return Path(task.answer["folder"])  # type: ignore[index]

    def known_runs(self) -> list[dict[str, str]]:
        """The runs of the server's start, with what they are of."""
        return [
            {
                "number": number,
                "name": path.name,
                "kind": CALLED.get(run_kind(path) or "?", "run"),
            }
            for number, path in self.runs.items()
        ]


def _apart(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "run"


def _add_errors(app: FastAPI) -> None:
    def said(status: int, reason: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": reason}, status, headers or None)

    @app.exception_handler(ConsilienceError)
    async def refused(_: Request, error: ConsilienceError) -> Response:
        if isinstance(error, TooMuchError):
            return said(429, str(error), **{"retry-after": "60"})
        return said(400, str(error))

    @app.exception_handler(FullError)
    async def full(_: Request, error: FullError) -> Response:
        return said(
            429, "too much waits already; try again shortly", **{"retry-after": "5"}
        )

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return said(422, f"{where}: {first['msg']}" if where else first["msg"])

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        return said(500, f"a fault of the workbench: {unexpected(error)}")

    @app.exception_handler(HTTPException)
    async def known(request: Request, error: HTTPException) -> Response:
        wants_page = "text/html" in request.headers.get("accept", "")
        if wants_page:
            return _page("web_error.html.j2", error.status_code, reason=error.detail)
        return said(error.status_code, str(error.detail))


# ---- the interface


def _add_interface(app: FastAPI, bench: Bench) -> None:
    desk, shelter = bench.desk, bench.shelter

    @app.get("/api/catalogue", tags=["interface"])
    def catalogue() -> dict[str, Any]:
        """Networks, explainers with their options, and fills."""
        return desk.catalogue()

    @app.post(
        "/api/images",
        tags=["interface"],
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"image/*": {"schema": {"format": "binary"}}},
            }
        },
    )
    async def upload(
        request: Request, x_name: Annotated[str, Header(max_length=400)] = "image"
    ) -> dict[str, Any]:
        """Give an image: its bytes as the body, its name in the header X-Name."""
        content = await request.body()
        name = x_name.encode("latin-1", "replace").decode("utf-8", "replace")
        one = shelter.put(name, content)
        try:
            seen = await asyncio.to_thread(
                desk.question, {"do": "look", "path": str(one.path), "name": one.name}
            )
        except (ConsilienceError, FullError):
            shelter.drop(one.number)
            raise
        return {"image": one.number, "name": one.name, **seen}

    @app.post("/api/explanations", tags=["interface"])
    def explanations(asked: Explanations) -> dict[str, Any]:
        """Start a job; follow it under ``/api/jobs/NUMBER/events``."""
        return _started(bench.explain(asked))

    @app.get("/api/jobs/{number}", tags=["interface"])
    def job(number: str) -> dict[str, Any]:
        """How a job stands, and what came of it."""
        return bench.facts(bench.task(number))

    @app.delete("/api/jobs/{number}", tags=["interface"])
    def cancel(number: str) -> dict[str, Any]:
        """Stop a job."""
        task = bench.task(number)
        desk.cancel(task)
        return {"job": number, "state": task.state}

    @app.get("/api/jobs/{number}/events", tags=["interface"])
    async def events(number: str) -> StreamingResponse:
        """A job's events as they come (server-sent events): ``image``, ``tile``,
        ``progress``, ``said``, ``failure`` and, last, ``end``.
        """
        return StreamingResponse(
            _stream(bench, bench.task(number)), media_type="text/event-stream"
        )

    @app.post("/api/jobs/{number}/evaluation", tags=["interface"])
    def evaluation(number: str) -> dict[str, Any]:
        """Test a finished run by the quick suite; its report then holds the result."""
        folder = bench.folder(number)
        if number in bench.runs:
            raise ConsilienceError(
                "a run of the server's start is not changed from here"
            )
        return _started(
            desk.start(
                {
                    "do": "evaluate",
                    "folder": str(folder),
                    "of": number,
                    "title": "quick suite",
                }
            )
        )

    @app.post("/api/planted", tags=["interface"])
    def planted(asked: PlantedTest) -> dict[str, Any]:
        """Score methods where the truth is known: drawn images and networks whose evidence
        is planted; the answer has a row a method, beside controls.
        """
        own = secrets.token_urlsafe(8)
        folder = str(shelter.job_folder(own))
        by = _apart(asked.by)
        told = {"do": "planted", "by": by, "planted_in": folder}
        return _started(desk.start({**told, "title": "planted evidence"}, own))

    @app.post("/api/ask", tags=["interface"])
    def ask(asked: Question) -> dict[str, Any]:
        """What the network says with a region taken away or kept alone."""
        return bench.asked_of("ask", asked)

    @app.get("/api/images/{number}/frame", tags=["interface"])
    def frame(number: str, model: str = "") -> dict[str, Any]:
        """An image as a network sees it."""
        one = shelter.get(number)
        asked = {"do": "frame", "path": str(one.path), "model": bench.model(model)}
        return {"name": one.name, **desk.question(asked)}

    @app.post("/api/units", tags=["interface"])
    def units(asked: UnitsQuestion) -> dict[str, Any]:
        """Units of a layer that answer to a region."""
        return bench.asked_of("units", asked)

    @app.post("/api/predictions", tags=["interface"])
    def predictions(asked: Predictions) -> dict[str, Any]:
        """Look through the server's folder: a job whose answer has a row an image."""
        model = bench.model(asked.model)
        return _started(
            desk.start({"do": "predict", "model": model, "title": "predictions"})
        )

    @app.post("/api/folder-images", tags=["interface"])
    def folder_images(asked: Places) -> dict[str, Any]:
        """Take images of the server's folder as if they had been uploaded."""
        places = [shelter.reserve(f"image {place}", "") for place in asked.places]
        found = desk.question(
            {
                "do": "fetch",
                "places": asked.places,
                "targets": [str(one.path) for one in places],
            }
        )
        for one, told in zip(places, found["images"], strict=True):
            one.name, one.size = told["name"], one.path.stat().st_size
        return {
            "images": [
                {"image": one.number, "name": one.name, "small": told["small"]}
                for one, told in zip(places, found["images"], strict=True)
            ]
        }


def _started(task: Task) -> dict[str, Any]:
    return {
        "job": task.number,
        "page": f"/jobs/{task.number}",
        "events": f"/api/jobs/{task.number}/events",
    }


async def _stream(bench: Bench, task: Task) -> AsyncIterator[str]:
    sent, told, quiet = 0, 0, time.monotonic()
    yield _event("state", {"state": task.state, "waiting": bench.desk.waiting(task)})
    state = task.state
    while True:
        over = task.over  # before the events are read: none may be lost
        fresh = task.events[sent:]
        sent += len(fresh)
        for event in fresh:
            yield _event(event["kind"], event)
        if task.state != state and not over:
            state = task.state
            yield _event("state", {"state": state, "waiting": 0})
        if task.told != told and task.progress is not None:
            told = task.told
            yield _event("progress", task.progress)
        if over:
            yield _event("end", bench.facts(task))
            return
        if fresh:
            quiet = time.monotonic()
        elif time.monotonic() - quiet > 15:
            quiet = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(0.04)


def _event(kind: str, facts: dict[str, Any]) -> str:
    text = json.dumps(_finite(facts), ensure_ascii=False)
    return f"event: {kind}\ndata: {text}\n\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


# ---- files of a run


def _add_files(app: FastAPI, bench: Bench) -> None:
    @app.get("/runs/{number}/report", tags=["runs"])
    def report(number: str) -> Response:
        """The run's report: one file that loads nothing."""
        folder = bench.folder(number)
        if not (folder / REPORT).is_file():
            bench.desk.question({"do": "report", "folder": str(folder)})
        return _kept_page(folder / REPORT)

    @app.get("/runs/{number}/{page}.html", tags=["runs"])
    def further(number: str, page: str) -> Response:
        """Another page of the run, as a recommendation's."""
        folder = bench.folder(number)
        there = _further(folder)
        if f"{page}.html" not in there:
            pages = ", ".join((REPORT, *there))
            raise HTTPException(404, f"the run has the pages {pages}")
        return _kept_page(folder / f"{page}.html")

    @app.get("/runs/{number}/run.zip", tags=["runs"])
    def archive(number: str) -> Response:
        """The whole folder, which the command line reads."""
        folder = bench.folder(number)
        return StreamingResponse(
            _zipped(folder),
            media_type="application/zip",
            headers={
                "content-disposition": f'attachment; filename="run-{number}.zip"'
            },
        )

    @app.get("/runs/{number}/{table}.csv", tags=["runs"])
    def table(number: str, table: str) -> Response:
        """A table of the run: ``agreement`` and ``explanations`` of one of explanations,
        else what its folder holds.
        """
        folder = bench.folder(number)
        if table not in (there := _tables(folder)):
            tables = ", ".join(there) or "none"
            raise HTTPException(404, f"no table {table}; the run has: {tables}")
        if run_kind(folder) == "explanations":
            asked = {"do": "table", "folder": str(folder), "table": table}
            content = bench.desk.question(asked)["content"]
        else:
            content = (folder / f"{table}.csv").read_text(encoding="utf-8")
        return Response(
            content,
            media_type="text/csv",
            headers={"content-disposition": f'attachment; filename="{table}.csv"'},
        )

    @app.get("/runs/{number}/panels/{place}.{form}", tags=["runs"])
    def panel(
        number: str, place: int, form: Literal["png", "svg", "pdf"]
    ) -> Response:
        """A drawing of one image for print: ``place`` counts the run's images from 0."""
        folder = bench.folder(number)
        samples = _samples(bench, number)
        if not 0 <= place < len(samples):
            raise HTTPException(404, f"the run has {len(samples)} images")
        asked = {"do": "panel", "folder": str(folder), "image": samples[place]}
        found = bench.desk.question({**asked, "format": form})
        return Response(
            found["content"],
            media_type=FORMATS[form],
            headers={
                "content-disposition": f'inline; filename="panel-{place}.{form}"'
            },
        )

    @app.get("/runs/{number}.json", tags=["runs"])
    def facts(number: str) -> Response:
        """The run's record."""
        return JSONResponse(_finite(_manifest(bench.folder(number))))


def _kept_page(file: Path) -> Response:
    """A page as it was written, under its own policy."""
    text = file.read_text(encoding="utf-8")
    found = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    own = found[1].replace("&#39;", "'") if found else "default-src 'none'"
    return HTMLResponse(
        text,
        headers={"content-security-policy": f"{own}; frame-ancestors 'none'"},
    )


def _further(folder: Path) -> list[str]:
    """Pages of a run beside its report."""
    return sorted(path.name for path in folder.glob("*.html") if path.name != REPORT)


def _samples(bench: Bench, number: str) -> list[str]:
    task = bench.desk.tasks.get(number)
    if task is not None and task.answer:
        return list(task.answer.get("samples", ()))
    folder = bench.runs[number]
    return list(
        bench.desk.question({"do": "samples", "folder": str(folder)})["samples"]
    )


def _manifest(folder: Path) -> dict[str, Any]:
    path = record_path(folder)
    if path is None:
        raise HTTPException(404, "this folder holds no finished run")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _tables(folder: Path) -> list[str]:
    """The tables of a run that can be had as CSV."""
    if run_kind(folder) == "explanations":
        return ["agreement", "explanations"]
    return sorted(path.stem for path in folder.glob("*.csv"))


class _Pieces(io.RawIOBase):
    """What a zip file writes, taken away piece by piece."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, content: Any) -> int:
        """Keep it until it is taken."""
        self.content += content
        return len(content)

    def taken(self) -> bytes:
        """What was written since."""
        content, self.content = bytes(self.content), bytearray()
        return content


def _zipped(folder: Path) -> Iterator[bytes]:
    """A folder as a zip, a file in memory at a time; links are left out."""
    pieces = _Pieces()
    with zipfile.ZipFile(pieces, "w", zipfile.ZIP_STORED) as into:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                into.write(path, f"run/{path.relative_to(folder)}")
                yield pieces.taken()
    yield pieces.taken()


# ---- pages


def _page(template: str, status: int = 200, **context: Any) -> HTMLResponse:
    made = html.environment().get_template(template)
    context = {"viewer": None, "page": "", "state": "{}", **context}
    return HTMLResponse(made.render(ramps=html.ramps(), **context), status)


def _state(**facts: Any) -> Markup:
    """Facts for a page's script, as JSON that ends no script."""
    text = json.dumps(_finite(facts), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))


SCRIPTS: dict[str, tuple[str, Sequence[str]]] = {
    "bench.js": ("text/javascript", ("viewer.js", "gallery.js")),
    "bench.css": ("text/css", ("report.css", "tiles.css", "viewer.css")),
}


@cache
def _static(name: str) -> bytes:
    kind, parts = SCRIPTS[name]
    own = "web.js" if name.endswith("js") else "web.css"
    folder = Path(__file__).parent / "templates"
    text = "\n".join(html.part(one) for one in parts)
    if kind == "text/css":
        text += html.ramp_styles()
    return (text + "\n" + (folder / own).read_text(encoding="utf-8")).encode()


def _add_pages(app: FastAPI, bench: Bench) -> None:
    hidden = {"include_in_schema": False}

    @app.get("/static/{name}", **hidden)  # type: ignore[arg-type]
    def static(name: str) -> Response:
        if name not in SCRIPTS:
            raise HTTPException(404, "there is no such file")
        return Response(_static(name), media_type=SCRIPTS[name][0])

    @app.get("/favicon.ico", **hidden)  # type: ignore[arg-type]
    def icon() -> Response:
        return Response(status_code=204)

    @app.get("/", **hidden)  # type: ignore[arg-type]
    def home() -> Response:
        known = bench.desk.catalogue()
        return _page(
            "web_home.html.j2",
            page="home",
            catalogue=known,
            runs=bench.known_runs(),
            jobs=[bench.facts(task) for task in reversed(bench.desk.tasks.values())],
            planted=bench.planted_scores(),
            state=_state(catalogue=known),
        )

    @app.get("/jobs/{number}.json", **hidden)  # type: ignore[arg-type]
    def job_facts(number: str) -> Response:
        return JSONResponse(_finite(bench.facts(bench.task(number))))

    @app.get("/jobs/{number}", **hidden)  # type: ignore[arg-type]
    def job(number: str) -> Response:
        facts = bench.facts(bench.task(number))
        asked = facts["asked"]
        labels = _labels(bench, asked["by"])
        columns = titles(labels, asked["models"], asked["targets"])
        viewer = {
            "columns": columns,
            "numbers": [("probability", "probability")],
            "many": len(facts["images"]) > 1,
            "truth": False,
        }
        return _page(
            "web_job.html.j2",
            page="job",
            job=facts,
            viewer=viewer,
            state=_state(job=facts, columns=columns),
        )

    @app.get("/ask/{number}", **hidden)  # type: ignore[arg-type]
    def ask(number: str, model: str = "") -> Response:
        one = bench.shelter.get(number)
        known = bench.desk.catalogue()
        return _page(
            "web_ask.html.j2",
            page="ask",
            catalogue=known,
            name=one.name,
            model=bench.model(model),
            state=_state(image=number, name=one.name, catalogue=known),
        )

    @app.get("/folder", **hidden)  # type: ignore[arg-type]
    def folder() -> Response:
        known = bench.desk.catalogue()
        return _page(
            "web_folder.html.j2",
            page="folder",
            catalogue=known,
            state=_state(catalogue=known),
        )

    @app.get("/runs/{number}", **hidden)  # type: ignore[arg-type]
    def run(number: str) -> Response:
        folder = bench.folder(number)
        kind = run_kind(folder) or "?"
        samples = _samples(bench, number) if kind == "explanations" else []
        return _page(
            "web_run.html.j2",
            page="run",
            number=number,
            name=folder.name if number in bench.runs else "run",
            called=CALLED.get(kind, kind),
            tables=_tables(folder),
            further=_further(folder),
            manifest=_manifest(folder),
            samples=samples,
        )


def _labels(bench: Bench, by: Sequence[str]) -> list[str]:
    """Titles of columns, as a run will label them."""
    known = {
        one["name"]: one["label"] for one in bench.desk.catalogue()["explainers"]
    }
    names = [spelled.partition(":")[0] for spelled in by]
    return [
        known.get(name, name) if names.count(name) == 1 else spelled
        for name, spelled in zip(names, by, strict=True)
    ]
