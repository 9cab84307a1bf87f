"""Black boxes: functions and ONNX files say what torch says, are shown what they ask
for, and refuse what they cannot.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import RedFinder, planted_image
from PIL import Image
from torch import nn

import consilience as cs
from consilience import progress
from consilience.models import callable as callable_models
from consilience.models import onnx as onnxfile
from consilience.models.engines import plan
from consilience.models.load import load_model
from consilience.types import ConsilienceError, Model, Network, Sample


class Listener:
    def __init__(self):
        self.said = []

    def start(self, label, total):
        return 0

    def advance(self, task, steps):
        pass

    def finish(self, task):
        pass

    def say(self, message):
        self.said.append(message)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHT = np.random.default_rng(1).normal(size=(5, 3, 3, 3)).astype(np.float32)
HEAD = np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32)
BIAS = np.array([0.1, -0.2, 0.3, 0.0], np.float32)


@pytest.fixture(autouse=True)
def _files_that_only_score(monkeypatch):
    """What is tested here is the file; that it is opened is in test_sources."""
    monkeypatch.setattr(
        "consilience.models.onnx.opened_onnx", lambda box, *_: (box, "")
    )


def net(softmax: bool = False) -> nn.Module:
    """The network of `graph`, in torch: the oracle."""
    parts = [
        nn.Conv2d(3, 5, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    ]
    module = nn.Sequential(*parts, *([nn.Softmax(dim=1)] if softmax else []))
    with torch.no_grad():
        module[0].weight[:], module[4].weight[:], module[4].bias[:] = map(
            torch.from_numpy, (WEIGHT, HEAD, BIAS)
        )
    return module.eval()


def images(count: int, size: int = 16) -> torch.Tensor:
    return torch.rand(
        count, 3, size, size, generator=torch.Generator().manual_seed(count)
    )


def expected(
    pixels: torch.Tensor, softmax: bool = False, mean=MEAN, std=STD
) -> torch.Tensor:
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    with torch.no_grad():
        return torch.cat(
            [net(softmax)((one[None] - shift) / scale) for one in pixels]
        )


# ---- functions


def test_a_function_is_the_network_it_calls():
    """Scores, view, prediction and a whole LIME explanation, against the same module
    wrapped as one.
    """
    module, sample = RedFinder().eval(), planted_image()
    whole = cs.wrap(
        module, classes=("nothing", "red"), mean=(0, 0, 0), std=(1, 1, 1), size=64
    ).using(engine="torch")
    box = cs.wrap_callable(module, classes=("nothing", "red"), size=64, name="served")
    assert torch.equal(box.view(sample).pixels, whole.view(sample).pixels)
    pixels = images(45, 64)
    torch.testing.assert_close(
        box.scores(pixels), whole.scores(pixels), atol=1e-6, rtol=1e-6
    )
    by = "lime:samples=80,segments=grid(4),seed=3"
    mine, theirs = (cs.explain(model, sample, by) for model in (box, whole))
    np.testing.assert_allclose(mine.values, theirs.values, atol=1e-5)
    assert (mine.target.name, mine.provenance["engine"]) == ("red", "callable")
    assert isinstance(box, Model)
    assert not isinstance(box, Network)


def test_pixels_as_numpy_with_colours_last():
    seen = []

    def served(batch):
        seen.append((type(batch), batch.dtype, batch.shape))
        return (
            net()(torch.from_numpy(batch.transpose(0, 3, 1, 2)))
            .detach()
            .numpy()
            .astype(np.float64)
        )

    box = cs.wrap_callable(
        served, size=(16, 20), layout="nhwc", mean=MEAN, std=STD, batch=7
    )
    pixels = torch.rand(16, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        box.scores(pixels), expected(pixels), atol=1e-6, rtol=1e-5
    )
    assert seen[1:] == [
        (np.ndarray, np.float32, (count, 16, 20, 3)) for count in (7, 7, 2)
    ]
    assert box.view(Sample("p", np.zeros((9, 9, 3), np.uint8))).neutral == MEAN
    assert box.classes == ("class 0", "class 1", "class 2", "class 3")


@pytest.mark.parametrize(
    ("softmax", "found"), [(False, "logits"), (True, "probabilities")]
)
def test_what_the_outputs_are_is_found_on_a_trial(softmax, found):
    box = cs.wrap_callable(net(softmax), size=16)
    assert (box.outputs, box.facts["outputs"]) == (
        found,
        f"{found}, found on a trial",
    )
    told = cs.wrap_callable(net(softmax), size=16, outputs="values")
    assert (told.outputs, told.facts["outputs"]) == ("values", "values, as told")
    assert told.id != box.id


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([[0.5, 0.5], [1.0, 0.0]], "probabilities"),
        ([[0.5, 0.5004], [1.0, 0.0]], "probabilities"),  # a softmax in half precision
        ([[0.5, 0.5], [1.1, -0.1]], "logits"),
        ([[0.5, 0.5], [0.4, 0.5]], "logits"),
        ([[1.0], [1.0]], "logits"),
    ],
)
def test_probabilities_are_positive_and_sum_to_one(rows, kind):
    assert callable_models.kind_of(torch.tensor(rows)) == kind


def test_the_id_follows_what_is_said():
    assert cs.wrap_callable(net(), size=16).id == cs.wrap_callable(net(), size=16).id
    other = net()
    with torch.no_grad():
        other[4].bias[2] += 0.01
    assert cs.wrap_callable(other, size=16).id != cs.wrap_callable(net(), size=16).id
    assert (
        cs.wrap_callable(net(), size=16, mean=MEAN, std=STD).id
        != cs.wrap_callable(net(), size=16).id
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"function": 3}, "wrap_callable takes a function; got int"),
        (
            {"function": lambda x: x},
            r"returns \(3, 3, 16, 16\) for 3 images; a classifier",
        ),
        ({"function": lambda x: x.mean((1, 2, 3))}, r"returns \(3,\) for 3 images"),
        (
            {"function": lambda x: x.mean((2, 3))[:1]},
            r"returns \(1, 3\) for 3 images",
        ),
        ({"function": lambda x: "cat"}, "returns str; a classifier returns numbers"),
        ({"function": lambda x: x.mean((2, 3)) / 0}, "not finite on a trial"),
        (
            {"classes": ("a", "b")},
            "2 class names for .*, which gives 4 outputs an image",
        ),
        ({"layout": "hwc"}, "layout is nchw or nhwc; got 'hwc'"),
        ({"batch": 0}, "batch is at least 1"),
        (
            {"outputs": "odds"},
            "outputs are logits, sigmoid, probabilities or values; got 'odds'",
        ),
        ({"view": "fit"}, "view is crop or squash"),
        ({"memory": 5}, "memory is in bytes"),
        ({"std": (1, 0, 1)}, "std above 0"),
    ],
)
def test_what_is_no_classifier_is_said(change, message):
    with pytest.raises(ConsilienceError, match=message):
        cs.wrap_callable(**{"function": net(), "size": 16} | change)


def test_what_a_function_raises_goes_through():
    calls = []

    def fails_later(pixels):
        calls.append(1)
        return net()(pixels) if len(calls) < 2 else 1 / 0

    box = cs.wrap_callable(fails_later, size=16)
    with pytest.raises(ZeroDivisionError):
        box.scores(images(2))
    with pytest.raises(
        ConsilienceError,
        match=r"takes pixels \(N, 3, h, w\) of 16 x 16, floats in \[0, 1\]; got \(2, 3, 20, 20\)",
    ):
        box.scores(images(2, 20))
    assert box.scores(images(2)[:0]).shape == (0, 4)


def test_what_needs_more_than_scores_refuses(planted):
    box = cs.wrap_callable(RedFinder(), classes=("nothing", "red"), size=64)
    with pytest.raises(
        ConsilienceError,
        match=r"gradcam needs gradients, layers of the model; RedFinder@\w+ offers scores only",
    ):
        cs.explain(box, planted, "gradcam")
    for name in ("random", "centre", "edges", "constant"):
        assert np.isfinite(cs.explain(box, planted, name).values).all()


def test_using_keeps_what_it_is_not_told():
    box = cs.wrap_callable(net(), size=64, batch=500)
    assert (
        box.batch == plan.MEMORY // (12 * (64 + 3) * 64 * 64)
        if box.batch < 32
        else box.batch == 32
    )
    small = box.using(memory=8 << 20)
    assert small.batch == (8 << 20) // (12 * (64 + 3) * 64 * 64) == 2
    assert small.id == box.id
    torch.testing.assert_close(small.scores(images(5, 64)), box.scores(images(5, 64)))
    assert box.using(precision="f32", device="cpu").id == box.id
    for options in (
        {"precision": "bf16"},
        {"device": "cuda"},
        {"engine": "openvino"},
    ):
        with pytest.raises(ConsilienceError):
            box.using(**options)


# ---- ONNX files


def graph(
    path,
    shape=("N", 3, 16, 16),
    softmax=False,
    dtype="FLOAT",
    metadata=None,
    second_input=False,
    op=None,
):
    """A hand-built file of `net`: conv, ReLU, global mean, linear; NHWC where the 3
    stands last; bytes where dtype is UINT8.
    """
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, getattr(onnx.TensorProto, dtype)
    nodes, at = [], "images"

    def add(op, *inputs, **attributes):
        nonlocal at
        nodes.append(
            helper.make_node(op, [at, *inputs], [f"v{len(nodes)}"], **attributes)
        )
        at = nodes[-1].output[0]

    if dtype != "FLOAT":
        add("Cast", to=onnx.TensorProto.FLOAT)
    if dtype == "UINT8":
        add("Sub", "mean")
        add("Div", "std")
    if shape[-1] == 3:
        add("Transpose", perm=[0, 3, 1, 2])
    add("Conv", "weight", strides=[2, 2])
    add("Relu")
    add("GlobalAveragePool")
    add("Flatten")
    add("Gemm", "head", "bias", transB=1)
    if softmax:
        add("Softmax", axis=1)
    if op:
        nodes.append(helper.make_node(op, [at], ["odd"], domain="own.domain"))
        at = "odd"
    nodes[-1].output[0] = "scores"
    side = (3,) if shape[-1] == 3 else (3, 1, 1)
    held = {
        "weight": WEIGHT,
        "head": HEAD,
        "bias": BIAS,
        "mean": 255 * np.reshape(MEAN, side),
        "std": 255 * np.reshape(STD, side),
    }
    given = [helper.make_tensor_value_info("images", kind, shape)]
    if second_input:
        given.append(helper.make_tensor_value_info("more", kind, [1]))
    out = helper.make_tensor_value_info(
        "scores", onnx.TensorProto.FLOAT, [shape[0], 4]
    )
    tensors = [
        onnx.numpy_helper.from_array(np.asarray(value, np.float32), name)
        for name, value in held.items()
    ]
    opsets = [
        helper.make_opsetid("", 17),
        *([helper.make_opsetid("own.domain", 1)] if op else []),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "net", given, [out], tensors),
        opset_imports=opsets,
        ir_version=9,
    )
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        ("N", 3, 16, 16),
        (8, 3, 16, 16),
        (1, 3, 16, 16),
        ("N", 16, 16, 3),
        (None, 3, None, None),
    ],
)
@pytest.mark.parametrize("count", [1, 8, 37])
def test_an_onnx_file_is_its_torch_network(tmp_path, shape, softmax, count):
    path = graph(tmp_path / "net.onnx", shape, softmax)
    model = load_model(f"onnx:{path},mean=.485+.456+.406,std=.229+.224+.225,size=16")
    pixels = images(count)
    torch.testing.assert_close(
        model.scores(pixels), expected(pixels, softmax), atol=1e-6, rtol=1e-4
    )
    assert model.outputs == ("probabilities" if softmax else "logits")
    assert model.batch == (shape[0] if isinstance(shape[0], int) else 32)
    facts = model.facts
    assert (facts["engine"], facts["device"], facts["weights"]) == (
        "onnxruntime",
        "cpu",
        str(path),
    )
    assert facts["layout"] == ("nhwc" if shape[-1] == 3 else "nchw")
    assert "assumed" not in facts
    assert model.can == frozenset()
    assert load_model(model.spec).id == model.id


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("UINT8", (1, 16, 16, 3)),
        ("UINT8", ("N", 3, 16, 16)),
        ("DOUBLE", ("N", 3, 16, 16)),
    ],
)
def test_the_type_of_the_input_is_the_files(tmp_path, dtype, shape):
    model = load_model(f"onnx:{graph(tmp_path / 'net.onnx', shape, dtype=dtype)}")
    pixels = (
        torch.from_numpy(
            np.random.default_rng(0).integers(0, 256, (9, 3, 16, 16))
        ).float()
        / 255
    )
    torch.testing.assert_close(
        model.scores(pixels), expected(pixels), atol=1e-4, rtol=1e-4
    )
    if dtype == "UINT8":
        with pytest.raises(ConsilienceError, match="takes bytes as they are"):
            load_model(f"onnx:{tmp_path / 'net.onnx'},mean=.5,std=.5")


def test_images_in_0_to_255(tmp_path):
    path = graph(tmp_path / "net.onnx")
    pixels = images(3)
    model = load_model(f"onnx:{path},scale=255,mean=127.5,std=51")
    torch.testing.assert_close(
        model.scores(pixels),
        expected(pixels, mean=(0.5,) * 3, std=(0.2,) * 3),
        atol=1e-5,
        rtol=1e-4,
    )
    assert model.recipe.mean == (0.5, 0.5, 0.5)
    bare = load_model(f"onnx:{path},scale=255")
    torch.testing.assert_close(
        bare.scores(pixels),
        expected(pixels, mean=(0.0,) * 3, std=(1 / 255,) * 3),
        atol=1e-3,
        rtol=1e-4,
    )


def test_what_is_assumed_is_said_and_kept(tmp_path):
    listener = Listener()
    with progress.listening(listener):
        model = load_model(f"onnx:{graph(tmp_path / 'net.onnx')}")
    (said,) = listener.said
    assert said.startswith(
        "net.onnx does not say its mean, std; taken: mean 0.485+0.456+0.406, std "
        "0.229+0.224+0.225"
    )
    assert model.facts["assumed"] in said
    torch.testing.assert_close(
        model.scores(images(2)), expected(images(2)), atol=1e-6, rtol=1e-4
    )


def test_a_file_that_takes_one_image_and_claims_any(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = graph(tmp_path / "net.onnx")
    model = onnx.load(path)
    one = onnx.numpy_helper.from_array(np.array([1, 5], np.int64), "one")
    model.graph.initializer.append(one)
    flatten = next(node for node in model.graph.node if node.op_type == "Flatten")
    flatten.op_type = "Reshape"
    flatten.input.append("one")
    onnx.save(model, path)
    box = load_model(f"onnx:{path}")
    assert box.batch == 1
    torch.testing.assert_close(
        box.scores(images(3)), expected(images(3)), atol=1e-6, rtol=1e-4
    )
    assert box.using(memory=2 << 20).batch == 1


def test_class_names_of_an_onnx_file(tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\nc\nd")
    plain = graph(tmp_path / "net.onnx")
    for names in (str({0: "a", 1: "b", 2: "c", 3: "d"}), '["a", "b", "c", "d"]'):
        assert load_model(
            f"onnx:{graph(tmp_path / 'n.onnx', metadata={'names': names})}"
        ).classes == tuple("abcd")
    assert (
        load_model(
            f"onnx:{graph(tmp_path / 'n.onnx', metadata={'names': '{(['})}"
        ).classes[0]
        == "class 0"
    )
    assert load_model(f"onnx:{plain},classes=a+b+c+d").classes == tuple("abcd")
    assert load_model(
        f"onnx:{plain}", labels=tmp_path / "names.txt"
    ).classes == tuple("abcd")
    with pytest.raises(
        ConsilienceError, match=r"2 class names for net.onnx, which gives 4 outputs"
    ):
        load_model(f"onnx:{plain},classes=a+b")


def test_weights_beside_the_file_count(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = graph(tmp_path / "net.onnx")
    inside = load_model(f"onnx:{path}")
    model = onnx.load(path)
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    before = load_model(f"onnx:{path}")
    torch.testing.assert_close(before.scores(images(2)), inside.scores(images(2)))
    content = bytearray((tmp_path / "weights.bin").read_bytes())
    content[3] ^= 1
    (tmp_path / "weights.bin").write_bytes(content)
    assert load_model(f"onnx:{path}").id != before.id


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda path: path.write_bytes(b"hello"),
            "",
            "is no ONNX model that can be run: ",
        ),
        (
            lambda path: path.write_bytes(b""),
            "",
            "is no ONNX model that can be run: ",
        ),
        (
            lambda path: path.write_bytes(graph(path).read_bytes()[:300]),
            "",
            "is no ONNX model that can be run: ",
        ),
        (
            lambda path: graph(path, op="Own"),
            "",
            "is no ONNX model that can be run: .*own.domain",
        ),
        (
            lambda path: graph(path, second_input=True),
            "",
            r"has 2 inputs \(images, more\)",
        ),
        (
            lambda path: graph(path, dtype="INT32"),
            "",
            r"takes tensor\(int32\) as 'images'; read are tensor\(float\)",
        ),
        (
            lambda path: graph(path, ("N", 3, 16)),
            "",
            "no ONNX model|takes .* a classifier of images takes",
        ),
        (
            lambda path: graph(path, (None, None, None, None)),
            "",
            "give layout=nchw or layout=nhwc",
        ),
        (graph, ",size=20", "takes 16 x 16; size is 20 x 20"),
        (graph, ",layout=nhwc", "takes 16 channels"),
        (graph, ",output=logits", "no output 'logits'; there is: scores"),
        (graph, ",mean=.5", "mean and std go together"),
        (graph, ",mean=.5+.5,std=.5", r"mean is one number or red\+green\+blue"),
        (graph, ",weights=random", "onnx has no option 'weights'"),
        (graph, ",precision=bf16", "runs in the precision it was made in"),
        (
            graph,
            ",engine=openvino",
            "onnx files run by onnxruntime; got engine 'openvino'",
        ),
        (graph, ",device=tpu", "no device 'tpu' here"),
        (graph, ",memory=lots", "memory is a number of bytes"),
        (lambda path: None, "", "there is no file"),
    ],
)
def test_what_is_no_such_model_is_said_in_one_line(
    tmp_path, capfd, make, options, message
):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    make(path)
    with pytest.raises(ConsilienceError, match=message) as caught:
        load_model(f"onnx:{path}{options}")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_without_the_runtime_it_says_what_to_install(tmp_path, monkeypatch):
    path = graph(tmp_path / "net.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ConsilienceError, match=r"pip install 'consilience\[onnx\]'"):
        load_model(f"onnx:{path}")


def test_onnx_from_the_command_line(tmp_path, capsys):
    from consilience.cli import main

    path = graph(tmp_path / "net.onnx")
    Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    ).save(tmp_path / "p.png")
    by = ("--by", "lime:samples=40,segments=grid(4)", "--by", "random")
    assert (
        main(
            [
                "explain",
                str(tmp_path / "p.png"),
                "-m",
                f"onnx:{path}",
                *by,
                "-o",
                str(tmp_path / "run"),
                "--memory",
                "500M",
            ]
        )
        == 0
    )
    run = cs.Run(tmp_path / "run")
    assert run.manifest["model"]["facts"]["engine"] == "onnxruntime"
    assert run.manifest["precision"] == []
    assert "mean 0.485" in (tmp_path / "run" / "report.html").read_text()
    assert (
        main(
            [
                "explain",
                str(tmp_path / "p.png"),
                "-m",
                f"onnx:{path}",
                "--by",
                "gradcam",
                "-o",
                str(tmp_path / "no"),
            ]
        )
        == 1
    )
    assert (
        "gradcam needs gradients, layers of the model; net@"
        in capsys.readouterr().err
    )
    assert main(["list", "layers", "-m", f"onnx:{path}"]) == 1
    assert "offers scores only" in capsys.readouterr().err


def test_a_factory_may_return_a_black_box(tmp_path, monkeypatch):
    (tmp_path / "served.py").write_text(
        "import consilience as cs\ndef make():\n    return cs.wrap_callable(lambda x: "
        "x.mean((2, 3)), size=16, name='means')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    box = load_model("served:make", memory="2M", view="squash")
    assert (box.spec, box.mode, box.memory) == (
        "served:make,view=squash,memory=2M",
        "squash",
        2 << 20,
    )
    torch.testing.assert_close(box.scores(images(3)), images(3).mean((2, 3)))


def test_names_of_external_files_are_found():
    assert [
        found[1][0]
        for found in onnxfile._LOCATION.finditer(b"xx\x0a\x08location\x12\x05a.bin")
    ] == [5]
