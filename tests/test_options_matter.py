"""No option is ignored: another value of it gives another number.

Every option of every registered explainer, metric and fill is tried at two values on one
small network and image. What cannot matter there is listed, with why, and tried where it
does.
"""

import typing

import numpy as np
import pytest
import torch
from test_what_a_network_says import net

import consilience as cs
from consilience.types import Box

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
    "smoothgradcam++": "smoothgradcam++:samples=6",
    "expected-gradients": "expected-gradients:samples=8",
    "blur-ig": "blur-ig:steps=8",
    "integrated-gradients": "integrated-gradients:steps=4",
    "sscam": "sscam:samples=3",
    "iscam": "iscam:samples=3",
    "lrp": "lrp:composite=epsilon-plus",
}

OTHER = {
    "score": ("logit", "probability"),
    "layer": ("0", "2"),
    "fill": ("black", "white"),
    "baseline": ("black", "white"),
    "segments": ("grid(4)", "grid(5)"),
    "permutations": ("4", "6"),
    "fuse": None,  # of several layers: tried below
    "quantile": None,
}

CANNOT_MATTER_HERE = {
    **dict.fromkeys(
        [
            *("cam relu", "gradcam++ relu", "layercam relu", "scorecam relu"),
        ],
        "filled below",
    ),
}


def model():
    torch.manual_seed(0)
    module = net(3)
    with torch.no_grad():
        module[-1].weight.mul_(12)
    return cs.wrap(module, classes=("a", "b", "c"), size=SIDE)


@pytest.fixture(scope="module")
def network():
    return model()


def alternatives(cls, item):
    """Two spellings of an option's value, other than each other; None where only the
    table below knows some.
    """
    if item.name in OTHER:
        return OTHER[item.name]
    kind, value = typing.get_type_hints(cls)[item.name], item.default
    if isinstance(value, bool):
        return "true", "false"
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        return str(choices[0]), str(choices[1])
    if isinstance(value, int):
        return str(value), str(
            value + 1 if item.name == "seed" else max(2, value // 2)
        )
    if isinstance(value, float):
        return f"{value:g}", f"{value / 2 if value else 0.3:g}"
    if isinstance(value, tuple) and value and isinstance(value[0], float):
        return "+".join(f"{one:g}" for one in value), f"{value[0]:g}"
    return None


def spelled(name, option, value, base):
    """A specification with one option more, or another value of one that is there."""
    head, _, rest = base.partition(":")
    kept = [
        one for one in rest.split(",") if one and not one.startswith(f"{option}=")
    ]
    return f"{head}:{','.join([*kept, f'{option}={value}'])}"
