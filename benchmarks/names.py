"""Writes docs/names.md: every explainer, metric, fill, superpixel method and mask, with
the first sentence of its own documentation. ``python benchmarks/names.py``
"""

import inspect
from pathlib import Path

from consilience import registry

PAGE = Path(__file__).parent.parent / "docs" / "names.md"
KINDS = {
    "Explainers": registry.explainers,
    "Metrics": registry.metrics,
    "Fills": registry.fills,
    "Superpixels": registry.segmenters,
}


def first_sentence(cls):
    text = " ".join(inspect.getdoc(cls).split("\n\n")[0].split())
    return text.replace("|", "\\|")


def page():
    lines = [
        "# Names",
        "",
        "Everything that has a name here. `consilience list explainers` (or metrics, fills, ...) has the options; this page is made by",
        "`python benchmarks/names.py`.",
    ]
    for title, kind in KINDS.items():
        lines += ["", f"## {title}", "", "| | |", "|---|---|"]
        own = [
            name
            for name in kind.names()
            if kind.get(name).__module__.startswith("consilience.")
        ]
        lines += [f"| `{name}` | {first_sentence(kind.get(name))} |" for name in own]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
