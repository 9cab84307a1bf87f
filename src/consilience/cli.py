"""The command line: each verb parses, calls one function and prints.

Data on stdout, progress on stderr.

Exit codes: 0 done, 1 an expected failure said in one line, 2 wrong usage. Verbs import
lazily: torch alone takes seconds.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience import registry
from consilience.older import OlderNameWarning, say_older
from consilience.progress import printable
from consilience.types import DEFAULT_MODEL, ConsilienceError

if TYPE_CHECKING:
    from consilience.runs.folder import Run

DEFAULT_BY = ("gradcam", "lime")
VERBS = (
    *("demo", "explain", "evaluate", "dissect", "compare", "report", "list"),
    *("run", "merge", "status", "query", "serve"),
    *("shortcuts", "check", "clusters", "recommend", "completion"),
)
ASK_A_NETWORK = frozenset(
    ["demo", "explain", "evaluate", "dissect", "shortcuts", "check", "recommend"]
)
"""Verbs that cannot do without torch."""
SHELLS = ("bash", "zsh", "tcsh")
LISTS = (
    "models",
    "explainers",
    "segmenters",
    "fills",
    "masks",
    "marks",
    "presets",
    "layers",
    "metrics",
    "suites",
)

EPILOG = """examples:
  consilience demo
  consilience explain dog.jpg --by gradcam --by lime:samples=700,seed=1
  consilience explain photos/ -m resnet50 --target "golden retriever" -o run
  consilience evaluate run --metric insertion --metric deletion
  consilience list explainers"""


VERB_EXAMPLES = {
    "demo": (
        "consilience demo",
        "consilience demo -o my-demo",
        "consilience demo --json > demo.json",
    ),
    "explain": (
        "consilience explain dog.jpg",
        "consilience explain photos/ -m resnet50 --by gradcam --by lime:samples=700 -o run",
        "consilience explain photos/ --truth labels.csv --target true",
    ),
    "evaluate": (
        "consilience evaluate run",
        "consilience evaluate run --metric insertion --metric deletion:fill=blur",
        "consilience evaluate --suite planted --by gradcam --by lime",
    ),
    "dissect": (
        "consilience dissect drawn:images=200",
        "consilience dissect broden1_224/ -m resnet50 -l layer3 -l layer4",
        "consilience dissect broden1_224/ --knockout --knockout-images 50 -o units",
    ),
    "compare": (
        "consilience compare units other-units",
        "consilience compare units:layer3 units:layer4",
        "consilience compare units other-units --significant --json",
    ),
    "report": (
        "consilience report run",
        "consilience report units",
        "consilience report runs/20261101-120000",
    ),
    "run": (
        "consilience run job.toml --dry-run",
        "consilience run job.toml --workers 4",
        "consilience run job.toml --shard 3/16",
    ),
    "merge": (
        "consilience merge run",
        "consilience merge run --json",
        "consilience merge s3://bucket/run",
    ),
    "status": (
        "consilience status run",
        "consilience status run --json",
        "consilience status runs/20261101-120000 --follow",
    ),
    "query": (
        'consilience query run "SELECT * FROM findings"',
        'consilience query run "SELECT a, b, avg(iou) FROM agreement GROUP BY a, b"',
        'consilience query run "SELECT sample, score FROM explanations" --csv > scores.csv',
    ),
    "serve": (
        "consilience serve",
        "consilience serve runs/* --images photos/ -m resnet50",
        "consilience serve --plugin my_method.py --port 9000",
    ),
    "shortcuts": (
        "consilience shortcuts photos/",
        "consilience shortcuts photos/ -m resnet50 --mark stamp --mark text:cyrillic",
        "consilience shortcuts photos/ --mark png:logo.png,size=0.2 --class carton -o marks",
    ),
    "check": (
        "consilience check new.pt --against old.pt --images photos/",
        "consilience check resnet50:precision=bf16 --against resnet50 --limits limits.toml",
        "consilience check onnx:model.onnx --against resnet50 --images photos/ --by occlusion",
    ),
    "completion": (
        "consilience completion bash > ~/.local/share/bash-completion/completions/consilience",
        "consilience completion zsh > ~/.zfunc/_consilience",
        "consilience completion tcsh > ~/.consilience.tcsh",
    ),
    "recommend": (
        "consilience recommend photos/ -m resnet50",
        "consilience recommend photos/ --by gradcam --by lime --by rise",
        "consilience recommend photos/ --metric planted-mark --metric road -o which",
    ),
    "clusters": (
        "consilience clusters run",
        "consilience clusters run --class carton --column Grad-CAM -o groups",
        "consilience clusters run --most 4 --json",
    ),
    "list": (
        "consilience list explainers",
        "consilience list layers -m resnet50:weights=random",
        "consilience list metrics --json",
    ),
}
"""Three commands for the help of each verb."""


def main_alone() -> int:
    """`main` as the whole of a process: what was imported stays to the end, and nothing
    is ever looked through for garbage again, which saves a second.
    """
    code = main(alone=True)
    gc.freeze()
    return code


def main(argv: Sequence[str] | None = None, alone: bool = False) -> int:
    """Entry point; returns the exit code. ``alone``: the process is this command's."""
    given = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in given if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        print(
            f"consilience: {registry.unknown('verb', verb, VERBS)}", file=sys.stderr
        )
        return 2
    _show_older_names()
    parser = build_parser()
    arguments = parser.parse_args(given)
    arguments.command = shlex.join(["consilience", *given])
    _listen_for_termination()
    try:
        for plugin in getattr(arguments, "plugin", None) or ():
            registry.load_plugin(plugin)
        check_before_loading(arguments)
        if verb in ASK_A_NETWORK:
            _load(alone)
        code: int = arguments.call(arguments)
    except ConsilienceError as error:
        for line in getattr(error, "lines", None) or [str(error)]:
            print(f"consilience: {printable(line)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(
            "consilience: stopped; give the same command again (with its -o) to continue",
            file=sys.stderr,
        )
        return STOPPED_BY_TERM if isinstance(stop, _TerminatedError) else 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        said = printable(f"{named}{error.strerror or error}")
        print(
            f"consilience: {said}; the same command goes on where it was",
            file=sys.stderr,
        )
        return 1
    return code


def _load(alone: bool) -> None:
    """What asks a network is imported at once, by the shortest way."""
    from consilience.models.importing import uncollected

    with uncollected():
        importlib.import_module("consilience.runs.explain")
    if alone:
        gc.freeze()


class _Older(argparse.Action):
    """A flag by the name that it had: it says so."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        say_older(str(option_string), f"--{self.dest.replace('_', '-')}")
        setattr(namespace, self.dest, values)


def _show_older_names() -> None:
    """Older names are told in one line, where Python would show none, or four."""
    shown = warnings.showwarning

    def show(message: Any, category: Any, *where: Any, **more: Any) -> None:
        if issubclass(category, OlderNameWarning):
            print(f"consilience: {printable(str(message))}", file=sys.stderr)
        else:
            shown(message, category, *where, **more)

    if getattr(shown, "of_consilience", False):
        return
    show.of_consilience = True  # type: ignore[attr-defined]
    warnings.filterwarnings("once", category=OlderNameWarning)
    warnings.showwarning = show


STOPPED_BY_TERM = 143
"""What a shell reports of a process that SIGTERM ended."""


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


def _terminated(number: int, frame: object) -> None:
    raise _TerminatedError


def _listen_for_termination() -> None:
    """In the main thread alone signals can be listened for."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)


def check_before_loading(arguments: argparse.Namespace) -> None:
    """Refuse paths, explainers, options and metrics that are not there, before torch or
    a model is loaded.
    """
    options = vars(arguments)
    files = ["weights", "labels", "words"]
    if options.get("knockout") is not False and options.get("suite") != "planted":
        files += ["truth", "groups"]  # where they do not belong, that is the error
    for name in files:
        file = options.get(name)
        if isinstance(file, str) and not os.path.exists(file):  # noqa: PTH110
            raise ConsilienceError(f"--{name}: {file} does not exist")
    _check_specifications(options)
    _check_paths(options)


def _check_specifications(options: dict[str, Any]) -> None:
    if options.get("plugin") or registry.has_plugins():
        return  # their names are known only when they are loaded
    from consilience.catalogue import check_specification

    for spec in options.get("by") or ():
        check_specification(registry.explainers, spec)
    for spec in options.get("metric") or ():
        check_specification(registry.metrics, spec)


def _check_paths(options: dict[str, Any]) -> None:
    from consilience.image_files import find_images, is_data_set

    if options.get("call") in (explain_verb, evaluate_verb) and options["paths"]:
        is_run = _is_run(options["paths"][0])
        if not (is_run and len(options["paths"]) == 1):
            named = [path for path in options["paths"] if not is_data_set(path)]
            if named:
                find_images(named)
    job = options.get("job")
    if job is not None and not Path(job).is_file():
        raise ConsilienceError(f"{job} does not exist")
    for name in ("run", "a", "b"):
        folder = options.get(name)
        if folder is not None and "://" in str(folder):
            continue  # storage elsewhere, looked at when it is read
        if folder is not None and not _is_folder(str(folder)):
            raise ConsilienceError(
                f"{folder} does not exist; {_runs_near(str(folder))}"
            )


def _is_run(path: str) -> bool:
    """Whether a path is a run's folder; a name that is too long is none."""
    return os.path.isfile(os.path.join(path, "job.json"))  # noqa: PTH113, PTH118


def _runs_near(text: str) -> str:
    """Finished runs beside a folder that is not there."""
    found = sorted(str(file.parent) for file in Path(text).parent.glob("*/run.json"))
    listed = ", ".join(found[:12]) or "no finished run beside it"
    return f"there is: {listed}" if found else f"there is {listed}"


def _is_folder(text: str) -> bool:
    """A folder, or ``FOLDER:LAYER+LAYER``."""
    return Path(text).is_dir() or Path(text.rpartition(":")[0] or text).is_dir()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="consilience",
        description="Explain what a vision model looks at, compare explanations, say whether to believe them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_demo(verbs)
    _add_explain(verbs)
    _add_evaluate(verbs)
    _add_dissect(verbs)
    _add_compare(verbs)
    _add_report(verbs)
    _add_list(verbs)
    _add_run(verbs)
    _add_merge(verbs)
    _add_status(verbs)
    _add_query(verbs)
    _add_serve(verbs)
    _add_recommend(verbs)
    _add_shortcuts(verbs)
    _add_check(verbs)
    _add_clusters(verbs)
    _add_completion(verbs)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(
            option_strings, dest, nargs=0, help="print the version and exit"
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"consilience {version('consilience')}")
        parser.exit()


def _verb(
    verbs: Any, name: str, call: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=text,
        description=text,
        epilog="\n  ".join(["examples:", *VERB_EXAMPLES[name]]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(call=call)
    return parser


def _add_demo(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "demo",
        demo_verb,
        "Explain photographs that come with the program, with the model that comes with it.",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="RUN",
        default="consilience-demo",
        help="folder of the run (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON"
    )


def _add_explain(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "explain",
        explain_verb,
        "Explain images and compare the explanations.",
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="images, folders or globs")
    add(
        "-m",
        "--model",
        action="append",
        metavar="MODEL",
        help=f"model, default {DEFAULT_MODEL}; once for each column, or one for all",
    )
    add(
        "--by",
        action="append",
        metavar="SPEC",
        help="explainer as name[:value][,key=value...]; repeat it (default: gradcam, lime)",
    )
    add(
        "--preset",
        metavar="NAME",
        help="a named protocol instead of --by; see `consilience list presets`",
    )
    add(
        "--target",
        default=None,
        metavar="T",
        help="predicted (default), true, a class index or a class name",
    )
    add(
        "--truth",
        metavar="FILE",
        help="CSV with image, class_index (or class) and boxes x0, y0, x1, y1",
    )
    add(
        "--view",
        choices=("crop", "squash"),
        help="crop as the model was trained (default) or squash the whole image",
    )
    add(
        "--value-range",
        metavar="LOW,HIGH",
        help="values of 16-bit and float images that are 0 and 1 (default: by their bits)",
    )
    add(
        "--maps",
        choices=("float32", "float16"),
        help="how maps are kept: float32 (default), or float16 (largest error 2**-12)",
    )
    add("--weights", metavar="FILE", help="weights of the model (.pth, .safetensors)")
    add("--labels", metavar="FILE", help="class names of the model")
    add("--device", metavar="D", help="auto (default), cpu, cuda, cuda:1, mps")
    add(
        "--engine", metavar="E", help="auto (default), torch, torch-compile, openvino"
    )
    add(
        "--precision",
        metavar="P",
        help="f32 (default), bf16, f16; says how far the maps moved from f32",
    )
    add(
        "--memory",
        metavar="SIZE",
        help="working memory of a pass through the model: 1G (default), 500M, bytes",
    )
    add(
        "--dissection",
        metavar="RUN",
        help="a dissection of this model: name the units that carry class activation maps",
    )
    add(
        "--plugin",
        action="append",
        metavar="FILE",
        help="a Python file that registers explainers",
    )
    _add_how(add)
    add(
        "-o",
        "--output",
        metavar="RUN",
        help="folder of the run (default: runs/DATE-TIME)",
    )
    add("--json", action="store_true", help="print the result as JSON")


def _add_workers(add: Callable[..., Any]) -> None:
    add("--workers", type=int, metavar="N", help="processes that share the images")
    add(
        "--cluster",
        metavar="A",
        help="make it on a Ray cluster: auto, or an address (extra ray)",
    )


def _add_how(add: Callable[..., Any]) -> None:
    """How a run is made, which changes nothing of what comes out."""
    _add_workers(add)
    add(
        "--shard",
        metavar="I/N",
        help="make the I-th of N parts; `consilience merge` puts them together",
    )
    add("--batch", type=int, metavar="N", help="images taken at a time (default 32)")
    add(
        "--panels",
        action="store_true",
        default=None,
        help="draw each image with its maps, as a PNG in RUN/panels",
    )
    add(
        "--reuse",
        action="append",
        metavar="RUN",
        help="take what this run has made already of the same; repeat it",
    )


def _how(arguments: argparse.Namespace) -> Any:
    from consilience.runs.explain import How

    return How(**_how_told(arguments))


def _how_told(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("workers", "cluster", "shard", "batch", "panels", "reuse")
    told = {name: getattr(arguments, name, None) for name in names}
    if told["shard"] is not None:
        from consilience.runs.jobfile import shard_of

        told["shard"] = shard_of(told["shard"])
    if told["reuse"] is not None:
        told["reuse"] = tuple(told["reuse"])
    if told["cluster"] is not None and told["workers"] is None:
        told["workers"] = 0  # as many as there is room for
    return {name: value for name, value in told.items() if value is not None}


def _add_run(verbs: Any) -> None:
    parser = _verb(
        verbs, "run", run_verb, "Do a whole job that stands in a TOML file."
    )
    add = parser.add_argument
    add("job", metavar="JOB.toml", help="images, networks, explainers, metrics ...")
    add(
        "--dry-run",
        action="store_true",
        help="say what will be done and what it will take, after a short probe",
    )
    _add_how(add)
    add(
        "-o",
        "--output",
        metavar="RUN",
        help="folder of the run, instead of the job's",
    )
    add("--json", action="store_true", help="print the result as JSON")


def _add_merge(verbs: Any) -> None:
    parser = _verb(
        verbs, "merge", merge_verb, "Put the parts of a run together (--shard)."
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON"
    )


def _add_status(verbs: Any) -> None:
    parser = _verb(
        verbs, "status", status_verb, "Where a run stands that is being made."
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="print what happens, a JSON event a line, until the run ends",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _add_query(verbs: Any) -> None:
    parser = _verb(
        verbs, "query", query_verb, "Ask a run's tables in SQL (extra query)."
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="the run's folder")
    add("sql", metavar="SQL", help="a query over explanations, agreement, scores ...")
    add("--csv", action="store_true", help="print CSV instead of a table")
    add("--json", action="store_true", help="print a list of rows as JSON")


def _add_serve(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "serve",
        serve_verb,
        "Open the workbench: explain, compare and doubt in a browser (extra web).",
    )
    add = parser.add_argument
    add(
        "runs",
        metavar="RUN",
        nargs="*",
        help="folders of runs and dissections to show",
    )
    add(
        *("-m", "--model"),
        action="append",
        metavar="SPEC",
        help="a network that pages may ask, repeatable; none other can be asked for",
    )
    add("--images", metavar="FOLDER", help="images to look through for failures")
    add("--labels", metavar="FILE", help="names of the classes, one a line")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default cpu)")
    add(
        "--plugin",
        action="append",
        metavar="FILE",
        help="a Python file of your own methods, loaded anew when it is saved",
        dest="plugins",
    )
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen (default 127.0.0.1); any other than loopback needs a token",
    )
    add("--port", type=int, default=8765, metavar="PORT", help="default 8765; 0: any")
    add(
        "--token",
        metavar="TEXT",
        help="what a browser must know; made at random where --host is not loopback",
    )


def _add_output(add: Any, plugins: str) -> None:
    """What every diagnosis takes: plug-ins, where it goes, and whether it is printed."""
    add(
        "--plugin",
        action="append",
        metavar="FILE",
        help=f"a Python file of {plugins}",
    )
    add(*("-o", "--output"), metavar="RUN", help="folder (default: runs/DATE-TIME)")
    add("--json", action="store_true", help="print the result as JSON")


def _add_shortcuts(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "shortcuts",
        shortcuts_verb,
        "Plant marks in images: does the network take one for a class?",
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="IMAGES", help="images, folders or globs")
    add(*("-m", "--model"), metavar="MODEL", help=f"default {DEFAULT_MODEL}")
    add(
        "--mark",
        action="append",
        metavar="SPEC",
        help="a mark as name[:value][,key=value...], repeatable (default: every drawn one)",
    )
    add(
        "--by",
        action="append",
        metavar="SPEC",
        help="explainers whose maps of the mark are looked at (default: gradcam)",
    )
    add(
        "--class",
        action="append",
        dest="classes",
        metavar="C",
        help="test these classes alone (name or number), repeatable",
    )
    add(
        "--least",
        type=float,
        metavar="SD",
        help="what counts as a shortcut, in standard deviations of the class's score "
        "(default: .5 for marks at a place, .75 for those that change the whole image)",
    )
    add(
        "--closer",
        type=int,
        default=3,
        metavar="N",
        help="findings looked at closely",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of scattered pixels and tests",
    )
    _add_loading(add)
    _add_output(add, "your marks")


def _add_recommend(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "recommend",
        recommend_verb,
        "Which explainer for a network? Planted evidence, mosaics, edited images, cost.",
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="IMAGES", help="images, folders or globs")
    add(*("-m", "--model"), metavar="MODEL", help=f"default {DEFAULT_MODEL}")
    add(
        "--by",
        action="append",
        metavar="SPEC",
        help="explainers to choose from, repeatable (default: ten of several kinds)",
    )
    add(
        "--metric",
        action="append",
        metavar="SPEC",
        help="kinds of evidence, repeatable (default: planted-mark, grid-pointing, "
        "insertion, deletion)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of draws and tests")
    _add_loading(add)
    _add_output(add, "your explainers and metrics")


def _add_completion(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "completion",
        completion_verb,
        "Print a script that completes this command's verbs and options in a shell.",
    )
    parser.add_argument(
        "shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS)
    )


def _add_check(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "check",
        check_verb,
        "Did a network change what it says and why? Exit code 0: the same, 3: changed, "
        "4: not shown.",
    )
    add = parser.add_argument
    add("new", metavar="NEW", help="the new network, as -m takes one")
    add("--against", required=True, metavar="OLD", help="the old network")
    add(
        "--limits",
        metavar="FILE",
        help="images, explainers and limits in a TOML file",
    )
    add("--images", nargs="+", metavar="PATH", help="images, folders or globs")
    add("--by", action="append", metavar="SPEC", help="explainers (default: gradcam)")
    add(
        "--mark",
        action="append",
        metavar="MARK",
        help="marks that are planted: does NEW answer to one more than OLD? Repeatable "
        "(default: all, every drawn one; none)",
    )
    add("--labels", metavar="FILE", help="class names of both networks")
    _add_output(add, "explainers or marks")


def _add_clusters(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "clusters",
        clusters_verb,
        "Are there groups among the explanations of a class, or is it one?",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="the folder of a run of explanations")
    add("--column", metavar="NAME", help="one column of the run (default: each)")
    add("--class", dest="class_name", metavar="C", help="one class (default: each)")
    add("--most", type=int, default=6, metavar="N", help="groups at most")
    add("--seed", type=int, default=0, metavar="N", help="of k-means and resamples")
    add(*("-o", "--output"), metavar="OUT", help="folder (default: runs/DATE-TIME)")
    add("--json", action="store_true", help="print the result as JSON")


def _add_evaluate(verbs: Any) -> None:
    text = "Score explanations by metrics, beside controls, with intervals: can they be trusted?"
    parser = _verb(verbs, "evaluate", evaluate_verb, text)
    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        metavar="RUN|PATH",
        help="a finished run, or images, folders or globs to explain first",
    )
    add(
        "--metric",
        action="append",
        metavar="SPEC",
        help="metric as name[:value][,key=value...]; repeat it",
    )
    add(
        "--suite",
        metavar="NAME",
        help="a named set of metrics (without --metric: quick); see `consilience list suites`",
    )
    add(
        "-m",
        "--model",
        action="append",
        metavar="MODEL",
        help=f"model of images, default {DEFAULT_MODEL}",
    )
    add(
        "--by",
        action="append",
        metavar="SPEC",
        help="explainer of images; repeat it (default: gradcam, lime)",
    )
    add(
        "--target",
        metavar="T",
        help="what is explained: predicted (default), true, a class index or a class name",
    )
    add(
        "--truth",
        metavar="FILE",
        help="CSV with image, class_index (or class) and boxes x0, y0, x1, y1",
    )
    add(
        "--view",
        choices=("crop", "squash"),
        help="crop as the model was trained (default) or squash the whole image",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="draws the other classes of the controls (default 0)",
    )
    _add_loading(add)
    add(
        "--plugin",
        action="append",
        metavar="FILE",
        help="a Python file that registers explainers or metrics",
    )
    _add_how(add)
    add(
        "-o",
        "--output",
        metavar="RUN",
        help="folder of the run, or of the planted suite's page (default: runs/DATE-TIME)",
    )
    add("--json", action="store_true", help="print the result as JSON")


def _add_dissect(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "dissect",
        dissect_verb,
        "Name what the units of a network detect, compared with chance.",
    )
    add = parser.add_argument
    add(
        "concepts",
        metavar="CONCEPTS",
        help="labelled images: a folder (Broden, ADE20K, masks), COCO JSON, drawn:images=N",
    )
    add(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="model (default: %(default)s)",
    )
    add(
        "-l",
        "--layer",
        action="append",
        metavar="LAYER",
        help="layer; repeat it (default: the last spatial output)",
    )
    add(
        "--words",
        metavar="FILE",
        help="name units in these words too, one a line (CLIP-Dissect)",
    )
    add(
        "--encoder",
        metavar="E",
        help="open_clip:NAME,pretrained=TAG|FILE (default ViT-B-16, openai), package.module:factory",
    )
    add(
        "--similarity",
        metavar="S",
        help="soft-wpmi (default), wpmi, rank-reorder, cos, cos-cubed, with options",
    )
    add("--prompt", metavar="P", help="what a word is put into, default {}")
    add(
        "--probe",
        metavar="PATH",
        help="images that words are told by (default: those of CONCEPTS)",
    )
    add(
        "--knockout",
        action="store_true",
        help="set detectors to zero, one at a time, and measure what classes lose",
    )
    add(
        "--knockout-pictures",
        action=_Older,
        dest="knockout_images",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    add(
        "--min-pictures",
        action=_Older,
        dest="min_images",
        type=int,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    add(
        "--knockout-images",
        metavar="N|PATH",
        help="over N images of CONCEPTS (default 100), or over those of a folder",
    )
    add(
        "--truth",
        metavar="FILE",
        help="CSV with the classes of the knock-out's images",
    )
    add(
        "--groups",
        metavar="FILE",
        help="CSV with the columns concept and class: which classes a concept means",
    )
    add(
        "--permutations",
        type=int,
        metavar="N",
        help="exchanges of labels behind p (default 999; 0 makes no null)",
    )
    _add_workers(add)
    add(
        "--against",
        choices=("random",),
        help="dissect the same architecture with random weights too",
    )
    add(
        "--min-images",
        type=int,
        metavar="N",
        help="a concept needs so many images (default 20)",
    )
    add(
        "--threshold",
        type=float,
        metavar="IOU",
        help="a detector's IoU is above this (default .04)",
    )
    add(
        "--quantile",
        type=float,
        metavar="Q",
        help="a unit's mask is what lies above this quantile (default .995)",
    )
    add(
        "--upsample",
        choices=("half-pixel", "align_corners", "netdissect"),
        help="how maps are enlarged (default half-pixel)",
    )
    add(
        "--union",
        choices=("paper", "lite"),
        help="which pixels count for a concept's category (default paper)",
    )
    add(
        "--view",
        choices=("crop", "squash"),
        help="squash the whole image (default) or crop as the model was trained",
    )
    add(
        "--seed",
        type=int,
        metavar="N",
        help="of permutations and bootstrap (default 0)",
    )
    _add_loading(add)
    add(
        "-o",
        "--output",
        metavar="RUN",
        help="folder of the run (default: runs/DATE-TIME)",
    )
    add("--json", action="store_true", help="print the result as JSON")


def _add_loading(add: Callable[..., Any]) -> None:
    add("--weights", metavar="FILE", help="weights of the model (.pth, .safetensors)")
    add("--labels", metavar="FILE", help="class names of the model")
    add("--device", metavar="D", help="auto (default), cpu, cuda, cuda:1, mps")
    add(
        "--engine", metavar="E", help="auto (default), torch, torch-compile, openvino"
    )
    add("--precision", metavar="P", help="f32 (default), bf16, f16")
    add(
        "--memory",
        metavar="SIZE",
        help="working memory of a pass through the model: 1G (default), 500M, bytes",
    )


def _add_compare(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "compare",
        compare_verb,
        "Compare two dissections: shared and own concepts.",
    )
    add = parser.add_argument
    add("a", metavar="A", help="a dissection's folder, or FOLDER:LAYER+LAYER")
    add("b", metavar="B", help="another one")
    add(
        "--significant",
        action="store_true",
        help="count significant units instead of detectors",
    )
    add(
        "--words",
        action="store_true",
        help="compare CLIP-Dissect's words instead of concepts",
    )
    add(
        "-o",
        "--output",
        metavar="FOLDER",
        help="folder of tables and page (default: runs/DATE-TIME)",
    )
    add("--json", action="store_true", help="print the result as JSON")


def _add_report(verbs: Any) -> None:
    parser = _verb(
        verbs, "report", report_verb, "Write the report of a finished run anew."
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder")


def _add_list(verbs: Any) -> None:
    parser = _verb(verbs, "list", list_verb, "List what there is, with its options.")
    parser.add_argument("what", choices=LISTS, metavar="WHAT", help=", ".join(LISTS))
    parser.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="whose layers (default: %(default)s)",
    )
    parser.add_argument(
        "--plugin",
        action="append",
        metavar="FILE",
        help="a Python file that registers explainers",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")


# ---- verbs


def demo_verb(arguments: argparse.Namespace) -> int:
    """The main job on the embedded model and scikit-image's photographs."""
    from consilience import demo as example

    code = _run_and_print(
        example.demo_job(), example.demo_images(), arguments, arguments.output
    )
    two = example.second_opinion()
    if two is not None and not arguments.json and code == 0:
        _second_opinion(*two, example.demo_images(), arguments)
    return code


def _second_opinion(
    new: str, old: str, images: Sequence[Path], arguments: argparse.Namespace
) -> None:
    """The demo's photographs by another network: does it say the same, for the same
    places? Made once.
    """
    from consilience.models.load import load_model
    from consilience.runs.check import run_check
    from consilience.runs.folder import REPORT
    from consilience.show import console
    from consilience.show.change_words import verdict_sentence

    folder = Path(arguments.output) / f"{new}-against-{old}"
    page = folder / REPORT
    if not page.is_file():
        with console.progress_bars():
            found, page = run_check(
                load_model(new),
                load_model(old),
                images,
                folder,
                command=arguments.command,
            )
        print(f"a second network, {new} against {old}: {verdict_sentence(found)}")
    print(f"a second network's report: {page}")


def explain_verb(arguments: argparse.Namespace) -> int:
    """Explain images."""
    from consilience.runs.explain import LoadOptions

    job = replace(
        _job(arguments),
        dissection=arguments.dissection,
        value_range=_value_range(arguments.value_range),
        maps=arguments.maps or "float32",
    )
    options = LoadOptions(**_loading(arguments))
    return _run_and_print(
        job,
        arguments.paths,
        arguments,
        arguments.output or _dated(),
        arguments.truth,
        options,
    )


def _value_range(given: str | None) -> tuple[float, float] | None:
    """Two numbers of ``LOW,HIGH``."""
    if given is None:
        return None
    try:
        low, high = map(float, given.split(","))
    except ValueError:
        raise ConsilienceError(
            f"--value-range is two numbers, LOW,HIGH; got {given!r}"
        ) from None
    return low, high


def evaluate_verb(arguments: argparse.Namespace) -> int:
    """Evaluate a run, images, or the planted suite."""
    from consilience.show import console

    if arguments.suite == "planted":
        return _evaluate_planted(arguments)
    with console.progress_bars():
        found = _evaluated(arguments)
    if found is None:
        return _part_is_made(arguments)
    if arguments.json:
        print(json.dumps(console.evaluation_as_json(found), ensure_ascii=False))
    else:
        console.show_evaluation(found, console.output())
    return 0


def _evaluated(arguments: argparse.Namespace) -> Any:
    from consilience.metrics.suites import asked_metrics
    from consilience.runs.evaluate import Asked, evaluate_images, evaluate_run
    from consilience.runs.explain import LoadOptions, job_from_specs

    if not arguments.paths:
        raise ConsilienceError(
            "evaluate needs a run's folder or images (only --suite planted takes none)"
        )
    metrics = asked_metrics(arguments.metric or (), arguments.suite)
    asked = Asked(metrics, arguments.suite, arguments.seed)
    options = LoadOptions(**_loading(arguments))
    is_run = len(arguments.paths) == 1 and _is_run(arguments.paths[0])
    if not is_run:
        job = job_from_specs(
            arguments.by or DEFAULT_BY,
            arguments.model,
            arguments.target,
            arguments.view,
        )
        output = arguments.output or _dated()
        return evaluate_images(
            asked,
            job,
            arguments.paths,
            output,
            arguments.truth,
            options,
            arguments.command,
            _how(arguments),
        )
    of_images = ("by", "model", "target", "view", "output")
    for name in (*of_images, "workers", "cluster", "shard", "batch", "reuse"):
        if getattr(arguments, name) is not None:
            raise ConsilienceError(
                f"--{name} goes with images; {arguments.paths[0]} is a run and has its own"
            )
    return evaluate_run(
        asked, arguments.paths[0], arguments.truth, options, arguments.command
    )


def _evaluate_planted(arguments: argparse.Namespace) -> int:
    from consilience.evaluation import planted_suite
    from consilience.files import json_ready
    from consilience.runs import planted
    from consilience.show import console

    if arguments.paths:
        raise ConsilienceError(
            f"--suite planted draws its own images; got {arguments.paths[0]}"
        )
    for name in ("model", "target", "truth", "view"):
        if getattr(arguments, name) is not None:
            raise ConsilienceError(
                f"--{name} goes with images; --suite planted has its own models and truth"
            )
    by, metrics = (
        arguments.by or planted_suite.PLANTED_EXPLAINERS,
        arguments.metric or planted_suite.PLANTED_METRICS,
    )
    with console.progress_bars():
        found, page = planted.run_planted(
            by,
            metrics,
            arguments.output or _dated(),
            arguments.seed,
            arguments.command,
        )
    if arguments.json:
        print(
            json.dumps(json_ready({**found, "report": str(page)}), ensure_ascii=False)
        )
    else:
        console.show_planted(found, page, console.output())
    return 0


def shortcuts_verb(arguments: argparse.Namespace) -> int:
    """Plant marks in images."""
    from consilience.runs import shortcuts
    from consilience.show import console

    asked = shortcuts.Asked(
        tuple(arguments.mark or ()),
        tuple(arguments.by or ()),
        tuple(arguments.classes or ()),
        arguments.least,
        seed=arguments.seed,
        closer=arguments.closer,
    )
    with console.progress_bars():
        found, page = shortcuts.run_shortcuts(
            asked,
            _one_model(arguments),
            arguments.paths,
            arguments.output or _dated(),
            arguments.command,
        )
    if arguments.json:
        told = {**shortcuts.as_dict(found), "report": str(page)}
        print(json.dumps(told, ensure_ascii=False))
    else:
        console.show_shortcuts(found, page, console.output())
    return 0


def completion_verb(arguments: argparse.Namespace) -> int:
    """Print a completion script."""
    try:
        import shtab
    except ImportError:
        raise ConsilienceError(
            "completion needs shtab; pip install 'consilience[completion]'"
        ) from None
    print(shtab.complete(build_parser(), shell=arguments.shell))
    return 0


def recommend_verb(arguments: argparse.Namespace) -> int:
    """Compare explainers on a network."""
    from consilience.runs import recommend
    from consilience.show import console

    with console.progress_bars():
        found, page = recommend.run_recommend(
            _one_model(arguments),
            arguments.paths,
            arguments.by or recommend.CANDIDATES,
            arguments.metric or recommend.METRICS,
            arguments.output or _dated(),
            arguments.seed,
            arguments.command,
        )
    if arguments.json:
        told = {**recommend.as_dict(found), "report": str(page)}
        print(json.dumps(told, ensure_ascii=False))
    else:
        console.show_recommendation(found, page, console.output())
    return 0


def clusters_verb(arguments: argparse.Namespace) -> int:
    """Look for groups among a run's explanations."""
    from consilience.runs import clusters
    from consilience.show import console

    with console.progress_bars():
        found, page = clusters.run_clusters(
            arguments.run,
            arguments.output or _dated(),
            arguments.column,
            arguments.class_name,
            arguments.most,
            arguments.seed,
            arguments.command,
        )
    if arguments.json:
        told = {**clusters.as_dict(found), "report": str(page)}
        print(json.dumps(told, ensure_ascii=False))
        return 0
    for one in found.values():
        print(printable(one.sentence()))
    print(f"report: {page}")
    return 0


CHANGED, UNDECIDED = 3, 4


def check_verb(arguments: argparse.Namespace) -> int:
    """Hold a new network against an old one."""
    from consilience.models.load import load_model
    from consilience.runs import check
    from consilience.show import console

    told = (
        check.read_limits(arguments.limits) if arguments.limits else check.CheckFile()
    )
    images = arguments.images or told.images
    if not images:
        raise ConsilienceError(
            "check needs images: --images, or images = [...] in the limits file"
        )
    limits = told.limits
    if arguments.mark:
        limits = replace(limits, marks=tuple(arguments.mark))
    with console.progress_bars():
        found, page = check.run_check(
            load_model(arguments.new, labels=arguments.labels),
            load_model(arguments.against, labels=arguments.labels),
            images,
            arguments.output or _dated(),
            arguments.by or told.explainers,
            limits,
            arguments.command,
        )
    if arguments.json:
        told_all = {**check.as_dict(found), "report": str(page)}
        print(json.dumps(told_all, ensure_ascii=False))
    else:
        console.show_check(found, page, console.output())
    if found.passed:
        return 0
    return CHANGED if found.verdict == "changed" else UNDECIDED


def _one_model(arguments: argparse.Namespace) -> Any:
    """The network of a diagnosis."""
    from consilience.models.load import load_model

    return load_model(arguments.model or DEFAULT_MODEL, **_loading(arguments))


def dissect_verb(arguments: argparse.Namespace) -> int:
    """Dissect a network."""
    from consilience.runs.dissect import run_dissection
    from consilience.show import console

    with console.progress_bars():
        finished = run_dissection(
            _dissection_job(arguments),
            arguments.output or _dated(),
            _loading(arguments),
            arguments.command,
            _how(arguments),
        )
    if arguments.json:
        print(json.dumps(console.dissection_as_json(finished), ensure_ascii=False))
    else:
        console.show_dissection(finished, console.output())
    left = finished.manifest["left_out"]
    if left:
        count = finished.manifest["concepts"]["images"]
        print(
            f"consilience: {len(left)} of {count} images could not be read",
            file=sys.stderr,
        )
    return 1 if left else 0


def _dissection_job(arguments: argparse.Namespace) -> Any:
    from consilience.runs.dissect import DissectionJob, KnockoutJob, WordsJob

    measured = (
        "permutations",
        "against",
        "min_images",
        "threshold",
        "quantile",
        "upsample",
        "union",
        "view",
        "seed",
    )
    options = tuple(
        (name, getattr(arguments, name))
        for name in measured
        if getattr(arguments, name) is not None
    )
    words = {
        name: getattr(arguments, name)
        for name in ("encoder", "similarity", "prompt", "probe")
    }
    given = {name: value for name, value in words.items() if value is not None}
    if given and not arguments.words:
        raise ConsilienceError(f"--{next(iter(given))} goes with --words FILE")
    knocked = [
        name
        for name in ("knockout_images", "truth", "groups")
        if getattr(arguments, name) is not None
    ]
    if knocked and not arguments.knockout:
        raise ConsilienceError(
            f"--{knocked[0].replace('_', '-')} goes with --knockout"
        )
    return DissectionJob(
        arguments.concepts,
        arguments.model,
        tuple(arguments.layer or ()),
        options,
        WordsJob(arguments.words, **given) if arguments.words else None,
        KnockoutJob(**_knockout_options(arguments)) if arguments.knockout else None,
    )


def _knockout_options(arguments: argparse.Namespace) -> dict[str, Any]:
    over = arguments.knockout_images
    if arguments.truth and (over is None or over.isdecimal()):
        raise ConsilienceError(
            "--truth names the classes of a folder of images; give it with --knockout-images "
            "FOLDER"
        )
    given = {"truth": arguments.truth, "groups": arguments.groups}
    if over is not None:
        given["images" if over.isdecimal() else "folder"] = (
            int(over) if over.isdecimal() else over
        )
    return given


def compare_verb(arguments: argparse.Namespace) -> int:
    """Compare two dissections."""
    from consilience.runs.compare import as_dict, compare_runs
    from consilience.show import console

    which: Any = "significant" if arguments.significant else "detector"
    made = compare_runs(
        arguments.a,
        arguments.b,
        arguments.output or _dated(),
        which,
        arguments.words,
        arguments.command,
    )
    if arguments.json:
        print(
            json.dumps(
                {**as_dict(made[0]), "report": str(made[1])}, ensure_ascii=False
            )
        )
    else:
        console.show_comparison(*made, console.output())
    return 0


def _loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """How models are loaded and run."""
    return {
        name: getattr(arguments, name)
        for name in ("weights", "labels", "device", "engine", "precision", "memory")
    }


def _dated() -> Path:
    from consilience.runs.explain import dated_folder

    return dated_folder()


def _job(arguments: argparse.Namespace) -> Any:
    from consilience.runs.explain import job_from_preset, job_from_specs

    if arguments.preset and arguments.by:
        raise ConsilienceError(
            "--preset names its own explainers; give --preset or --by, not both"
        )
    if arguments.preset:
        return job_from_preset(
            arguments.preset, arguments.model, arguments.target, arguments.view
        )
    return job_from_specs(
        arguments.by or DEFAULT_BY, arguments.model, arguments.target, arguments.view
    )


def _run_and_print(
    job: Any,
    paths: Sequence[Any],
    arguments: argparse.Namespace,
    output: Any,
    truth: Any = None,
    options: Any = None,
) -> int:
    from consilience.runs.explain import run_explanations
    from consilience.show import console

    how = _how(arguments) if hasattr(arguments, "workers") else None
    with console.progress_bars():
        finished = run_explanations(
            job, paths, output, truth, options, arguments.command, how=how
        )
    if finished is None:
        return _part_is_made(arguments)
    return _print_run(finished, arguments)


def _part_is_made(arguments: argparse.Namespace) -> int:
    print(
        f"part {arguments.shard} is made; consilience merge puts the parts together"
    )
    return 0


def _print_run(finished: Run, arguments: argparse.Namespace) -> int:
    from consilience.show import console

    if arguments.json:
        print(json.dumps(console.as_json(finished), ensure_ascii=False))
    else:
        console.show_run(finished, console.output())
    failures = finished.manifest["failures"]
    if failures:
        done = len(finished.samples)
        print(
            f"consilience: {len(failures)} of {done + len(failures)} images failed",
            file=sys.stderr,
        )
    return 1 if failures else 0


def run_verb(arguments: argparse.Namespace) -> int:
    """Do a job file."""
    from consilience.runs import jobfile, plan
    from consilience.show import console

    told = _how_told(arguments)
    work = jobfile.read_job(arguments.job, output=arguments.output, **told)
    if arguments.dry_run:
        with console.progress_bars():
            found = plan.estimate(work)
        if arguments.json:
            print(json.dumps([vars(one) for one in found]))
        else:
            console.show_plan(work, found, console.output())
        return 0
    with console.progress_bars():
        finished = jobfile.do_work(work, arguments.command)
    if not finished:
        number, count = work.how.shard or (1, 1)
        print(
            f"part {number}/{count} is made; consilience merge puts the parts together"
        )
        return 0
    if arguments.json:
        rows = [_as_json(one) for one in finished]
        print(json.dumps(rows if len(rows) > 1 else rows[0], ensure_ascii=False))
        return max(map(_failures, finished))
    return max(_show_any(one, arguments) for one in finished)


def _as_json(finished: Any) -> Any:
    from consilience.runs.dissect import DissectionRun
    from consilience.runs.scores import Evaluation
    from consilience.show import console

    if isinstance(finished, DissectionRun):
        return console.dissection_as_json(finished)
    if isinstance(finished, Evaluation):
        return console.evaluation_as_json(finished)
    return console.as_json(finished)


def _show_any(finished: Any, arguments: argparse.Namespace) -> int:
    from consilience.runs.dissect import DissectionRun
    from consilience.runs.scores import Evaluation
    from consilience.show import console

    if isinstance(finished, DissectionRun):
        console.show_dissection(finished, console.output())
        return 1 if finished.manifest["left_out"] else 0
    if isinstance(finished, Evaluation):
        console.show_evaluation(finished, console.output())
        return _failures(finished)
    return _print_run(finished, arguments)


def _failures(finished: Any) -> int:
    """The exit code of a run: 1 where images failed."""
    from consilience.runs.folder import MANIFEST, read_manifest

    if not (finished.folder / MANIFEST).is_file():
        return 0
    kind = "dissection" if hasattr(finished, "dissection") else "explanations"
    manifest = read_manifest(finished.folder, kind)
    return 1 if manifest.get("failures") or manifest.get("left_out") else 0


def merge_verb(arguments: argparse.Namespace) -> int:
    """Put the parts of a run together."""
    from consilience.runs.evaluate import merge_evaluation
    from consilience.runs.explain import merge_run
    from consilience.show import console

    with console.progress_bars():
        finished: Any = merge_run(arguments.run, arguments.command)
        finished = merge_evaluation(finished, arguments.command) or finished
    if arguments.json:
        print(json.dumps(_as_json(finished), ensure_ascii=False))
        return _failures(finished)
    return _show_any(finished, arguments)


def status_verb(arguments: argparse.Namespace) -> int:
    """Say where a run stands."""
    from consilience.files import json_ready, place
    from consilience.runs.log import follow, status_of
    from consilience.show import console

    found = status_of(place(arguments.run))
    if arguments.follow:
        for event in follow(place(arguments.run)):
            print(json.dumps(event, ensure_ascii=False), flush=True)
        return 0
    if arguments.json:
        print(json.dumps(json_ready(found), ensure_ascii=False))
    else:
        console.show_status(found, console.output())
    return 0


def query_verb(arguments: argparse.Namespace) -> int:
    """Answer a query."""
    from consilience.files import json_ready, spreadsheet_safe
    from consilience.runs.query import query
    from consilience.show import console

    answer = query(arguments.run, arguments.sql).df()
    if arguments.json:
        rows = json_ready(answer.to_dict("records"))
        print(json.dumps(rows, ensure_ascii=False, default=str))
    elif arguments.csv:
        print(spreadsheet_safe(answer).to_csv(index=False), end="")
    else:
        console.show_frame(answer, console.output())
    return 0


def serve_verb(arguments: argparse.Namespace) -> int:
    """Serve the workbench until Ctrl-C."""
    from consilience.web import serve

    return serve(arguments)


def report_verb(arguments: argparse.Namespace) -> int:
    """Write a report anew."""
    from consilience.runs.dissect import DissectionRun, is_dissection
    from consilience.runs.folder import Run
    from consilience.show import dissection_page as page
    from consilience.show import html as reports

    if is_dissection(arguments.run):
        print(page.write_dissection_report(DissectionRun(arguments.run)))
        return 0
    finished: Run = Run(arguments.run)
    print(reports.write_report(finished))
    return 0


def list_verb(arguments: argparse.Namespace) -> int:
    """Print a list."""
    from consilience.show import console

    rows = console.listing(arguments.what, arguments.model)
    if arguments.json:
        print(json.dumps(rows, ensure_ascii=False))
    else:
        console.show_rows(rows, console.output())
    return 0
