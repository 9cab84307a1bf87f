"""Quantiles, masks and counts against slow loops, and units that were built to detect
something.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from oracles_dissection import (
    assert_within,
    enlarged,
    literal,
    planted_broden,
    planted_model,
    small_broden,
    small_model,
    stacks_of,
)
from scipy import stats as scipy_stats
from torch.nn import functional

from consilience.dissection.concepts import load_concepts
from consilience.dissection.measure import Job, dissect
from consilience.dissection.quantiles import FloorError, TailSketch
from consilience.dissection.result import Dissection, largest_iou
from consilience.dissection.tally import Tops, unit_masks
from consilience.models.features import Features
from consilience.models.network import wrap
from consilience.types import ConsilienceError

# ---- quantiles


def streams(images, side=5):
    """Noise, noise through a ReLU, rising, falling, flat, and ties."""
    rng = np.random.default_rng(3)
    noise = rng.normal(size=images * side * side)
    rows = [
        noise,
        np.maximum(noise, 0),
        np.sort(noise),
        -np.sort(-noise),
        np.zeros_like(noise),
        np.round(noise),
    ]
    return (
        np.stack(rows, axis=1)
        .astype(np.float32)
        .reshape(images, side, side, -1)
        .transpose(0, 3, 1, 2)
    )


def sketched(maps, q, capacity, step=7):
    sketch = TailSketch(
        maps.shape[1], len(maps) * maps.shape[2] * maps.shape[3], q, capacity
    )
    for start in range(0, len(maps), step):
        sketch.add(torch.from_numpy(maps[start : start + step]))
    return sketch


@pytest.mark.parametrize("images", [1, 40, 300])
@pytest.mark.parametrize("q", [0.5, 0.995])
def test_a_quantile_that_fits_is_numpys(images, q):
    maps = streams(images)
    values, bound = sketched(maps, q, capacity=5000).result()
    rows = maps.transpose(1, 0, 2, 3).reshape(6, -1).astype(np.float64)
    assert values.tolist() == np.quantile(rows, q, axis=1).astype(np.float32).tolist()
    assert not bound.any()


@pytest.mark.parametrize("capacity", [256, 2048])
def test_a_quantile_that_does_not_fit_is_off_by_no_more_ranks_than_it_says(capacity):
    maps = streams(4000)
    sketch = sketched(maps, 0.95, capacity, step=64)
    values, bound = sketch.result()
    rows = maps.transpose(1, 0, 2, 3).reshape(6, -1)
    assert not sketch.exact
    assert (bound > 0).all()
    assert_within(rows, values, bound, sketch.rank)
    assert bound[0] < 0.2 * sketch.rank if capacity == 2048 else bound[0] > 0


def test_the_state_of_a_sketch_does_not_grow_with_the_stream():
    sizes = []
    for images in (500, 4000):
        sketch = sketched(streams(images), 0.95, 256, step=50)
        sizes.append(sum(array.nbytes for array in sketch.state().values()))
    assert sizes[1] <= 1.2 * sizes[0]


def test_a_sketch_goes_on_from_its_state():
    maps = streams(300)
    whole = sketched(maps, 0.9, 128)
    first = TailSketch(6, 300 * 25, 0.9, 128)
    for start in range(0, 140, 7):
        first.add(torch.from_numpy(maps[start : start + 7]))
    second = TailSketch(6, 300 * 25, 0.9, 128)
    second.restore(first.state())
    first.state()
    for start in range(140, 300, 7):
        second.add(torch.from_numpy(maps[start : start + 7]))
    assert second.seen == whole.seen
    values, bound = second.result()
    rows = maps.transpose(1, 0, 2, 3).reshape(6, -1)
    assert all(
        abs(int((row > value).sum()) - second.rank) <= off
        for row, value, off in zip(rows[:4], values, bound, strict=False)
    )


def parts_of(maps, q, capacity, cuts, least=None):
    """Sketches of consecutive parts of a stream."""
    total = len(maps) * maps.shape[2] * maps.shape[3]
    for low, high in itertools.pairwise([0, *cuts, len(maps)]):
        part = TailSketch(maps.shape[1], total, q, capacity, least)
        for start in range(low, high, 16):
            part.add(torch.from_numpy(maps[start : min(start + 16, high)]))
        yield part


def merged(parts, kept=lambda part: part):
    first, *others = map(kept, parts)
    for other in others:
        first.merge(other)
    return first


@pytest.mark.parametrize("cuts", [[30], [1, 2, 30, 31, 200]])
def test_merged_sketches_that_fit_are_exact(cuts):
    maps = streams(300)
    values, bound = merged(parts_of(maps, 0.98, 5000, cuts)).result()
    rows = maps.transpose(1, 0, 2, 3).reshape(6, -1).astype(np.float64)
    assert (
        values.tolist() == np.quantile(rows, 0.98, axis=1).astype(np.float32).tolist()
    )
    assert not bound.any()


@pytest.mark.parametrize("capacity", [256, 2048])
@pytest.mark.parametrize("count", [2, 5, 64])
def test_merged_sketches_are_off_by_no_more_ranks_than_they_say(capacity, count):
    maps = streams(4000)
    cuts = [number * 4000 // count for number in range(1, count)]
    parts = list(parts_of(maps, 0.95, capacity, cuts))
    apart = sum(part.error for part in parts)
    sketch = merged(parts)
    assert not sketch.exact
    assert sketch.seen == sketch.total
    assert (sketch.error >= apart).all()
    values, bound = sketch.result()
    rows = maps.transpose(1, 0, 2, 3).reshape(6, -1)
    assert_within(rows, values, bound, sketch.rank)
    assert bound[0] < 0.25 * sketch.rank if capacity == 2048 else bound[0] > 0


@pytest.mark.parametrize("capacity", [256, 10_000])
def test_values_below_a_floor_change_nothing(capacity):
    maps = streams(1000)
    rows = maps.transpose(1, 0, 2, 3).reshape(6, -1)
    # every twentieth value and more; in the flat row, and that of ties, the quantile
    # itself is the floor
    floor = np.sort(rows, axis=1)[:, -int(0.08 * rows.shape[1])]
    floor[5] = np.quantile(rows[5], 0.95)
    assert floor[4] == 0
    sketch = merged(parts_of(maps, 0.95, capacity, [100, 500], floor))
    values, bound = sketch.result()
    if sketch.exact:
        exact = np.quantile(rows.astype(np.float64), 0.95, axis=1)
        assert values.tolist() == exact.astype(np.float32).tolist()
        return
    assert values[4] == 0
    assert_within(rows, values, bound, sketch.rank)


@pytest.mark.parametrize("capacity", [256, 10_000])
def test_a_floor_that_was_too_high_is_noticed(capacity):
    maps = streams(1000)
    rows = maps.transpose(1, 0, 2, 3).reshape(6, -1)
    floor = np.sort(rows, axis=1)[:, -int(0.08 * rows.shape[1])]
    floor[[1, 3]] = np.sort(rows, axis=1)[[1, 3], -int(0.02 * rows.shape[1])]
    with pytest.raises(FloorError, match="2 units have fewer") as caught:
        merged(parts_of(maps, 0.95, capacity, [100, 500], floor)).result()
    assert caught.value.units.tolist() == [1, 3]


def test_halvings_of_a_merge_are_counted():
    """Two parts, each with one buffer of values that count for two: of both, halved once
    more, values count for four, and ranks move by two more.
    """
    rng = np.random.default_rng(0)
    sketch = TailSketch(1, 100_000, 0.99, 64)
    width, levels = sketch._width, sketch._levels
    assert levels > 2
    parts = []
    for _ in range(2):
        part = TailSketch(1, 100_000, 0.99, 64)
        part.add(torch.from_numpy(rng.random((1, 1, 1, width), np.float32)))
        assert part.error.tolist() == [1]
        assert part._half[0].shape == (1, width // 2)
        parts.append(part)
    whole = merged(parts)
    assert whole._half[0] is None
    assert whole._half[1].shape == (1, width // 2)
    assert whole.error.tolist() == [1 + 1 + 2]


@pytest.mark.parametrize("least", [None, np.full(6, -0.5)])
def test_a_part_comes_back_from_its_state(least):
    maps = streams(1000)

    def kept(part):
        again = TailSketch(6, part.total, part.q, 256, least)
        again.restore(part.state())
        return again

    plain = merged(parts_of(maps, 0.95, 256, [100, 500], least))
    again = merged(parts_of(maps, 0.95, 256, [100, 500], least), kept)
    for one, other in zip(plain.result(), again.result(), strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("capacity", [64, 5000])
@pytest.mark.parametrize("place", [7, 200])
def test_a_single_value_that_is_no_number_is_found(capacity, place):
    maps = streams(300)
    maps[place, 2, 1, 1] = np.nan
    with pytest.raises(ConsilienceError, match="not finite"):
        merged(parts_of(maps, 0.95, capacity, [40])).result()


def test_a_sketch_refuses_what_it_cannot_say():
    sketch = TailSketch(2, 10, 0.9, 64)
    sketch.add(torch.zeros(1, 2, 3, 3))
    with pytest.raises(ConsilienceError, match="shown 9"):
        sketch.result()
    sketch.add(torch.full((1, 2, 1, 1), torch.nan))
    with pytest.raises(ConsilienceError, match="not finite"):
        sketch.result()
    with pytest.raises(ConsilienceError, match="between 0 and 1"):
        TailSketch(2, 10, 1.0, 64)


# ---- masks


@pytest.mark.parametrize("upsample", ["half-pixel", "align_corners", "netdissect"])
@pytest.mark.parametrize(
    ("cells", "size"),
    [((7, 7), (28, 28)), ((5, 3), (16, 20)), ((1, 1), (8, 8)), ((14, 14), (9, 9))],
)
def test_masks_are_the_literal_ones(upsample, cells, size):
    maps = np.random.default_rng(0).normal(size=(3, *cells)).astype(np.float32)
    cuts = np.array([0.1, -0.4, 0.9], dtype=np.float32)
    got = unit_masks(torch.from_numpy(maps), torch.from_numpy(cuts), size, upsample)
    expected = [
        enlarged(one, size, upsample) > cut
        for one, cut in zip(maps, cuts, strict=True)
    ]
    assert np.array_equal(got.numpy(), np.stack(expected))


@pytest.mark.parametrize(
    ("upsample", "corners"), [("half-pixel", False), ("align_corners", True)]
)
def test_masks_are_those_of_torchs_interpolation(upsample, corners):
    maps = torch.randn(4, 7, 7, generator=torch.Generator().manual_seed(1))
    large = functional.interpolate(
        maps[:, None], (112, 112), mode="bilinear", align_corners=corners
    )[:, 0]
    apart = unit_masks(maps, torch.full((4,), 0.3), (112, 112), upsample) != (
        large > 0.3
    )
    assert not (apart & ((large - 0.3).abs() > 1e-5)).any()


def test_a_plateau_at_the_threshold_is_not_above_it():
    maps = torch.full((1, 7, 7), 5.9999995)
    maps[0, 3, 3] = 6.5
    mask = unit_masks(maps, torch.tensor([5.9999995]), (112, 112))
    assert 0 < int(mask.sum()) <= 32 * 32
    assert not mask[0, :32].any()


# ---- the counts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_concepts(small_broden(tmp_path_factory.mktemp("broden") / "set"))


def activations(model, concepts, layer, view="squash"):
    views = [model.view(sample, view) for sample in concepts.samples]
    maps = model.activations(torch.cat([one.pixels for one in views]), [layer])[layer]
    return maps.numpy(), [one.geometry for one in views]


@pytest.mark.parametrize("union", ["paper", "lite"])
@pytest.mark.parametrize("upsample", ["half-pixel", "align_corners", "netdissect"])
def test_counts_are_the_literal_ones(tiny, union, upsample):
    model = small_model()
    layers = ["act", "clip", "embed"]
    found = dissect(
        model,
        layers,
        tiny,
        min_images=1,
        quantile=0.9,
        union=union,
        upsample=upsample,
        permutations=0,
    )
    categories = [one.category for one in tiny.concepts]
    stacks = stacks_of(tiny)
    for name in layers:
        maps, _ = activations(model, tiny, name)
        cuts, shared, unions = literal(
            maps, stacks, categories, tiny.grid, 0.9, upsample, union
        )
        layer = found.layer(name)
        assert layer.thresholds.tolist() == cuts.tolist()
        assert np.array_equal(layer.intersections, shared)
        assert np.array_equal(layer.unions, unions)
    assert found.layer("embed").grid is None


def test_counts_of_a_token_grid(tiny):
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        depth=2,
        embed_dim=12,
        num_heads=2,
        num_classes=3,
    )
    model = wrap(network, size=32, engine="torch")
    layer = dissect(model, "blocks.1", tiny, quantile=0.9, permutations=0).layer(
        "blocks.1"
    )
    maps, _ = activations(model, tiny, "blocks.1")
    assert layer.grid == maps.shape[2:] == (4, 4)
    _, shared, unions = literal(
        maps, stacks_of(tiny), [one.category for one in tiny.concepts], tiny.grid, 0.9
    )
    assert np.array_equal(layer.intersections, shared)
    assert np.array_equal(layer.unions, unions)


def test_with_crop_the_labels_move_with_the_image(tmp_path):
    concepts = load_concepts(
        small_broden(tmp_path / "set", count=6, side=48, grid=(24, 24))
    )
    model = wrap(
        small_model().module,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=32,
        resize=48,
        engine="torch",
    )
    layer = dissect(
        model, "act", concepts, quantile=0.9, permutations=0, view="crop"
    ).layer("act")
    maps, geometries = activations(model, concepts, "act", "crop")
    stacks = stacks_of(concepts, geometries)
    # the window is pixels 8 to 40 of 48: with 24 cells a side, cells 4 to 20
    whole = stacks_of(concepts)
    for moved, full in zip(stacks, whole, strict=True):
        for concept, mask in moved.items():
            rows = 4 + (np.arange(24) + 0.5) * 16 / 24
            assert np.array_equal(
                mask, full[concept][np.ix_(rows.astype(int), rows.astype(int))]
            )
    _, shared, unions = literal(
        maps, stacks, [one.category for one in concepts.concepts], concepts.grid, 0.9
    )
    assert np.array_equal(layer.intersections, shared)
    assert np.array_equal(layer.unions, unions)


def test_top_images_are_the_highest_and_earlier_ones_stay():
    peaks = torch.tensor([[1.0, 5.0], [3.0, 5.0], [3.0, 4.0], [0.5, 9.0], [2.0, 5.0]])
    tops = Tops(2, 3)
    for start in range(0, 5, 2):
        tops.add(start, peaks[start : start + 2])
    assert tops.indices.tolist() == [[1, 2, 4], [3, 0, 1]]
    assert tops.values.tolist() == [[3, 3, 2], [9, 5, 5]]


# ---- units of known answers


def test_planted_units_are_found_with_iou_one(tmp_path):
    concepts = load_concepts(planted_broden(tmp_path / "set"))
    found = dissect(planted_model(), "act", concepts, permutations=199, resamples=50)
    rows = found.table().set_index("unit")
    assert rows["concept"].tolist()[:3] == ["red", "striped", "cross"]
    assert rows["iou"].tolist() == [1, 1, 1, 0]
    assert rows["significant"].tolist() == [True, True, True, False]
    assert rows["p"].tolist() == [1 / 200, 1 / 200, 1 / 200, 1]
    assert rows["alternatives"].tolist() == ["red", "striped", "cross", ""]
    facts = found.concept_table().set_index("concept")
    assert (facts.loc[["red", "striped", "cross"], "prevalence"] < 0.005).all()
    assert facts.loc["grey", "why"].startswith("cannot be detected")
    # the unit whose own pixels come nearest to the concept's, not the quantile's share
    grey = next(one for one in found.concepts if one.name == "grey")
    own = found.layers[0].unit_pixels[:, found.categories.index(grey.category)]
    assert len(set(own.tolist())) > 1
    assert facts.loc["grey", "ceiling"] == own.max() / grey.pixels
    assert rows["ceiling"].tolist()[:3] == [1, 1, 1]
    assert np.isnan(rows["ceiling"].iloc[3])
    assert found.headline("act").startswith("act: 3 of 4 units detect a concept (")


class Redness(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.red = torch.nn.Conv2d(3, 2, 1)
        self.act = torch.nn.ReLU()
        self.head = torch.nn.Linear(2, 2)
        with torch.no_grad():
            self.red.weight[:, :, 0, 0] = torch.tensor(
                [[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]]
            )
            self.red.bias[:] = -0.4

    def forward(self, x):
        return self.head(self.act(self.red(x)).mean(dim=(2, 3)))


def test_a_red_unit_on_the_drawn_set_finds_red_exactly():
    model = wrap(Redness(), mean=(0, 0, 0), std=(1, 1, 1), size=64, engine="torch")
    found = dissect(
        model, "act", "drawn:images=48,size=64", min_images=5, permutations=0
    ).table()
    assert found["concept"].tolist() == ["red", "blue"]
    assert found["iou"].tolist() == [1, 1]


# ---- engines, resume, disk


def test_the_engine_gives_what_torch_gives():
    torch.manual_seed(0)
    plain = small_model()
    fast = plain.using(engine="openvino")
    pixels = torch.rand(plain.batch, 3, 32, 32)
    layers = ["stem", "act", "clip", "embed"]
    features = Features(fast, layers)
    for count in (plain.batch, 3):
        maps, expected = (
            features(pixels[:count]),
            plain.activations(pixels[:count], layers),
        )
        for name in layers:
            assert maps[name].shape == expected[name].shape
            assert torch.allclose(maps[name], expected[name], atol=1e-5)
    assert features.facts["engine"] == "openvino"
    assert not any(module._forward_hooks for module in plain.module.modules())


def test_features_are_the_same_before_and_after_an_in_place_relu():
    model = small_model().using(engine="openvino")
    maps = Features(model, ["stem", "act"])(torch.rand(model.batch, 3, 32, 32))
    assert float(maps["stem"].min()) < 0
    assert torch.equal(maps["act"], maps["stem"].clamp(min=0))


class KilledError(Exception):
    pass


@pytest.mark.parametrize("last", [1, 4])
def test_a_killed_dissection_goes_on(tmp_path, monkeypatch, last):
    concepts = load_concepts("drawn:images=80,size=32")
    options = {"min_images": 1, "quantile": 0.95, "permutations": 19, "resamples": 10}
    whole = dissect(small_model(), ["act", "clip"], concepts, **options)
    monkeypatch.setattr("consilience.dissection.measure.KEEP_EVERY", 0.0)
    seen = []
    once = Job._keep

    def dying(self):
        once(self)
        seen.append(dict(self.done))
        if len(seen) == last:
            raise KilledError

    monkeypatch.setattr(Job, "_keep", dying)
    state = tmp_path / "state"
    with pytest.raises(KilledError):
        dissect(small_model(), ["act", "clip"], concepts, state=state, **options)
    assert state.stat().st_size < 200e6
    with pytest.raises(ConsilienceError, match="another dissection"):
        dissect(small_model(), ["act"], concepts, state=state, **options)
    again = dissect(small_model(), ["act", "clip"], concepts, state=state, **options)
    assert seen[-1] != {"quantiles": 0, "counting": 0}
    assert again.table().equals(whole.table())
    assert again.top().equals(whole.top())
    assert not state.exists()


def test_a_dissection_comes_back_from_disk(tiny, tmp_path):
    found = dissect(
        small_model(),
        ["act", "embed"],
        tiny,
        min_images=1,
        quantile=0.9,
        permutations=19,
        against="random",
    )
    again = Dissection.read(found.write(tmp_path / "kept"))
    assert again.table().equals(found.table())
    assert again.summary().equals(found.summary())
    assert again.concept_table().equals(found.concept_table())
    assert again.top().equals(found.top())
    for name in ("act", "embed"):
        assert np.array_equal(again.layer(name).unions, found.layer(name).unions)
        assert (
            again.layer(name).null.alternatives == found.layer(name).null.alternatives
        )
    assert again.random.table().equals(found.random.table())
    assert not np.array_equal(
        found.random.layer("act").thresholds, found.layer("act").thresholds
    )


def test_netdissects_columns_hold_netdissects_numbers(tiny):
    found = dissect(
        small_model(), "clip", tiny, min_images=1, quantile=0.9, permutations=0
    )
    rows = found.netdissect("clip")
    assert rows.columns[:4].tolist() == ["unit", "category", "label", "score"]
    assert rows["score"].is_monotonic_decreasing
    row = rows.iloc[0]
    truth, seen, both = (
        row[f"{row['category']}-{word}"]
        for word in ("truth", "activation", "intersect")
    )
    assert (
        row["score"] == row[f"{row['category']}-iou"] == both / (truth + seen - both)
    )
    assert (
        row["label"]
        == found.table().set_index("unit").loc[row["unit"] - 1, "concept"]
    )


def test_tables_count_what_they_say(tiny):
    found = dissect(
        small_model(),
        ["act", "clip"],
        tiny,
        min_images=6,
        quantile=0.9,
        permutations=0,
    )
    rows, summary = found.table(), found.summary().set_index("layer")
    facts = {one.name: one for one in found.concepts}
    assert not facts["grey"].why or facts["grey"].eligible
    assert set(rows["concept"]) - {""} <= {
        one.name for one in found.concepts if one.images >= 6
    }
    for name in ("act", "clip"):
        own = rows[rows["layer"] == name]
        assert (
            summary.loc[name, "detectors"]
            == (own["iou"] > 0.04).sum()
            == len(found.detectors(name))
        )
        pairs = own[own["detector"]][["concept", "category"]]
        assert summary.loc[name, "unique_detectors"] == len(
            set(map(tuple, pairs.to_numpy()))
        )


def test_an_activation_engine_leaves_the_model_as_it_was():
    model = small_model().using(engine="openvino")
    model.module.train()
    Features(model, ["act"])(torch.rand(model.batch, 3, 32, 32))
    assert model.module.training
    assert not any(module._forward_hooks for module in model.module.modules())
    model.module.eval()


@pytest.mark.parametrize(
    ("layers", "options", "says"),
    [
        ("nowhere", {}, "no layer 'nowhere'"),
        ([], {}, "at least one layer"),
        ("act", {"quantil": 0.9}, "no option 'quantil'"),
        ("act", {"quantile": 1.5}, "between 0 and 1"),
        ("act", {"upsample": "nearest"}, "upsample is one of"),
        ("act", {"union": "all"}, "union is one of"),
        ("act", {"against": "chance"}, "against is random"),
    ],
)
def test_what_cannot_be_dissected_is_refused_in_one_line(tiny, layers, options, says):
    with pytest.raises(ConsilienceError, match=says) as caught:
        dissect(small_model(), layers, tiny, permutations=0, **options)
    assert "\n" not in str(caught.value)


def test_benjamini_hochberg_is_its_definition():
    p = np.array([0.04, 0.001, 0.3, 0.02, 0.02, 1.0])
    expected = [
        min(
            p[j] * len(p) / ((p <= p[j]).sum()) for j in range(len(p)) if p[j] >= p[i]
        )
        for i in range(len(p))
    ]
    assert np.allclose(scipy_stats.false_discovery_control(p), expected)


def test_a_detector_is_over_the_threshold_and_significant_by_q(tmp_path):
    concepts = load_concepts(small_broden(tmp_path / "set"))
    how = {"quantile": 0.9, "min_images": 1, "permutations": 19}
    found = dissect(small_model(), "act", concepts, threshold=0.0, **how)
    best = found.table()["iou"]
    unit = int(best.argmax())
    again = dissect(
        small_model(), "act", concepts, threshold=float(best[unit]), **how
    )
    assert found.table()["detector"][unit]
    assert not again.table()["detector"][unit]
    assert again.counts("act")["detectors"] == 0
    layer = found.layers[0]
    p, q = np.full(layer.units, 0.04), np.full(layer.units, 0.06)
    q[0] = 0.05
    null = replace(layer.null, p=p, q=q)
    changed = replace(found, layers=(replace(layer, null=null),))
    assert changed.table()["significant"].tolist() == [True] + [False] * (
        layer.units - 1
    )


def test_the_largest_iou_of_two_sizes_by_hand():
    found = largest_iou(np.array([[10], [40], [0]]), np.array([[20, 40, 0]]))
    assert found.tolist() == [[0.5, 0.25, 0], [0.5, 1, 0], [0, 0, 0]]
