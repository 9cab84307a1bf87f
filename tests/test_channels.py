"""Images of any number of channels, bits and formats, and networks that take them."""

import numpy as np
import pytest
import tifffile
import torch
from networks import small_cnn
from PIL import Image
from torch import nn

import consilience as cs
from consilience import images

pydicom = pytest.importorskip("pydicom")


def net(channels, outputs=2):
    return small_cnn(outputs, channels)


RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _the_same_numbers_whatever_ran_before():
    RNG.bit_generator.state = np.random.default_rng(1).bit_generator.state


COLOUR = RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 2, 4, 11])
def test_the_gradient_is_torchs_own(channels):
    module = net(channels)
    mean = tuple(np.linspace(0.2, 0.6, channels))
    std = tuple(np.linspace(0.3, 0.5, channels))
    model = cs.wrap(module, size=64, mean=mean, std=std)
    assert model.channels == channels
    pixels = RNG.random((64, 64, channels)).astype(np.float32)
    found = cs.explain(
        model, cs.Sample("x", pixels), "gradient:channels=sum", target=1
    )
    leaf = torch.from_numpy(pixels).permute(2, 0, 1)[None].double().requires_grad_()
    shape = (1, channels, 1, 1)
    shown = (leaf - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(
        shape
    )
    double = net(channels).double()
    (grad,) = torch.autograd.grad(double(shown)[0, 1], [leaf])
    assert np.abs(found.values - grad[0].sum(0).numpy()).max() < 1e-6
    assert np.abs(found.values).max() > 1e-4


class FourthIgnored(nn.Module):
    """A three-channel network that is given a fourth."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, 2, 1)
        self.rest = net(3)[1:]
        with torch.no_grad():
            self.first.weight.zero_()
            self.first.weight[:, :3] = net(3)[0].weight
            self.first.bias[:] = net(3)[0].bias

    def forward(self, x):
        return self.rest(self.first(x))


METHODS = [
    "gradcam:layer=rest.3",
    "lime:samples=64,seed=1",
    "lime:samples=64,segments=slic,fill=blur",
    "kernelshap:samples=64",
    "rise:masks=32",
    "occlusion",
    "integrated-gradients:steps=4",
    "integrated-gradients:steps=4,baseline=white",
    "guided-backprop",
    "scorecam:layer=rest.3",
    "xrai",
    "edges",
    "centre",
]


@pytest.mark.parametrize("by", METHODS)
def test_a_channel_that_is_not_read_changes_nothing(by):
    """Every method, on four channels of which the network reads three."""
    extra = RNG.integers(0, 256, (64, 64, 1)).astype(np.uint8)
    four = cs.Sample("x", np.dstack([COLOUR, extra]))
    wide = cs.wrap(FourthIgnored(), size=64, mean=(0.5,) * 4, std=(0.5,) * 4)
    plain = cs.wrap(net(3), size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    spec = by.replace("rest.3", "3")
    got = cs.explain(wide, four, by, target=1)
    expected = cs.explain(plain, cs.Sample("x", COLOUR), spec, target=1)
    assert np.abs(got.values - expected.values).max() < 1e-5
    assert np.abs(expected.values).max() > 0


@pytest.mark.parametrize(
    "metric",
    [
        "insertion:steps=8",
        "deletion:steps=8,fill=percentile",
        "average-drop",
        "road",
        "irof",
        "max-sensitivity:samples=2",
        "sparseness",
        "infidelity",
    ],
)
@pytest.mark.parametrize("channels", [1, 4])
def test_metrics_take_any_number_of_channels(metric, channels):
    model = cs.wrap(net(channels), size=64)
    pixels = RNG.random((64, 64, channels)).astype(np.float32)
    found = cs.evaluate(model, cs.explain(model, pixels, target=1), metric)
    (score,) = found.values()
    assert isinstance(score, cs.Score), score
    assert np.isfinite(score.value)


def test_sixteen_bits_are_eight_bits_times_257():
    eight, sixteen = (
        cs.Sample("x", COLOUR),
        cs.Sample("x", COLOUR.astype(np.uint16) * np.uint16(257)),
    )
    model = cs.wrap(net(3), size=64)
    assert torch.allclose(
        model.view(eight).pixels, model.view(sixteen).pixels, atol=1e-7
    )
    assert np.array_equal(eight.rgb, sixteen.rgb)
    assert eight.digest != sixteen.digest


def test_a_range_of_values_is_what_becomes_0_and_1():
    values = np.linspace(-100, 300, 64 * 64).reshape(64, 64).astype(np.float32)
    with pytest.raises(
        cs.ConsilienceError, match="from -100 to 300; its range is 0 to 1"
    ):
        cs.Sample("x", values)
    sample = cs.Sample("x", values, value_range=(-100, 300))
    view = cs.wrap(net(1), size=64).view(sample)
    assert np.allclose(view.pixels[0, 0].numpy(), (values + 100) / 400, atol=1e-6)
    assert sample.rgb[-1, -1].tolist() == [255, 255, 255]
    with pytest.raises(cs.ConsilienceError, match="its range is 0 to 200"):
        cs.Sample("x", values, value_range=(0, 200))
    with pytest.raises(cs.ConsilienceError, match="low before high"):
        cs.Sample("x", values, value_range=(5, 5))


def test_colour_into_a_grey_network_and_back():
    grey = np.array(Image.fromarray(COLOUR).convert("L"))
    model = cs.wrap(net(1), size=64, mean=(0.5,), std=(0.5,))
    by_colour, by_grey = (cs.explain(model, one) for one in (COLOUR, grey))
    assert np.array_equal(by_colour.values, by_grey.values)
    assert by_colour.provenance["notes"] == [
        "colour converted to grey (its luminance, ITU-R 601)"
    ]
    assert "notes" not in by_grey.provenance
    same = np.repeat(grey[:, :, None], 3, axis=2)
    assert "notes" not in cs.explain(model, same).provenance  # nothing was lost
    floats = RNG.random((64, 64, 3)).astype(np.float32)
    shown = model.view(cs.Sample("x", floats)).pixels[0, 0].numpy()
    # ITU-R 601, by hand
    by_hand = 0.299 * floats[..., 0] + 0.587 * floats[..., 1] + 0.114 * floats[..., 2]
    assert np.abs(shown - by_hand).max() < 1e-6
    assert "converted to grey" in cs.explain(model, floats).provenance["notes"][0]
    plain = cs.wrap(net(3), size=64)
    repeated = cs.explain(plain, grey)
    assert np.array_equal(repeated.values, cs.explain(plain, same).values)
    assert repeated.provenance["notes"] == ["grey repeated as red, green and blue"]


@pytest.mark.parametrize(("has", "takes"), [(4, 3), (3, 11), (11, 1), (2, 3)])
def test_other_channels_are_refused_with_both_numbers(has, takes):
    with pytest.raises(cs.ConsilienceError, match=f"has {has} .*takes {takes} "):
        cs.explain(
            cs.wrap(net(takes), size=64),
            cs.Sample("x", np.zeros((9, 9, has), np.uint8)),
        )


def test_channels_are_told_by_the_module_or_its_user():
    assert cs.wrap(net(1), size=64).channels == 1
    assert "1 channels, mean 0, std 1" in cs.wrap(net(1), size=64).facts["assumed"]
    assert cs.wrap(net(4), size=64, channels=4).recipe.mean == (0.0,) * 4
    assert cs.wrap(net(2), size=64, mean=(0.1, 0.2)).recipe.std == (1.0, 1.0)
    with pytest.raises(
        cs.ConsilienceError, match="std is 4 numbers, one a channel; got 3"
    ):
        cs.wrap(net(4), size=64, channels=4, std=(1, 1, 1))
    with pytest.raises(cs.ConsilienceError, match=r"black image \(1, 5, 64, 64\)"):
        cs.wrap(net(4), size=64, channels=5)


def test_timms_grey_networks_average_what_its_configuration_says():
    import timm

    module = timm.create_model("resnet10t", in_chans=1, num_classes=2)
    recipe = cs.wrap(module).recipe
    said = module.pretrained_cfg
    assert recipe.mean == pytest.approx((np.mean(said["mean"]),))
    assert recipe.std == pytest.approx((np.mean(said["std"]),))


def test_fills_of_other_channels():
    model = cs.wrap(net(2), size=64)
    sample = cs.Sample("x", RNG.random((64, 64, 2)))
    for fill in ("colour(.25)", "colour(.1+.9)", "percentile", "noise", "neutral"):
        assert cs.explain(model, sample, f"lime:samples=32,fill={fill}") is not None
    with pytest.raises(
        cs.ConsilienceError, match="3 numbers; the image has 2 channels"
    ):
        cs.explain(model, sample, "lime:samples=32,fill=colour(.1+.2+.3)")


def test_resizing_is_the_same_for_each_channel():
    placement = images.Placement.crop((64, 64), 40, (32, 48))
    colour = images.place(COLOUR, placement, "bicubic", (0.2, 0.4, 0.6))
    for channel in range(3):
        alone = images.place(
            COLOUR[:, :, channel : channel + 1],
            placement,
            "bicubic",
            (0.2, 0.4, 0.6)[channel],
        )
        assert np.array_equal(colour[:, :, channel], alone[:, :, 0])
    floats = COLOUR.astype(np.float32) / 255
    shares, whole = (
        images.place(one, placement, "bilinear", (0.2, 0.4, 0.6))
        for one in (floats, COLOUR)
    )
    assert np.abs(shares * 255 - whole).max() <= 1.01
    assert shares.min() >= 0
    assert shares.max() <= 1


def test_a_display_image_is_what_people_and_superpixels_see():
    bands = RNG.random((64, 64, 5)).astype(np.float32)
    shown = np.zeros((64, 64, 3), np.uint8)
    shown[:, 32:] = 255
    sample = cs.Sample("x", bands, display=shown)
    model = cs.wrap(net(5), size=64)
    assert np.array_equal(sample.rgb, shown)
    assert np.array_equal(model.view(sample).rgb, shown / 255)
    found = cs.explain(model, sample, "lime:samples=32,segments=felzenszwalb")
    segments = found.extras["segments"]
    assert len(np.unique(segments[:, :30])) == 1
    assert segments[0, 0] != segments[0, -1]
    with pytest.raises(cs.ConsilienceError, match="display is"):
        cs.Sample("x", bands, display=shown[:5])
    loaded = cs.Sample("x", bands)
    shares = bands[:, :, :3].astype(np.float64)
    assert np.array_equal(loaded.rgb, np.rint(shares * 255))


def test_a_saved_explanation_keeps_them(tmp_path):
    sample = cs.Sample(
        "x", RNG.random((64, 64, 5)) * 9, value_range=(0, 9), display=COLOUR
    )
    made = cs.explain(cs.wrap(net(5), size=64), sample)
    back = cs.Explanation.load(made.save(tmp_path / "x.npz"))
    assert np.array_equal(back.sample.pixels, sample.pixels)
    assert back.sample.range == (0, 9)
    assert np.array_equal(back.sample.display, COLOUR)
    assert back.sample.digest == sample.digest


def test_a_run_of_many_channels_from_files(tmp_path):
    for number in range(2):
        bands = RNG.integers(0, 9000, (70, 64, 5)).astype(np.uint16)
        tifffile.imwrite(
            tmp_path / f"{number}.tif",
            bands,
            photometric="minisblack",
            planarconfig="contig",
        )
    model = cs.wrap(net(5), size=64)
    run = cs.run(model, tmp_path, ["gradcam", "lime:samples=32"], tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()
    assert np.array_equal(run["1", "Grad-CAM"].sample.pixels, bands)
    again = cs.run(model, tmp_path, ["gradcam", "lime:samples=32"], tmp_path / "run")
    assert np.array_equal(again["1", "LIME"].values, run["1", "LIME"].values)


# ---- formats


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_bands_of_a_tiff(planar, dtype, tmp_path):
    bands = (RNG.random((20, 30, 6)) * (1 if dtype == np.float32 else 250)).astype(
        dtype
    )
    stored = bands if planar == "contig" else bands.transpose(2, 0, 1)
    file = tmp_path / "x.tif"
    tifffile.imwrite(file, stored, planarconfig=planar, photometric="minisblack")
    sample = cs.read_image(file, channels=6)
    assert sample.pixels.dtype == dtype
    assert np.array_equal(sample.pixels, bands)
    with pytest.raises(
        cs.ConsilienceError, match=r"has 6 channels, .* takes 3 channels"
    ):
        cs.explain(cs.wrap(net(3), size=64), file)


def test_pages_are_channels_only_where_there_are_as_many(tmp_path):
    pages = RNG.integers(0, 255, (6, 20, 30)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", pages, photometric="minisblack")
    six = cs.read_image(tmp_path / "x.tif", channels=6)
    assert np.array_equal(six.pixels, pages.transpose(1, 2, 0))
    assert "6 pages read as channels" in six.notes
    one = cs.read_image(tmp_path / "x.tif", channels=1)
    assert np.array_equal(one.pixels[:, :, 0], pages[0])
    assert "first of 6 frames" in one.notes


@pytest.mark.parametrize(("axes", "word"), [("ZYX", "slices"), ("TYX", "frames")])
def test_volumes_are_refused_in_words(axes, word, tmp_path):
    tifffile.imwrite(
        tmp_path / "x.tif",
        np.zeros((7, 20, 30), np.uint8),
        imagej=True,
        metadata={"axes": axes},
    )
    with pytest.raises(
        cs.ConsilienceError, match=f"a volume of 7 {word}, not an image"
    ):
        cs.read_image(tmp_path / "x.tif", channels=7)


def test_grey_of_twelve_bits_keeps_them(tmp_path):
    grey = RNG.integers(0, 4096, (20, 30)).astype(np.uint16)
    grey[0, 0] = 4095
    Image.fromarray(grey).save(tmp_path / "x.png")
    sample = cs.read_image(tmp_path / "x.png", channels=1)
    assert np.array_equal(sample.pixels[:, :, 0], grey)
    assert sample.range == (0, 4095)
    assert sample.notes == ("12-bit grey",)
    told = cs.read_image(tmp_path / "x.png", channels=1, value_range=(0, 65535))
    assert told.range == (0, 65535)


def test_transparency_is_a_channel_only_for_four(tmp_path):
    four = RNG.integers(0, 255, (20, 30, 4)).astype(np.uint8)
    Image.fromarray(four).save(tmp_path / "x.png")
    assert np.array_equal(cs.read_image(tmp_path / "x.png", channels=4).pixels, four)
    assert cs.read_image(tmp_path / "x.png").channels == 3


def test_arrays_in_files(tmp_path):
    bands = RNG.random((20, 30, 7)).astype(np.float64)
    np.save(tmp_path / "x.npy", bands)
    sample = cs.read_image(tmp_path / "x.npy", channels=7)
    assert np.allclose(sample.pixels, bands)
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(cs.ConsilienceError, match="not an array that is read here"):
        cs.read_image(tmp_path / "o.npy")


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".jfif", "JPEG"),
        (".jpe", "JPEG"),
        (".avif", "AVIF"),
        (".jp2", "JPEG2000"),
        (".pbm", "PPM"),
        (".qoi", "QOI"),
        (".tif", "TIFF"),
    ],
)
def test_formats_of_a_folder(suffix, kind, tmp_path):
    picture = Image.fromarray(COLOUR)
    if suffix == ".pbm":
        picture = picture.convert("1")
    picture.save(tmp_path / f"x{suffix}", kind)
    (one,) = cs.explain(cs.wrap(net(3), size=64), tmp_path)
    assert one.sample.pixels.shape == (64, 64, 3)


def test_heif(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(COLOUR)).save(tmp_path / "x.heic")
    (one,) = cs.explain(cs.wrap(net(3), size=64), tmp_path)
    assert one.sample.pixels.shape == (64, 64, 3)


def dicom(path, stored, **tags):
    """A DICOM file by hand."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID = SecondaryCaptureImageStorage
    made.SOPInstanceUID = "1.2.3"
    made.Rows, made.Columns = stored.shape[-2:]
    made.SamplesPerPixel = 1
    made.PhotometricInterpretation = "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit = 15
    made.PixelRepresentation = 0
    if stored.ndim == 3:
        made.NumberOfFrames = len(stored)
    for name, value in tags.items():
        setattr(made, name, value)
    made.PixelData = stored.astype(np.uint16).tobytes()
    made.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("function", [None, "LINEAR_EXACT", "SIGMOID"])
def test_dicom_through_its_window(function, tmp_path):
    from pydicom.pixels.processing import apply_rescale, apply_voi_lut

    stored = RNG.integers(0, 65536, (20, 30))
    tags = {"RescaleSlope": 0.5, "RescaleIntercept": -1000}
    tags |= {"WindowCenter": 9000, "WindowWidth": 12000}
    if function:
        tags["VOILUTFunction"] = function
    file = dicom(tmp_path / "x.dcm", stored, **tags)
    got = cs.read_image(file, channels=1)
    read = pydicom.dcmread(file)
    seen = apply_voi_lut(apply_rescale(read.pixel_array, read), read)
    # pydicom spreads the window over all values that the file could hold
    low, high = -1000.0, 65535 * 0.5 - 1000
    share = (seen - low) / (high - low)
    assert np.abs(got.pixels[:, :, 0] - share).max() < 1e-4
    assert got.pixels.std() > 0.1
    assert got.notes[0].startswith("window 9000, width 12000")
    inverted = dicom(
        tmp_path / "y.dcm", stored, PhotometricInterpretation="MONOCHROME1", **tags
    )
    other = cs.read_image(inverted, channels=1)
    assert np.allclose(other.pixels, 1 - got.pixels, atol=1e-6)
    (one,) = cs.explain(cs.wrap(net(3), size=64), [file])
    assert "window 9000, width 12000" in one.sample.notes[0]


def test_a_narrow_window_of_dicom(tmp_path):
    """PS3.3 C.11.2.1.2: y = ((x - (c - 0.5)) / (w - 1) + 0.5), by hand; 1 is a threshold."""
    stored = np.arange(600).reshape(20, 30)
    file = dicom(tmp_path / "x.dcm", stored, WindowCenter=300, WindowWidth=11)
    got = cs.read_image(file, channels=1).pixels[:, :, 0].ravel()
    assert got[294] == 0
    assert got[305] == 1
    assert got[302] == pytest.approx((302 - 299.5) / 10 + 0.5, abs=1e-6)
    file = dicom(tmp_path / "y.dcm", stored, WindowCenter=300, WindowWidth=1)
    sharp = cs.read_image(file, channels=1).pixels[:, :, 0].ravel()
    assert (sharp == (np.arange(600) > 299.5)).all()


def test_dicom_without_a_window_and_of_many_frames(tmp_path):
    stored = RNG.integers(100, 4000, (20, 30))
    plain = cs.read_image(dicom(tmp_path / "x.dcm", stored), channels=1)
    low, high = stored.min(), stored.max()
    assert np.allclose(
        plain.pixels[:, :, 0], (stored - low) / (high - low), atol=1e-6
    )
    assert plain.notes == (
        f"no window: values {low} to {high} shown as black to white",
    )
    frames = dicom(tmp_path / "y.dcm", RNG.integers(0, 9, (4, 20, 30)))
    with pytest.raises(
        cs.ConsilienceError, match="a volume of 4 frames, not an image"
    ):
        cs.read_image(frames)
    (tmp_path / "z.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"broken")
    with pytest.raises(cs.ConsilienceError, match="not a DICOM image"):
        cs.read_image(tmp_path / "z.dcm")


def test_a_range_on_the_command_line_is_part_of_the_job(
    tmp_path, monkeypatch, capsys
):
    from consilience.cli import main
    from consilience.runs.folder import Run

    bands = RNG.integers(0, 10000, (64, 64, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", bands, photometric="rgb")
    start = ["explain", str(tmp_path / "x.tif"), "--by", "centre", "-o"]
    assert main([*start, str(tmp_path / "a"), "--value-range", "0,10000"]) == 0
    sample = Run(tmp_path / "a")["x", "centre"].sample
    assert sample.range == (0, 10000)
    assert np.array_equal(sample.pixels, bands)
    assert main([*start, str(tmp_path / "a"), "--value-range", "0,20000"]) == 1
    assert "value_range" in capsys.readouterr().err
    assert main([*start, str(tmp_path / "b"), "--value-range", "wide"]) == 1
    assert "two numbers, LOW,HIGH; got 'wide'" in capsys.readouterr().err


def test_a_range_is_not_for_what_was_seen_through_a_window(tmp_path):
    file = dicom(tmp_path / "x.dcm", RNG.integers(0, 9, (20, 30)))
    with pytest.raises(cs.ConsilienceError, match="a value range is not for it"):
        cs.read_image(file, value_range=(0, 9))


def test_an_image_too_large_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(cs.ConsilienceError, match="claims 64 x 64 pixels"):
        cs.explain(cs.wrap(net(3), size=64), Image.fromarray(COLOUR))


def test_what_would_be_seen_as_black_is_brightened_for_people_alone():
    """A tenth of the range: shown as the same image that fills it, and told to the network
    as it is.
    """
    full = COLOUR.astype(np.uint16) * np.uint16(257)
    dim = cs.Sample("x", full // 10)
    model = cs.wrap(net(3), size=64)
    assert (
        np.abs(dim.rgb.astype(int) - np.minimum(COLOUR * (1 / 0.995), 255)).mean() < 2
    )
    assert float(model.view(dim).pixels.max()) == pytest.approx(0.1, abs=1e-3)
    assert model.view(dim).rgb.max() == 1
    assert cs.Sample("x", full).gain == 1
    assert cs.Sample("x", COLOUR // 10).gain == 1  # eight bits are as they are seen
    assert cs.Sample("x", np.zeros((4, 4, 3), np.uint16)).rgb.max() == 0
