"""The pages of the site that are made: one for each explainer and metric, the gallery, and
``llms.txt``. A hook of mkdocs; everything said comes from the registry's docstrings, from
``known-failures.toml``, the references, and what ``make gallery`` drew and measured.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from consilience import registry
from consilience.options import options_of, range_in_words, spelled_default
from consilience.show.citations import CITED, entries

DOCS = Path(__file__).parent
GALLERY = "gallery"
NEEDS = {
    "layers": "the layers of the network",
    "gradients": "gradients",
    "module": "the torch module itself",
}
OUTSIDE = (
    r"\[([^\]]*)\]\((?:\.\./)+(?:src/|tests/|examples/|benchmarks/|[A-Z]+\.md)[^)]*\)"
)
KINDS = {"explainer": registry.explainers, "metric": registry.metrics}


# ---- what is known


def failures(kind: str, name: str) -> list[dict[str, str]]:
    """What an explainer or metric is known to do wrong, and by whom."""
    told = tomllib.loads((DOCS / "known-failures.toml").read_text("utf-8"))
    return [one for one in told[kind] if name in one["names"]]


def gallery() -> dict[str, Any]:
    """What `make gallery` left."""
    found: dict[str, Any] = json.loads(
        (DOCS / GALLERY / "gallery.json").read_text("utf-8")
    )
    return found


def picture_of(name: str) -> str | None:
    """The picture's file in the gallery, where there is one."""
    file = f"{file_of(name)}.webp"
    return file if (DOCS / GALLERY / file).is_file() else None


def file_of(name: str) -> str:
    """A name as files and addresses take it."""
    return name.replace("+", "p")


# ---- pages


def page_of(kind: str, name: str) -> str:
    """The page of an explainer or metric, in Markdown."""
    cls = KINDS[kind].get(name)
    first, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
    lines = [f"# {title_of(cls, name)}", "", prose(first), ""]
    if kind == "explainer":
        lines += [*_pictured(name), ""]
    if rest:
        lines += [prose(rest), ""]
    lines += ["## Use it", "", "```sh", command_of(kind, name), "```", ""]
    lines += _options(cls)
    lines += ["## What it needs", "", needs_of(kind, cls), ""]
    if kind == "explainer":
        lines += ["## What it costs", "", cost_of(name), ""]
    lines += ["## Known failures", ""]
    lines += [
        f"- {one['text']} ({linked(one['source'])})" for one in failures(kind, name)
    ]
    if keys := CITED.get(name, ()):
        known = entries()
        lines += ["", "## Source", "", "```bibtex"]
        lines += ["\n\n".join(known[key].strip() for key in keys), "```"]
    return "\n".join([*lines, ""])


def linked(source: str) -> str:
    """A source whose pages of these docs are links."""
    return re.sub(r"docs/([\w-]+)\.md", r"[\1](../\1.md)", source)


def title_of(cls: Any, name: str) -> str:
    """The label that reports give it, and its name."""
    label = getattr(cls, "label", name)
    return f"{label} (`{name}`)" if isinstance(label, str) and label != name else name


def prose(text: str) -> str:
    """A docstring's paragraphs as Markdown: code in single ticks, links to objects as
    code.
    """
    joined = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    code = re.split(r"(`[^`]*`)", joined)  # what stands between is at odd places
    code[::2] = [part.replace("<", "&lt;") for part in code[::2]]
    return "".join(code)


def _pictured(name: str) -> list[str]:
    made = gallery()["methods"].get(name, {})
    if file := picture_of(name):
        return [
            f"![{name} of {made['target']}](../{GALLERY}/{file})",
            "",
            f"Of *{made['target']}*, by {gallery()['model']}; "
            f"[the photograph and all others](../gallery.md).",
        ]
    return [f"*No picture*: {made.get('why', 'it was not drawn')}."]


def command_of(kind: str, name: str) -> str:
    """How it is asked for."""
    if kind == "explainer":
        return f"consilience explain dog.jpg --by {name}"
    return f"consilience evaluate run --metric {name}"


def _options(cls: Any) -> list[str]:
    shown = options_of(cls)
    if not shown:
        return ["It has no options.", ""]
    rows = ["| option | unless told | |", "|---|---|---|"]
    for item in shown:
        bounds = range_in_words(item.metadata.get("bounds", {}))
        what = "; ".join(
            part for part in (item.metadata.get("help", ""), bounds) if part
        )
        default = spelled_default(item)
        rows.append(
            f"| `{item.name}` | {f'`{default}`' if default else ''} | {_cell(what)} |"
        )
    return [*rows, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def needs_of(kind: str, cls: Any) -> str:
    """What it asks of a network, in a sentence."""
    if kind == "metric":
        return metric_needs(cls)
    needs = sorted(getattr(cls, "needs", ()))
    if not needs:
        return (
            "Scores alone: any network, also an ONNX file, an address or a function."
        )
    told = [NEEDS[one] for one in needs]
    listed = " and ".join([", ".join(told[:-1]), told[-1]] if len(told) > 1 else told)
    return f"{listed[:1].upper()}{listed[1:]}. A network that lacks it is refused in one line."


def metric_needs(cls: Any) -> str:
    """Which way it is read, within which bounds, and what it asks of the network."""
    better = {True: "Higher is better", False: "Lower is better"}.get(
        getattr(cls, "higher_is_better", None), "Neither way is better by itself"
    )
    low, high = getattr(cls, "bounds", (-math.inf, math.inf))
    ends = f"from {low:g} to {high:g}".replace("-inf", "anything").replace(
        "inf", "anything"
    )
    needs = [NEEDS[one] for one in sorted(getattr(cls, "needs", ()))]
    asks = f" It asks for {' and '.join(needs)}." if needs else ""
    return f"{better}; values lie {ends}.{asks}"


def cost_of(name: str) -> str:
    """Passes and time of one explanation, beside a bare forward pass."""
    known = gallery()
    made = known["methods"].get(name, {})
    if "forwards" not in made:
        return "Not measured here: the network of the gallery cannot be asked so."
    passes = ""
    if made["passes"]:
        several = "es" if made["passes"] > 1 else ""
        passes = f"{made['passes']:,} pass{several} of the network"
    taken = (
        f"{made['forwards']:,} times a bare forward pass of one image "
        f"({made['seconds']:.2g} s)"
    )
    return (
        f"{passes}{', ' if passes else ''}{taken}: one {known['model']} image on "
        f"{known['machine']}, {known['date']}."
    )


def gallery_page() -> str:
    """Every explainer's picture beside the photograph."""
    known = gallery()
    shown = [name for name in registry.explainers.names() if picture_of(name)]
    others = [name for name in registry.explainers.names() if not picture_of(name)]
    target = known["methods"][shown[0]]["target"]
    lines = [
        "# Gallery",
        "",
        f"Every explainer on one photograph, of the class that {known['model']} says: "
        f"*{target}*. They differ, and which of them to believe no picture tells: that "
        f"is what [agreement](agreement.md), [evaluation](evaluation.md) and "
        f"[`recommend`](diagnosis.md) are for. Made by `make gallery` ({known['date']}).",
        "",
        f"![the photograph]({GALLERY}/photograph.webp){{ width=180 }}",
        "",
        "<style>.md-typeset .grid{grid-template-columns:"
        "repeat(auto-fit,minmax(9rem,1fr))}</style>",
        "",
        '<div class="grid" markdown>',
        "",
    ]
    for name in shown:
        page = f"explainers/{file_of(name)}.md"
        lines += [
            f"[![{name}]({GALLERY}/{picture_of(name)}){{ width=180 }}<br>`{name}`]({page})",
            "",
        ]
    lines += ["</div>", "", "Not drawn, since this network cannot be asked so:", ""]
    lines += [f"- [`{name}`](explainers/{file_of(name)}.md)" for name in others]
    return "\n".join([*lines, ""])


def made_pages() -> dict[str, str]:
    """Every page that is made, by its address in the docs."""
    measured = (DOCS.parent / "benchmarks" / "README.md").read_text("utf-8")
    measured = re.sub(r"\]\((?:\.\./)+docs/", "](", measured)
    pages = {"gallery.md": gallery_page(), "benchmarks.md": measured}
    for kind, plugins in KINDS.items():
        for name in plugins.names():
            pages[f"{kind}s/{file_of(name)}.md"] = page_of(kind, name)
    return pages


def llms_text(config: Any) -> str:
    """The site in short for programs that read: what there is, and where."""
    lines = [
        f"# {config['site_name']}",
        "",
        f"> {config['site_description']}",
        "",
    ]

    def listed(entry: Any) -> list[str]:
        if isinstance(entry, str):
            text = (
                (DOCS / entry).read_text("utf-8") if (DOCS / entry).is_file() else ""
            )
            title = re.search(r"^# (.+)$", text, re.MULTILINE)
            address = entry.removesuffix(".md").removesuffix("index")
            named = title[1] if title else address.rpartition("/")[2]
            return [f"- [{named}]({address}{'/' if address else './'})"]
        return [
            line
            for inner in (entry.values() if isinstance(entry, dict) else entry)
            for line in listed(inner)
        ]

    for section in config["nav"]:
        [(name, inside)] = section.items()
        lines += [f"## {name}", "", *listed(inside), ""]
    return "\n".join(lines)


# ---- the hooks


def on_config(config: Any) -> Any:
    """The made pages' places in the navigation."""
    made: dict[str, list[Any]] = {"Explainers": [], "Metrics": []}
    for kind, plugins in KINDS.items():
        for name in plugins.names():
            made[f"{kind.capitalize()}s"].append(
                {name: f"{kind}s/{file_of(name)}.md"}
            )
    for section in config["nav"]:
        if "Reference" in section:
            section["Reference"] += [{name: pages} for name, pages in made.items()]
        if "Results" in section:
            section["Results"].insert(0, {"Gallery": "gallery.md"})
            section["Results"].append({"Benchmarks": "benchmarks.md"})
    return config


def on_files(files: Any, config: Any) -> Any:
    """The made pages among the files."""
    from mkdocs.structure.files import File

    for address, text in made_pages().items():
        files.append(File.generated(config, address, content=text))
    files.append(File.generated(config, "llms.txt", content=llms_text(config)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of the docs: the benchmarks are a page of the site, and what else lies
    in the repository is named without a link.
    """
    up = "../" * page.file.src_uri.count("/")
    joined = re.sub(
        r"\]\((?:\.\./)+benchmarks/README\.md\)", f"]({up}benchmarks.md)", markdown
    )
    return re.sub(OUTSIDE, r"\1", joined)


def on_post_build(config: Any) -> None:
    """Every relative link and picture of the site is there."""
    from mkdocs.exceptions import PluginError

    site = Path(config["site_dir"])
    broken = [
        f"{page.relative_to(site)}: {link}"
        for page in sorted(site.rglob("*.html"))
        for link in links_of(page.read_text("utf-8"))
        if page.name != "404.html" and not _there(page, link)
    ]
    if broken:
        raise PluginError(f"broken links: {'; '.join(broken[:20])}")


def links_of(html: str) -> set[str]:
    """Addresses within the site that a page points to, without their anchors."""
    found = re.findall(r'(?:href|src)="([^"#?]+)["#?]', html)
    return {link for link in found if not re.match(r"[a-z]+:|//|/", link)}


def _there(page: Path, link: str) -> bool:
    target = page.parent / unquote(link)
    return target.is_file() or (target / "index.html").is_file()
