"""What a report cites: the works behind what was run, as a paragraph and as BibTeX.

A registered name goes to the keys of its works. What has none (an own plug-in, a control
of this library) is described by its docstring alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files

from consilience.registry import Registry, explainers, metrics, summary_of
from consilience.spec import parse
from consilience.types import ConsilienceError

CITED: dict[str, tuple[str, ...]] = {
    "ablation": ("robnik2008explaining", "zeiler2014visualizing"),
    "ablationcam": ("desai2020ablationcam",),
    "attention": ("caron2021dino",),
    "attnlrp": ("achtibat2024attnlrp",),
    "banzhaf": ("wang2023databanzhaf",),
    "blur-ig": ("xu2020blurig",),
    "cam": ("zhou2016cam",),
    "deconvnet": ("zeiler2014visualizing",),
    "deeplift": ("shrikumar2017deeplift",),
    "dff": ("collins2018dff",),
    "eigencam": ("muhammad2020eigencam",),
    "excitation-backprop": ("zhang2018excitation",),
    "expected-gradients": ("erion2021expected",),
    "finercam": ("zhang2025finercam", "selvaraju2017gradcam"),
    "fullgrad": ("srinivas2019fullgrad",),
    "generic-attention": ("chefer2021generic",),
    "gradcam": ("selvaraju2017gradcam",),
    "gradcam++": ("chattopadhay2018gradcampp",),
    "gradcam-elementwise": ("pillai2021explainable",),
    "gradient": ("simonyan2014deep",),
    "guided-backprop": ("springenberg2015striving",),
    "guided-gradcam": ("selvaraju2017gradcam", "springenberg2015striving"),
    "guided-ig": ("kapishnikov2021guided",),
    "hirescam": ("draelos2020hirescam",),
    "hsic": ("novello2022hsic",),
    "input-x-gradient": ("shrikumar2017deeplift",),
    "integrated-gradients": ("sundararajan2017axiomatic",),
    "iscam": ("naidu2020iscam",),
    "kernelshap": ("lundberg2017shap",),
    "layercam": ("jiang2021layercam",),
    "legrad": ("bousselham2025legrad",),
    "lime": ("ribeiro2016lime",),
    "lrp": ("bach2015lrp",),
    "minimal": ("carter2019sufficient", "ignatiev2019abduction"),
    "occlusion": ("zeiler2014visualizing",),
    "opticam": ("zhang2024opticam",),
    "reciprocam": ("byun2024reciprocam",),
    "rise": ("petsiuk2018rise",),
    "rollout": ("abnar2020rollout",),
    "scorecam": ("wang2020scorecam",),
    "shapley": ("castro2009shapley", "strumbelj2014explaining"),
    "smoothgrad": ("smilkov2017smoothgrad",),
    "smoothgradcam++": ("omeiza2019smooth",),
    "sobol": ("fel2021sobol",),
    "squaregrad": ("hooker2019roar",),
    "sscam": ("wang2020sscam",),
    "transformer-attribution": ("chefer2021beyond",),
    "vargrad": ("adebayo2018local",),
    "xgradcam": ("fu2020xgradcam",),
    "xrai": ("kapishnikov2019xrai",),
    "adcc": ("poppi2021revisiting",),
    "average-drop": ("chattopadhay2018gradcampp",),
    "average-gain": ("zhang2024opticam",),
    "average-sensitivity": ("bhatt2020evaluating", "yeh2019infidelity"),
    "comprehensiveness": ("deyoung2020eraser",),
    "deletion": ("petsiuk2018rise",),
    "effective-pixels": ("hill1973diversity",),
    "emprt": ("hedstrom2024fresh",),
    "energy": ("wang2020scorecam",),
    "entropy": ("bhatt2020evaluating",),
    "faithfulness-correlation": ("bhatt2020evaluating",),
    "faithfulness-estimate": ("alvarezmelis2018towards",),
    "grid-pointing": ("bohle2021coda",),
    "increase": ("chattopadhay2018gradcampp",),
    "infidelity": ("yeh2019infidelity",),
    "insertion": ("petsiuk2018rise",),
    "irof": ("rieger2020irof",),
    "local-lipschitz": ("alvarezmelis2018robustness",),
    "max-box-acc": ("choe2020evaluating",),
    "max-sensitivity": ("yeh2019infidelity",),
    "monotonicity": ("arya2019one",),
    "mprt": ("adebayo2018sanity",),
    "pixel-flipping": ("bach2015lrp",),
    "pointing-game": ("zhang2018excitation",),
    "random-logit": ("sixt2020when",),
    "region-perturbation": ("samek2017evaluating",),
    "relevance-mass": ("arras2022clevr",),
    "relevance-rank": ("arras2022clevr",),
    "road": ("rong2022road",),
    "sensitivity-n": ("ancona2018towards",),
    "smooth-mprt": ("hedstrom2024fresh",),
    "sparseness": ("chalasani2020concise",),
    "sufficiency": ("deyoung2020eraser",),
}
"""By registered name the works it comes from."""


def bibtex(keys: Iterable[str]) -> str:
    """Works as BibTeX, in order of key."""
    there = entries()
    return "\n\n".join(there[key] for key in sorted(set(keys)))


@cache
def entries() -> dict[str, str]:
    """Every work of ``references.bib`` by its key."""
    path = files("consilience") / "show" / "templates" / "references.bib"
    found = path.read_text(encoding="utf-8").strip().split("\n\n")
    return {entry[entry.index("{") + 1 : entry.index(",")]: entry for entry in found}


def keys_of(spelled: Iterable[str]) -> list[str]:
    """Keys of the works behind explainers and metrics as spelled in a run."""
    names = dict.fromkeys(_name(one) for one in spelled)
    return sorted({key for name in names for key in CITED.get(name, ())})


def described(spelled: Sequence[str], registry: Registry = explainers) -> list[str]:
    """The first sentence of each one's docstring, which names its source; what is not
    registered here is named alone.
    """
    said = []
    for name in dict.fromkeys(_name(one) for one in spelled):
        try:
            said.append(summary_of(registry.get(name)).rstrip(". ").replace("``", ""))
        except ConsilienceError:
            said.append(name)
    return said


def _name(spelled: str) -> str:
    try:
        return parse(spelled).name
    except ConsilienceError:
        return spelled


def methods_paragraph(
    explained: Sequence[str], measured: Sequence[str], compared: bool, version: str
) -> str:
    """How a run was made, in the sentences of a paper's methods."""
    parts = [
        f"Explanations were made with consilience {version}: "
        + "; ".join(described(explained))
        + "."
    ]
    if compared:
        parts.append(
            "Binary masks of two explanations were compared by intersection over union "
            "with its expectation for independent masks of the same areas, by rank "
            "correlation of the raw maps, and by permuting images, p adjusted by Holm's "
            "method; intervals are 95 % over images."
        )
    if measured:
        parts.append(
            "They were measured by " + "; ".join(described(measured, metrics)) + "."
        )
    return " ".join(parts)
