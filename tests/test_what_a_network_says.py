"""Networks as people bring them: cut gradients, compiled parts, counters, random
passes, other dtypes, a caller's own modes, classes called by digits.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import small_cnn as net
from torch import nn

import consilience as cs
from consilience.classnames import classes_named
from consilience.targets.classes import class_name
from consilience.types import ConsilienceError

SAMPLE = cs.Sample(
    "noise", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
)


def wrapped(module, **more):
    return cs.wrap(module, size=64, **more)


class Cut(nn.Module):
    """Its body runs without gradients, in one of three ways."""

    def __init__(self, how):
        super().__init__()
        whole = net()
        self.body, self.tail, self.how = whole[:2], whole[2:], how

    def forward(self, x):
        if self.how == "detach":
            return self.tail(self.body(x).detach())
        with torch.no_grad() if self.how == "no_grad" else torch.inference_mode():
            features = self.body(x)
        return self.tail(features.clone())


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "detach"])
def test_a_cut_gradient_is_refused_in_front_of_the_cut_and_right_behind_it(how):
    model = wrapped(Cut(how))
    for by in ("gradient", "integrated-gradients:steps=4", "gradcam:layer=body.0"):
        with pytest.raises(ConsilienceError, match="forward pass cuts it"):
            cs.explain(model, SAMPLE, by)
    whole = cs.explain(wrapped(net()), SAMPLE, "gradcam:layer=3", target=1)
    behind = cs.explain(model, SAMPLE, "gradcam:layer=tail.3", target=1)
    np.testing.assert_allclose(behind.values, whole.values, atol=1e-7)
    asked = [p.requires_grad for p in model.module.parameters()]
    assert all(asked)
    assert all(p.grad is None for p in model.module.parameters())


def test_a_quantised_head_gives_no_gradient():
    module = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})
    for by in ("gradient", "gradcam", "gradcam:layer=0"):
        with pytest.raises(ConsilienceError, match="forward pass cuts it"):
            cs.explain(wrapped(module), SAMPLE, by)
    assert np.abs(cs.explain(wrapped(module), SAMPLE, "scorecam").values).max() > 0


def test_a_true_zero_carries_its_reason():
    """A ReLU that is off: the score does not change with the image either."""
    module = net()
    with torch.no_grad():
        module[0].weight.zero_()
        module[0].bias.fill_(-1)
    made = cs.explain(wrapped(module), SAMPLE, "gradient")
    assert np.abs(made.values).max() == 0
    assert any(
        "gradient is exactly zero" in note for note in made.provenance["notes"]
    )
    sampled = cs.explain(wrapped(module), SAMPLE, "occlusion:window=32,stride=32")
    assert any("nothing that was changed" in n for n in sampled.provenance["notes"])


@pytest.mark.parametrize("by", ["gradcam", "gradient", "lime:samples=64", "scorecam"])
def test_the_callers_modes_change_nothing(by):
    model = wrapped(net())
    right = cs.explain(model, SAMPLE, by)
    for mode in (
        torch.inference_mode(),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        with mode:
            found = cs.explain(model, SAMPLE, by)
            number = cs.evaluate(model, right, "insertion:steps=4")[
                "insertion:steps=4"
            ]
        np.testing.assert_array_equal(found.values, right.values)
        assert found.provenance["precision"] == "f32"
        assert (
            number.value
            == cs.evaluate(model, right, "insertion:steps=4")[
                "insertion:steps=4"
            ].value
        )
    assert not torch.is_inference_mode_enabled()


def in_place(module):
    module.compile(backend="eager")
    return module


def of_a_part(module):
    module[2] = torch.compile(module[2], backend="eager")
    return module


@pytest.mark.parametrize(
    "how", [lambda m: torch.compile(m, backend="eager"), in_place, of_a_part]
)
@pytest.mark.parametrize("by", ["gradcam", "gradient", "scorecam"])
def test_compiled_networks_are_as_right_as_the_eager_ones(how, by):
    right = cs.explain(wrapped(net()), SAMPLE, by)
    found = cs.explain(wrapped(how(net())), SAMPLE, by)
    np.testing.assert_allclose(found.values, right.values, atol=1e-7)


class Count(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.body, self.how, self.calls, self.seen_by = net(), how, 0, []
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.how == "attribute":
            self.calls += 1
        if self.how == "list":
            self.seen_by.append(1)
        if self.how == "buffer":
            self.seen += 1
        if self.how == "new buffer":
            self.seen = self.seen + 1
        return self.body(x)


@pytest.mark.parametrize("how", ["attribute", "list", "buffer", "new buffer"])
def test_a_counter_in_forward_is_not_another_model(how):
    model = wrapped(Count(how))
    made = [cs.explain(model, SAMPLE, by) for by in ("gradcam", "gradient")]
    assert made[0].model_id == made[1].model_id == model.id
    assert len(cs.agree(made).table()) == 1
    before = model.id
    with torch.no_grad():
        model.module.body[0].weight.add_(1)
    assert model.id != before  # what is not volatile still counts
    model.module.how = "none"
    changed = model.id
    assert changed not in (before, made[0].model_id)


def test_a_random_forward_pass_says_so():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return self.body(nn.functional.dropout(x, 0.3, training=True))

    for by in ("gradcam", "lime:samples=64"):
        notes = cs.explain(wrapped(Dropped()), SAMPLE, by).provenance["notes"]
        assert any("forward pass is random" in note for note in notes)
    plain = cs.explain(wrapped(net()), SAMPLE, "gradcam")
    assert "notes" not in plain.provenance


@pytest.mark.parametrize(
    ("dtype", "precision", "near"),
    [
        (torch.float16, "f16", 0.1),
        (torch.bfloat16, "bf16", 0.1),
        (torch.float64, "f64", 1e-5),
    ],
)
@pytest.mark.parametrize(
    "by", ["gradcam", "integrated-gradients:steps=3", "lime:samples=64", "scorecam"]
)
def test_a_network_is_explained_in_its_own_precision(dtype, precision, near, by):
    low = wrapped(net().to(dtype))
    assert low.facts["precision"] == precision
    assert low.facts["engine"] == "torch"
    found, plain = (
        cs.explain(model, SAMPLE, by, 1) for model in (low, wrapped(net()))
    )
    gap = np.abs(found.values - plain.values).max()
    assert gap < near * np.abs(plain.values).max()
    assert found.provenance["precision"] == precision
    with pytest.raises(ConsilienceError, match="engine openvino runs float32"):
        wrapped(net().to(dtype), engine="openvino")


def test_a_backbone_that_runs_twice_says_so():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = net()

        def forward(self, x):
            return self.n(x) + self.n(x.flip(3))

    for by in ("gradcam", "gradcam:layer=n.3"):
        with pytest.raises(ConsilienceError, match="2 times in one pass"):
            cs.explain(wrapped(Twice()), SAMPLE, by)


# ---- names of classes


def test_a_text_is_a_name_before_it_is_a_number():
    model = wrapped(net(), classes=("2", "0", "1"))
    found = [cs.explain(model, SAMPLE, "gradient", target=t).target for t in ("0", 0)]
    assert [(one.index, one.name) for one in found] == [(1, "0"), (0, "2")]
    plain = wrapped(net(), classes=("a", "b", "c"))
    assert cs.explain(plain, SAMPLE, "gradient", target="2").target.name == "c"


@pytest.mark.parametrize("number", [np.int64(1), np.uint8(1), torch.tensor(1)])
def test_whole_numbers_of_any_library_are_targets(number):
    made = cs.explain(wrapped(net()), SAMPLE, "gradient", target=number)
    assert made.target.index == 1


@pytest.mark.parametrize("wrong", [None, 1.0, True, [1], torch.ones(2)])
def test_what_is_no_target_is_one_line(wrong):
    with pytest.raises(ConsilienceError, match="a target is a word"):
        cs.explain(wrapped(net()), SAMPLE, "gradient", target=wrong)


def test_one_rule_for_names_of_classes():
    classes = ("hen, biddy", "jack-o'-lantern", "crane", "crane", "Hen")
    assert classes_named("Hen", classes) == [4]  # exactly so
    assert classes_named("hen", classes) == [4]  # as it is compared
    assert classes_named("biddy", classes) == [0]
    assert classes_named("Jack_o_Lantern", classes) == [1]
    assert classes_named("crane", classes) == [2, 3]
    assert classes_named("crow", classes) == []
    model = SimpleNamespace(classes=classes)
    assert [class_name(model, i) for i in (1, 2, 3, 9)] == [
        "jack-o'-lantern",
        "crane (2)",
        "crane (3)",
        "9",
    ]


def test_a_pass_without_gradients_stays_one():
    model = wrapped(net())
    pixels = model.view(SAMPLE).pixels
    with torch.no_grad():
        assert not model.logits(pixels).requires_grad
    assert not model.scores(pixels).requires_grad
    assert model.logits(pixels.clone().requires_grad_()).requires_grad


# ---- what a module says of itself


def test_a_wrapped_timm_network_is_shown_images_as_its_configuration_says():
    import timm

    torch.manual_seed(0)
    module = timm.create_model("efficientnet_lite0", num_classes=3).eval()
    module.pretrained_cfg = {
        **module.pretrained_cfg,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.2, 0.1),
        "input_size": (3, 64, 64),
        "crop_pct": 0.8,
        "interpolation": "bicubic",
    }
    model = cs.wrap(module)
    recipe = model.recipe
    assert (recipe.size, recipe.resized) == ((64, 64), (80, 80))
    assert (recipe.mean, recipe.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert recipe.interpolation == "bicubic"
    assert model.facts["assumed"] == (
        "as its pretrained_cfg says; outputs read as logits of one class of several "
        "(outputs=sigmoid for labels)"
    )
    other = cs.wrap(module, mean=(0, 0, 0), interpolation="bilinear").recipe
    assert (other.mean, other.std) == ((0, 0, 0), (0.2, 0.2, 0.1))
    assert (other.interpolation, other.size) == ("bilinear", (64, 64))
    own = cs.wrap(module, size=96).recipe  # another frame is another recipe
    assert (own.size, own.resized, own.interpolation) == (
        (96, 96),
        (96, 96),
        "bilinear",
    )


def test_what_is_assumed_is_said():
    plain = cs.wrap(net(), size=64)
    assert plain.facts["assumed"] == (
        "ImageNet's mean, ImageNet's std assumed: the module does not say; outputs read "
        "as logits of one class of several (outputs=sigmoid for labels)"
    )
    told = cs.wrap(net(), size=64, mean=(0, 0, 0), std=(1, 1, 1), outputs="logits")
    assert "assumed" not in told.facts


# ---- one logit, independent labels


def literal_sigmoid(number):
    return 1 / (1 + np.exp(-number))


def test_one_logit_is_a_yes_or_no():
    """Softmax over one number is 1; the probability of the yes is its sigmoid."""
    model = wrapped(net(1), classes=("red",))
    assert (model.outputs, model.classes) == ("sigmoid", ("red", "not red"))
    assert "outputs=sigmoid" in model.facts["assumed"]
    logit = float(model.logits(model.view(SAMPLE).pixels)[0, 0].detach())
    lime = cs.explain(model, SAMPLE, "lime:samples=64,segments=grid(4)")
    assert lime.provenance["score"] == pytest.approx(literal_sigmoid(logit), abs=1e-6)
    said = lime.provenance["prediction"]["probability"]
    assert said == pytest.approx(literal_sigmoid(logit), abs=1e-6)
    assert np.abs(lime.values).max() > 0
    cam = cs.explain(model, SAMPLE, "gradcam")
    assert cam.provenance["score"] == pytest.approx(logit, abs=1e-6)
    curve = cs.evaluate(model, cam, "deletion:steps=8")["deletion:steps=8"].curve
    assert curve[1, 0] == pytest.approx(literal_sigmoid(logit), abs=1e-6)
    assert np.ptp(curve[1]) > 0


@pytest.mark.parametrize("inside", [False, True])
def test_the_complement_of_one_output_is_the_second_class(inside):
    """p of the complement is 1 - p; its logit and its gradients are the first's with the
    other sign; every tail and a written-out copy know it.
    """
    module = nn.Sequential(net(1), nn.Sigmoid()) if inside else net(1)
    model = wrapped(module)
    assert model.classes == ("class 0", "class 1")
    pixels = model.view(SAMPLE).pixels
    raw = model.logits(pixels)[0].detach()
    assert float(raw[1]) == pytest.approx(float(1 - raw[0] if inside else -raw[0]))
    both = [cs.explain(model, SAMPLE, "gradient", target=index) for index in (0, 1)]
    assert np.abs(both[0].values).max() > 0
    yes, no = (
        cs.explain(model, SAMPLE, "gradient:channels=sum", target=index).values
        for index in (0, 1)
    )
    np.testing.assert_allclose(no, -yes, atol=1e-7)
    chances = [
        cs.explain(model, SAMPLE, "lime:samples=64,segments=grid(4)", index)
        for index in (0, 1)
    ]
    assert sum(one.provenance["score"] for one in chances) == pytest.approx(1)
    weights = [one.extras["weights"] for one in chances]
    np.testing.assert_allclose(weights[1], -weights[0], atol=1e-6)
    assert np.abs(weights[0]).max() > 0
    layer = model.target_layer()
    channels = torch.arange(4)
    ablated = {}
    for kind in ("closed", "split", "replay") if not inside else ("split", "replay"):
        ablated[kind] = model.tail(pixels, layer, kind).without(channels)
        assert ablated[kind].shape == (4, 2)
    for kind in ablated:
        torch.testing.assert_close(
            ablated[kind], ablated["replay"], atol=1e-5, rtol=1e-4
        )
    if not inside:
        relevance = [
            cs.explain(model, SAMPLE, "lrp", index).values for index in (0, 1)
        ]
        assert not np.allclose(relevance[0], relevance[1])


def test_names_of_a_yes_or_no():
    assert wrapped(net(1), classes=("cat", "dog")).classes == ("cat", "dog")
    with pytest.raises(
        cs.ConsilienceError, match="3 class names for a module with 1"
    ):
        wrapped(net(1), classes=("a", "b", "c"))
    box = cs.wrap_callable(
        lambda x: x.mean(dim=(1, 2, 3))[:, None] * 90 - 40, classes=("red",), size=32
    )
    assert box.classes == ("red", "not red")
    said = box.scores(torch.full((2, 3, 32, 32), 0.6))
    np.testing.assert_allclose(said, [[14, -14]] * 2, atol=1e-4)
    sure = cs.wrap_callable(lambda x: x.mean(dim=(1, 2, 3))[:, None], size=32)
    np.testing.assert_allclose(
        sure.scores(torch.full((1, 3, 32, 32), 0.6)), [[0.6, 0.4]], atol=1e-6
    )
    assert sure.outputs == "probabilities"


def test_a_black_box_that_is_random_says_so():
    rng = np.random.default_rng(0)

    def noisy(pixels):
        return np.stack([rng.normal(size=len(pixels)), np.ones(len(pixels))], axis=1)

    made = cs.explain(
        cs.wrap_callable(noisy, size=32), SAMPLE, "lime:samples=32,segments=grid(3)"
    )
    assert "forward pass is random" in made.provenance["notes"][0]
    steady = cs.wrap_callable(lambda x: x.mean(dim=(2, 3)), size=32)
    assert steady.randomness == 0


def test_a_torchvision_entry_says_how_images_are_shown():
    from torchvision.models import ResNet18_Weights, resnet18

    entry = ResNet18_Weights.IMAGENET1K_V1
    module = resnet18(weights=None).eval()
    model = cs.wrap(module, weights=entry)
    recipe = model.recipe
    # torchvision's own transforms: 256, centre 224, these means
    assert (recipe.size, recipe.resized) == ((224, 224), (256, 256))
    assert recipe.mean == (0.485, 0.456, 0.406)
    assert (model.classes[0], len(model.classes)) == ("tench", 1000)
    assert "as its weights entry says" in model.facts["assumed"]
    own = entry.transforms()(torch.from_numpy(SAMPLE.pixels).permute(2, 0, 1))
    ours = recipe.normalised(model.view(SAMPLE).pixels)[0]
    assert float((own - ours).abs().mean()) < 0.02
    with pytest.raises(cs.ConsilienceError, match="weights is a torchvision entry"):
        cs.wrap(module, weights="IMAGENET1K_V1")


def test_a_softmax_already_inside_is_found():
    """A softmax of a softmax is nearly uniform."""
    model = wrapped(nn.Sequential(net(4), nn.Softmax(dim=1)))
    assert model.outputs == "probabilities"
    assert "sum to 1" in model.facts["assumed"]
    raw = model.logits(model.view(SAMPLE).pixels)[0].detach()
    made = cs.explain(model, SAMPLE, "lime:samples=64,segments=grid(4)")
    assert made.provenance["prediction"]["probability"] == pytest.approx(
        float(raw.max()), abs=1e-6
    )
    told = wrapped(nn.Sequential(net(4), nn.Softmax(dim=1)), outputs="logits")
    assert told.outputs == "logits"
    logs = wrapped(nn.Sequential(net(4), nn.LogSoftmax(dim=1)))
    assert logs.outputs == "logits"


def test_sigmoids_already_inside_are_found():
    model = wrapped(nn.Sequential(net(4), nn.Sigmoid()))
    assert model.outputs == "probabilities"
    assert "a sigmoid inside" in model.facts["assumed"]


class Squashed(nn.Module):
    """Numbers in [0, 1] by a function, which no module tells."""

    def __init__(self):
        super().__init__()
        self.net = net(4)

    def forward(self, x):
        return torch.sigmoid(self.net(x))


def test_what_cannot_be_told_is_said():
    assert (
        "read as logits (outputs= says otherwise)"
        in wrapped(Squashed()).facts["assumed"]
    )
    assert "outputs of noise" not in wrapped(net(4)).facts["assumed"]


def test_labels_that_do_not_exclude_each_other():
    model = wrapped(net(5), outputs="sigmoid")
    logits = model.logits(model.view(SAMPLE).pixels)[0].detach().numpy()
    made = cs.explain(model, SAMPLE, "lime:samples=64,segments=grid(4)", target=3)
    assert made.provenance["score"] == pytest.approx(
        float(literal_sigmoid(logits[3])), abs=1e-6
    )
    best = made.provenance["prediction"]
    assert best["index"] == int(logits.argmax())
    assert best["probability"] == pytest.approx(
        float(literal_sigmoid(logits.max())), abs=1e-6
    )
    likely = sorted(np.flatnonzero(logits >= 0), key=lambda index: -logits[index])
    assert list(best["also"]) == likely[1:]
    assert len(likely) > 1
    assert np.isnan(best["uniform"])
    gap = cs.explain(model, SAMPLE, "lime:samples=64", target="difference:0,1")
    right = literal_sigmoid(logits[0]) - literal_sigmoid(logits[1])
    assert gap.provenance["score"] == pytest.approx(float(right), abs=1e-6)


def test_a_black_box_of_one_output():
    def yes(pixels):
        return np.asarray(pixels).mean(axis=(1, 2, 3))[:, None] * 800 - 150

    def sure(pixels):
        return literal_sigmoid(yes(pixels))

    found = [cs.wrap_callable(f, size=32).outputs for f in (yes, sure)]
    assert found == ["sigmoid", "probabilities"]
    with pytest.raises(ConsilienceError, match="logits, sigmoid, probabilities"):
        wrapped(net(), outputs="softmax")


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_automatic_layer_of_a_segmentation_is_not_its_answer(channels):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, channels, 1)
    )
    model = cs.wrap_segmentation(module.eval(), size=64)
    made = cs.explain(model, SAMPLE, "gradcam", target="pixels:class 1")
    assert made.provenance["layer"] == "1"


@pytest.mark.parametrize("total", [1 - 5e-5, 1 + 5e-5])
def test_a_softmax_in_single_precision_need_not_sum_to_one_exactly(total):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(4)

        def forward(self, x):
            return self.net(x).softmax(dim=1) * total

    assert wrapped(Scaled()).outputs == "probabilities"


def test_labels_from_a_half_on_are_predicted_too():
    def says(pixels):
        return torch.tensor([[3.0, 0.05, -0.05, 1.0]]).expand(len(pixels), -1)

    model = cs.wrap_callable(
        says, classes=("a", "b", "c", "d"), size=32, outputs="sigmoid"
    )
    made = cs.explain(model, SAMPLE, "lime:samples=32,segments=grid(2)")
    assert made.provenance["prediction"]["also"] == (3, 1)
