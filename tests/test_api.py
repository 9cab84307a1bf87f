"""The public verbs: targets, views, provenance, refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import planted_image

import consilience as cs
from consilience import api, registry
from consilience.models.network import wrap
from consilience.types import ClassTarget, ConsilienceError, Sample


def test_public_surface_is_there():
    assert all(getattr(cs, name) is not None for name in cs.__all__)
    with pytest.raises(AttributeError, match="load_model"):
        cs.lode_model  # noqa: B018


def test_a_module_given_for_a_spelling_is_told_where_to_go():
    with pytest.raises(ConsilienceError, match=r"\(Linear\) goes to wrap\(module"):
        cs.load_model(torch.nn.Linear(2, 2))
    with pytest.raises(ConsilienceError, match="no model 'resnet5000'"):
        cs.load_model(Path("resnet5000"))
    with pytest.raises(ConsilienceError, match=r"a specification is text.*got int"):
        cs.load_model(50)


@pytest.mark.parametrize(
    "by", [3, None, cs.Sample, registry.explainers.get("gradcam")]
)
def test_what_is_no_explainer_is_refused_in_one_line(red_model, planted, by):
    with pytest.raises(ConsilienceError, match="not the spelling of one explainer"):
        cs.explain(red_model, planted, by)


def test_targets_by_word_number_and_name(red_model, planted):
    outputs = api.raw_outputs(red_model, red_model.view(planted))
    first = int(outputs[0].argmax())

    def index(target, sample=planted):
        return api.target_of_image(red_model, sample, target, outputs).index

    labelled = Sample("l", planted.pixels, label=0)
    assert [index("predicted"), index("red"), index("RED"), index(0), index("0")] == [
        first,
        1,
        1,
        0,
        0,
    ]
    assert index("true", labelled) == 0
    for target, said in [
        ("blue", "There is|there is: nothing, red"),
        ("7", "0 to 1"),
        ("-1", "0 to 1"),
        ("true", "--truth"),
    ]:
        with pytest.raises(ConsilienceError, match=said):
            index(target)


def test_an_ambiguous_class_name_is_refused(planted):
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    twins = wrap(module, classes=("crane", "dog", "crane"), size=32).using(
        engine="torch"
    )
    with pytest.raises(ConsilienceError, match="number 0 and 2"):
        api.explain(twins, planted, "gradcam", target="crane")


def test_scores_of_a_class_target():
    outputs = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    logit = ClassTarget(1, "b")
    assert logit.of(outputs).tolist() == [3.0, 0.0]
    expected = [np.exp(3) / (np.exp(1) + np.exp(3)), 0.5]
    np.testing.assert_allclose(
        logit.scored("probability").of(outputs), expected, rtol=1e-6
    )
    already = ClassTarget(1, "b", outputs="probabilities").scored("logit")
    assert already.score == "probability"
    assert already.of(outputs).tolist() == [3.0, 0.0]


def test_prediction_is_the_softmax_of_the_model(red_model, planted):
    view = red_model.view(planted)
    z = red_model.module(view.pixels).detach()[0].double().numpy()
    p = np.exp(z) / np.exp(z).sum()
    said = api.predict(red_model, api.raw_outputs(red_model, view))
    assert said.index == int(p.argmax())
    assert said.probability == pytest.approx(p.max(), rel=1e-5)
    assert said.margin == pytest.approx(p.max() - p.min(), rel=1e-5)


def test_key_changes_with_everything_the_map_depends_on(red_model, planted):
    base = api.explain(red_model, planted, "gradcam", target="red").provenance["key"]
    other_module = wrap(
        red_model.module,
        classes=("nothing", "red"),
        mean=(0, 0, 0),
        std=(2, 1, 1),
        size=64,
    )
    others = [
        api.explain(red_model, planted_image(1), "gradcam", target="red"),
        api.explain(red_model, planted, "gradcam:relu=false", target="red"),
        api.explain(red_model, planted, "gradcam:layer=act", target="red"),
        api.explain(red_model, planted, "gradcam", target="nothing"),
        api.explain(red_model, planted, "gradcam", target="red", view="squash"),
        api.explain(
            other_module.using(engine="torch"), planted, "gradcam", target="red"
        ),
    ]
    keys = [base, *(one.provenance["key"] for one in others)]
    assert len(set(keys)) == len(keys)
    auto_spelled_out = api.explain(
        red_model, planted, "gradcam:layer=last", target="red"
    )
    assert auto_spelled_out.provenance["key"] == base


def test_provenance_says_how(red_model, planted):
    made = api.explain(red_model, planted, "gradcam", target="red").provenance
    assert made["layer"] == "last"
    pairs = made["resolved"].removeprefix("gradcam:").split(",")
    assert set(pairs) == {"layer=last", "relu=true", "score=logit", "fuse=mean"}
    assert made["view"] == "crop"
    assert made["seconds"] > 0
    assert made["versions"]["torch"] == torch.__version__.partition("+")[0]
    z = red_model.module(red_model.view(planted).pixels).detach()
    assert made["score"] == pytest.approx(float(z[0, 1]), rel=1e-5)


def test_unknown_explainer_and_option_list_what_there_is(red_model, planted):
    with pytest.raises(ConsilienceError, match=r"did you mean 'gradcam'"):
        api.explain(red_model, planted, "grad-cam")
    with pytest.raises(
        ConsilienceError,
        match=r"lime has no option 'sample' \(did you mean samples\?\)",
    ):
        api.explain(red_model, planted, "lime:sample=3")
