"""Grad-CAM against the paper's formula, finite differences and pytorch-grad-cam."""

import numpy as np
import pytest
import torch
import torchvision
from conftest import planted_image

from consilience import api, images
from consilience.models.load import load_model
from consilience.models.network import wrap
from consilience.types import ClassTarget, ConsilienceError


def literal_gradcam(activations, gradients):
    """Equations 1 and 2 in loops, no ReLU."""
    channels, height, width = activations.shape
    total = np.zeros((height, width))
    for k in range(channels):
        alpha = 0.0
        for i in range(height):
            for j in range(width):
                alpha += gradients[k, i, j] / (height * width)
        for i in range(height):
            for j in range(width):
                total[i, j] += alpha * activations[k, i, j]
    return total


def test_equals_the_formula_with_gradients_by_finite_differences(red_model, planted):
    view = red_model.view(planted)
    acts = red_model.activations(view.pixels, ["last"])["last"].double()

    def score(a):
        return float((red_model.module.head.double()(a.mean(dim=(2, 3))))[0, 1])

    try:
        gradients = np.zeros(acts.shape[1:])
        for index in np.ndindex(*acts.shape[1:]):
            step = torch.zeros_like(acts)
            step[(0, *index)] = 1e-4
            gradients[index] = (score(acts + step) - score(acts - step)) / 2e-4
    finally:
        red_model.module.float()
    expected = literal_gradcam(acts[0].numpy(), gradients)
    explanation = api.explain(
        red_model, planted, "gradcam:layer=last,relu=false", target="red"
    )
    np.testing.assert_allclose(
        explanation.extras["grid"], expected, rtol=1e-4, atol=1e-7
    )


def peer_map(module, layer, pixels, index):
    """pytorch-grad-cam's map: ReLU, enlarged, scaled to [0, 1]."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with GradCAM(model=module, target_layers=[layer]) as cam:
        return cam(input_tensor=pixels, targets=[ClassifierOutputTarget(index)])[0]


def scaled(values):
    values = values - values.min()
    return values / (1e-7 + values.max())


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_pytorch_grad_cam_on_resnet50(seed):
    torch.manual_seed(seed)
    module = torchvision.models.resnet50().eval()
    model = wrap(
        module,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        size=224,
        resize=256,
    ).using(engine="torch")
    rng = np.random.default_rng(seed)
    sample = type(planted_image())(
        "noise", rng.integers(0, 256, (300, 260, 3), dtype=np.uint8)
    )
    view = model.view(sample)
    explanation = api.explain(model, sample, "gradcam", target=7)
    assert explanation.provenance["layer"] == "layer4"
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1)
        for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    peer = peer_map(module, module.layer4, (view.pixels - mean) / std, 7)
    # The peer enlarges with OpenCV, whose bilinear coefficients are rounded to 1/2048.
    np.testing.assert_allclose(scaled(explanation.values), peer, atol=1e-3)


def test_equals_pytorch_grad_cam_on_the_embedded_model():
    import skimage.data

    model = load_model("efficientnet_lite0", engine="torch")
    sample = type(planted_image())("cat", skimage.data.chelsea())
    view = model.view(sample)
    explanation = api.explain(model, sample, "gradcam")
    assert explanation.provenance["layer"] == "bn2"
    peer = peer_map(
        model.module, model.module.bn2, view.pixels * 2 - 1, explanation.target.index
    )
    np.testing.assert_allclose(scaled(explanation.values), peer, atol=1e-3)


def test_relu_is_on_the_layers_grid_before_enlarging(red_model, planted):
    signed = api.explain(red_model, planted, "gradcam:relu=false", target="nothing")
    positive = api.explain(red_model, planted, "gradcam", target="nothing")
    grid = torch.from_numpy(signed.extras["grid"]).relu()
    np.testing.assert_array_equal(
        positive.values, images.enlarge(grid, (64, 64)).numpy()
    )


def test_several_layers_are_fused_on_the_finest_grid(red_model, planted):
    fine, coarse = (
        api.explain(red_model, planted, f"gradcam:{layer}", target="red")
        for layer in ("act", "last")
    )
    both = api.explain(
        red_model, planted, "gradcam:layer=act+last,fuse=max", target="red"
    )
    np.testing.assert_allclose(
        both.values, np.maximum(fine.values, coarse.values), rtol=1e-5
    )


def test_unknown_layer_lists_what_there_is(red_model, planted):
    with pytest.raises(ConsilienceError, match="did you mean 'last'"):
        api.explain(red_model, planted, "gradcam:lasst", target="red")


def test_probability_and_logit_are_different_questions(red_model, planted):
    logit = api.explain(red_model, planted, "gradcam:relu=false", target="red")
    probability = api.explain(
        red_model, planted, "gradcam:relu=false,score=probability", target="red"
    )
    outputs = red_model.logits(red_model.view(planted).pixels).detach()
    p = ClassTarget(1, "red", "probability").of(outputs)
    red, grey = (
        api.explain(red_model, planted, "gradcam:relu=false", target=t).values
        for t in ("red", "nothing")
    )
    assert logit.target.score == "logit"
    # d p_red / d A = p (1 - p) (d z_red - d z_nothing) / d A
    np.testing.assert_allclose(
        probability.values, float(p * (1 - p)) * (red - grey), rtol=1e-3, atol=1e-7
    )
