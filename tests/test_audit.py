"""Each finding where it belongs and not where it does not; the six errors of the study,
by name.
"""

import math
import string
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from consilience import registry, study
from consilience.agreement import audit
from consilience.agreement.audit import SEVERITIES, Auditor, Finding
from consilience.agreement.masks import Mask
from consilience.agreement.overlap import Agreement
from consilience.images import Placement
from consilience.show.words import ADVICE, FINDINGS
from consilience.types import ClassTarget, Explanation, Sample

SIZE = (20, 20)
IMAGE = np.random.default_rng(0).integers(60, 200, (30, 40, 3), dtype=np.uint8)
CAM, LIME = "Grad-CAM", "LIME"


def explained(
    by="gradcam",
    sample="a",
    model="net@1",
    target=0,
    values=None,
    pixels=IMAGE,
    view="squash",
    geometry=None,
    **made,
):
    values = np.random.default_rng(1).normal(size=SIZE) if values is None else values
    geometry = geometry or Placement.squash(pixels.shape[:2], values.shape)
    goal = ClassTarget(target, f"class {target}")
    return Explanation(
        Sample(sample, pixels),
        model,
        by,
        goal,
        geometry,
        values.astype(np.float32),
        {},
        {"view": view, **made},
    )


def covering(share, rule="top:fraction=0.2", tied=0, at=0):
    on = np.zeros(400, dtype=bool)
    on[at : at + round(400 * share)] = True
    return Mask(on.reshape(SIZE), rule, tied)


SURE = {
    "index": 0,
    "name": "class 0",
    "probability": 0.9,
    "margin": 0.85,
    "true": 0,
    "true_name": "class 0",
}


def found(*images, summary=None, labels=(CAM, LIME)):
    """Findings of images, each (explanations, masks) or (explanations, masks,
    prediction).
    """
    auditor = Auditor()
    for explanations, masks, *said in images:
        auditor.add(
            explanations, masks, *(said or [SURE]), labels=labels[: len(masks)]
        )
    return auditor.findings(None, summary)


def codes(findings):
    return [finding.code for finding in findings]


def one(findings, code):
    (finding,) = [finding for finding in findings if finding.code == code]
    return finding


def sound(sample="a"):
    """An image of which there is nothing to say."""
    by = "lime:samples=700,fill=percentile(20),seed=0"
    return [explained(sample=sample), explained(by, sample, seed=0)], [
        covering(0.2),
        covering(0.2, "superpixels"),
    ]


def summary_of(**changed):
    row = {
        "a": CAM,
        "b": LIME,
        "images": 10,
        "n": 10,
        "iou_mean": 0.3,
        "expected_mean": 0.15,
        "share_p05": 0.9,
    }
    row |= {"excess_mean": 0.18, "excess_low": 0.12, "excess_high": 0.24}
    return pd.DataFrame([row | changed])


def test_a_sound_comparison_has_no_findings():
    assert found(sound("a"), sound("b"), summary=summary_of()) == []


def test_nothing_seen_nothing_said():
    auditor = Auditor()
    auditor.add([], [])
    assert auditor.findings() == []


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.009, None), (0.06, "6 %"), (float("nan"), None), (None, None)],
)
def test_attributions_that_do_not_add_up(share, said):
    known = {} if share is None else {"completeness_share": share}
    ours = explained("integrated-gradients", **known)
    findings = found(([ours], [covering(0.2)]), labels=("IG",))
    if said is None:
        assert "completeness-gap" not in codes(findings)
    else:
        finding = one(findings, "completeness-gap")
        assert finding.severity == "warning"
        assert finding.where == "IG"
        assert f"the gap is {said} of it" in finding.message


def test_a_gap_is_found_in_a_real_explanation(red_model, planted):
    from consilience import api

    rough, fine = (
        api.explain(red_model, planted, f"integrated-gradients:{more}", "red")
        for more in ("steps=1,rule=riemann-left", "steps=50")
    )
    whole = Mask(rough.values > 0, "top:fraction=0.2", 0)
    assert "completeness-gap" in codes(found(([rough], [whole]), labels=("IG",)))
    assert "completeness-gap" not in codes(found(([fine], [whole]), labels=("IG",)))


def test_every_rule_reads():
    """Places in the texts are those that are filled; order is by severity; every code
    is met in this file.
    """
    severities = [
        ("error", "warning", "note").index(severity)
        for severity in SEVERITIES.values()
    ]
    assert severities == sorted(severities)
    assert set(FINDINGS) == set(ADVICE) == set(SEVERITIES)
    assert all(advice.endswith(".") for advice in ADVICE.values())
    assert Finding("few-images", "warning").advice == "Add images."
    for code, text in FINDINGS.items():
        assert {name for _, name, _, _ in string.Formatter().parse(text) if name} <= {
            "images",
            "first",
            "second",
            "words",
        }
        assert f'"{code}"' in open(__file__, encoding="utf-8").read()  # noqa: PTH123, SIM115


# ---- one explanation


def test_rendered_mask_with_its_area_and_its_ties():
    pages = [
        covering(0.22, "luminance:percentile=80", 80),
        covering(0.32, "luminance:percentile=80", 100),
    ]
    finding = one(
        found(
            *[
                ([explained(sample=name)], [page])
                for name, page in zip("ab", pages, strict=True)
            ]
        ),
        "rendered-mask",
    )
    assert finding.severity == "error"
    assert finding.where == CAM
    assert "22-32 % of the frame, and 20-25 % of the frame share" in finding.message
    assert "in all 2 images" in finding.message


def test_flat_map_and_empty_mask():
    flat = found(
        ([explained(values=np.zeros(SIZE))], [covering(0.0)]),
        ([explained(sample="b")], [covering(0.02)]),
    )
    assert codes(flat) == ["empty-mask", "flat-map"]
    assert "in 1 of 2 images (a)" in one(flat, "flat-map").message
    assert "empty" in one(flat, "empty-mask").message
    nearly = np.zeros(SIZE)
    nearly[3, 3] = 1e-20
    assert codes(found(([explained(values=nearly)], [covering(0.1)]))) == []


@pytest.mark.parametrize(
    ("rule", "what"),
    [("top:fraction=0.2", "pixels"), ("superpixels:k=10", "superpixels")],
)
def test_ties_at_the_cut(rule, what):
    finding = one(found(([explained()], [covering(0.2, rule, 1234)])), "ties-at-cut")
    assert f"1,234 {what} share the value at the cut" in finding.message
    assert "ties-at-cut" not in codes(
        found(([explained()], [covering(0.2, rule, 0)]))
    )
    assert "ties-at-cut" not in codes(
        found(([explained()], [covering(0.2, "luminance:percentile=80", 9)]))
    )


def test_fill_truncated_says_what_it_should_have_been():
    finding = one(
        found(([explained("lime:fill=truncated(20)")], [covering(0.2)])),
        "fill-truncated",
    )
    assert finding.severity == "error"
    assert "(0.00 0.00 0.00) instead of (" in finding.message
    assert "fill-truncated" not in codes(
        found(([explained("lime:fill=percentile(20)")], [covering(0.2)]))
    )
    assert "fill-truncated" not in codes(
        found(([explained("lime:fill=black")], [covering(0.2)]))
    )
    assert "fill-truncated" not in codes(
        found(([explained("lime")], [covering(0.2)]))
    )


def test_a_percentile_that_is_black_by_right_is_noted_and_no_error():
    dark = np.zeros((30, 40, 3), dtype=np.uint8)
    dark[:20] = 200
    for fill in ("truncated(20)", "percentile(20)"):
        findings = found(
            ([explained(f"lime:fill={fill}", pixels=dark)], [covering(0.2)])
        )
        assert codes(findings) == ["fill-black"]
        assert findings[0].severity == "note"


def test_fill_out_of_range(monkeypatch):
    class Wrong:
        def image(self, view, segments):
            return view.pixels * 255

    monkeypatch.setattr(registry.fills, "build", lambda spec: Wrong())
    finding = one(
        found(([explained("lime:fill=wrong")], [covering(0.2)])), "fill-out-of-range"
    )
    assert finding.severity == "error"
    high = audit._view(explained()).pixels.max().item() * 255
    assert f" to {high:g}" in finding.message


def test_unseeded_draws():
    findings = found(
        ([explained("lime:seed=5", unseeded=True, seed=5)], [covering(0.2)])
    )
    finding = one(findings, "seed-without-effect")
    assert finding.severity == "error"
    assert "reaches only its own default segmentation" in finding.message
    assert "seeds drawn this time: 5" in finding.message
    assert (
        codes(
            found(
                ([explained("lime:seed=5", unseeded=False, seed=5)], [covering(0.2)])
            )
        )
        == []
    )


def unsettled(p_top, sample="a", **made):
    return replace(
        explained("lime", sample, **made), extras={"p_top": np.array(p_top)}
    )


def test_superpixels_that_are_not_settled():
    tie = {"code": "not-told-apart", "draws": 700, "rivals": [1, 2], "place": 2}
    images = [
        (
            [unsettled([1, 0.6, 0.4, 0], "a", stable=False, verdict=tie)],
            [covering(0.2)],
        ),
        (
            [
                unsettled(
                    [0.99, 0.96, 0.05, 0],
                    "b",
                    stable=True,
                    verdict="stable after 256 draws",
                )
            ],
            [covering(0.2)],
        ),
        (
            [unsettled([0.5, 0.6, 0.9, 0], "c", stable=False, verdict=tie)],
            [covering(0.2)],
        ),
    ]
    finding = one(found(*images, labels=(LIME,)), "unstable-superpixels")
    assert (finding.severity, finding.where) == ("warning", LIME)
    assert (
        "in 2 of 3 images (a, c): 0-50 % of the top ones are sure" in finding.message
    )
    assert (
        "(after 700 draws: superpixels 1 and 2 could not be told apart at place 2)"
        in finding.message
    )


def test_settled_superpixels_are_no_finding():
    for made in ({"stable": True}, {}):
        assert (
            codes(found(([unsettled([1, 0.97, 0.03], **made)], [covering(0.2)])))
            == []
        )
    few = unsettled(
        [np.nan] * 3,
        stable=False,
        verdict={"code": "too-few-draws", "draws": 20, "superpixels": 3},
    )
    assert (
        "0 % of the top ones are sure"
        in one(found(([few], [covering(0.2)])), "unstable-superpixels").message
    )


# ---- columns of an image


@pytest.mark.parametrize(
    ("other", "code", "words"),
    [
        ({"model": "net@2"}, "mixed-weights", "Grad-CAM net@1 against LIME net@2"),
        (
            {"view": "crop", "geometry": Placement.crop((30, 40), 24, SIZE)},
            "mixed-views",
            "Grad-CAM squash against LIME crop",
        ),
        ({"target": 4}, "mixed-targets", "Grad-CAM class 0 against LIME class 4"),
    ],
)
def test_columns_that_do_not_match(other, code, words):
    findings = found(([explained(), explained("lime", **other)], [covering(0.2)] * 2))
    assert codes(findings) == [code]
    assert findings[0].severity == "error"
    assert findings[0].where == "Grad-CAM | LIME"
    assert words in findings[0].message


def test_another_score_of_the_same_class_is_no_mismatch():
    first, second = explained(), explained("lime")
    object.__setattr__(second, "target", ClassTarget(0, "class 0", "probability"))
    assert codes(found(([first, second], [covering(0.2)] * 2))) == []


def test_images_with_mismatches_are_counted_and_the_first_few_named():
    images = [
        (
            [
                explained(sample=name),
                explained("lime", name, target=int(name in "bcde")),
            ],
            [covering(0.2)] * 2,
        )
        for name in "abcdef"
    ]
    assert (
        "in 4 of 6 images (b, c, d, ...)"
        in one(found(*images), "mixed-targets").message
    )


# ---- predictions


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, []),
        ({"true": None}, []),
        ({"true": 3, "true_name": "kite"}, ["prediction-wrong"]),
        ({"probability": 0.49}, ["prediction-unsure"]),
        ({"probability": 0.5, "margin": 0.1}, []),
        ({"probability": 0.52, "margin": 0.09}, ["prediction-unsure"]),
        ({"probability": math.nan, "margin": math.nan}, []),
        ({"probability": None, "margin": None}, []),
    ],
)
def test_predictions(said, expected):
    findings = found(([explained()], [covering(0.2)], SURE | said))
    assert codes(findings) == expected


def test_predictions_are_said_in_words():
    findings = found(
        (
            [explained()],
            [covering(0.2)],
            SURE
            | {"true": 3, "true_name": "kite", "probability": 0.3, "margin": 0.05},
        )
    )
    assert "kite is called class 0" in one(findings, "prediction-wrong").message
    assert (
        "class 0 at 0.30, 0.05 before the next"
        in one(findings, "prediction-unsure").message
    )


def test_no_prediction_no_finding():
    auditor = Auditor()
    auditor.add([explained()], [covering(0.2)])
    assert auditor.findings() == []


# ---- all images


def test_below_chance_names_both_numbers():
    findings = found(
        summary=summary_of(
            iou_mean=0.1198,
            expected_mean=0.19,
            excess_mean=-0.09,
            excess_low=-0.12,
            excess_high=-0.06,
        )
    )
    assert codes(findings) == ["below-chance"]
    assert (
        "mean IoU 0.120 is below chance: independent masks of the same areas reach 0.190"
        in findings[0].message
    )
    assert findings[0].where == "Grad-CAM | LIME"
    assert codes(found(summary=summary_of(iou_mean=0.1901, expected_mean=0.19))) == []


def test_bare_iou_that_chance_can_explain_is_said():
    findings = found(
        summary=summary_of(
            iou_mean=0.2,
            expected_mean=0.19,
            excess_mean=0.01,
            excess_low=-0.005,
            excess_high=0.025,
        )
    )
    assert "chance-level" in codes(findings)
    assert (
        "the mean IoU of 0.200 is not clearly above chance"
        in one(findings, "chance-level").message
    )
    assert "0.190" in one(findings, "chance-level").message


def test_published_numbers_below_chance_are_named():
    table = pd.DataFrame(
        {"published_iou": [0.09, 0.15, np.nan], "expected_iou": [0.18, 0.20, 0.9]}
    )
    auditor = Auditor()
    findings = auditor.findings(table, summary_of())
    assert [(found.code, found.where) for found in findings] == [
        ("below-chance", "as published")
    ]
    assert (
        "mean IoU 0.120 is below chance: independent masks of the same areas reach 0.190"
        in findings[0].message
    )
    assert auditor.findings(table.assign(expected_iou=0.1), summary_of()) == []


def test_area_that_varies_names_its_range():
    shares = {"a": 0.28, "b": 0.45, "c": 0.70}
    images = [
        (
            [explained(sample=name), explained(sample=name)],
            [covering(0.2), covering(share)],
        )
        for name, share in shares.items()
    ]
    finding = one(found(*images), "area-varies")
    assert finding.where == LIME
    assert "cover 28-70 % of the frame" in finding.message
    steady = [
        ([explained(sample=name)], [covering(share)])
        for name, share in (("a", 0.2), ("b", 0.245))
    ]
    assert codes(found(*steady)) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {
                "n": 0,
                "excess_mean": math.nan,
                "excess_low": math.nan,
                "excess_high": math.nan,
            },
            "no image has a defined IoU",
        ),
        (
            {"n": 1, "excess_low": math.nan, "excess_high": math.nan},
            "one image has no interval",
        ),
        ({"n": 4}, "4 images are too few"),
        ({"n": 5, "share_p05": 0.8}, ""),
        (
            {"n": 10, "excess_mean": 0.02, "excess_low": -0.01, "excess_high": 0.05},
            "10 images give a mean excess of 0.020 +- 0.030",
        ),
        (
            {
                "n": 10,
                "excess_mean": -0.02,
                "excess_low": -0.03,
                "excess_high": -0.01,
            },
            "",
        ),
    ],
)
def test_few_images(changed, words):
    findings = [
        finding
        for finding in found(summary=summary_of(**changed))
        if finding.code != "chance-level"
    ]
    assert codes(findings) == (["few-images"] if words else [])
    assert all(words in finding.message for finding in findings)


def test_a_verdict_and_its_audit_do_not_contradict_each_other():
    """Shown by exchanging images, with a wide interval: its size is not known."""
    wide = {"excess_mean": 0.1, "excess_low": -0.05, "excess_high": 0.25, "n": 6}
    findings = found(summary=summary_of(**wide, verdict="shown"))
    assert codes(findings) == ["size-unknown"]
    assert "mean excess, −0.050 to 0.250, includes 0" in findings[0].message
    assert "size-unknown" not in codes(
        found(summary=summary_of(**wide, verdict="not-shown"))
    )


def test_overlap_that_shifted_shapes_have_too():
    finding = one(found(summary=summary_of(share_p05=0.3)), "shift-explains")
    assert "in only 30 % of the images" in finding.message
    assert codes(found(summary=summary_of(share_p05=0.5))) == []
    assert codes(
        found(
            summary=summary_of(
                share_p05=0.3, excess_mean=0.1, excess_low=0.0, excess_high=0.2
            )
        )
    ) == ["chance-level"]


def test_a_label_that_is_predicted_beside_the_first_is_not_wrong():
    said = SURE | {"true": 3, "true_name": "kite"}
    assert "prediction-wrong" in codes(found(([explained()], [covering(0.2)], said)))
    met = found(([explained()], [covering(0.2)], said | {"also": (2, 3)}))
    assert "prediction-wrong" not in codes(met)


def discs(centres, radius=5.0, side=20):
    """Masks (side, side) of discs about some centres."""
    rows, columns = np.mgrid[:side, :side] + 0.5
    return [
        Mask((rows - y) ** 2 + (columns - x) ** 2 <= radius**2, "top")
        for y, x in centres
    ]


def compared_discs(centres, labels=(CAM, LIME), by=("gradcam", "lime"), **said):
    """Findings on pairs of discs, an image a row of two centres."""
    agreement, auditor = Agreement(), Auditor()
    for number, two in enumerate(centres):
        masks = discs(two)
        maps = [
            replace(
                explained(by=name, sample=f"image {number}"),
                values=mask.on.astype(np.float32),
            )
            for name, mask in zip(by, masks, strict=True)
        ]
        agreement.add(maps, masks, labels)
        auditor.add(maps, masks, SURE | said, labels)
    return auditor.findings(agreement.table(), agreement.summary())


def test_maps_that_share_only_the_middle():
    rng = np.random.default_rng(5)
    near = 10 + rng.normal(0, 1.5, (12, 2, 2))
    finding = one(compared_discs(near), "centre-explains")
    assert finding.where == f"{CAM} | {LIME}"
    rows, columns = np.mgrid[:20, :20] + 0.5
    distance = ((rows - 10) ** 2 + (columns - 10) ** 2).ravel()
    central = []
    for two in near:
        lesser = []
        for mask in discs(two):
            area = int(mask.on.sum())
            disc = np.isin(np.arange(400), np.argsort(distance, kind="stable")[:area])
            both = (mask.on.ravel() & disc).sum()
            expected = sum(
                x
                / (2 * area - x)
                * math.comb(area, x)
                * math.comb(400 - area, area - x)
                for x in range(area + 1)
            ) / math.comb(400, area)
            lesser.append((both / (2 * area - both) - expected) / (1 - expected))
        central.append(min(lesser))
    assert finding.facts["second"] == pytest.approx([np.mean(central)] * 2, abs=1e-9)
    # the same object in both, wherever it lies, is more than the middle
    objects = rng.uniform(5, 15, (12, 1, 2)) + rng.normal(0, 0.5, (12, 2, 2))
    assert "centre-explains" not in codes(compared_discs(objects))


def test_relatives_that_agree():
    objects = np.repeat(
        np.random.default_rng(6).uniform(5, 15, (12, 1, 2)), 2, axis=1
    )
    labels = (CAM, "Layer-CAM")
    finding = one(
        compared_discs(objects, labels, ("gradcam", "layercam")), "one-family"
    )
    assert finding.where == f"{CAM} | Layer-CAM"
    assert "both are class activation maps" in finding.message
    assert "one-family" not in codes(compared_discs(objects))
    # that they agree was not shown: nothing is laid to their being relatives
    apart = np.random.default_rng(7).uniform(5, 15, (12, 2, 2))
    assert "one-family" not in codes(
        compared_discs(apart, labels, ("gradcam", "layercam"))
    )
    assert "one-family" not in codes(
        compared_discs(objects, labels, ("mine", "other"))
    )


def test_every_family_is_of_explainers_that_exist():
    named = [name for names in audit.FAMILIES.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) <= set(registry.explainers.names())


@pytest.mark.parametrize(
    ("classes", "probability", "uniform"),
    [(1000, 0.005, True), (1000, 0.0051, False), (2, 0.6, True), (2, 0.61, False)],
)
def test_outputs_that_know_nothing(classes, probability, uniform):
    said = {"probability": probability, "margin": 0.5, "uniform": 1 / classes}
    met = found(([explained()], [covering(0.2)], SURE | said))
    assert ("outputs-uniform" in codes(met)) == uniform
    if uniform:
        sentence = one(met, "outputs-uniform").message
        assert f"the first of {classes:,} classes has p = {probability:g}" in sentence


# ---- together


def test_most_serious_first_and_equal_codes_by_place():
    images = [
        (
            [
                explained("lime:fill=truncated(20)", model="x@1"),
                explained("lime:fill=truncated(20)"),
            ],
            [covering(0.2)] * 2,
            {},
        )
    ]
    findings = found(*images, labels=("B", "A"), summary=summary_of(n=3))
    assert [(finding.code, finding.where) for finding in findings] == [
        ("mixed-weights", "B | A"),
        ("fill-truncated", "A"),
        ("fill-truncated", "B"),
        ("few-images", "Grad-CAM | LIME"),
    ]


def test_unnamed_columns_go_by_their_spelling():
    auditor = Auditor()
    auditor.add([explained("lime:fill=truncated(20)")], [covering(0.2)])
    assert [finding.where for finding in auditor.findings()] == [
        "lime:fill=truncated(20)"
    ]


def test_no_array_is_kept():
    auditor = Auditor()
    auditor.add(*sound())
    kept = repr(vars(auditor))
    assert "array" not in kept
    assert len(kept) < 500


def superpixels(weights, sample, **made):
    """A LIME explanation over a grid of squares, as the study's code made it."""
    segments = np.kron(np.arange(25).reshape(5, 5), np.ones((4, 4), dtype=int))
    base = explained(
        "lime:samples=700,fill=truncated(20),draw=lime,seed=7",
        sample,
        values=weights[segments],
        **made,
    )
    extras = {
        "segments": segments,
        "weights": weights,
        "refit": weights,
        "selected": np.argsort(-np.abs(weights))[:10],
    }
    return Explanation(
        base.sample,
        base.model_id,
        base.explainer,
        base.target,
        base.geometry,
        base.values,
        extras,
        base.provenance,
    )


def test_the_six_errors_of_the_study_are_all_named():
    """The real cutters, the real table: a page's margins compared with superpixels of
    another network.
    """
    rng = np.random.default_rng(3)
    cam_cutter, lime_cutter = (
        registry.cutters.build("luminance:80"),
        registry.cutters.build("superpixels:10"),
    )
    auditor, agreement = Auditor(), Agreement(allow_mismatch=True)
    labels = (CAM, LIME)
    for n in range(6):
        sample = f"image {n}"
        weights = rng.normal(size=25)
        weights[:10] = np.where(np.arange(10) < 4 + n, 2.0, -2.0) + 0.01 * rng.normal(
            size=10
        )
        weights[:10] = weights[:10][::-1] if n % 2 else weights[:10]
        shuffled = np.full(25, 0.01)
        shuffled[6:9], shuffled[11:14], shuffled[16:19] = (
            weights[:3],
            weights[3:6],
            weights[6:9],
        )
        pair = [
            explained("gradcam", sample, model="resnet50@v1"),
            superpixels(shuffled, sample, model="resnet50@v2", unseeded=True, seed=7),
        ]
        masks = [cam_cutter.cut(pair[0]), lime_cutter.cut(pair[1])]
        auditor.add(pair, masks, SURE, labels)
        agreement.add(pair, masks, labels)
    findings = auditor.findings(agreement.table(), agreement.summary())
    assert {
        "rendered-mask",
        "mixed-weights",
        "fill-truncated",
        "seed-without-effect",
        "below-chance",
        "area-varies",
    } <= set(codes(findings))
    assert all(
        isinstance(finding, Finding) and "{" not in finding.message
        for finding in findings
    )
    row = agreement.summary().iloc[0]
    assert f"{row['iou_mean']:.3f}" in one(findings, "below-chance").message
    assert f"{row['expected_mean']:.3f}" in one(findings, "below-chance").message
    assert study.PUBLISHED_MEAN == 0.1198
