"""What people hold an image, a label or a network in, given to ``cs.explain`` as it is."""

import io
import itertools
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from networks import small_cnn as net
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import consilience as cs

CLASSES = ("cat", "dog", "rose")


@pytest.fixture(scope="module")
def model():
    return cs.wrap(net(), size=64, classes=CLASSES)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (70, 90, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pixels):
    """Two class folders and files that are no images."""
    base = tmp_path_factory.mktemp("photos")
    for name, shift in (("rose/1.png", 0), ("cat/2.png", 40)):
        file = base / name
        file.parent.mkdir()
        Image.fromarray(np.roll(pixels, shift, axis=1)).save(file)
    (base / "notes.txt").write_text("x")
    (base / "cat" / "movie.mov").write_text("x")
    return base


@pytest.fixture(scope="module")
def expected(model, pixels):
    return cs.explain(model, cs.Sample("x", pixels), "gradcam").values


def as_tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


HOLDERS = {
    "path": lambda pixels, folder: str(folder / "rose" / "1.png"),
    "Path": lambda pixels, folder: folder / "rose" / "1.png",
    "PIL": lambda pixels, folder: Image.fromarray(pixels),
    "opened PIL": lambda pixels, folder: Image.open(folder / "rose" / "1.png"),
    "bytes": lambda pixels, folder: (folder / "rose" / "1.png").read_bytes(),
    "open file": lambda pixels, folder: io.BytesIO(
        (folder / "rose" / "1.png").read_bytes()
    ),
    "uint8": lambda pixels, folder: pixels,
    "int64": lambda pixels, folder: pixels.astype(np.int64),
    "float32": lambda pixels, folder: pixels.astype(np.float32) / 255,
    "float64": lambda pixels, folder: pixels / 255,
    "channels first": lambda pixels, folder: pixels.transpose(2, 0, 1),
    "tensor": lambda pixels, folder: as_tensor(pixels),
    "float tensor": lambda pixels, folder: as_tensor(pixels) / 255,
    "requires grad": lambda pixels, folder: (
        as_tensor(pixels) / 255
    ).requires_grad_(),
    "tensor channels last": lambda pixels, folder: torch.from_numpy(pixels),
    "pair": lambda pixels, folder: (as_tensor(pixels), 1),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_one_image_in_any_holder(holder, model, pixels, folder, expected):
    got = cs.explain(model, HOLDERS[holder](pixels, folder), "gradcam")
    assert isinstance(got, cs.Explanation)
    assert np.array_equal(got.values, expected)


class Items(Dataset):
    """As torchvision's folders: pairs, class names in an order of their own."""

    classes = ("rose", "cat", "dog")

    def __init__(self, pixels, count=3):
        self.pixels, self.count = pixels, count

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        if place >= self.count:
            raise IndexError(place)
        return as_tensor(np.roll(self.pixels, place, axis=0)) / 255, place % 3


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        yield from (self.items[place] for place in range(len(self.items)))


class Records:
    """As a Hugging Face data set: mappings, class names among the features."""

    features: ClassVar = {"label": SimpleNamespace(names=["rose", "cat", "dog"])}

    def __init__(self, pixels):
        self.items = Items(pixels)

    def __len__(self):
        return 3

    def __getitem__(self, place):
        image, label = self.items[place]
        array = (image * 255).round().byte().permute(1, 2, 0).numpy()
        return {"image": Image.fromarray(array), "label": label}


COLLECTIONS = {
    "data set": lambda pixels: Items(pixels),
    "iterable data set": lambda pixels: Stream(Items(pixels)),
    "loader": lambda pixels: DataLoader(Items(pixels), batch_size=2),
    "a loader's batch": lambda pixels: next(
        iter(DataLoader(Items(pixels), batch_size=3))
    ),
    "records": lambda pixels: Records(pixels),
    "list of pairs": lambda pixels: [Items(pixels)[place] for place in range(3)],
    "generator": lambda pixels: (Items(pixels)[place][0] for place in range(3)),
    "batch": lambda pixels: torch.stack(
        [Items(pixels)[place][0] for place in range(3)]
    ),
    "array batch": lambda pixels: np.stack(
        [np.roll(pixels, place, axis=0) for place in range(3)]
    ),
    "mapping": lambda pixels: {
        f"n{place}": np.roll(pixels, place, axis=0) for place in range(3)
    },
}
LABELLED = {"data set", "loader", "records"}


@pytest.mark.parametrize("kind", COLLECTIONS)
def test_many_images_in_any_holder(kind, model, pixels):
    found = cs.explain(model, COLLECTIONS[kind](pixels), "gradcam")
    assert isinstance(found, cs.Explanations)
    assert len(found) == 3
    assert not found.failures
    for place, one in enumerate(found):
        rolled = np.roll(pixels, place, axis=0)
        alone = cs.explain(model, rolled, "gradcam")
        assert np.array_equal(one.sample.pixels, rolled)
        assert np.abs(one.values - alone.values).max() < 1e-6
        assert one.target.index == alone.target.index
        assert one.provenance["score"] == pytest.approx(alone.provenance["score"])
        said, known = one.provenance["prediction"], alone.provenance["prediction"]
        assert said["index"] == known["index"]
        assert said["margin"] == pytest.approx(known["margin"], abs=1e-6)
    if (
        kind in LABELLED
    ):  # by name, since both have names: rose is the network's third
        assert [one.sample.label for one in found] == [2, 0, 1]
    names = [one.sample.name for one in found]
    assert len(set(names)) == 3
    if kind == "mapping":
        assert found["n1"] is found[1]


@pytest.mark.parametrize(
    "by", ["gradcam", "lime:samples=32,seed=1", "smoothgrad:samples=4", "centre"]
)
def test_a_batch_is_many_of_one_by_every_kind_of_method(by, model, pixels):
    batch = np.stack([pixels, np.roll(pixels, 9, axis=1)])
    found = cs.explain(model, batch, by)
    for one, image in zip(found, batch, strict=True):
        assert np.abs(one.values - cs.explain(model, image, by).values).max() < 1e-5


def test_a_folder_a_pattern_and_a_list_of_paths(model, folder):
    whole = cs.explain(model, folder)
    assert [one.sample.name for one in whole] == ["2", "1"]
    assert [one.sample.label for one in whole] == [0, 2]  # their folders' names
    assert [one.sample.source for one in whole] == [
        str(folder / "cat" / "2.png"),
        str(folder / "rose" / "1.png"),
    ]
    pattern = cs.explain(model, str(folder / "*" / "1.png"))
    assert [one.sample.name for one in pattern] == ["1"]
    listed = cs.explain(model, sorted(folder.glob("*/*.png")), target="true")
    assert [one.target.index for one in listed] == [0, 2]


def test_what_fails_is_beside_the_rest(model, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    found = cs.explain(model, tmp_path)
    assert [one.sample.name for one in found] == ["good"]
    assert [one.name for one in found.failures] == ["bad"]
    assert "bad.png: not an image in any format" in found.failures[0].reason
    assert repr(found) == "<Explanations by gradcam: 1 image, 1 failed>"
    (tmp_path / "good.png").unlink()
    with pytest.raises(cs.ConsilienceError, match=r"the image not could be|bad\.png"):
        cs.explain(model, tmp_path)


def test_one_that_fails_in_a_batch_is_alone(pixels):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            if bool((x == 1).all(dim=(1, 2, 3)).any()):
                raise RuntimeError("white images are not for me")
            return self.net(x)

    picky = cs.wrap(Picky(), size=64, mean=(0, 0, 0), std=(1, 1, 1), classes=CLASSES)
    white = np.full_like(pixels, 255)
    found = cs.explain(picky, [pixels, white, np.roll(pixels, 3)])
    assert len(found) == 2
    (failure,) = found.failures
    assert failure.name == "image-0001"
    assert "white images are not for me" in failure.reason


REFUSED = {
    "floats to 255": (lambda p: p.astype(np.float32), "divide by 255, or give uint8"),
    "normalised": (lambda p: (as_tensor(p) / 255 - 0.5) / 0.2, "normalised already?"),
    "not finite": (lambda p: np.full((9, 9, 3), np.nan), "not an image"),
    "address": (lambda p: "https://example.org/dog.jpg", "download it first"),
    "none": (lambda p: None, "a data set or a loader; got NoneType"),
    "number": (lambda p: 3, "got int"),
    "missing": (lambda p: "nosuch.jpg", "nosuch.jpg: no such file"),
    "empty list": (lambda p: [], "no images: list is empty"),
    "empty batch": (lambda p: np.zeros((0, 9, 9, 3), np.uint8), "holds none"),
    "axes": (lambda p: np.zeros((5, 28, 28)), "which axis of"),
    "transparency": (
        lambda p: np.dstack([p, p[:, :, :1]]),
        "image has 4 channels, and the network takes 3 channels",
    ),
    "vector": (lambda p: np.zeros(9), "an image is"),
    "text bytes": (lambda p: b"hello", "the bytes are not an image"),
    "wide ints": (lambda p: p.astype(int) * 9, "whole numbers from 0 to 2295"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_image_is_refused_in_one_line(kind, model, pixels):
    make, said = REFUSED[kind]
    with pytest.raises(cs.ConsilienceError) as error:
        cs.explain(model, make(pixels))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# ---- networks


def test_a_bare_module_is_wrapped(pixels):
    module = net()
    assert np.array_equal(
        cs.explain(module, pixels).values,
        cs.explain(cs.wrap(module), pixels).values,
    )


def test_a_function_and_a_spelling(pixels):
    def means(images):
        return images.mean(dim=(2, 3))

    by = "lime:samples=32"
    assert np.array_equal(
        cs.explain(means, pixels, by).values,
        cs.explain(cs.wrap_callable(means), pixels, by).values,
    )
    assert cs.explain("efficientnet_lite0", pixels, "centre").model_id.startswith(
        "efficientnet_lite0@"
    )


@pytest.mark.parametrize("wrong", [42, nn.Linear, None, {"a": 1}])
def test_what_is_no_model_is_refused(wrong, pixels):
    with pytest.raises(cs.ConsilienceError, match="a model is a spelling"):
        cs.explain(wrong, pixels)


class Wrapped(nn.Module):
    """A classifier that returns its scores in some holder."""

    def __init__(self, hold):
        super().__init__()
        self.net, self.hold = net(), hold

    def forward(self, x):
        return self.hold(self.net(x))


HOLDS = {
    "dict": lambda y: {"logits": y, "features": y.repeat(1, 2)},
    "only one": lambda y: {
        "scores": y,
        "maps": y[:, :, None, None].repeat(1, 1, 2, 2),
    },
    "tuple": lambda y: (y, None),
    "one in a list": lambda y: [y],
    "object": lambda y: SimpleNamespace(logits=y),
    "cell": lambda y: y[:, :, None, None],
}


@pytest.mark.parametrize("kind", HOLDS)
@pytest.mark.parametrize("by", ["gradcam", "ablationcam", "lime:samples=8"])
def test_outputs_in_any_holder(kind, by, pixels):
    got = cs.explain(Wrapped(HOLDS[kind]), pixels, by)
    assert np.allclose(got.values, cs.explain(net(), pixels, by).values, atol=1e-6)


def test_one_of_several_outputs_is_named(pixels):
    module = Wrapped(lambda y: {"first": y, "second": -y})
    with pytest.raises(cs.ConsilienceError, match=r"name the one.*: first, second"):
        cs.wrap(module)
    second = cs.explain(cs.wrap(module, output="second"), pixels, target=1)
    negated = cs.explain(Wrapped(lambda y: -y), pixels, target=1)
    assert np.allclose(second.values, negated.values)
    assert np.abs(second.values).max() > 0
    with pytest.raises(
        cs.ConsilienceError, match=r"no output 'third'.*first, second"
    ):
        cs.wrap(module, output="third")
    pair = cs.wrap(Wrapped(lambda y: (y, -y)), output=1)
    assert np.allclose(cs.explain(pair, pixels, target=1).values, second.values)


def test_a_row_for_every_image():
    with pytest.raises(cs.ConsilienceError, match="3 scores for 1 image"):
        cs.wrap(Wrapped(lambda y: y[0]))
    single = cs.wrap(Wrapped(lambda y: y[:, 0]))
    assert single.classes == ("class 0", "class 1")  # a yes or no


def test_a_parallel_module_is_opened(pixels):
    module = net()
    parallel = cs.wrap(nn.DataParallel(module))
    assert parallel.module is module
    assert np.array_equal(
        cs.explain(parallel, pixels).values, cs.explain(module, pixels).values
    )


def test_a_module_that_cannot_run_says_so_in_one_line():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(cs.ConsilienceError) as error:
        cs.wrap(flat)
    said = str(error.value)
    assert said.startswith(
        "Sequential cannot be run on a black image (1, 3, 224, 224)"
    )
    assert "give wrap the size= and channels=" in said
    assert "\n" not in said
    assert cs.wrap(flat, size=32).anatomy.outputs == 10


def test_a_model_is_one_line(model):
    assert repr(model) == "<Sequential: 3 classes (logits), 3 x 64 x 64, f32 on cpu>"
    box = cs.wrap_callable(lambda x: x.mean((2, 3)), name="means", size=32)
    assert (
        repr(box) == "<means: 3 classes (logits), 3 x 32 x 32, scores only, callable>"
    )


# ---- what comes back


def test_tables_of_many(model, pixels):
    many = cs.explain(model, [pixels, np.roll(pixels, 5)])
    table = many.table()
    assert list(table["image"]) == ["image-0000", "image-0001"]
    assert list(table["predicted"]) == [
        one.provenance["prediction"]["name"] for one in many
    ]
    assert table["true"].isna().all()
    scores = cs.evaluate(model, many, ["deletion:steps=4", "pointing-game"])
    alone = cs.evaluate(model, many[1], "deletion:steps=4")["deletion:steps=4"].value
    assert scores[1]["deletion:steps=4"].value == pytest.approx(alone)
    rows = scores.table()
    assert list(zip(rows["image"], rows["metric"], strict=True)) == list(
        itertools.product(table["image"], ["deletion:steps=4", "pointing-game"])
    )
    summary = scores.summary().set_index("metric")
    values = [one["deletion:steps=4"].value for one in scores]
    mean, spread = np.mean(values), np.ptp(values) / 2
    row = summary.loc["deletion:steps=4"]
    assert row["mean"] == pytest.approx(mean)
    assert (row["n"], row["missing"]) == (2, 0)
    # Student's t with one degree of freedom at 95 %
    assert row["low"] == pytest.approx(mean - 12.7062 * spread, rel=1e-4)
    assert row["high"] == pytest.approx(mean + 12.7062 * spread, rel=1e-4)
    assert summary.loc["pointing-game", "missing"] == 2
    assert np.isnan(summary.loc["pointing-game", "mean"])
    with pytest.raises(cs.ConsilienceError, match="no image is called 'x'"):
        many["x"]


def test_a_suite_and_the_quick_one_by_default(model, pixels):
    from consilience.metrics.suites import SUITES

    one = cs.explain(model, pixels)
    assert tuple(cs.evaluate(model, one)) == SUITES["quick"]
    assert tuple(cs.evaluate(model, one, suite="quick")) == SUITES["quick"]
    both = cs.evaluate(model, one, "deletion:steps=3", suite="quick")
    assert tuple(both) == ("deletion:steps=3", *SUITES["quick"])
    with pytest.raises(cs.ConsilienceError, match="suite"):
        cs.evaluate(model, one, suite="quik")


def test_own_maps_are_like_any_other(model, pixels):
    made = cs.explain(model, pixels)
    own = cs.Explanation.of(pixels, made.values, model, name="mine")
    assert own.explainer == "mine"
    assert own.target == made.target
    assert own.provenance["score"] == pytest.approx(made.provenance["score"])
    for metric in ("deletion:steps=4", "average-drop"):
        assert (
            cs.evaluate(model, own, metric)[metric].value
            == cs.evaluate(model, made, metric)[metric].value
        )
    (row,) = cs.agree([own, made]).table().to_dict("records")
    assert row["iou"] == 1
    again = cs.evaluate(model, own, "max-sensitivity")["max-sensitivity"]
    assert isinstance(again, cs.NotApplicable)


def test_an_own_map_of_the_image_is_moved_into_the_frame(model):
    pixels = np.zeros((64, 128, 3), np.uint8)
    values = np.zeros((64, 128))
    values[:, 32:96] = np.arange(64)[None, :]  # what the centre crop shows
    own = cs.Explanation.of(pixels, values, model, target=0, frame="image")
    assert np.allclose(own.values, values[:, 32:96], atol=1e-4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((2, 3, 4)), "sum it over colours first"),
        (np.full((4, 4), np.inf), "not finite"),
        ("x", "a map is numbers"),
        (np.zeros((0, 4)), "a map is"),
    ],
)
def test_own_maps_that_are_none(values, said, model, pixels):
    with pytest.raises(cs.ConsilienceError, match=said):
        cs.Explanation.of(pixels, values, model)


def test_own_maps_have_names_of_their_own(model, pixels):
    with pytest.raises(cs.ConsilienceError, match="an explainer of its own"):
        cs.Explanation.of(pixels, np.ones((4, 4)), model, name="gradcam")


def test_layers_side_by_side(model, pixels):
    found = cs.compare_layers(model, pixels)
    names = [one.provenance["layer"] for one in found]
    assert names == ["0", "1", "2", "3"]
    for name, one in zip(names, found, strict=True):
        alone = cs.explain(model, pixels, f"gradcam:layer={name}")
        assert np.array_equal(one.values, alone.values)
    chosen = cs.compare_layers(model, pixels, ["2"], by="layercam")
    assert [one.name for one in chosen] == ["layercam"]
    assert len(found.figure().axes) == 4
    with pytest.raises(cs.ConsilienceError, match="lime looks at no layer"):
        cs.compare_layers(model, pixels, by="lime")


def test_to_fiftyone_fills_the_samples_of_the_data_set(
    model, folder, monkeypatch, pixels
):
    class Kept(dict):
        def __init__(self, filepath):
            super().__init__()
            self.filepath, self.saved = filepath, 0

        def save(self):
            self.saved += 1

    fake = SimpleNamespace(Heatmap=lambda **said: ("heatmap", *said.values()))
    monkeypatch.setitem(__import__("sys").modules, "fiftyone", fake)
    files = sorted(map(str, folder.glob("*/*.png")))
    dataset = [Kept(file) for file in files]
    found = cs.explain(model, folder, "gradcam++")
    found.to_fiftyone(dataset)
    for one, kept in zip(found, dataset, strict=True):
        kind, values, span = kept["gradcam_plus_plus"]
        shown = one.to_image()
        assert (kind, span, kept.saved) == ("heatmap", [0, 1], 1)
        assert values.shape == one.sample.pixels.shape[:2]
        seen = np.isfinite(shown)
        scaled = (shown[seen] - shown[seen].min()) / np.ptp(shown[seen])
        assert np.allclose(values[seen], scaled)
        assert (values[~seen] == 0).all()
    with pytest.raises(cs.ConsilienceError, match="has no sample for"):
        found.to_fiftyone(dataset[:1])


@pytest.mark.parametrize(
    "kind", ["data set", "loader", "records", "array batch", "mapping"]
)
def test_a_run_of_what_people_hold(kind, model, pixels, tmp_path):
    given = COLLECTIONS[kind](pixels)
    run = cs.run(model, given, "gradcam", tmp_path / "run")
    assert len(run.samples) == 3
    found = {one.sample.name: one for one in cs.explain(model, given, "gradcam")}
    for one in run.values() if hasattr(run, "values") else run:
        assert np.allclose(one.values, found[one.sample.name].values, atol=1e-6)
    made = (tmp_path / "run" / "explanations.parquet").stat().st_mtime_ns
    again = cs.run(model, COLLECTIONS[kind](pixels), "gradcam", tmp_path / "run")
    assert len(again.samples) == 3
    assert made
    with pytest.raises(cs.ConsilienceError):  # another job
        cs.run(model, [np.roll(pixels, 1)], "gradcam", tmp_path / "run")


def test_a_run_takes_a_bare_module_and_an_image_that_fails(pixels, tmp_path):
    run = cs.run(net(), [pixels, np.zeros(5)], "centre", tmp_path / "run")
    assert len(run.samples) == 1
    assert run.manifest["failures"][0]["name"] == "image-0001"


def test_what_a_folder_holds_besides_is_counted(folder, tmp_path):
    from consilience.image_files import passed_over

    assert passed_over([folder]) == "passed over 2 other files: 1 .mov, 1 .txt"
    assert passed_over([folder / "rose", "nosuch.jpg"]) is None
    (tmp_path / "README").write_text("x")
    (tmp_path / ".hidden").write_text("x")
    assert passed_over([tmp_path]) == "passed over 1 other file: 1 no suffix"


def test_an_image_three_pixels_high_lies_as_its_kind_does(model):
    odd = np.random.default_rng(1).integers(0, 256, (3, 40, 3)).astype(np.uint8)
    assert np.array_equal(cs.explain(model, odd).sample.pixels, odd)
    turned = cs.explain(model, torch.from_numpy(odd)).sample.pixels
    assert np.array_equal(turned, odd.transpose(1, 2, 0))


def test_labels_of_a_data_set_that_shares_a_name_are_never_numbers(model, pixels):
    class Partly(Items):
        classes = ("dog", "cat", "ox")  # the network has cat, dog, rose

    found = cs.explain(model, Partly(pixels))
    assert [one.sample.label for one in found] == [1, 0, None]
    assert "label 'ox' is none of the network's classes" in found[2].sample.notes

    class Others(Items):
        classes = ("a", "b", "c")

    assert [one.sample.label for one in cs.explain(model, Others(pixels))] == [
        0,
        1,
        2,
    ]
    wrong = cs.explain(model, [(pixels, 1), (pixels, 7)])
    assert [one.sample.label for one in wrong] == [1, None]
    assert "label 7 is none of the network's 3 classes" in wrong[1].sample.notes


def test_one_number_is_every_channels():
    assert cs.wrap(net(), mean=0.5, std=0.25).recipe.mean == (0.5,) * 3
    assert cs.wrap(net(2, 1), mean=0.5, std=0.25).recipe.std == (0.25,)
    assert cs.wrap(net(2, 4), channels=4, mean=0.5).recipe.mean == (0.5,) * 4


def test_right_and_wrong_are_by_number_where_classes_share_a_name(pixels, tmp_path):
    twins = cs.wrap(net(), size=64, classes=("crane", "crane", "dog"))
    predicted = cs.explain(twins, pixels).target.index
    samples = [
        cs.Sample("same", pixels, label=predicted),
        cs.Sample("other", pixels, label=(predicted + 1) % 3),
        cs.Sample("unknown", pixels),
    ]
    run = cs.run(twins, samples, "centre", tmp_path / "run")
    said = {name: one["right"] for name, one in run.predictions.items()}
    assert said == {"same": True, "other": False, "unknown": None}
