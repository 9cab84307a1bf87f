"""Options check themselves, whoever calls the constructor; spelling is invertible."""

import dataclasses
import math
import typing
from typing import Literal

import numpy as np
import pytest
import torch

from consilience import options
from consilience.dissection import concepts, encoders, words
from consilience.explainers.cam import GradCAM
from consilience.explainers.lime import Lime
from consilience.metrics.curves import PixelFlipping
from consilience.perturb.fills import BlurFill, ColourFill
from consilience.perturb.superpixels import Slic
from consilience.registry import (
    cutters,
    explainers,
    fills,
    metrics,
    segmenters,
    spell,
)
from consilience.targets import targets
from consilience.types import ConsilienceError

REGISTRIES = (
    explainers,
    metrics,
    segmenters,
    fills,
    cutters,
    targets,
    concepts.concept_sets,
    words.similarities,
    encoders.encoders,
)
CLASSES = {
    f"{registry.kind}-{name}": (registry, registry.get(name))
    for registry in REGISTRIES
    for name in registry.names()
    if registry.get(name).__module__.startswith("consilience.")
}
REQUIRED = {str: "red", int: 3, float: 0.5}


def required_values(cls):
    """Values for the options that have no default."""
    hints = typing.get_type_hints(cls)
    return {
        item.name: REQUIRED[hints[item.name]]
        for item in options.options_of(cls)
        if item.default is dataclasses.MISSING
    }


def literals(hint):
    """The choices of every Literal inside a type."""
    if typing.get_origin(hint) is Literal:
        return [typing.get_args(hint)]
    return [found for part in typing.get_args(hint) for found in literals(part)]


LITERAL_FIELDS = [
    pytest.param(cls, item.name, id=f"{name}.{item.name}")
    for name, (_, cls) in CLASSES.items()
    for item in options.options_of(cls)
    if literals(typing.get_type_hints(cls)[item.name])
]


@pytest.mark.parametrize(("cls", "name"), LITERAL_FIELDS)
def test_no_choice_takes_nonsense(cls, name):
    with pytest.raises(ConsilienceError) as caught:
        cls(**{**required_values(cls), name: "nonsense"})
    assert "\n" not in str(caught.value)
    assert f"{cls.spelled}: {name}" in str(caught.value)


def test_there_are_as_many_choices_as_there_were():
    assert len(LITERAL_FIELDS) >= 135


def other_value(item, hint):
    """A value that differs from the default and is allowed, or None."""
    kind = item.metadata.get("kind")
    if kind is not None:
        names = [
            name
            for name in options.BUILDERS[kind].names()
            if options.BUILDERS[kind].get(name).__module__.startswith("consilience.")
        ]
        built = [options.BUILDERS[kind].build(name) for name in names]
        if typing.get_origin(hint) is tuple:
            return tuple(built[:2])
        return next((one for one in built if one != item.default), None)
    choices = literals(hint)
    if choices and typing.get_origin(hint) is not tuple:
        return next((one for one in choices[0] if one != item.default), None)
    return {
        bool: not item.default,
        str: 'a, "b" + (c)=none',
        tuple[str, ...]: ("none",),
        typing.Optional[str]: "none",  # noqa: UP045 - the form that get_type_hints gives
        str | None: "none",
    }.get(hint)


def variants(cls):
    """The class at its defaults, and with one option changed at a time."""
    hints, base = typing.get_type_hints(cls), required_values(cls)
    yield cls(**base)
    for item in options.options_of(cls):
        value = other_value(item, hints[item.name])
        if value is None:
            continue
        try:
            yield cls(**{**base, item.name: value})
        except ConsilienceError:  # an option that goes with another one only
            continue


@pytest.mark.parametrize("name", CLASSES)
def test_parse_and_spell_are_inverse(name):
    registry, cls = CLASSES[name]
    for thing in variants(cls):
        assert registry.build(spell(thing)) == thing
        assert registry.build(spell(thing, full=True)) == thing


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_what_their_fields_say(name):
    _, cls = CLASSES[name]
    hints = typing.get_type_hints(cls)
    for item in options.options_of(cls):
        if item.default is not dataclasses.MISSING:
            again = options.checked_value(item.default, hints[item.name], item, name)
            assert again == item.default


# ---- by hand


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PixelFlipping(order="MoRF"),
            "pixel-flipping: order is one of morf, lerf; got 'MoRF'",
        ),
        (
            lambda: GradCAM(fuse="sum"),
            "gradcam: fuse is one of mean, max, product; got 'sum'",
        ),
        (
            lambda: GradCAM(score="prob"),
            "gradcam: score is one of logit, probability; got 'prob'",
        ),
        (lambda: Lime(samples="many"), "lime: samples is a whole number; got 'many'"),
        (lambda: Lime(samples=7.5), "lime: samples is a whole number; got 7.5"),
        (lambda: Lime(samples=True), "lime: samples is a whole number; got True"),
        (lambda: Lime(samples=1), "lime: samples must be at least 2; got 1"),
        (lambda: Lime(alpha=math.nan), "lime: alpha is a number; got nan"),
        (lambda: Lime(alpha=math.inf), "lime: alpha is finite; got inf"),
        (lambda: GradCAM(relu="yes"), "gradcam: relu is true or false; got 'yes'"),
        (lambda: GradCAM(layer=3), "gradcam: layer is a text; got 3"),
        (
            lambda: GradCAM(layer=torch.nn.ReLU()),
            "gradcam: layer is a text; got ReLU()",
        ),
        (
            lambda: Lime(sample=5),
            "lime has no option 'sample' (did you mean samples?); it has samples, ",
        ),
        (lambda: Lime(fill=3), "lime: fill is a fill; got 3"),
        (
            lambda: ColourFill((0.0, 0.5, 2.0)),
            "colour: rgb must be at least 0 and at most 1; got 2",
        ),
    ],
)
def test_one_line_in_the_style_of_the_spelled_form(make, message):
    with pytest.raises(ConsilienceError) as caught:
        make()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lime:samples=many", "lime: samples is a whole number; got 'many'"),
        ("lime:samples=1", "lime: samples must be at least 2; got 1"),
        ("gradcam:fuse=sum", "gradcam: fuse is one of mean, max, product; got 'sum'"),
    ],
)
def test_the_spelled_form_says_the_same(spec, message):
    with pytest.raises(ConsilienceError) as caught:
        explainers.build(spec)
    assert str(caught.value) == message


def test_values_become_what_they_mean():
    assert GradCAM(layer="layer4").layer == ("layer4",)
    assert GradCAM(layer=["a", "b"]).layer == ("a", "b")
    assert spell(GradCAM(layer=["blocks.5"])) == "gradcam:layer=blocks.5"
    made = Lime(
        samples=np.int64(64), alpha=np.float32(0.5), segments="slic:9", fill="blur:3"
    )
    assert type(made.samples) is int
    assert type(made.alpha) is float
    assert made.segments == Slic(9)
    assert made.fill == BlurFill(3)
    assert dataclasses.replace(made, samples=32).samples == 32
    with pytest.raises(ConsilienceError, match="at least 2"):
        dataclasses.replace(made, samples=1)
