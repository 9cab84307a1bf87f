"""The command line: each verb parses, calls one function and prints. Data on stdout, progress on stderr.

Exit codes: 0 done, 1 an expected failure said in one line, 2 wrong usage. Verbs import lazily: torch alone takes seconds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience import registry
from consilience.types import ConsilienceError

if TYPE_CHECKING:
    from consilience.store import Run

DEFAULT_MODEL = "efficientnet_lite0"
DEFAULT_BY = ("gradcam", "lime")
LISTS = ("models", "explainers", "segmenters", "fills", "masks", "presets", "layers")

EPILOG = """examples:
  consilience demo
  consilience explain dog.jpg --by gradcam --by lime:samples=700,seed=1
  consilience explain photos/ -m resnet50 --target "golden retriever" -o run
  consilience list explainers"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    arguments.command = shlex.join(["consilience", *(sys.argv[1:] if argv is None else argv)])
    try:
        for plugin in getattr(arguments, "plugin", None) or ():
            registry.load_plugin(plugin)
        code: int = arguments.call(arguments)
    except ConsilienceError as error:
        print(f"consilience: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("consilience: stopped; give the same command again (with its -o) to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="consilience",
        description="Explain what a vision model looks at, hold explanations against each other, say whether to believe them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_demo(verbs)
    _add_explain(verbs)
    _add_report(verbs)
    _add_list(verbs)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"consilience {version('consilience')}")
        parser.exit()


def _verb(verbs: Any, name: str, call: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(call=call)
    return parser


def _add_demo(verbs: Any) -> None:
    parser = _verb(verbs, "demo", demo, "Explain photographs that come with the program, with the model that comes with it.")
    parser.add_argument(
        "-o", "--output", metavar="RUN", default="consilience-demo", help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_explain(verbs: Any) -> None:
    parser = _verb(verbs, "explain", explain, "Explain pictures and hold the explanations against each other.")
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="pictures, folders or globs")
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
    add("--preset", metavar="NAME", help="a named protocol instead of --by; see `consilience list presets`")
    add("--target", default=None, metavar="T", help="predicted (default), true, a class index or a class name")
    add("--truth", metavar="FILE", help="CSV with image, class_index (or class) and boxes x0, y0, x1, y1")
    add("--view", choices=("crop", "squash"), help="crop as the model was trained (default) or squash the whole picture")
    add("--weights", metavar="FILE", help="weights of the model (.pth, .safetensors)")
    add("--labels", metavar="FILE", help="class names of the model")
    add("--device", metavar="D", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--engine", metavar="E", help="auto (default), torch, torch-compile, openvino")
    add("--precision", metavar="P", help="f32 (default), bf16, f16; says how far the maps moved from f32")
    add("--memory", metavar="SIZE", help="working memory of a pass through the model: 1G (default), 500M, bytes")
    add("--plugin", action="append", metavar="FILE", help="a Python file that registers explainers")
    add("-o", "--output", metavar="RUN", help="folder of the run (default: runs/DATE-TIME)")
    add("--json", action="store_true", help="print the result as JSON")


def _add_report(verbs: Any) -> None:
    parser = _verb(verbs, "report", report, "Write the report of a finished run anew.")
    parser.add_argument("run", metavar="RUN", help="a run's folder")


def _add_list(verbs: Any) -> None:
    parser = _verb(verbs, "list", list_things, "List what there is, with its options.")
    parser.add_argument("what", choices=LISTS, metavar="WHAT", help=", ".join(LISTS))
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, metavar="MODEL", help="whose layers (default: %(default)s)")
    parser.add_argument("--plugin", action="append", metavar="FILE", help="a Python file that registers explainers")
    parser.add_argument("--json", action="store_true", help="print as JSON")


# ---------------------------------------------------------------- verbs


def demo(arguments: argparse.Namespace) -> int:
    """The main job on the embedded model and scikit-image's photographs."""
    from consilience import demo as example

    return _run_and_print(example.job(), example.pictures(), arguments, arguments.output)


def explain(arguments: argparse.Namespace) -> int:
    """Explain pictures."""
    from consilience.run import Options

    output = arguments.output or Path("runs") / datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    names = ("weights", "labels", "device", "engine", "precision", "memory")
    options = Options(**{name: getattr(arguments, name) for name in names})
    return _run_and_print(_job(arguments), arguments.paths, arguments, output, arguments.truth, options)


def _job(arguments: argparse.Namespace) -> Any:
    from consilience.run import job_from_preset, job_from_specs

    if arguments.preset and arguments.by:
        raise ConsilienceError("--preset names its own explainers; give --preset or --by, not both")
    if arguments.preset:
        return job_from_preset(arguments.preset, arguments.model, arguments.target, arguments.view)
    return job_from_specs(arguments.by or DEFAULT_BY, arguments.model, arguments.target, arguments.view)


def _run_and_print(
    job: Any, paths: Sequence[Any], arguments: argparse.Namespace, output: Any, truth: Any = None, options: Any = None
) -> int:
    from consilience import terminal
    from consilience.run import run

    with terminal.bars():
        finished = run(job, paths, output, truth, options, arguments.command)
    if arguments.json:
        print(json.dumps(terminal.as_json(finished), ensure_ascii=False))
    else:
        terminal.show(finished, terminal.output())
    failures = finished.manifest["failures"]
    if failures:
        done = len(finished.samples)
        print(f"consilience: {len(failures)} of {done + len(failures)} pictures failed", file=sys.stderr)
    return 1 if failures else 0


def report(arguments: argparse.Namespace) -> int:
    """Write a report anew."""
    from consilience import report as reports
    from consilience.store import Run

    finished: Run = Run(arguments.run)
    print(reports.write(finished))
    return 0


def list_things(arguments: argparse.Namespace) -> int:
    """Print a list."""
    from consilience import terminal

    rows = terminal.listing(arguments.what, arguments.model)
    if arguments.json:
        print(json.dumps(rows, ensure_ascii=False))
    else:
        terminal.show_rows(rows, terminal.output())
    return 0
