"""What a number depends on changes the key under which it is kept: a table."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from test_what_a_network_says import SAMPLE, net, wrapped

import consilience as cs
from consilience import api, registry
from consilience.dissection.measure import DissectionOptions, Job, layers_of
from consilience.evaluation import columns
from consilience.runs import evaluate
from consilience.types import Box


@pytest.fixture(scope="module")
def model():
    return wrapped(net(3), classes=("a", "b", "c"))


def key(
    model, sample=SAMPLE, by="lime:samples=16,segments=grid(2)", target=0, view=None
):
    explainer = registry.explainers.build(by)
    goal = api.target_of_image(model, sample, target, torch.zeros(1, 3))
    shown = model.view(sample, view)
    return api.explanation_key(model, sample, shown, explainer, goal)


def other_weights():
    torch.manual_seed(5)
    module = net(3)
    with torch.no_grad():
        next(module.parameters()).add_(0.01)
    return wrapped(module, classes=("a", "b", "c"))


PIXELS = SAMPLE.pixels.copy()
PIXELS[0, 0, 0] ^= 1

CHANGES = {
    "a pixel": {"sample": replace(SAMPLE, pixels=PIXELS)},
    "the explainer": {"by": "rise:masks=16"},
    "an option": {"by": "lime:samples=17,segments=grid(2)"},
    "a seed": {"by": "lime:samples=16,segments=grid(2),seed=1"},
    "a nested option": {"by": "lime:samples=16,segments=grid(3)"},
    "a nested choice": {"by": "lime:samples=16,segments=grid(2),fill=black"},
    "the class": {"target": 1},
    "a target of two classes": {"target": "difference:0,1"},
    "the view": {"view": "squash"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_map_depends_on_is_in_its_key(model, change):
    wide = replace(SAMPLE, pixels=np.concatenate([SAMPLE.pixels] * 2, axis=1))
    sample = {"sample": wide} if change == "the view" else {}
    assert key(model, **sample) != key(model, **(sample | CHANGES[change]))


MODELS = {
    "weights": lambda model: other_weights(),
    "the mean": lambda model: wrapped(model.module, mean=(0.1, 0.2, 0.3)),
    "the spread": lambda model: wrapped(model.module, std=(0.1, 0.2, 0.3)),
    "the frame": lambda model: cs.wrap(model.module, size=60),
    "what is resized": lambda model: wrapped(model.module, resize=80),
    "interpolation": lambda model: wrapped(model.module, interpolation="bicubic"),
    "the kind of outputs": lambda model: wrapped(model.module, outputs="sigmoid"),
    "the precision": lambda model: model.using(precision="bf16", engine="torch"),
    "the engine": lambda model: model.using(engine="torch"),
}


@pytest.mark.parametrize("change", MODELS)
def test_what_a_model_is_is_in_the_key_of_its_maps(model, change):
    base = model.using(engine="openvino") if change == "the engine" else model
    assert key(base) != key(MODELS[change](base))


def test_the_same_has_the_same_key(model):
    again = wrapped(model.module, classes=("a", "b", "c"))
    assert key(model) == key(again) == key(again, by="lime:16,segments=grid(n=2)")
    assert key(model, sample=replace(SAMPLE, name="other", label=2)) == key(model)


# ---- numbers about maps


def entry(model, column, seed=0, sample=SAMPLE, target=0, view=None, **changed):
    made = cs.explain(model, sample, "lime:samples=16,segments=grid(2)", target, view)
    made = replace(made, **changed)
    rows = columns.columns_of([("LIME", made.explainer)])
    there = columns.image_entries(rows, {"LIME": made}, {"LIME": model}, seed)
    return next(one for one in there if one.column.label == column)


def test_the_key_of_a_control(model):
    base = entry(model, "random").key
    wide = replace(SAMPLE, pixels=np.concatenate([SAMPLE.pixels] * 2, axis=1))
    assert entry(model, "random").key == base
    assert entry(model, "centre").key != base
    assert entry(model, "random", target=1).key != base
    assert entry(other_weights(), "random").key != base
    assert entry(model.using(precision="bf16", engine="torch"), "random").key != base
    views = {
        entry(model, "random", sample=wide, view=view).key
        for view in ("crop", "squash")
    }
    assert len(views) == 2
    control = columns.TableColumn("random", "control", "random:seed=1")
    made = cs.explain(model, SAMPLE, "gradcam", 0)
    seeded = columns._entry(control, {"C": made}, {"C": model}, "C", 0)
    plain = columns._entry(
        columns.TableColumn("random", "control", "random"),
        {"C": made},
        {"C": model},
        "C",
        0,
    )
    assert seeded.key != plain.key


def test_the_key_of_another_class(model):
    base = entry(model, "LIME, another class").key
    assert entry(model, "LIME, another class", seed=1).key != base
    assert entry(model, "LIME, another class", target=1).key != base
    assert entry(other_weights(), "LIME, another class").key != base


def test_the_key_of_a_score(model):
    own = entry(model, "LIME")

    def scored(column=own, sample=SAMPLE):
        return evaluate._key(column, columns.truth_digest(sample))

    base = scored()
    assert scored(entry(model, "LIME", target=1)) != base
    assert (
        scored(replace(own, model=model.using(precision="bf16", engine="torch")))
        != base
    )
    truth = replace(SAMPLE, label=1)
    boxed = replace(truth, boxes=(Box(1, 0, 0, 9, 9),))
    moved = replace(truth, boxes=(Box(1, 0, 0, 9, 8),))
    masked = replace(truth, masks={"red": np.eye(64, dtype=bool)})
    turned = replace(truth, masks={"red": ~np.eye(64, dtype=bool)})
    keys = {
        scored(sample=one) for one in (SAMPLE, truth, boxed, moved, masked, turned)
    }
    assert len(keys) == 6


# ---- dissections


OTHER = {
    "union": "lite",
    "upsample": "align_corners",
    "view": "crop",
    "quantile": 0.9,
    "threshold": 0.5,
    "level": 0.1,
}


@pytest.mark.parametrize("name", [item.name for item in fields(DissectionOptions)])
def test_every_option_of_a_dissection_is_in_its_key(model, name):
    from consilience.dissection.concepts import load_concepts

    concepts = load_concepts("drawn:images=20,size=32")
    layers = layers_of(model, [model.layers()[0].name])
    base = DissectionOptions()
    value = OTHER.get(name)
    other = replace(
        base, **{name: value if value is not None else getattr(base, name) + 1}
    )

    def of(options, layers=layers, concepts=concepts, model=model):
        return Job(model, layers, concepts, options, None).key

    assert of(base) == of(DissectionOptions())
    assert of(other) != of(base)
    if name == "seed":
        assert of(base, layers=layers_of(model, [model.layers()[1].name])) != of(base)
        assert of(base, concepts=load_concepts("drawn:images=21,size=32")) != of(base)
        assert of(base, model=other_weights()) != of(base)
