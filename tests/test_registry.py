"""The grammar, the registry and the nouns: parse and render are inverse, and every
error says what there is.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience import progress, registry
from consilience.registry import (
    Registry,
    Spec,
    construct,
    option,
    parse,
    render,
    spell,
    unknown,
)
from consilience.types import ClassTarget, ConsilienceError, Explanation, Sample

# ---- the grammar


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("gradcam", Spec("gradcam")),
        ("gradcam++", Spec("gradcam++")),
        (" gradcam : layer4 ", Spec("gradcam", ("layer4",))),
        ("a:1,2,x=3", Spec("a", ("1", "2"), (("x", "3"),))),
        ("a:x=b+c+d", Spec("a", (), (("x", ("b", "c", "d")),))),
        ("a:x=b()", Spec("a", (), (("x", Spec("b")),))),
        (
            "a:x=b(1,y=c(2))",
            Spec("a", (), (("x", Spec("b", ("1",), (("y", Spec("c", ("2",))),))),)),
        ),
        ("a:x=b(1)+c", Spec("a", (), (("x", (Spec("b", ("1",)), "c")),))),
        ('a:x="b,c+d(e)=f"', Spec("a", (), (("x", "b,c+d(e)=f"),))),
        (r"a:x='it\'s'", Spec("a", (), (("x", "it's"),))),
        (
            "timm:convnext_tiny.in12k,weights=C:/a b.pth",
            Spec("timm", ("convnext_tiny.in12k",), (("weights", "C:/a b.pth"),)),
        ),
        ("a:x=-1e-05", Spec("a", (), (("x", "-1e-05"),))),
        ('a:x=""', Spec("a", (), (("x", ""),))),
    ],
)
def test_parses_to(text, spec):
    assert parse(text) == spec


words = st.text(min_size=0, max_size=8).filter(lambda text: "\x00" not in text)
names = st.from_regex(r"[a-z][a-z0-9_+.-]{0,8}", fullmatch=True)
inner_names = st.from_regex(r"[a-z][a-z0-9_.-]{0,8}", fullmatch=True)
keys = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)


def specs_of(names, values):
    pairs = st.dictionaries(keys, values, max_size=3).map(
        lambda found: tuple(found.items())
    )
    return st.builds(
        Spec, names, st.lists(values, max_size=2).map(tuple), pairs
    ).filter(lambda spec: spec.args or spec.options)


def lists_of(values):
    return st.one_of(values, st.lists(values, min_size=2, max_size=3).map(tuple))


nested = st.recursive(
    words,
    lambda inner: st.one_of(inner, specs_of(inner_names, lists_of(inner))),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(specs_of(names, lists_of(nested)))
def test_render_and_parse_are_inverse(spec):
    assert parse(render(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a specification"),
        (":a", "is not a specification"),
        ("a b:c", "is not a specification"),
        ("a,b", "is not a specification"),
        ("a:x=1,x=2", "'x' twice"),
        ("a:x=1,2", "a value without a name comes after a named one"),
        ("a:x=", "a value is missing"),
        ("a:,b", "a value is missing"),
        ("a:x=b(1", "was not expected there"),
        ("a:x=1)", "was not expected there"),
        ("a:x='b", "a quote is opened and not closed"),
        ("a:", "a value is missing"),
    ],
)
def test_bad_grammar_is_refused_with_the_text(text, message):
    with pytest.raises(ConsilienceError, match=message) as caught:
        parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", [None, 3, b"lime", ["lime"]])
def test_what_is_no_text_is_refused_in_one_line(text):
    with pytest.raises(ConsilienceError) as caught:
        parse(text)
    assert str(caught.value) == (
        "a specification is text, name[:value][,key=value...]; got "
        f"{type(text).__name__}"
    )


# ---- schemas

things = Registry("thing")


@things.register("grid")
@dataclass(frozen=True)
class Grid:
    n: int = 8
    ratio: float = 0.2


@things.register("dots")
@dataclass(frozen=True)
class Dots:
    """No options."""


@things.register("wide")
@dataclass(frozen=True)
class Wide:
    samples: int = 700
    width: float = 0.25
    layer: str = "auto"
    layers: tuple[str, ...] = ()
    rgb: tuple[float, float, float] = (0.5, 0.5, 0.5)
    relu: bool = True
    until: float | None = None
    draw: Literal["lime", "independent"] = "independent"
    within: Grid | Dots = option(Grid(), kind="thing", help="nested")


@things.register("needy")
@dataclass(frozen=True)
class Needy:
    path: str


wides = st.builds(
    Wide,
    samples=st.integers(-(10**6), 10**9),
    width=st.floats(allow_nan=False),
    layer=words,
    layers=st.lists(words, min_size=1, max_size=3).map(tuple),
    rgb=st.tuples(*[st.floats(allow_nan=False, width=32)] * 3),
    relu=st.booleans(),
    until=st.none() | st.floats(allow_nan=False),
    draw=st.sampled_from(["lime", "independent"]),
    within=st.just(Dots())
    | st.builds(Grid, st.integers(), st.floats(allow_nan=False)),
)


@settings(max_examples=300, deadline=None)
@given(wides)
def test_spell_and_build_are_inverse(thing):
    assert things.build(spell(thing)) == thing
    assert things.build(spell(thing, full=True)) == thing


def test_spelling_omits_defaults_and_full_names_all():
    assert spell(Wide()) == "wide"
    assert (
        spell(Wide(samples=5, within=Grid(n=3))) == "wide:samples=5,within=grid(n=3)"
    )
    assert spell(Grid(), full=True) == "grid:n=8,ratio=0.2"
    assert (
        spell(Wide(relu=False, until=1.5, layers=("a", "b")))
        == "wide:layers=a+b,relu=false,until=1.5"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.01, "0.01"),
        (1e-5, "1e-05"),
        (1e20, "1e20"),
        (1 / 3, "0.3333333333333333"),
        (2.0, "2"),
    ],
)
def test_floats_are_spelled_short_and_exactly(value, text):
    assert spell(Grid(ratio=value)) == f"grid:ratio={text}"
    assert things.build(f"grid:ratio={text}").ratio == value


def test_values_are_converted_as_their_field_is_typed():
    built = things.build(
        "wide:20,.5,layers=a,rgb=1+0+.5,relu=no,until=none,draw=lime,within=grid(4)"
    )
    assert built == Wide(
        20, 0.5, "auto", ("a",), (1.0, 0.0, 0.5), False, None, "lime", Grid(4)
    )
    assert things.build("wide:within=dots").within == Dots()
    assert things.build(built) is built


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "gird",
            r"no thing 'gird'; did you mean 'grid'\? There is: dots, grid, needy, wide",
        ),
        ("zzz", "no thing 'zzz'; there is: dots, grid, needy, wide"),
        ("grid:m=1", r"grid has no option 'm'; it has n, ratio|did you mean"),
        (
            "wide:sample=1",
            r"wide has no option 'sample' \(did you mean samples\?\); it has samples, width, layer",
        ),
        ("dots:n=1", "dots has no option 'n'; it has no options"),
        ("grid:1,2,3", "grid takes 2 values at most; got 3"),
        ("grid:1,n=2", "grid is given 'n' twice"),
        ("grid:n=1.5", "grid: n is a whole number; got '1.5'"),
        ("grid:ratio=x", "grid: ratio is a number; got 'x'"),
        ("wide:relu=maybe", "wide: relu is true or false; got 'maybe'"),
        ("wide:draw=none", "wide: draw is one of lime, independent; got 'none'"),
        ("wide:rgb=1+2", "wide: rgb takes 3 values joined by +"),
        ("wide:samples=1+2", "wide: samples takes one plain value"),
        ("wide:layer=grid(3)", "wide: layer takes one plain value"),
        ("wide:until=soon", "wide: until is a number; got 'soon'"),
        ("wide:within=grid+dots", "wide: within is one thing, got a list"),
        ("wide:within=gird(3)", "no thing 'gird'; did you mean 'grid'"),
        ("wide:within=grid(k=3)", "grid has no option 'k'; it has n, ratio"),
        ("needy", "needy needs path: needy:PATH"),
    ],
)
def test_errors_say_what_there_is(spec, message):
    with pytest.raises(ConsilienceError, match=message):
        things.build(spec)


def test_dashes_in_options_are_underscores():
    assert construct(Wide, parse("wide:samples=3")).samples == 3

    @things.register("dashed")
    @dataclass(frozen=True)
    class Dashed:
        kernel_width: float = 0.1

    try:
        assert things.build("dashed:kernel-width=2").kernel_width == 2
    finally:
        del things._entries["dashed"]


def test_a_long_list_is_cut_and_counted():
    assert unknown("word", "zz", [f"w{n}" for n in range(9)], limit=2).endswith(
        "w0, w1, ... (9 in all)"
    )


def test_a_name_is_registered_once_but_a_module_may_be_loaded_again():
    things.register("grid")(Grid)
    with pytest.raises(ConsilienceError, match="thing 'grid' is registered by"):
        things.register("grid")(Dots)
    assert things.get("grid") is Grid


def test_every_registry_of_the_package_loads_and_spells_its_defaults():
    for kind in (
        registry.explainers,
        registry.segmenters,
        registry.fills,
        registry.cutters,
    ):
        assert kind.names()
        for name in kind.names():
            built = kind.build(name)
            assert kind.build(spell(built, full=True)) == built


# ---- plugins

PLUGIN = """
from dataclasses import dataclass
from consilience.registry import {where}

@{where}.register("{name}")
@dataclass(frozen=True)
class Mine:
    n: int = 3
    higher_is_better = True
    bounds = (0.0, 1.0)

    def score(self, model, view, explanation):
        raise NotImplementedError

    def explain(self, model, view, target):
        raise NotImplementedError
"""


def test_a_plugin_that_lacks_parts_is_told_all_of_them_at_once(tmp_path):
    file = tmp_path / "half.py"
    file.write_text(
        "from consilience.registry import metrics\n\n"
        "@metrics.register('half')\nclass Half:\n    bounds = (0, 1)\n"
    )
    with pytest.raises(ConsilienceError) as caught:
        registry.load_plugin(file)
    assert str(caught.value).endswith(
        "Half) lacks @dataclass(frozen=True), score, higher_is_better"
    )
    assert "half" not in registry.metrics.names()


def test_a_plugin_file_registers_what_it_holds(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.format(where="metrics", name="test-of-plugins"))
    try:
        registry.load_plugin(file)
        assert (
            spell(registry.metrics.build("test-of-plugins:4"))
            == "test-of-plugins:n=4"
        )
        registry.load_plugin(file)
    finally:
        registry.metrics._entries.pop("test-of-plugins", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 / 0", "does not load: ZeroDivisionError"),
        ("def", "does not load: SyntaxError"),
        ("import nowhere_at_all", "nowhere"),
    ],
)
def test_a_plugin_that_does_not_load_says_why(tmp_path, content, message):
    (tmp_path / "bad.py").write_text(content)
    with pytest.raises(ConsilienceError, match=message):
        registry.load_plugin(tmp_path / "bad.py")


def test_a_plugin_that_is_no_file(tmp_path):
    with pytest.raises(ConsilienceError, match="is not a file"):
        registry.load_plugin(tmp_path)


def test_a_failed_import_is_not_taken_for_an_empty_registry(tmp_path, monkeypatch):
    (tmp_path / "consilience_test_broken.py").write_text(
        "raise ImportError('half installed')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    broken = Registry("thing", "consilience_test_broken")
    for _ in range(2):
        with pytest.raises(ImportError, match="half installed"):
            broken.names()


# ---- the nouns


def test_a_sample_is_numbers_with_channels_last():
    for bad in (
        np.zeros((2,), np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
        np.zeros((2, 2, 3), np.int64),
        np.zeros((2, 2, 3), complex),
        [[1]],
    ):
        with pytest.raises(
            ConsilienceError,
            match=r"pixels are \(H, W, C\) uint8, uint16 or floats; 'a' has",
        ):
            Sample("a", bad)
    with pytest.raises(ConsilienceError, match="'a' is an empty image: 5 x 0"):
        Sample("a", np.zeros((0, 5, 3), np.uint8))


def test_a_digest_is_of_shape_and_pixels_alone():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert (
        Sample("a", pixels).digest
        == Sample("b", np.asfortranarray(pixels), label=3).digest
    )
    assert Sample("a", pixels).digest != Sample("a", pixels.reshape(4, 2, 3)).digest
    changed = pixels.copy()
    changed[1, 3, 2] += 1
    assert Sample("a", pixels).digest != Sample("a", changed).digest


@pytest.mark.parametrize(
    ("outputs", "score", "expected"),
    [
        ("logits", "logit", [3.0, 1.0]),
        (
            "logits",
            "probability",
            [
                math.e**3 / (1 + math.e + math.e**3),
                math.e / (2 * math.e + math.e**-2),
            ],
        ),
        ("probabilities", "probability", [3.0, 1.0]),
        ("values", "value", [3.0, 1.0]),
    ],
)
def test_class_target_by_hand(outputs, score, expected):
    rows = torch.tensor([[0.0, 3.0, 1.0], [1.0, 1.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(
        ClassTarget(1, "b", score, outputs).of(rows),
        torch.tensor(expected, dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("outputs", "score"),
    [
        ("logits", "probability"),
        ("probabilities", "probability"),
        ("values", "value"),
    ],
)
def test_a_target_is_read_as_far_as_outputs_allow(outputs, score):
    assert ClassTarget(1, "b", outputs=outputs).scored("probability").score == score
    assert ClassTarget(1, "b", outputs=outputs).scored("logit").score == (
        "logit" if outputs == "logits" else score
    )


def test_an_explanations_name_is_without_options():
    sample = Sample("a", np.zeros((1, 1, 3), np.uint8))
    one = Explanation(
        sample, "m", "lime:samples=3", ClassTarget(0, "a"), None, np.zeros((1, 1))
    )
    assert one.name == "lime"


# ---- progress


class Listener:
    def __init__(self, stop_at=None):
        self.heard, self.stop_at = [], stop_at

    def start(self, label, total):
        self.heard.append(("start", label, total))
        return len(self.heard)

    def advance(self, task, steps):
        self.heard.append(("advance", task, steps))
        if len(self.heard) == self.stop_at:
            raise progress.Cancelled

    def finish(self, task):
        self.heard.append(("finish", task))

    def say(self, message):
        self.heard.append(("say", message))


def work():
    for _ in progress.track([1, 2], "inner"):
        progress.say("x")


def test_progress_costs_nothing_without_a_listener():
    work()


def test_progress_is_heard_in_order_and_ends_with_the_context():
    listener = Listener()
    with progress.listening(listener):
        work()
    step = [("say", "x"), ("advance", 1, 1)]
    assert listener.heard == [("start", "inner", 2), *step, *step, ("finish", 1)]
    work()
    assert len(listener.heard) == 6


def test_a_cancelled_task_is_closed():
    listener = Listener(stop_at=3)
    with pytest.raises(progress.Cancelled), progress.listening(listener):
        work()
    assert listener.heard[-1] == ("finish", 1)
