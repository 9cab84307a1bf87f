"""Groups of maps that are known, and maps that have none."""

import math

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

from consilience import ConsilienceError
from consilience.diagnosis import clusters
from consilience.diagnosis.clusters import cluster_maps, on_grid

SIDE = 14


def blobs(count, seed=0, tagged=0.0, spread=1.5, tag=0.6):
    """Maps of a blob whose place varies; a share has a second one in a corner."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    at = rng.normal(6.5, spread, (count, 2))
    size = rng.uniform(2, 3, count)
    maps = np.exp(
        -((y - at[:, :1, None]) ** 2 + (x - at[:, 1:, None]) ** 2)
        / (2 * size**2)[:, None, None]
    )
    maps += 0.05 * rng.normal(size=maps.shape)
    has = rng.permutation(count) < round(tagged * count)
    corner = np.exp(-((y - 12) ** 2 + (x - 12) ** 2) / 4)
    maps[has] = (1 - tag) * maps[has] + 2 * tag * corner
    return maps, has


def names(maps):
    return [f"i{place}" for place in range(len(maps))]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "share"), [(30, 0.5), (60, 0.3)])
def test_a_tagged_part_is_found(seed, count, share):
    maps, has = blobs(count, seed, share)
    found = cluster_maps(maps, names(maps), "m", "c", has.astype(float), nulls=59)
    assert found.count == 2
    assert adjusted_rand_score(has, found.labels) > 0.9
    assert found.p_silhouette == pytest.approx(1 / 60)
    assert found.p == max(found.p_silhouette, found.p_dip) <= 0.05
    assert found.silhouette > found.by_chance
    assert found.agreement > 0.9
    sizes = [len(one.members) for one in found.clusters]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == count
    tagged = next(one for one in found.clusters if has[one.members].all())
    assert tagged.stability > 0.75
    assert tagged.apart[11:, 11:].mean() > 0
    assert tagged.shown[11:13, 11:13].all()
    assert not tagged.shown[:3, :3].any()
    assert (tagged.right, tagged.known) == (sizes[found.clusters.index(tagged)],) * 2


def test_one_cluster_is_an_answer_of_its_own():
    """Blobs whose place varies are one cluster: alarms in at most 5 % of 20."""
    alarms = 0
    for seed in range(20):
        maps, _ = blobs(24 if seed % 2 else 50, seed)
        found = cluster_maps(maps, names(maps), nulls=19, seed=seed, most=3)
        alarms += found.count > 1
        if found.count == 1:
            assert set(found.labels) == {0}
            assert len(found.clusters) == 1
            assert not found.clusters[0].shown.any()
            assert math.isnan(found.agreement)
    assert alarms <= 20 * 0.05 + 2 * math.sqrt(20 * 0.05 * 0.95)


def test_a_bent_sheet_is_one_cluster_though_its_silhouette_is_not():
    maps, _ = blobs(60, 3)
    found = cluster_maps(maps, names(maps), nulls=39, most=4)
    assert found.p_silhouette <= 0.05
    assert found.p_dip > 0.05
    assert found.count == 1


def test_three_groups_are_three():
    rng = np.random.default_rng(0)
    maps = np.zeros((45, SIDE, SIDE))
    true = np.repeat([0, 1, 2], 15)
    for place, corner in ((0, (2, 2)), (1, (2, 10)), (2, (10, 5))):
        maps[true == place, corner[0], corner[1]] = 1
    maps += 0.03 * rng.normal(size=maps.shape)
    found = cluster_maps(maps, names(maps), nulls=39)
    assert found.count == found.tried == 3
    assert adjusted_rand_score(true, found.labels) == 1


def test_numbers_by_hand():
    maps, has = blobs(20, 1, 0.5)
    correct = np.where(np.arange(20) % 4 == 0, np.nan, has.astype(float))
    found = cluster_maps(maps, names(maps), "gradcam", "dog", correct, nulls=19)
    rows = maps.reshape(20, -1)
    rows = rows / np.sqrt((rows**2).sum(1))[:, None]
    centred = rows - rows.mean(0)
    _values, vectors = np.linalg.eigh(centred.T @ centred)
    points = centred @ vectors[:, ::-1][:, :5]
    assert found.silhouette == pytest.approx(silhouette_score(points, found.labels))
    for one in found.clusters:
        mine = set(one.members.tolist())
        inside = np.array([place in mine for place in range(20)])
        mean = rows[inside].mean(0)
        assert one.mean.ravel() == pytest.approx(mean)
        assert one.apart.ravel() == pytest.approx(mean - rows[~inside].mean(0))
        centre = points[inside].mean(0)
        far = {at: np.linalg.norm(points[at] - centre) for at in mine}
        assert one.typical.tolist() == sorted(far, key=far.get)[:6]
        asked = [at for at in mine if np.isfinite(correct[at])]
        assert one.known == len(asked)
        assert one.right == sum(correct[at] for at in asked)
    table = found.table()
    assert table["images"].tolist() == [len(one.members) for one in found.clusters]
    assert table["accuracy"].tolist() == pytest.approx(
        [one.right / one.known for one in found.clusters]
    )
    assert found.sentence().startswith("dog by gradcam: 2 groups of 10, 10 images")


def test_stability_by_slow_loops():
    maps, _ = blobs(18, 4, 0.4, tag=0.35)
    rows = maps.reshape(18, -1)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    points, _ = clusters._components(rows)
    labels = clusters._kmeans(points, 2, 0).labels_
    labels[:2] = 1 - labels[:2]
    agreement, jaccard = clusters._resampled(points, labels, 2, 7)
    rng, rand, best = np.random.default_rng(7), [], {0: [], 1: []}
    for draw in range(clusters.RESAMPLES):
        drawn = sorted(set(rng.integers(0, 18, 18).tolist()))
        again = KMeans(2, n_init=5, random_state=7 + draw).fit(points[drawn]).labels_
        groups = [
            {at for at, g in zip(drawn, again, strict=True) if g == k} for k in (0, 1)
        ]
        pairs = [(i, j) for i in range(len(drawn)) for j in range(i)]
        same = [
            (labels[drawn[i]] == labels[drawn[j]], again[i] == again[j])
            for i, j in pairs
        ]
        both, own = sum(a and b for a, b in same), sum(a for a, _ in same)
        other, chance = sum(b for _, b in same), 0.0
        chance = own * other / len(pairs)
        most = (own + other) / 2
        rand.append((both - chance) / (most - chance))
        for k in (0, 1):
            mine = {at for at in drawn if labels[at] == k}
            if mine:
                best[k].append(max(len(mine & g) / len(mine | g) for g in groups))
    assert agreement == pytest.approx(np.mean(rand))
    assert jaccard.tolist() == pytest.approx([np.mean(best[0]), np.mean(best[1])])
    assert 0 < agreement < 0.95  # a fixture in which right and wrong differ


def test_cells_apart_by_slow_permutations():
    maps, has = blobs(16, 5, 0.5, tag=0.3)
    apart, shown = clusters._apart(maps, has, 3, draws=99)
    rng = np.random.default_rng(3)

    def difference(chosen):
        return maps[chosen].mean(0) - maps[~chosen].mean(0)

    largest = [np.abs(difference(rng.permutation(has))).max() for _ in range(99)]
    assert apart == pytest.approx(difference(has))
    assert (shown == (np.abs(difference(has)) > sorted(largest)[94])).all()
    assert 0 < shown.sum() < shown.size / 2


def test_cells_by_slow_means():
    values = np.random.default_rng(0).normal(size=(30, 44))
    cells = on_grid(values, 7)
    rows, columns = (np.linspace(0, n, 8).round().astype(int) for n in (30, 44))
    for i in range(7):
        for j in range(7):
            part = values[rows[i] : rows[i + 1], columns[j] : columns[j + 1]]
            assert cells[i, j] == pytest.approx(part.mean())
    assert on_grid(np.ones((7, 7))).shape == (14, 14)


@pytest.mark.parametrize(
    ("maps", "given", "words"),
    [
        (np.ones((9, 4, 4)), {}, "every map is the same"),
        (np.random.default_rng(0).normal(size=(9, 4, 4)), {"most": 1}, "most >= 2"),
        (
            np.random.default_rng(0).normal(size=(9, 4, 4)),
            {"nulls": 3},
            "nulls >= 19",
        ),
    ],
)
def test_what_cannot_be_grouped_is_said(maps, given, words):
    with pytest.raises(ConsilienceError, match=words):
        cluster_maps(maps, names(maps), **given)


def test_a_map_of_zeros_is_a_point_like_any_other():
    maps, _ = blobs(20, 0)
    maps[3] = 0
    found = cluster_maps(maps, names(maps), nulls=19)
    assert np.isfinite(found.silhouette)
    assert len(found.labels) == 20


def test_groups_are_numbered_by_size():
    assert clusters._by_size(np.array([5, 5, 2, 2, 2, 9])).tolist() == [
        1,
        1,
        0,
        0,
        0,
        2,
    ]
    assert clusters._by_size(np.array([4, 1, 4, 1])).tolist() == [0, 1, 0, 1]


def tagged_run(folder):
    """A run of a network that looks at the brightest place: a corner, in half of them."""
    import torch
    from torch import nn

    import consilience as cs
    from consilience.runs.explain import job_from_specs, run_explanations

    class Bright(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.Sequential(nn.AvgPool2d(4), nn.ReLU())

        def forward(self, x):
            said = self.cells(x).pow(3).mean((1, 2, 3))
            return torch.stack([said, 0.1 * said], 1)

    maps, has = blobs(24, 2, 0.5, spread=0.6, tag=0.85)
    pixels = (np.clip(maps, 0, 1.2) / 1.2 * 255).astype(np.uint8)
    samples = [
        cs.Sample(
            f"i{place:02d}", one.repeat(4, 0).repeat(4, 1)[..., None].repeat(3, 2), 0
        )
        for place, one in enumerate(pixels)
    ]
    model = cs.wrap(
        Bright().eval(), size=56, classes=["bright", "dark"], engine="torch"
    )
    job = job_from_specs(["occlusion:window=8,stride=4", "edges"], target="bright")
    run_explanations(job, samples, folder, models=[model] * 2)
    return has


def test_groups_of_a_run_from_the_shell(tmp_path, capsys):
    import json

    import pandas as pd

    import consilience as cs
    from consilience.cli import main

    has = tagged_run(tmp_path / "run")
    column = "Occlusion"
    command = ["clusters", str(tmp_path / "run"), "--column", column, "-o"]
    assert main([*command, str(tmp_path / "out"), "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)["groups"]
    assert (told["class"], told["count"]) == ("bright", 2)
    rows = pd.read_csv(tmp_path / "out" / "clusters.csv").sort_values("image")
    assert adjusted_rand_score(has, rows["cluster"]) > 0.8
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 of 1 class with groups" in page
    assert page.count("Group ") == 2
    assert "what sets it apart" in page
    found = cs.clusters(tmp_path / "run", column)
    [one] = found.values()
    assert one.sentence() == told["said"]
    assert [len(each.members) for each in one.clusters] == [12, 12]
    assert all(each.known == 12 for each in one.clusters)
    loose = cs.clusters(list(cs.Run(tmp_path / "run"))[:24:1], nulls=19)
    assert {key[1] for key in loose} == {"bright"}


def test_what_cannot_be_asked_of_a_run_is_said(tmp_path, capsys):
    import consilience as cs

    tagged_run(tmp_path / "run")
    with pytest.raises(ConsilienceError, match="did you mean 'edges'"):
        cs.clusters(tmp_path / "run", "Edge")
    with pytest.raises(ConsilienceError, match="did you mean 'bright'"):
        cs.clusters(tmp_path / "run", class_name="brigt")
    some = list(cs.Run(tmp_path / "run"))[:5]
    with pytest.raises(ConsilienceError, match="8 images or more; the largest has"):
        cs.clusters(some)


def shares_of(has, seed=0):
    """Shares of four concepts: a corner's differs by group, the rest do not."""
    rng = np.random.default_rng(seed)
    shares = rng.normal([0.2, 0.3, 0.4, 0.1], 0.05, (len(has), 4))
    shares[has, 1] += 0.3
    return shares


def test_concepts_apart_by_slow_permutations():
    maps, has = blobs(20, 1, 0.5)
    shares, concepts = shares_of(has), ("", "mark", "sky", "tree")
    shares[3] = np.nan  # an image of which it could not be told
    found = cluster_maps(maps, names(maps), nulls=19)
    told = clusters.with_concepts(found, shares, concepts, seed=5)
    known = np.arange(20) != 3
    for number, one in enumerate(told.clusters):
        inside = (found.labels == number)[known]
        rows = shares[known]
        here = [np.mean([row[k] for row in rows[inside]]) for k in range(4)]
        there = [np.mean([row[k] for row in rows[~inside]]) for k in range(4)]
        rng, largest = np.random.default_rng(5), []
        for _ in range(999):
            drawn = rng.permutation(inside)
            largest.append(
                max(abs(rows[drawn].mean(0) - rows[~drawn].mean(0)).tolist())
            )
        bar = sorted(largest)[949]
        order = sorted(range(4), key=lambda k: -abs(here[k] - there[k]))
        assert [share.concept for share in one.concepts] == [
            concepts[k] for k in order
        ]
        for share, k in zip(one.concepts, order, strict=True):
            assert share.here == pytest.approx(here[k])
            assert share.elsewhere == pytest.approx(there[k])
            assert share.shown == (abs(here[k] - there[k]) > bar)
        assert [share.concept for share in one.apart_by()] == ["mark"]
    said = told.table()["concepts_apart"].tolist()
    assert all(line.startswith("mark 0.") and " against 0." in line for line in said)
    assert found.table()["concepts_apart"].tolist() == ["", ""]


def test_concepts_that_do_not_differ_are_not_shown():
    shown = 0
    maps, _ = blobs(24, 2, 0.5)
    found = cluster_maps(maps, names(maps), nulls=19)
    concepts = tuple(f"c{k}" for k in range(30))
    for seed in range(40):
        shares = np.random.default_rng(seed).exponential(0.1, (24, 30))
        told = clusters.with_concepts(found, shares, concepts, seed)
        shown += bool(told.clusters[0].apart_by())
    assert shown <= 5  # .05 of 40 and three standard deviations


def test_concepts_known_of_one_side_alone_say_nothing():
    maps, has = blobs(20, 1, 0.5)
    found = cluster_maps(maps, names(maps), nulls=19)
    assert found.count == 2
    shares = shares_of(has)
    shares[has] = np.nan
    told = clusters.with_concepts(found, shares, ("", "mark", "sky", "tree"))
    assert all(one.concepts == () for one in told.clusters)


def test_concepts_of_one_group_are_its_largest_shares():
    maps, _ = blobs(20, 3)
    found = cluster_maps(maps, names(maps), nulls=19)
    assert found.count == 1
    shares = np.tile([0.2, -0.5, 0.1], (20, 1))
    [one] = clusters.with_concepts(found, shares, ("a", "b", "c")).clusters
    assert [share.concept for share in one.concepts] == ["b", "a", "c"]
    assert [share.here for share in one.concepts] == pytest.approx([-0.5, 0.2, 0.1])
    assert all(math.isnan(share.elsewhere) for share in one.concepts)
    assert one.apart_by() == ()


def test_concepts_come_with_the_explanations_and_stand_on_the_page(tmp_path):
    from dataclasses import replace

    import consilience as cs
    from consilience.show.clusters_page import clusters_page

    has = tagged_run(tmp_path / "run")
    run = cs.Run(tmp_path / "run")
    made = [run[(f"i{place:02d}", "Occlusion")] for place in range(24)]
    shares = shares_of(has)
    told = [
        replace(
            one,
            provenance={
                **one.provenance,
                "units": {"concepts": {"": row[0], "mark": row[1], "<sky>": row[2]}},
            },
        )
        for one, row in zip(made, shares, strict=True)
    ]
    told[4] = replace(
        told[4], provenance={**made[4].provenance, "units": {"code": 1}}
    )
    found = clusters.clusters_of(told, nulls=19)
    without = clusters.clusters_of(made, nulls=19)
    assert found.labels.tolist() == without.labels.tolist()
    got, concepts = clusters.concept_shares(told)
    assert concepts == ("", "<sky>", "mark")
    assert np.isnan(got[4]).all()
    assert got[5] == pytest.approx(shares[5][[0, 2, 1]])
    assert clusters.concept_shares(made) == (pytest.approx(np.zeros((24, 0))), ())
    key = ("Occlusion", "bright")
    typical = {key: [[told[at] for at in one.typical] for one in found.clusters]}
    page = clusters_page({key: found}, typical, "0")
    assert page.count(
        "shown to differ from the other images&#39;: mark "
    ) + page.count("shown to differ from the other images': mark ") == len(
        found.clusters
    )
    same = [
        one
        if "concepts" not in one.provenance["units"]
        else replace(
            one,
            provenance={**one.provenance, "units": {"concepts": {"<sky>": 1.0}}},
        )
        for one in told
    ]
    page = clusters_page({key: clusters.clusters_of(same, nulls=19)}, typical, "0")
    assert "No concept was shown to carry more or less" in page
    assert "<sky>" not in page
    page = clusters_page({key: without}, typical, "0")
    assert "oncept" not in page.partition("</style>")[2]
