"""Words come last: reasons, verdicts and findings are codes with facts, and every code
has its sentence in one place.
"""

import ast
import copy
import json
import pickle
import string
from pathlib import Path

import pytest

import consilience as cs
from consilience.show import words
from consilience.types import OF_IMAGE, NotApplicable

SOURCE = Path(__file__).parent.parent / "src" / "consilience"


def raised():
    """Every ``NotApplicable(...)`` of the source: file, line, code, names of facts."""
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "NotApplicable"
            ):
                yield file.relative_to(SOURCE), node


RAISED = [pytest.param(node, id=f"{file}:{node.lineno}") for file, node in raised()]


@pytest.mark.parametrize("node", RAISED)
def test_every_reason_is_a_code_whose_sentence_has_its_facts(node):
    assert not node.args, "a sentence is made where a fact is meant"
    facts = {word.arg: word.value for word in node.keywords}
    code = facts.pop("code")
    if isinstance(code, ast.JoinedStr):  # no-object-auto, -boxes, -masks
        start = code.values[0].value
        codes = [known for known in words.REASONS if known.startswith(start)]
    elif isinstance(code, ast.Name):
        codes = [{"FAILED": "failed"}[code.id]]
    else:
        codes = [code.value]
    assert codes
    for name in codes:
        named = {
            part for _, part, _, _ in string.Formatter().parse(words.REASONS[name])
        } - {None, "has"}
        assert named <= set(facts)
        assert set(facts) - named <= {"image", "others", "masks"}


def test_no_code_is_without_use():
    text = "\n".join(
        file.read_text(encoding="utf-8")
        for file in SOURCE.rglob("*.py")
        if file.name != "words.py"
    )
    unused = [
        code
        for code in words.REASONS
        if f'"{code}"' not in text and not code.startswith("no-object-")
    ]
    assert unused == []


@pytest.mark.parametrize("name", ["a.jpg", "e", "the", "image", "{x}", "a {image} b"])
def test_a_name_does_not_change_the_sentence_round_it(red_model, planted, name):
    from dataclasses import replace

    one = cs.explain(red_model, replace(planted, name=name), "gradcam")
    reason = cs.evaluate(red_model, one, "pointing-game")["pointing-game"]
    assert str(reason) == (
        f"{name} has neither a mask nor a box of class {one.target.index} "
        f"{one.target.name}; it has no boxes and 0 masks"
    )
    left = {key: part for key, part in reason.facts.items() if key not in OF_IMAGE}
    assert words.reason_sentence(reason.code, left) == (
        "the image has neither a mask nor a box of the explained class; it has boxes of "
        "another class, or none and 0 masks"
    )


def test_a_plug_in_may_say_it_in_its_own_words():
    plain = NotApplicable("no edges {today}")
    assert (str(plain), plain.code, plain.facts) == (
        "no edges {today}",
        "said",
        {"text": "no edges {today}"},
    )
    named = NotApplicable("{image} has {count} edges", image="a.jpg", count=3)
    assert str(named) == "a.jpg has 3 edges"
    general = {key: part for key, part in named.facts.items() if key not in OF_IMAGE}
    assert words.reason_sentence("said", general) == "the image has 3 edges"


def test_a_reason_survives_json_and_pickle():
    reason = NotApplicable(code="below-gap", what="score", found=0.00123, gap=0.01)
    said = "score is 0.00123, below the gap of 0.01: nothing to divide by"
    assert str(reason) == said
    assert (
        words.reason_sentence(reason.code, json.loads(json.dumps(reason.facts)))
        == said
    )
    for again in (copy.copy(reason), pickle.loads(pickle.dumps(reason))):
        assert (str(again), again.code, again.facts) == (
            said,
            reason.code,
            reason.facts,
        )


def test_an_unknown_code_is_still_said():
    assert (
        words.reason_sentence("of-a-later-version", {"n": 3}) == "of-a-later-version"
    )
    assert words.reason_sentence("no-seed", {}).startswith("(no explainer) draws")


@pytest.mark.parametrize(("p", "said"), [(0.0004, "p < 0.001"), (0.031, "p = 0.031")])
@pytest.mark.parametrize("verdict", ["shown", "not-shown"])
def test_a_p_has_one_sign(p, said, verdict):
    row = {"verdict": verdict, "why": "", "p_holm": p, "iou_mean": 0.3}
    reason = words.verdict_reason({**row, "expected_mean": 0.1})
    assert said in reason.replace(words.NBSP, " ")
    assert "= <" not in reason


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ({"code": "stable", "draws": 500}, "stable after 500 draws"),
        ({"code": "flat", "draws": 9}, "not stable: there is nothing to explain"),
        (
            {"code": "nothing-left-out", "draws": 64, "superpixels": 5},
            "not told: all 5 superpixels are selected, so none is left out that could take a "
            "place",
        ),
        (
            {"code": "design-cannot-tell", "draws": 64, "design": "hadamard"},
            "not told: 64 draws by draw=hadamard cannot tell superpixels that act together",
        ),
        (
            {"code": "too-few-draws", "draws": 64, "superpixels": 90},
            "not stable: 64 draws are too few to tell 90 superpixels apart",
        ),
        (
            {"code": "not-told-apart", "draws": 64, "rivals": [4, 6], "place": 5},
            "not stable after 64 draws: superpixels 4 and 6 could not be told apart at place 5",
        ),
    ],
)
def test_every_verdict_of_a_surrogate_has_its_sentence(verdict, said):
    from consilience.show.words import stability_sentence

    assert stability_sentence(verdict) == said


@pytest.mark.parametrize("by", ["lime:samples=64", "lime:samples=64,draw=hadamard"])
def test_a_run_of_few_superpixels_is_finished(by, tmp_path):
    import numpy as np

    import consilience as cs

    model = cs.wrap_callable(lambda x: x.mean(dim=(2, 3)), size=32)
    sample = cs.Sample("x", np.random.default_rng(0).random((32, 32, 3)))
    for segments in ("grid(2)", "grid(6)"):
        run = cs.run(model, sample, f"{by},segments={segments}", tmp_path / segments)
        assert (run.folder / "report.html").is_file()


def said(label="dog", true=None, right=None, probability=0.9344):
    return {"label": label, "true": true, "right": right, "probability": probability}


@pytest.mark.parametrize(
    ("predictions", "sentence"),
    [
        ({"x": said()}, "x is called dog (p 0.934)"),
        (
            {"x": said(true="dog", right=True)},
            "x is called dog (p 0.934), which is right",
        ),
        (
            {"x": said(true="cat", right=False)},
            "x is called dog (p 0.934); it is cat",
        ),
        (
            {"x": said(probability=float("nan"))},
            "x is called dog (no probability)",
        ),
        (
            {"x": said(), "y": said()},
            "2 images explained, none with a known class",
        ),
        (
            {
                "x": said(true="dog", right=True),
                "y": said(true="dog", right=False),  # another class of that name
                "z": said(),
            },
            "3 images explained; 1 of 2 right",
        ),
    ],
)
def test_what_was_predicted_in_a_sentence(predictions, sentence):
    assert words.prediction_sentence(predictions) == sentence


def test_what_was_called_what_is_counted():
    predictions = {
        "a": said("dog", "cat", False),
        "b": said("ox", "cat", False),
        "c": said("ox", "cat", False),
        "d": said("cat", "cat", True),
        "e": said(),
    }
    assert words.confusion_rows(predictions) == [("cat", "ox", 2), ("cat", "dog", 1)]


@pytest.mark.parametrize(
    ("severities", "sentence"),
    [
        (
            ["note", "warning", "error"],
            "Do not rely on it yet: the audit found 1 error.",
        ),
        (
            ["warning", "note", "warning"],
            "To be taken with care: the audit found 2 warnings.",
        ),
        (
            ["note"],
            "The audit found nothing against it. That the maps are faithful is not",
        ),
    ],
)
def test_how_far_to_trust_it(severities, sentence):
    from types import SimpleNamespace

    findings = [SimpleNamespace(severity=one) for one in severities]
    assert words.trust_sentence(findings).startswith(sentence)


def test_a_line_every_half_minute_where_there_is_no_terminal(capsys):
    from rich.console import Console

    from consilience.show.console import LogLines

    now = [0.0]
    log = LogLines(Console(width=200), clock=lambda: now[0])
    outer = log.start("images", 10)
    for second in range(1, 101):
        now[0] = float(second)
        if second % 10 == 0:
            log.advance(outer, 1)
    log.finish(outer)
    assert capsys.readouterr().out.replace("\xa0", " ").splitlines() == [
        "images 3 of 10, 30 s, about 70 s left",
        "images 6 of 10, 60 s, about 40 s left",
        "images 9 of 10, 90 s, about 10 s left",
    ]
