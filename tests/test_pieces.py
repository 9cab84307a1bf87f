"""A dissection in pieces: whoever makes them, in one process or several, with a worker
that dies or a try that was killed, the numbers are those of one stream.
"""

import os
import signal

import numpy as np
import pytest
import torch
from oracles_dissection import assert_within, small_broden, small_model

from consilience.cli import main
from consilience.dissection import measure
from consilience.dissection.concepts import load_concepts
from consilience.dissection.measure import Job, dissect, read_state, write_state
from consilience.dissection.quantiles import TailSketch
from consilience.runs import crew, pieces
from consilience.runs.dissect import (
    STATE,
    DissectionJob,
    DissectionRun,
    run_dissection,
)
from consilience.runs.explain import How
from consilience.types import ConsilienceError

IMAGES = 200
MODEL = "oracles_dissection:small_model"
ASKED = {"min_images": 1, "quantile": 0.97, "permutations": 19, "resamples": 10}


@pytest.fixture(scope="module")
def drawn():
    return load_concepts(f"drawn:images={IMAGES},size=32")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers find the networks of the tests."""
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))  # noqa: PTH120


@pytest.fixture
def crowded(monkeypatch):
    """Little room for what a quantile needs."""
    monkeypatch.setattr(measure, "SKETCHES", 1 << 16)


def elsewhere(folder, order=1):
    """Pieces made by jobs of their own, from the files that workers would have."""

    def share(job, step, numbers):
        write_state(folder / "told.npz", job.told(step))
        for number in list(numbers)[::order]:
            other = Job(job.model, job.layers, job.concepts, job.options, None)
            found = other.piece(step, number, read_state(folder / "told.npz"))
            write_state(folder / f"{number}.npz", found)
        for number in numbers:
            yield number, read_state(folder / f"{number}.npz")

    return share


def assert_same(one, other):
    assert one.table().equals(other.table())
    assert one.top().equals(other.top())
    for layer, again in zip(one.layers, other.layers, strict=True):
        for name in ("thresholds", "intersections", "unions", "unit_pixels"):
            assert np.array_equal(getattr(layer, name), getattr(again, name)), name
        assert (layer.null is None) == (again.null is None)
        if layer.null is not None:
            assert layer.null.alternatives == again.null.alternatives
            for name in ("p", "q", "expected_iou", "expected_detectors"):
                said = (getattr(null, name) for null in (layer.null, again.null))
                assert np.array_equal(*said), name
    assert one.concepts == other.concepts
    drop = ("seconds", "engine")
    facts, others = (
        {key: value for key, value in found.facts.items() if key not in drop}
        for found in (one, other)
    )
    assert facts == others


def test_pieces_depend_on_the_number_of_images_alone(drawn):
    model = small_model()
    layers = measure.layers_of(model, ["act"])
    job = Job(model, layers, drawn, measure.DissectionOptions(), None)
    assert [len(one) for one in job.pieces] == [64, 64, 64, 8]
    assert [index for one in job.pieces for index in one] == list(range(IMAGES))

    class Many:
        def __len__(self):
            return 1_000_000

        def __getattr__(self, name):
            return getattr(drawn, name)

    many = Job(model, layers, Many(), measure.DissectionOptions(), None)
    assert len(many.pieces) == 64
    assert {len(one) for one in many.pieces} == {15625}


@pytest.mark.parametrize("order", [1, -1])
def test_pieces_made_elsewhere_are_those_of_one_stream(drawn, tmp_path, order):
    layers = ["stem", "act", "embed"]
    whole = dissect(small_model(), layers, drawn, **ASKED)
    assert not any(whole.facts["quantile_rank_error"].values())
    shared = elsewhere(tmp_path, order)
    assert_same(whole, dissect(small_model(), layers, drawn, share=shared, **ASKED))


def test_pieces_whose_sketches_are_not_exact_are_too(drawn, tmp_path, crowded):
    """And the thresholds are as near as they say."""
    layers = ["stem", "act"]
    whole = dissect(small_model(), layers, drawn, **ASKED)
    shared = elsewhere(tmp_path, -1)
    assert_same(whole, dissect(small_model(), layers, drawn, share=shared, **ASKED))
    model = small_model()
    pixels = torch.cat(
        [model.view(drawn.sample(index), "squash").pixels for index in range(IMAGES)]
    )
    with torch.no_grad():
        maps = model.activations(pixels, layers)
    for name in layers:
        bound = whole.facts["quantile_rank_error"][name]
        assert bound > 0
        rows = maps[name].transpose(0, 1).flatten(1).numpy()
        rank = rows.shape[1] - int(np.floor((rows.shape[1] - 1) * ASKED["quantile"]))
        cuts = whole.layer(name).thresholds
        assert_within(rows, cuts, [bound] * len(rows), rank)
        assert bound < 0.5 * rank


@pytest.mark.parametrize("exact", [True, False])
def test_a_pilot_that_misleads_costs_time_alone(drawn, tmp_path, monkeypatch, exact):
    """Where the images that were looked at first are the strongest by far, the floor is
    too high for nearly every unit.
    """
    if not exact:
        monkeypatch.setattr(measure, "SKETCHES", 1 << 14)
    plain = dissect(small_model(), ["act"], drawn, **ASKED)
    tried = []
    result = TailSketch.result

    def counted(self):
        tried.append(self.least)
        return result(self)

    def misleading(self):
        return [torch.full((layer.channels,), 1e3).numpy() for layer in self.layers]

    monkeypatch.setattr(TailSketch, "result", counted)
    monkeypatch.setattr(Job, "_pilot", misleading)
    again = dissect(small_model(), ["act"], drawn, share=elsewhere(tmp_path), **ASKED)
    assert len(tried) == 2
    assert (tried[1] == -np.inf).all()
    if exact:
        assert_same(plain, again)
    bound = again.facts["quantile_rank_error"]["act"]
    assert (bound == 0) == exact


def test_a_pilot_is_the_value_that_is_passed_eight_times_as_often(drawn):
    options = measure.DissectionOptions(quantile=0.98)
    model = small_model()
    layers = measure.layers_of(model, ["stem", "embed"])
    stem, embed = Job(model, layers, drawn, options, None)._pilot()
    assert embed is None  # twelve images give no tail of a vector
    spread = np.linspace(0, IMAGES - 1, IMAGES // 16).round().astype(int)
    pixels = torch.cat(
        [model.view(drawn.sample(int(one)), "squash").pixels for one in spread]
    )
    with torch.no_grad():
        rows = model.activations(pixels, ["stem"])["stem"]
    rows = np.sort(rows.transpose(0, 1).flatten(1).numpy(), axis=1)
    assert stem.tolist() == rows[:, -int(0.16 * rows.shape[1])].tolist()


# ---- workers


def found_by(folder, how=None, concepts=f"drawn:images={IMAGES},size=32", **options):
    job = DissectionJob(
        concepts, MODEL, ("act", "embed"), tuple({**ASKED, **options}.items())
    )
    return run_dissection(job, folder, {"engine": "torch"}, "", how)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return found_by(tmp_path_factory.mktemp("alone") / "run")


def test_workers_find_the_same_and_one_that_dies_is_replaced(
    alone, tmp_path, monkeypatch
):
    killed = []
    plain = crew.Crew._finished

    def kills_the_other(self, number, block):
        plain(self, number, block)
        others = [one for one in self._hands if one != number]
        if not killed and others:
            killed.append(others[0])
            os.kill(self._hands[others[0]].pid, signal.SIGKILL)

    monkeypatch.setattr(crew.Crew, "_finished", kills_the_other)
    run = found_by(tmp_path / "run", How(workers=2))
    assert killed
    assert_same(alone.dissection, run.dissection)
    for name in ("units.parquet", "act.csv", "embed.csv"):
        one, other = ((place.folder / name).read_bytes() for place in (alone, run))
        assert one == other, name
    assert not (tmp_path / "run" / "pieces").exists()
    assert not (tmp_path / "run" / STATE).exists()


@pytest.fixture
def made(monkeypatch):
    """Pieces made by a worker in this process; their numbers."""
    numbers, plain = [], pieces.Shared._hired

    class Here:
        def __init__(self, errand):
            self.maker = errand.from_text(errand.as_text()).maker(0)

        def make(self, places, names, last):
            for place in places:
                numbers.append(place)
                for outcome in self.maker.make([place]):
                    yield pieces.Outcome(**outcome)

        def end(self):
            numbers.append("end")

        def stop(self):
            numbers.append("stop")

    monkeypatch.setattr(
        pieces.Shared, "_hired", lambda self, job: Here(plain(self, job).errand)
    )
    return numbers


def test_what_a_killed_try_left_is_taken(alone, tmp_path, monkeypatch, made):
    """Merged pieces from the state, others from their files."""
    monkeypatch.setattr(measure, "KEEP_EVERY", 0.0)
    keep, kept = Job._keep, []

    def dying(self):
        keep(self)
        kept.append(dict(self.done))
        if len(kept) in (2, 5):
            # the next piece is there already, and another dissection's as well
            told = self.told("quantiles")
            found = Job(self.model, self.layers, self.concepts, self.options, None)
            if len(kept) == 2:
                folder = tmp_path / "run" / "pieces"
                key = np.array(pieces.key_of(self, "quantiles", told))
                state = found.piece("quantiles", 2, told)
                write_state(folder / "quantiles-002.npz", {**state, "key": key})
                write_state(
                    folder / "quantiles-003.npz", {**state, "key": np.array("x")}
                )
            raise KeyboardInterrupt

    monkeypatch.setattr(Job, "_keep", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            found_by(tmp_path / "run", How(workers=2))
    run = found_by(tmp_path / "run", How(workers=2))
    assert kept[1] == {"quantiles": 2, "counting": 0}
    assert kept[4] == {"quantiles": 4, "counting": 1}
    assert made == [0, 1, "stop", 3, 4, "stop", 5, 6, 7, "end"]
    assert_same(alone.dissection, run.dissection)


def test_workers_leave_out_what_cannot_be_read(tmp_path, made):
    spec = small_broden(tmp_path / "set", count=70)
    broken = tmp_path / "set" / "images" / "p66.png"
    assert broken.is_file()
    broken.write_bytes(broken.read_bytes()[:60])
    runs = [
        found_by(tmp_path / name, how, str(spec), permutations=0)
        for name, how in (("one", None), ("two", How(workers=2)))
    ]
    for run in runs:
        (note,) = run.manifest["left_out"]
        assert note.startswith("left out: p66.png: ")
        assert run.manifest["concepts"]["images"] == 69
    assert_same(runs[0].dissection, runs[1].dissection)
    assert made


@pytest.mark.parametrize("flags", [["--workers", "2"], []])
def test_the_command_has_workers(alone, tmp_path, made, flags):
    command = ["dissect", f"drawn:images={IMAGES},size=32", "-m", MODEL]
    options = ["-l", "act", "-l", "embed", "--engine", "torch"]
    for name in ("min_images", "quantile", "permutations"):
        options += [f"--{name.replace('_', '-')}", str(ASKED[name])]
    folder = tmp_path / "run"
    assert main([*command, *options, *flags, "-o", str(folder)]) == 0
    assert bool(made) == bool(flags)
    found = DissectionRun(folder).dissection
    assert found.top().equals(alone.dissection.top())
    same = ["unit", "layer", "iou", "threshold"]
    assert found.table()[same].equals(alone.dissection.table()[same])


def test_what_workers_cannot_have_is_one_line(tmp_path):
    with pytest.raises(ConsilienceError, match="memory of one process"):
        found_by("memory://a/run", How(workers=2))


def test_a_dissection_lies_on_any_storage(alone):
    pytest.importorskip("upath")
    run = found_by("memory://dissected/run")
    assert_same(alone.dissection, run.dissection)
    names = {file.name for file in run.folder.iterdir()}
    assert names >= {"units.parquet", "act.csv", "run.json", "report.html"}
    assert not {"pieces", STATE} & names
    assert_same(alone.dissection, DissectionRun("memory://dissected/run").dissection)
