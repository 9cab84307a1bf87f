"""A check of a new network against an old one: limits in a file, answers for pipelines."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from consilience import api, data, inputs, progress, registry
from consilience.diagnosis import change
from consilience.diagnosis.change import Change, Criterion, ImageChange, Limits
from consilience.files import (
    json_ready,
    read_text,
    spreadsheet_safe,
    write_bytes,
)
from consilience.image_files import find_images
from consilience.models.gathering import held
from consilience.models.load import as_model
from consilience.runs.folder import REPORT, RunFolder
from consilience.runs.sources import content_of
from consilience.show.change_words import (
    classes_sentence,
    criterion_sentence,
    markdown,
    verdict_sentence,
)
from consilience.types import ConsilienceError, Explanation, Sample

BLOCK = 32
METHODS = ("gradcam",)
RAN = ("engine", "precision", "device")
SUMMARY, JUNIT = "summary.md", "junit.xml"
SHOWN = 8
"""Images that are drawn."""


@dataclass(frozen=True)
class CheckFile:
    """What a limits file says: images, explainers and limits."""

    images: tuple[str, ...] = ()
    explainers: tuple[str, ...] = METHODS
    limits: Limits = field(default_factory=Limits)


def read_limits(path: str | Path) -> CheckFile:
    """A limits file: ``images`` (paths beside the file), ``explainers``, and a table
    ``[limits]``. Raises `ConsilienceError` for what there is not.
    """
    file = Path(path)
    try:
        told = tomllib.loads(read_text(file, "limits file"))
    except tomllib.TOMLDecodeError as error:
        raise ConsilienceError(f"{file} is no TOML: {error}") from None
    known = ("images", "explainers", "limits")
    if bad := [name for name in told if name not in known]:
        raise ConsilienceError(f"{file}: {registry.unknown('key', bad[0], known)}")
    for name in ("images", "explainers"):
        given = told.get(name, [])
        if isinstance(given, str):
            told[name] = [given]
        elif not (
            isinstance(given, list) and all(isinstance(one, str) for one in given)
        ):
            raise ConsilienceError(
                f"{file}: {name} is a list of texts; got {given!r}"
            )
    if not isinstance(told.get("limits", {}), dict):
        raise ConsilienceError(f"{file}: limits is a table, [limits]")
    try:
        limits = Limits.of(told.get("limits", {}))
    except (ConsilienceError, TypeError) as error:
        raise ConsilienceError(f"{file}: {error}") from None
    images = tuple(str(file.parent / one) for one in told.get("images", ()))
    return CheckFile(images, tuple(told.get("explainers", METHODS)), limits)


def check(
    new: Any,
    old: Any,
    images: Any,
    by: Sequence[str] = METHODS,
    limits: Limits | Mapping[str, Any] | None = None,
) -> Change:
    """Did a network change what it says of images, and why?

    ``new`` and ``old`` are models or what stands for one (`explain`), ``images`` a
    collection; ``by`` the explainers whose maps are compared, toward the class that the
    old network says; ``limits`` what counts as a change (`Limits`, or a dict of its
    fields). ``found.verdict`` is ``same``, ``changed`` or ``not shown``. Images that
    cannot be read or explained are in ``failures``.
    """
    models = (as_model(new), as_model(old))
    asked = limits if isinstance(limits, Limits) else Limits.of(limits or {})
    asked, notes = asked.seen_by(*models)
    for spec in by:
        for model in models:
            api.resolve_explainer(model, spec)
    found: list[ImageChange] = []
    failures: list[tuple[str, str]] = []
    if isinstance(images, str | Path):
        inputs.refuse_url(images)
        images = find_images([images])  # to know how many there are
    waiting = iter(inputs.samples_from(images, inputs.Shown.of(models[1])))
    count = len(images) if isinstance(images, Sized) else 0
    planted = _Planted(asked.marked, count)
    new_held, old_held = (held(model) for model in models)
    with progress.task("asking both networks", count) as running, new_held, old_held:
        while part := list(islice(waiting, BLOCK)):
            samples: list[Sample] = []
            failed: list[data.Failure] = []
            marked: list[bool] = []
            for read in part:
                due = planted.next()
                if isinstance(read, Sample):
                    samples.append(read)
                    marked.append(due)
                else:
                    failed.append(read)
            for one in _changes(models, samples, by, asked, marked):
                (failed if isinstance(one, data.Failure) else found).append(one)  # type: ignore[arg-type]
            failures += [(one.name, one.reason) for one in failed]
            running.advance(len(part))
    return change.judge(*models, found, by, asked, failures, notes)


@dataclass
class _Planted:
    """Which images marks are planted in: ``most`` of them, spread evenly over ``count``
    where it is known (0: not), else the first.
    """

    most: int
    count: int
    seen: int = 0
    taken: int = 0

    def next(self) -> bool:
        """Whether the next image is one."""
        count = max(self.count, self.most)  # a loader's length is one of batches
        step = self.seen * self.most // count
        due = step != (self.seen - 1) * self.most // count and self.taken < self.most
        self.seen += 1
        self.taken += due
        return due


def _changes(
    models: tuple[Any, Any],
    samples: Sequence[Sample],
    by: Sequence[str],
    asked: Limits,
    planted: Sequence[bool],
) -> Iterator[ImageChange | data.Failure]:
    if samples:
        yield from change.changes(*models, samples, by, asked, planted)


def run_check(
    new: Any,
    old: Any,
    images: Sequence[str | Path],
    folder: str | Path,
    by: Sequence[str] = METHODS,
    limits: Limits | None = None,
    command: str = "",
) -> tuple[Change, Path]:
    """`check` of files into a folder: a page with the worst images, ``check.json``,
    ``summary.md`` for a pull request, ``junit.xml``, and tables of classes and images,
    worst first. Returns what was found and the page's path.
    """
    from consilience.show.check_page import check_page

    models = (as_model(new), as_model(old))
    asked = limits or Limits()
    ways = [{k: one.facts.get(k) for k in RAN} for one in models]
    files = find_images(list(images))
    place = RunFolder(
        folder,
        "check",
        {
            "new": {"id": models[0].id, **ways[0]},
            "old": {"id": models[1].id, **ways[1]},
            "images": content_of(files, data.names_of(files)),
            "explainers": [api.explainer_spelling(spec) for spec in by],
            "limits": asdict(asked.seen_by(*models)[0]),
            "version": version("consilience"),
        },
        {"command": command},
    )
    with place.locked():
        found = check(*models, files, by, asked)
        for name, table in (
            ("classes", found.by_class),
            ("images", found.images),
            ("floors", found.floors),
            ("marks", found.marks),
        ):
            if not len(table):
                continue
            text = spreadsheet_safe(table).to_csv(index=False)
            write_bytes(place.path / f"{name}.csv", text.encode())
        write_bytes(place.path / JUNIT, junit(found))
        write_bytes(place.path / SUMMARY, markdown(found).encode())
        page = place.path / REPORT
        text = check_page(
            found, _worst(models, files, found), version("consilience"), command
        )
        write_bytes(page, text.encode())
        place.finish({"command": command, **as_dict(found)})
    return found, page


def _worst(
    models: tuple[Any, Any], files: Sequence[Path], found: Change
) -> list[tuple[Explanation, Explanation]]:
    """Maps of the old and the new network, by the method that fell most, of the images
    that changed most, toward the class that the old network says.
    """
    new, old = models
    places = {
        name: file for file, name in zip(files, data.names_of(files), strict=True)
    }
    pairs = []
    for row in found.images.head(SHOWN).to_dict("records"):
        if not row["method"]:
            continue
        file = places[row["image"]]
        sample = next(iter(inputs.samples_from([file], inputs.Shown.of(old))))
        if not isinstance(sample, Sample):  # it could be read a moment ago
            continue
        sample = replace(sample, name=row["image"])
        before = api.explain(old, sample, by=row["method"])
        after = api.explain(new, sample, by=row["method"], target=before.target)
        pairs.append((before, after))
    return pairs


# ---- for other programs


def as_dict(found: Change) -> dict[str, Any]:
    """A check as plain data; of images the ten worst."""
    told: dict[str, Any] = json_ready(
        {
            "verdict": found.verdict,
            "passed": found.passed,
            "new": found.new_id,
            "old": found.old_id,
            "limits": asdict(found.limits),
            "criteria": [asdict(one) for one in found.criteria],
            "floors": found.floors.to_dict("records"),
            "marks": found.marks.to_dict("records"),
            "beyond": found.beyond,
            "classes": found.by_class.to_dict("records"),
            "worst": found.images.head(10).to_dict("records"),
            "failures": [list(one) for one in found.failures],
            "notes": list(found.notes),
        }
    )
    return told


def junit(found: Change) -> bytes:
    """A test suite in JUnit's XML: a test a criterion, and one for classes; one that is
    not shown fails or is skipped, as the limits say.
    """
    failing = [one for one in found.criteria if _fails(one, found)]
    suite = ElementTree.Element(
        "testsuite",
        name=f"consilience check {found.new_id} against {found.old_id}",
        tests=str(len(found.criteria) + 1),
        failures=str(len(failing) + bool(found.beyond)),
        skipped=str(
            sum(
                one.answer == "not shown"
                for one in found.criteria
                if one not in failing
            )
        ),
        errors="0",
    )
    for one in found.criteria:
        case = ElementTree.SubElement(
            suite, "testcase", classname="consilience.check", name=one.name
        )
        said = criterion_sentence(one)
        if one in failing:
            ElementTree.SubElement(case, "failure", message=said)
        elif one.answer == "not shown":
            ElementTree.SubElement(case, "skipped", message=said)
        ElementTree.SubElement(case, "system-out").text = said
    case = ElementTree.SubElement(
        suite, "testcase", classname="consilience.check", name="classes"
    )
    if found.beyond:
        ElementTree.SubElement(case, "failure", message=classes_sentence(found))
    ElementTree.SubElement(case, "system-out").text = classes_sentence(found)
    ElementTree.SubElement(suite, "system-out").text = verdict_sentence(found)
    text: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return text


def _fails(one: Criterion, found: Change) -> bool:
    undecided = one.answer == "not shown" and found.limits.undecided == "fail"
    return one.answer == "beyond" or undecided
