"""No option is ignored: another value of it gives another number.

Every option of every registered explainer, metric and fill is tried at two values on one
small network and image. What cannot matter there is listed, with why, and tried where it
does.
"""

import typing
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from test_what_a_network_says import net

import consilience as cs
from consilience import registry
from consilience.types import Box, Score

RNG = np.random.default_rng(0)
SIDE = 64
PIXELS = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
PIXELS[8:30, 10:34] = (220, 40, 30)
MASK = np.zeros((SIDE, SIDE), dtype=bool)
MASK[5:27, 12:40] = True
SAMPLE = cs.Sample(
    "noise",
    PIXELS,
    label=1,
    boxes=(Box(1, 8, 6, 36, 33), Box(1, 40, 40, 52, 60)),
    masks={"b": MASK},
)

CHEAP = {
    "guided-ig": "guided-ig:steps=12",
    "xrai": "xrai:steps=8,segments=grid(6)",
    "rise": "rise:masks=60",
    "sobol": "sobol:design=4,grid=4",
    "hsic": "hsic:masks=60,grid=4",
    "lime": "lime:samples=80,segments=grid(4),features=4",
    "kernelshap": "kernelshap:samples=60,segments=grid(4)",
    "shapley": "shapley:permutations=4,segments=grid(4)",
    "banzhaf": "banzhaf:samples=80,segments=grid(4)",
    "ablation": "ablation:segments=grid(4)",
    "smoothgrad": "smoothgrad:samples=6",
    "squaregrad": "squaregrad:samples=6",
    "vargrad": "vargrad:samples=6",
    # at the last layer the gradient of a linear head is the same for every noise
    "smoothgradcam++": "smoothgradcam++:samples=6,layer=0",
    "expected-gradients": "expected-gradients:samples=8",
    "blur-ig": "blur-ig:steps=8",
    "integrated-gradients": "integrated-gradients:steps=4",
    "sscam": "sscam:samples=3",
    "opticam": "opticam:steps=4",
    "iscam": "iscam:samples=3",
    "irof": "irof:segments=grid(8)",
    "monotonicity": "monotonicity:steps=20,reads=logit",
    "mprt": "mprt:steps=2",
    "smooth-mprt": "smooth-mprt:steps=2,samples=2",
    "insertion": "insertion:steps=9",
    "deletion": "deletion:steps=9",
    "pixel-flipping": "pixel-flipping:steps=9",
    "region-perturbation": "region-perturbation:regions=20",
}

OTHER = {
    "score": ("logit", "probability"),
    "layer": ("0", "2"),
    "fill": ("black", "white"),
    "baseline": ("black", "white"),
    "segments": ("grid(4)", "grid(5)"),
    "permutations": ("4", "6"),
    "channels": ("sum", "largest"),
    "rule": ("gauss-legendre", "trapezoid"),
    "fuse": ("mean,layer=0+2", "max,layer=0+2"),
    "steps": ("9", "4"),
}

BY_PLACE = {
    "scorecam channels": ("0", "5"),
    "sscam channels": ("0", "5"),
    "iscam channels": ("0", "5"),
    "lrp gamma": (
        "0.25,composite=epsilon-gamma-box",
        "3,composite=epsilon-gamma-box",
    ),
    "dff layer": ("1", "3"),
    "dff fuse": ("mean,layer=1+3", "max,layer=1+3"),
    "lime features": ("2,selection=highest", "4,selection=highest"),
    "lime refit_alpha": ("1,features=4", "400,features=4"),
    "lime selection": ("highest,features=3", "forward,features=3"),
    "guided-gradcam reduce": ("largest", "sum"),
    "blur-ig rule": ("riemann-left", "trapezoid"),
    "deletion normalised": ("true,gap=0", "false"),
    "insertion normalised": ("true,gap=0", "false"),
    "deletion gap": ("0,normalised=true", "0.99,normalised=true"),
    "insertion gap": ("0,normalised=true", "0.99,normalised=true"),
    "irof gap": ("0.001", "0.99"),
    "mprt steps": ("1", "2"),
    "smooth-mprt steps": ("1", "2"),
    "monotonicity slack": ("0", "5"),
    "monotonicity steps": ("20", "7"),
    "pointing-game tolerance": ("0,seed=1,truth=masks", "60,seed=1,truth=masks"),
    "pointing-game seed": ("0,tolerance=0,truth=masks", "1,tolerance=0,truth=masks"),
    "pointing-game truth": ("boxes,tolerance=0,seed=1", "masks,tolerance=0,seed=1"),
    "random-logit seed": ("0,classes=2", "1,classes=2"),
    "relevance-rank part": ("signed", "absolute"),
    "local-lipschitz samples": ("1", "10"),
    "max-sensitivity samples": ("1", "10"),
    "max-box-acc thresholds": ("100", "1"),
    "max-box-acc delta": ("0.3", "0.9"),
    "best-iou truth": ("boxes", "masks"),
    "relevance-rank truth": ("boxes", "masks"),
    "max-box-acc truth": ("boxes", "masks"),
    "auc truth": ("boxes", "masks"),
    "energy truth": ("boxes", "masks"),
    "relevance-mass truth": ("boxes", "masks"),
    "iou truth": ("boxes", "masks"),
    "refinecam grids": ("1", "2"),
    "effective-pixels least": ("1e-05,order=0", "0.5,order=0"),
}

ELSEWHERE = {
    "cam": "needs a pooled linear head behind the layer (tests/test_cam.py)",
    "relu": "the last layer's activations of this network are not below 0 (test_cam.py)",
    "minimal": "needs a class that is said first (tests/test_minimal.py)",
    "attention": "needs attention (tests/test_attention.py)",
    "until": "stops where it is sure (tests/test_lime.py, test_sampling.py)",
    "agreement": "of until=stable (tests/test_sampling.py)",
    "fidelity": "needs a machine with bf16, or a copy of one's own (tests/test_fidelity.py)",
    "several images": "needs several images (test_evaluation.py, test_marked.py)",
    "no effect on this network": "see the module that is named for the metric",
}


def no_case(name, option):
    """Why an option cannot be tried here; nothing where it can."""
    spelling = f"{name} {option}"
    if name in ATTENTION:
        return ELSEWHERE["attention"]
    if name in ("cam", "minimal"):
        return ELSEWHERE[name]
    if option == "relu" and spelling not in RELU_MATTERS:
        return ELSEWHERE["relu"]
    if option in ("until", "agreement", "fidelity"):
        return ELSEWHERE[option]
    if name in ("grid-pointing", "planted-mark"):
        return ELSEWHERE["several images"]
    return SPECIAL.get(spelling, "")


ATTENTION = (
    *("attention", "attnlrp", "generic-attention", "gradient-rollout", "legrad"),
    *("rollout", "transformer-attribution"),
)
RELU_MATTERS = ("gradcam relu", "hirescam relu", "xgradcam relu", "ablationcam relu")
SPECIAL = {
    "average-gain fill": "nothing is gained on this image (tests/test_faithfulness.py)",
    "increase fill": "nothing is gained on this image (tests/test_faithfulness.py)",
    "max-box-acc boxes": "one box comes out here (tests/test_localisation.py)",
    "pointing-game at": "the image is the frame here (tests/test_localisation.py)",
    "seed-agreement similarity": "needs an explainer with a seed: below",
    "seed-agreement seeds": "needs an explainer with a seed: below",
}


def model():
    torch.manual_seed(0)
    module = net(6)
    with torch.no_grad():
        module[-1].weight.mul_(12)
    return cs.wrap(module, classes=tuple("abcdef"), size=SIDE)


@pytest.fixture(scope="module")
def network():
    return model()


def alternatives(cls, item, name):
    """Two spellings of an option's value; None where only a table knows some."""
    by_place = BY_PLACE.get(f"{name} {item.name}")
    if by_place or item.name in OTHER:
        return by_place or OTHER[item.name]
    kind, value = typing.get_type_hints(cls)[item.name], item.default
    if isinstance(value, bool):
        return "true", "false"
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        return str(choices[0]), str(choices[-1])
    if isinstance(value, int):
        return str(value), str(
            value + 1 if item.name == "seed" else max(2, value // 2)
        )
    if isinstance(value, float):
        return f"{value:g}", f"{value / 2 if value else 0.3:g}"
    if isinstance(value, tuple) and value and isinstance(value[0], float):
        return "+".join(f"{one:g}" for one in value), f"{value[0]:g}"
    return None


def spelled(option, value, base):
    """A specification with an option more, or other values of those that are there."""
    head, _, rest = base.partition(":")
    new = f"{option}={value}".split(",")
    names = {one.partition("=")[0] for one in new}
    kept = [one for one in rest.split(",") if one.partition("=")[0] not in names]
    return f"{head}:{','.join([*filter(None, kept), *new])}"


def cases(of):
    return [
        pytest.param(name, item, id=f"{name}-{item.name}")
        for name in of.names()
        if of.get(name).__module__.startswith("consilience.")
        for item in fields(of.get(name))
        if not no_case(name, item.name)
    ]


@pytest.mark.parametrize(("name", "item"), cases(registry.explainers))
def test_every_option_of_an_explainer_changes_its_map(name, item, network):
    values = alternatives(registry.explainers.get(name), item, name)
    base = CHEAP.get(name, name)
    found = [
        cs.explain(network, SAMPLE, spelled(item.name, value, base), 1)
        for value in values
    ]
    assert content(found[0]) != content(found[1])


def content(made):
    """A map and what is kept beside it."""
    extras = [np.asarray(made.extras[key]).tobytes() for key in sorted(made.extras)]
    return [made.values.tobytes(), *extras]


@pytest.fixture(scope="module")
def tied(network):
    """A map of few values, so that seeds, which break ties, can matter."""
    made = cs.explain(network, SAMPLE, "gradient:channels=sum")
    levels = np.random.default_rng(1).normal(size=(8, 8)).round()
    levels[1:4, 1:5] += 1
    levels[2, 2] = levels[6, 5] = 4  # maxima: in a box and the mask, in a box alone
    levels[7, 7] = levels[7, 0] = -5  # large, and outside of all
    index, name = made.target.index, made.target.name
    boxes = tuple(replace(box, index=index) for box in SAMPLE.boxes)
    sample = replace(SAMPLE, label=index, boxes=boxes, masks={name: MASK})
    values = levels.repeat(8, 0).repeat(8, 1).astype(np.float32)
    return replace(made, values=values, sample=sample)


@pytest.mark.parametrize(("name", "item"), cases(registry.metrics))
def test_every_option_of_a_metric_changes_its_number(name, item, network, tied):
    values = alternatives(registry.metrics.get(name), item, name)
    base = CHEAP.get(name, name)
    found = []
    for value in values:
        metric = spelled(item.name, value, base)
        (score,) = cs.evaluate(network, tied, [metric]).values()
        found.append(score.value if isinstance(score, Score) else score.code)
    # one of the two may say that it does not apply, not both
    assert any(isinstance(one, float) for one in found)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    "options", [("seeds=2", "seeds=4"), ("similarity=spearman", "similarity=pearson")]
)
def test_options_of_agreement_between_seeds(options, network):
    made = cs.explain(network, SAMPLE, "smoothgrad:samples=2")
    scores = cs.evaluate(network, made, [f"seed-agreement:{one}" for one in options])
    assert len({score.value for score in scores.values()}) == 2


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("blur", "sigma", ("2", "9")),
        ("percentile", "q", ("10", "70")),
        ("rise-blur", "sigma", ("1", "6")),
        ("rise-blur", "side", ("3", "11")),
        ("noise", "seed", ("0", "1")),
        ("colour", "rgb", ("0.5+0.5+0.5", "0.1+0.5+0.5")),
    ],
)
def test_every_option_of_a_fill_changes_it(name, option, values, network):
    view = network.view(SAMPLE)
    made = [
        registry.fills.build(f"{name}:{option}={value}").image(view, None)
        for value in values
    ]
    assert not torch.equal(*made)


def test_the_percentile_of_the_truncated_fill(network):
    """It is cast to a whole number: black, unless the percentile is white itself."""
    pixels = PIXELS.copy()
    pixels[:, 20:] = 255
    view = network.view(replace(SAMPLE, pixels=pixels))
    low, high = (
        registry.fills.build(f"truncated:percentile={q}").image(view, None)
        for q in (5, 80)
    )
    assert float(low.max()) == 0
    assert float(high.min()) == 1
