"""What a person at a terminal sees: bars on stderr while waiting, tables on stdout when
done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import markup
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from consilience import progress, registry
from consilience.files import json_ready
from consilience.show import words
from consilience.show.words import count_of, format_number, format_p
from consilience.show.words import missing as is_missing
from consilience.types import ConsilienceError, Network


def escape(text: str) -> str:
    """Text without markup and without what a terminal would obey."""
    return markup.escape(progress.printable(text))


TERMINAL_WIDTH = 200
SUMMARY_NUMBERS = (
    ("iou", "iou_mean", "IoU"),
    ("expected_iou", "expected_mean", "by chance"),
    ("excess", "excess_mean", "excess"),
    ("p", "", "p (shifts)"),
    ("spearman", "spearman_mean", "Spearman"),
)
"""A column of the pairs, its mean in the summary, its heading."""
PUBLISHED_NUMBER = ("published_iou", "", "published IoU")
SEVERITY = {
    "error": "[bold red]error[/]",
    "warning": "[yellow]warning[/]",
    "note": "[dim]note[/]",
}


class Bars:
    """A `progress.Reporter` that draws one bar a task."""

    def __init__(self, drawing: Progress) -> None:
        self._drawing = drawing

    def start(self, label: str, total: int) -> int:
        """Open a bar."""
        return self._drawing.add_task(label, total=total)

    def advance(self, task: int, steps: int) -> None:
        """Move a bar."""
        self._drawing.advance(task, steps)  # type: ignore[arg-type]

    def finish(self, task: int) -> None:
        """Take a bar away."""
        self._drawing.remove_task(task)  # type: ignore[arg-type]

    def say(self, message: str) -> None:
        """A line above the bars."""
        self._drawing.console.print(escape(message), highlight=False, soft_wrap=True)


@contextmanager
def progress_bars() -> Iterator[None]:
    """Draw the progress of everything inside on stderr; on a stream that is not a terminal
    a line every half minute.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    if not console.is_terminal:
        with progress.listening(LogLines(console)):
            yield
        return
    drawing = Progress(*columns, console=console, transient=True)
    with drawing, progress.listening(Bars(drawing)):
        yield


class LogLines:
    """A `progress.Reporter` for files and pipes: a line every half minute on what runs,
    how far it is and how long it may take.
    """

    def __init__(
        self, console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._clock = console, clock
        self._tasks: dict[int, list[Any]] = {}
        self._said = clock()
        self._lock = threading.RLock()  # several threads report

    def start(self, label: str, total: int) -> int:
        """A task begins."""
        with self._lock:
            key = max(self._tasks, default=0) + 1
            self._tasks[key] = [label, total, 0, self._clock()]
            return key

    def advance(self, task: int, steps: int) -> None:
        """Steps are done; a line where half a minute has passed."""
        with self._lock:
            self._tasks[task][2] += steps
            now = self._clock()
            if now - self._said >= LOG_SECONDS:
                self._said = now
                lines = [self._line(one, now) for one in self._tasks.values()]
                self.say("; ".join(lines))

    def finish(self, task: int) -> None:
        """A task is over."""
        with self._lock:
            self._tasks.pop(task, None)

    def say(self, message: str) -> None:
        """A line."""
        self._console.print(escape(message), highlight=False, soft_wrap=True)

    @staticmethod
    def _line(task: Sequence[Any], now: float) -> str:
        label, total, done, start = task
        spent, known = now - start, ""
        if 0 < done < total:
            left = words.format_seconds(spent / done * (total - done))
            known = f", about {left} left"
        return f"{label} {done} of {total}, {words.format_seconds(spent)}{known}"


LOG_SECONDS = 30.0


def as_json(run: Any) -> dict[str, Any]:
    """A run's results as plain data."""
    keys = (
        "title",
        "preset",
        "model",
        "columns",
        "target",
        "seconds",
        "failures",
        "summary",
        "audit",
        "precision",
    )
    manifest: dict[str, Any] = {key: run.manifest.get(key) for key in keys}
    tables = {
        "predictions": run.predictions,
        "agreement": run.agreement.to_dict("records"),
    }
    manifest["audit"] = [
        {**row, "message": finding.message, "advice": finding.advice}
        for row, finding in zip(manifest["audit"] or [], run.audit, strict=True)
    ]
    result: dict[str, Any] = json_ready(
        {
            "run": str(run.folder),
            "report": str(run.folder / "report.html"),
            **manifest,
            **tables,
        }
    )
    return result


# ---- tables


def output() -> Console:
    """Where results go: a terminal as wide as it is, a file or pipe without broken
    lines.
    """
    console = Console()
    return (
        console
        if console.is_terminal
        else Console(width=TERMINAL_WIDTH, soft_wrap=True)
    )


def show_run(run: Any, console: Console) -> None:
    """The answer, how far to trust it, at most three findings with what to do; then
    predictions (wrong ones first), agreement by image, verdicts, what low precision
    moved, where the report is.
    """
    answer = words.answer_sentence(run.predictions, run.manifest["summary"])
    console.print(escape(answer), highlight=False)
    console.print(escape(words.trust_sentence(run.audit)), highlight=False)
    _show_findings(run, console)
    console.print(_predictions(run))
    _show_confusion(run.predictions, console)
    if len(run.agreement):
        console.print(_agreement(run))
    for name, layer in looked_at(run).items():
        console.print(
            f"{escape(name)} looks at layer {escape(layer)}", highlight=False
        )
    for row in run.manifest["summary"]:
        console.print(escape(words.pair_sentence(row)), highlight=False)
    for line in (*_carried(run), *_how_it_ran(run)):
        console.print(escape(line), highlight=False)
    console.print(
        f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True
    )


def _show_findings(run: Any, console: Console) -> None:
    """The first findings, gravest first, and how many more the report has."""
    order = list(SEVERITY)
    findings = sorted(run.audit, key=lambda finding: order.index(finding.severity))
    for finding in findings[:MOST_FINDINGS]:
        where = (
            f" [dim]({escape(finding.where)})[/]"
            if finding.where and finding.where not in finding.message
            else ""
        )
        console.print(
            f"{SEVERITY[finding.severity]} {finding.code}: {escape(finding.message)}{where}. "
            f"{escape(finding.advice)}",
            highlight=False,
        )
    if left := len(findings) - MOST_FINDINGS:
        more = words.count_of(left, "finding") if left > 0 else ""
        if more:
            console.print(f"{more} more in the report", highlight=False)


MOST_FINDINGS = 3


def _show_confusion(predictions: Any, console: Console) -> None:
    """Which classes were called what, where several are known."""
    rows = words.confusion_rows(predictions)
    if not rows or len(predictions) < MOST_FINDINGS:
        return
    table = Table(
        "true class", "called", "images", title="Wrong", title_justify="left"
    )
    for true, called, count in rows[:MOST_CONFUSIONS]:
        table.add_row(escape(true), escape(called), str(count))
    console.print(table)


MOST_CONFUSIONS = 12


def _wrong_first(item: tuple[str, Any]) -> bool:
    return item[1]["right"] is not False


def _carried(run: Any, most: int = 20) -> Iterator[str]:
    """Which units carry the maps of the first images, where a dissection was at hand."""
    rows = run.explanations
    known = rows[rows["units"] != ""] if "units" in rows else rows.head(0)
    for row in known.head(most).to_dict("records"):
        yield f"{row['sample']}, {row['column']}: {row['units']}"


def _how_it_ran(run: Any) -> Iterator[str]:
    """What the engine had to decide otherwise than asked, and how far maps of low
    precision lie from f32.
    """
    notes = [model["facts"].get("note") for model in run.manifest.get("models") or []]
    yield from (f"engine: {note}" for note in dict.fromkeys(notes) if note)
    for row in run.manifest.get("precision") or []:
        if row["precision"] == "f32":
            yield f"{row['column']} was made in f32 all the same"
            continue
        shift = f"Spearman {format_number(row['spearman'])}, IoU of the top 20 % {format_number(row['iou_at_20'])}"
        yield f"{row['column']} in {row['precision']} against f32 on {row['image']}: {shift}"


def _predictions(run: Any) -> Table:
    table = Table(
        "image",
        "predicted",
        "p",
        "true class",
        title=run.manifest["model"]["id"],
        title_justify="left",
    )
    rows = sorted(run.predictions.items(), key=_wrong_first)
    for name, said in rows[:MOST_ROWS]:
        table.add_row(
            escape(name),
            escape(str(said["label"])),
            format_number(said["probability"]),
            escape(said["true"] or ""),
        )
    table.caption = _left_out(len(rows))
    return table


MOST_ROWS = 40
"""Rows of images that a terminal is given; the report and the tables have all."""


def show_plan(work: Any, found: Any, console: Console) -> None:
    """What a job will do and take."""
    for one in found:
        asked = f", {words.count_of(one.metrics, 'metric')}" if one.metrics else ""
        console.print(
            escape(
                f"{one.folder}: {words.count_of(one.images, 'image')}, "
                f"{' and '.join(one.columns)} of {one.network}{asked}"
            ),
            highlight=False,
        )
        workers = words.count_of(max(1, work.how.workers), "worker")
        console.print(
            f"  about {words.format_seconds(one.seconds)} with {workers}, "
            f"{one.passes:,.0f} passes of an image, {_bytes(one.memory)} of memory a "
            f"process, {_bytes(one.disk)} on disk (from {one.probed} images in "
            f"{words.format_seconds(one.took)})",
            highlight=False,
        )
    if work.dissection is not None:
        job, folder = work.dissection
        console.print(
            escape(
                f"{folder}: dissection of {job.model} over {job.concepts}; not estimated"
            ),
            highlight=False,
        )


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def show_status(found: dict[str, Any], console: Console) -> None:
    """Where a run stands: done, failed with reasons, rate, time left."""
    left = found["seconds_left"]
    rate = found["rate"]
    line = f"{found['state']}: {found['done']} of {found['images']} images done"
    if found["failed"]:
        line += f", {found['failed']} failed"
    if found["state"] == "running" and rate == rate:
        line += (
            f"; {rate:.3g} images a second, about {words.format_seconds(left)} left"
        )
    console.print(line, highlight=False)
    if found["state"] == "running" and found["quiet"] > QUIET:
        quiet = words.format_seconds(found["quiet"])
        console.print(
            f"nothing happened for {quiet}: if it was killed, the same command goes on",
            highlight=False,
        )
    if found["reasons"]:
        table = Table("image", "reason")
        for name, reason in list(found["reasons"].items())[:MOST_ROWS]:
            table.add_row(escape(name), escape(reason))
        table.caption = _left_out(len(found["reasons"]))
        console.print(table)


QUIET = 120.0
"""Seconds without an event after which a run may be dead."""


def show_frame(frame: Any, console: Console) -> None:
    """A table of any columns."""
    table = Table(*map(str, frame.columns))
    for row in frame.head(MOST_ROWS).itertuples(index=False):
        table.add_row(
            *(
                escape(format_number(cell) if isinstance(cell, float) else str(cell))
                for cell in row
            )
        )
    table.caption = _left_out(len(frame))
    console.print(table)


def _left_out(rows: int) -> str | None:
    """What stands under a table that was cut."""
    if rows <= MOST_ROWS:
        return None
    return f"{words.count_of(rows - MOST_ROWS, 'more row')} in the run's tables"


def _agreement(run: Any) -> Table:
    rows, summary = run.agreement, run.manifest["summary"]
    columns = [
        *SUMMARY_NUMBERS,
        *([PUBLISHED_NUMBER] if PUBLISHED_NUMBER[0] in rows.columns else []),
    ]
    several = len(summary) > 1
    names = [
        "image",
        *(["pair"] if several else []),
        *(title for _, _, title in columns),
    ]
    table = Table(*names, title="Agreement of masks", title_justify="left")
    table.caption = _left_out(len(rows))
    for row in rows.head(MOST_ROWS).to_dict("records"):
        pair = [escape(f"{row['a']} / {row['b']}")] if several else []
        table.add_row(
            escape(row["sample"]),
            *pair,
            *(_shown_number(key, row[key]) for key, _, _ in columns),
        )
    table.add_section()
    for row in summary:
        pair = [escape(f"{row['a']} / {row['b']}")] if several else []
        published = (
            rows[PUBLISHED_NUMBER[0]].mean() if PUBLISHED_NUMBER in columns else None
        )
        means = [
            published if key is PUBLISHED_NUMBER[0] else row.get(mean)
            for key, mean, _ in columns
        ]
        table.add_row("mean", *pair, *map(words.format_share, means), style="bold")
    return table


def _shown_number(key: str, value: Any) -> str:
    return words.format_p(value) if key == "p" else words.format_share(value)


def looked_at(run: Any) -> dict[str, str]:
    """By column the layer that was used, where a method has one."""
    rows = run.explanations.drop_duplicates("column")
    return {
        name: layer
        for name, layer in zip(rows["column"], rows["layer"], strict=True)
        if layer
    }


# ---- dissections


def dissection_as_json(run: Any) -> dict[str, Any]:
    """A dissection's results as plain data (`dissection.job.DissectionRun`)."""
    keys = (
        "title",
        "model",
        "concepts",
        "layers",
        "words",
        "knockout",
        "seconds",
    )
    said = {key: run.manifest.get(key) for key in keys}
    counts = run.manifest["counts"]
    said["headlines"] = {
        name: words.dissection_headline(counts[name]) for name in counts
    }
    tables = {
        "summary": run.dissection.summary().to_dict("records"),
        "units": run.units.to_dict("records"),
    }
    tables["knocked_out"] = (
        [] if run.knockout is None else run.knockout.to_dict("records")
    )
    result: dict[str, Any] = json_ready(
        {
            "run": str(run.folder),
            "report": str(run.folder / "report.html"),
            **said,
            **tables,
        }
    )
    return result


def show_dissection(run: Any, console: Console, most: int = 15) -> None:
    """Headlines, the best units, what knocking out did, where the report is."""
    for layer in run.manifest["layers"]:
        lead = words.dissection_headline(run.manifest["counts"][layer])
        console.print(escape(lead), highlight=False)
    units = run.units.sort_values("iou", ascending=False, kind="stable").head(most)
    named = "word" in units
    heads = (
        "layer",
        "unit",
        "concept",
        "category",
        "IoU",
        "p",
        "q",
        *(("word", "margin") if named else ()),
    )
    table = Table(*heads, title="Units of highest IoU", title_justify="left")
    for row in units.to_dict("records"):
        word = (
            [escape(str(row["word"])), format_number(row["margin"])] if named else []
        )
        numbers = (format_number(row[key]) for key in ("iou", "p", "q"))
        table.add_row(
            escape(row["layer"]),
            str(row["unit"]),
            escape(row["concept"]),
            escape(row["category"]),
            *numbers,
            *word,
        )
    console.print(table)
    if run.knockout is not None and len(run.knockout):
        _show_knockout(run.knockout, console)
    console.print(
        f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True
    )


def _show_knockout(rows: Any, console: Console, most: int = 10) -> None:
    heads = (
        "layer",
        "unit",
        "concept",
        "loss of the predicted class",
        "95 %",
        "predictions that change",
    )
    table = Table(*heads, title="Units whose loss costs most", title_justify="left")
    for row in (
        rows.sort_values("lost", ascending=False, kind="stable")
        .head(most)
        .to_dict("records")
    ):
        bounds = (
            f"{format_number(row['lost_low'])} to {format_number(row['lost_high'])}"
        )
        unit = (escape(row["layer"]), str(row["unit"]), escape(row["concept"]))
        table.add_row(
            *unit, format_number(row["lost"]), bounds, format_number(row["flips"])
        )
    console.print(table)
    tested = rows[rows["classes"] > 0].sort_values("p_holm", kind="stable")
    for _, row in tested.head(most).iterrows():
        console.print(
            escape(
                f"{words.knockout_sentence(row)}; p = {format_number(row['p_holm'])} (Holm)"
            ),
            highlight=False,
        )


def show_comparison(compared: Any, page: Any, console: Console) -> None:
    """The comparison in a sentence, by layer, and where the page is."""
    console.print(escape(compared.headline()), highlight=False)
    heads = (
        escape(compared.a.name),
        escape(compared.b.name),
        "shared",
        "Jaccard",
        "by chance",
        "p",
    )
    table = Table(*heads)
    for row in compared.jaccard().to_dict("records"):
        numbers = (format_number(row[key]) for key in ("jaccard", "expected", "p"))
        table.add_row(
            escape(row["a"]), escape(row["b"]), str(row["shared"]), *numbers
        )
    console.print(table)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


# ---- evaluations


def evaluation_as_json(found: Any) -> dict[str, Any]:
    """An evaluation's results as plain data (`evaluation.Evaluation`), the numbers of
    every image among them.
    """
    said = {key: value for key, value in found.summary.items() if key != "curves"}
    rows = found.table().drop(columns="digest").to_dict("records")
    where = {"run": str(found.folder), "report": str(found.folder / "report.html")}
    result: dict[str, Any] = json_ready({**where, **said, "values": rows})
    return result


def show_evaluation(found: Any, console: Console) -> None:
    """A table a metric: methods, then controls, each with its interval; what is marked
    and why; where the report is.
    """
    said = found.summary
    told: set[str] = set()
    for metric in said["metrics"]:
        if words.is_empty(said, metric):
            continue
        cells = {
            cell["column"]: cell
            for cell in said["cells"]
            if cell["metric"] == metric["spec"]
        }
        against = [
            row for row in said["against_controls"] if row["metric"] == metric["spec"]
        ]
        console.print(_metric_table(said, metric, cells))
        lines = words.marks(metric, cells, against)
        for line in (
            line for line in lines if line not in told
        ):  # that there are too few images is said once
            console.print(escape(line), highlight=False)
        told.update(lines)
        for line in words.reasons(metric, cells):
            console.print(escape(f"No number: {line}"), highlight=False)
        console.print()
    for labels, reason in words.silent(said):
        console.print(
            escape(f"No number of {', '.join(labels)}: {reason}."), highlight=False
        )
    console.print(
        f"report: {found.folder / 'report.html'}", highlight=False, soft_wrap=True
    )


def _metric_table(
    said: dict[str, Any], metric: dict[str, Any], cells: dict[str, Any]
) -> Table:
    from consilience.show.evaluation_page import gathered

    whole = gathered(said, metric["spec"])
    arrow = "more is better" if metric["higher_is_better"] else "less is better"
    heads = (
        "map",
        "mean",
        "95 %",
        f"{words.metric_unit(metric)}s",
        "no number",
        "better than every control",
    )
    table = Table(
        *heads,
        title=escape(f"{metric['label']} ({metric['spec']}), {arrow}"),
        title_justify="left",
    )
    if whole:
        table.add_column("of the data set")
    for kinds in (("method",), ("control", "other")):
        for column in (
            column for column in said["columns"] if column["kind"] in kinds
        ):
            row = _metric_row(column, cells[column["label"]])
            row += (
                [
                    format_number(whole[column["label"]]["value"])
                    if column["label"] in whole
                    else ""
                ]
                if whole
                else []
            )
            table.add_row(*row, style=None if column["kind"] == "method" else "dim")
        table.add_section()
    return table


def _metric_row(column: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    bounds = (
        "–"
        if is_missing(cell["low"])
        else f"{format_number(cell['low'])} to {format_number(cell['high'])}"
    )
    above = ""
    if column["kind"] == "method":
        short = (
            "[bold]not shown[/]" if cell.get("reachable", True) else "too few to tell"
        )
        above = {True: "yes", False: short, None: "–"}[cell.get("above")]
    counts = (str(cell["n"]), str(cell["not_applicable"] or ""))
    return [
        escape(column["label"]),
        format_number(cell["mean"]),
        bounds,
        *counts,
        above,
    ]


def show_recommendation(found: Any, page: Any, console: Console) -> None:
    """Every method's numbers beside what it costs, what they show, and where the page
    is.
    """
    from consilience.show import recommend_words

    metrics = [one for one in found.metrics if not one.get("absent")]
    table = Table("method", title="Methods, the fastest first", title_justify="left")
    for metric in metrics:
        arrow = "↑" if metric["higher_is_better"] else "↓"
        table.add_column(f"{metric['label']} {arrow}")
    table.add_column("passes / time")
    for one in found.standings:
        cells = []
        for metric in metrics:
            cell = one.cells.get(metric["spec"], {})
            star = " ★" if metric["spec"] in one.above else ""
            cells.append(format_number(cell.get("mean")) + star)
        mark = "▸ " if one.label in found.left else "  "
        table.add_row(
            mark + escape(one.label), *cells, recommend_words.cost_words(one)
        )
    console.print(table)
    console.print(
        "▸ left: nothing was shown to beat it. ★ above every control.",
        highlight=False,
    )
    for line in recommend_words.lines(found):
        console.print(escape(line), highlight=False)
    console.print(escape(recommend_words.headline(found)), highlight=False)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def show_planted(found: dict[str, Any], page: Any, console: Console) -> None:
    """The planted suite: how well methods find the evidence, which metrics rank the
    true map first, and where the page is.
    """
    console.print(_methods_table(found["methods"]))
    for note in found["notes"]:
        console.print(escape(note), highlight=False)
    console.print()
    console.print(_ranking_table(found["metrics"]))
    console.print()
    for line in found["verified"]:
        console.print(escape(line), highlight=False)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _methods_table(rows: Sequence[dict[str, Any]]) -> Table:
    worlds = [
        key for key in rows[0] if key not in ("method", "mean", "low", "high", "n")
    ]
    heads = ("method", *worlds, "mean", "95 %")
    table = Table(
        *heads,
        title="Methods: share of the map on the planted evidence",
        title_justify="left",
    )
    for row in rows:
        shares = [format_number(row[key]) for key in (*worlds, "mean")]
        table.add_row(
            escape(row["method"]),
            *shares,
            f"{format_number(row['low'])} to {format_number(row['high'])}",
        )
    return table


def _ranking_table(rows: Sequence[dict[str, Any]]) -> Table:
    wrong = [key for key in rows[0] if key.startswith("above ")]
    heads = (
        "metric",
        *(key.replace("above ", "before ") for key in wrong),
        "all",
        "comparisons",
    )
    table = Table(
        *heads,
        title="Metrics: how often is the true map ranked before a wrong one?",
        title_justify="left",
    )
    for row in rows:
        table.add_row(
            escape(row["metric"]),
            *(format_number(row[key]) for key in (*wrong, "all")),
            str(row["comparisons"]),
        )
    return table


def show_shortcuts(found: Any, page: Any, console: Console) -> None:
    """What was found, the largest classes, and where the page is."""
    from consilience.show import shortcuts_page

    table = Table(
        *("mark", "class", "verdict", "shift", "rank", "beyond", "95 %", "SD", "p"),
        "classes found",
        title="The class that each mark moves most",
        title_justify="left",
    )
    for row in found.largest().to_dict("records"):
        table.add_row(
            escape(row["mark"]),
            escape(row["class"]),
            row["verdict"],
            f"{row['shift']:+.2f}",
            str(row["rank"]),
            f"{row['excess']:+.2f} ({row['nearest']})",
            f"{row['low']:+.2f} to {row['high']:+.2f}",
            f"{row['size']:+.1f}",
            format_p(row["p"]),
            str(row["classes_found"]),
        )
    console.print(table)
    console.print()
    said = [shortcuts_page.headline(found), *shortcuts_page.sentences(found)]
    for line in said:
        console.print(escape(line), highlight=False)
    if found.failures:
        name, why = found.failures[0]
        count = len(found.failures)
        console.print(
            escape(f"{count_of(count, 'image')} could not be read: {name}: {why}"),
            highlight=False,
        )
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def show_check(found: Any, page: Any, console: Console) -> None:
    """Every number with its margin, the worst images, and where the page is."""
    from consilience.show import change_words

    for one in found.criteria:
        console.print(escape(change_words.criterion_sentence(one)), highlight=False)
    worst = found.images.head(5)
    table = Table(
        *("image", "old", "new", "less alike"),
        title="The worst images",
        title_justify="left",
    )
    for row in worst.to_dict("records"):
        table.add_row(
            escape(row["image"]),
            escape(row["old"]),
            escape(row["new"]),
            change_words.likeness(row["drop"]),
        )
    console.print(table)
    for line in (*found.notes, change_words.verdict_sentence(found)):
        console.print(escape(line), highlight=False)
    if found.failures:
        name, why = found.failures[0]
        said = f"{count_of(len(found.failures), 'image')} left out: {name}: {why}"
        console.print(escape(said), highlight=False)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


# ---- lists


def listing(what: str, model: str) -> list[dict[str, Any]]:
    """Rows of a list, a dictionary each."""
    if what == "models":
        from consilience.models.load import model_names

        return [{"model": name} for name in model_names()]
    if what == "presets":
        from consilience.study import load_preset, preset_names

        return [
            {"preset": name, "what": load_preset(name).title}
            for name in preset_names()
        ]
    if what == "layers":
        return _layers(model)
    if what == "suites":
        from consilience.metrics import suites

        return [
            {
                "suite": name,
                "what": words,
                "metrics": ", ".join(suites.SUITES.get(name, ("its own",))),
            }
            for name, words in suites.WHAT.items()
        ]
    of_kind = {
        "metrics": registry.metrics,
        "masks": registry.cutters,
        "explainers": registry.explainers,
        "segmenters": registry.segmenters,
        "fills": registry.fills,
        "marks": registry.marks,
    }
    return [_described(of_kind[what], name) for name in of_kind[what].names()]


def _layers(model: str) -> list[dict[str, Any]]:
    from consilience.models.load import load_model

    network = load_model(model)
    if not isinstance(network, Network):
        raise ConsilienceError(f"{network.id} offers scores only; it shows no layers")
    chosen = network.target_layer()
    return [
        {
            "layer": layer.name,
            "channels": layer.channels,
            "grid": "vector"
            if layer.spatial is None
            else f"{layer.spatial[0]} x {layer.spatial[1]}",
            "auto": "auto" if layer.name == chosen else "",
        }
        for layer in network.layers()
    ]


def _described(kind: registry.Registry, name: str) -> dict[str, Any]:
    cls = kind.get(name)
    first = registry.summary_of(cls)
    options = registry.options_of(cls)
    return {
        kind.kind: name,
        "what": first,
        "options": ", ".join(
            f"{item.name}={registry.spelled_default(item)}" for item in options
        ),
    }


def show_rows(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A list as a table."""
    if not rows:
        console.print("none")
        return
    table = Table(*rows[0], show_lines=False)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    console.print(table)
