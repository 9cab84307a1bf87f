"""CLIP-Dissect: similarities against the paper's formulas, encoders of known answers,
embeddings kept by content.
"""

import sys

import numpy as np
import oracles_words as oracles
import pandas as pd
import pytest
import torch

from consilience.dissection import class_groups, encoders, words
from consilience.dissection.encoders import (
    EncoderPair,
    OpenClip,
    image_embeddings,
    load_encoder,
    word_embeddings,
)
from consilience.dissection.words import (
    Space,
    beside,
    name_units,
    read_words,
    similarities,
)
from consilience.types import ConsilienceError, Sample

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "grey": (1, 1, 1)}


def _unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def space():
    rng = np.random.default_rng(0)
    return Space(_unit(rng.normal(size=(40, 6))), _unit(rng.normal(size=(9, 6))))


@pytest.fixture
def units():
    return np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)


class ColourEncoder:
    """Images by their mean colour, words by the colour they name: one space, known
    answers.
    """

    id = "colours@1"

    def __init__(self):
        self.asked = []

    def images(self, images):
        self.asked += ["image"] * len(images)
        return torch.stack(
            [
                torch.from_numpy(image / 255).float().mean(dim=(0, 1))
                for image in images
            ]
        )

    def words(self, words):
        self.asked += words
        return torch.tensor([COLOURS[word] for word in words]).float()


def colour_images(count=60, seed=0):
    """Plain images, each of one colour that is anything between black and its own; the
    digests differ.
    """
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        base = np.array(list(COLOURS.values())[number % 3]) * rng.uniform(
            0.3, 1
        ) + rng.uniform(0, 0.15, 3)
        found.append(
            Sample(
                f"p{number}",
                np.broadcast_to(
                    (255 * base.clip(0, 1)).astype(np.uint8), (64, 64, 3)
                ).copy(),
            )
        )
    return found


# ---- the formulas


@pytest.mark.parametrize("block", [1 << 25, 400])
@pytest.mark.parametrize(
    ("spec", "literal"),
    [
        ("soft-wpmi", lambda q, P: oracles.soft_wpmi(q, P, 100, 10, 1, 0.998, 0.97)),
        (
            "soft-wpmi:top=7,scale=4,lam=.5,first=.9,last=.2",
            lambda q, P: oracles.soft_wpmi(q, P, 7, 4, 0.5, 0.9, 0.2),
        ),
        ("wpmi", lambda q, P: oracles.wpmi(q, P, 28, 2, 0.6)),
        ("wpmi:top=5,scale=10,lam=0", lambda q, P: oracles.wpmi(q, P, 5, 10, 0)),
        ("rank-reorder:share=.3", lambda q, P: oracles.rank_reorder(q, P, 3, 0.3)),
        (
            "rank-reorder:share=1,power=1",
            lambda q, P: oracles.rank_reorder(q, P, 1, 1),
        ),
        ("cos", oracles.cos),
        ("cos-cubed", oracles.cos_cubed),
    ],
)
def test_similarities_are_the_papers(spec, literal, block, units, space, monkeypatch):
    monkeypatch.setattr(words, "SIMILARITY_BYTES", block)
    P = space.images.astype(np.float64) @ space.words.astype(np.float64).T
    expected = literal(units.T.astype(np.float64).tolist(), P.tolist())
    np.testing.assert_allclose(
        similarities.build(spec).scores(units, space), expected, rtol=1e-9, atol=1e-12
    )


def test_wpmi_is_soft_wpmi_with_certain_membership(units, space):
    soft = similarities.build(
        "soft-wpmi:top=28,scale=2,lam=.6,first=.9999999999,last=.9999999999"
    )
    hard = similarities.build("wpmi")
    np.testing.assert_allclose(
        soft.scores(units, space), hard.scores(units, space), rtol=1e-6
    )


def test_ties_go_to_the_earlier_image(space):
    tied = np.zeros((40, 2), np.float32)
    tied[:3, 0], tied[3:, 1] = 1, 1
    P = (space.images.astype(float) @ space.words.T.astype(float)).tolist()
    expected = oracles.soft_wpmi(tied.T.tolist(), P, 5, 10, 1, 0.998, 0.97)
    np.testing.assert_allclose(
        similarities.build("soft-wpmi:top=5").scores(tied, space), expected, rtol=1e-6
    )


def test_a_unit_that_orders_images_as_a_word_does_is_not_reordered(space):
    near = space.images @ space.words.T
    scores = similarities.build("rank-reorder:share=1").scores(near, space)
    np.testing.assert_allclose(np.diag(scores), 0, atol=1e-12)
    assert (scores <= 0).all()
    assert (scores.argmax(axis=1) == np.arange(9)).all()


def test_one_unit_has_no_prior(units, space):
    with pytest.raises(ConsilienceError, match="lam=0"):
        similarities.build("soft-wpmi").scores(units[:, :1], space)


@pytest.mark.parametrize(
    "spec",
    ["soft-wpmi:top=0", "soft-wpmi:first=1", "rank-reorder:share=0", "wpmi:top=-1"],
)
def test_impossible_options_are_refused(spec):
    with pytest.raises(ConsilienceError):
        similarities.build(spec)


# ---- units of known answers


@pytest.mark.parametrize(
    "similarity",
    ["soft-wpmi:top=12", "wpmi:top=12", "rank-reorder:share=.5", "cos", "cos-cubed"],
)
def test_colour_units_are_named_by_their_colour(similarity, red_model):
    found = name_units(
        red_model,
        ["mix"],
        list(COLOURS),
        colour_images(),
        ColourEncoder(),
        similarity,
    ).table()
    assert list(found["word"][:3]) == ["red", "green", "blue"]
    assert (found["margin"][:3] > 0).all()
    assert (found["word_score"] - found["runner_up_score"]).equals(found["margin"])
    assert list(found["unit"]) == [0, 1, 2, 3]


def test_a_unit_that_says_the_same_of_every_image_has_no_word(red_model):
    samples = [
        sample for number, sample in enumerate(colour_images()) if number % 3 == 0
    ]  # red alone: 1 and 2 are silent
    found = name_units(
        red_model, ["last"], list(COLOURS), samples, ColourEncoder()
    ).table()
    assert list(found["word"][1:3]) == ["", ""]
    assert found["word_score"][1:3].isna().all()
    assert found["word"][0] != ""


def test_silent_units_do_not_enter_the_prior(red_model):
    samples = [
        sample for number, sample in enumerate(colour_images()) if number % 3 == 0
    ]
    values = words.summaries(red_model, ["last"], samples)["last"]
    assert (np.ptp(values, axis=0) > 0).tolist() == [True, False, False, True]
    space = Space(
        image_embeddings(ColourEncoder(), samples),
        word_embeddings(ColourEncoder(), list(COLOURS)),
    )
    kind = similarities.build("soft-wpmi")
    scores = words._scored(kind, values, space)
    np.testing.assert_array_equal(
        scores[[0, 3]], kind.scores(values[:, [0, 3]], space)
    )


def test_summaries_are_means_of_maps(red_model):
    samples = colour_images(9)
    found = words.summaries(
        red_model.using(memory=1 << 20), ["mix", "pool"], samples, "squash"
    )
    for name, values in found.items():
        one = [
            red_model.activations(red_model.view(s, "squash").pixels, [name])[name][
                0
            ].mean(dim=(1, 2))
            for s in samples
        ]
        np.testing.assert_allclose(
            values, torch.stack(one).numpy(), rtol=1e-5, atol=1e-7
        )


def test_words_stand_beside_concepts(red_model):
    found = name_units(
        red_model, ["mix"], list(COLOURS), colour_images(), ColourEncoder()
    ).table()
    dissection = pd.DataFrame(
        {
            "layer": "mix",
            "unit": [0, 1, 3],
            "concept": ["red-c", "car", ""],
            "iou": [0.4, 0.1, 0.0],
        }
    )
    table = beside(found, dissection).set_index("unit")
    assert list(table.loc[[0, 1], "same"]) == [True, False]
    assert table["same"].isna()[[2, 3]].all()
    assert table.loc[0, "word"] == "red"
    assert table.loc[0, "iou"] == 0.4


# ---- word lists


def test_word_lists(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("\ufeffdog\n\n  cat \ndog\nsports car\n", encoding="utf-8")
    assert read_words(file) == ("dog", "cat", "sports car")
    assert read_words(["b", "a", "b"]) == ("b", "a")
    with pytest.raises(ConsilienceError, match="at least two"):
        read_words(["one", " one ", ""])
    with pytest.raises(ConsilienceError, match="cannot be read"):
        read_words(tmp_path / "none.txt")


def test_a_prompt_needs_a_place_for_the_word(red_model):
    with pytest.raises(ConsilienceError, match="where the word goes"):
        name_units(
            red_model,
            ["mix"],
            list(COLOURS),
            colour_images(4),
            ColourEncoder(),
            prompt="a photo",
        )


# ---- embeddings kept by content


def test_embeddings_are_kept_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path))
    encoder, samples = ColourEncoder(), colour_images(10)
    first = image_embeddings(encoder, samples, batch=4)
    assert len(encoder.asked) == 10
    again = image_embeddings(
        encoder, [Sample("renamed", samples[3].pixels), samples[0]]
    )
    assert len(encoder.asked) == 10
    np.testing.assert_array_equal(again, first[[3, 0]])
    changed = samples[3].pixels.copy()
    changed[0, 0] = 255 - changed[0, 0]
    image_embeddings(encoder, [Sample(samples[3].name, changed)])
    assert len(encoder.asked) == 11
    assert not list(tmp_path.rglob("*.part"))


def test_another_encoder_and_a_damaged_file_are_encoded_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path))
    word_embeddings(ColourEncoder(), ["red", "blue"])
    other = ColourEncoder()
    other.id = "colours@2"
    word_embeddings(other, ["red", "blue"])
    assert other.asked == ["red", "blue"]
    for file in tmp_path.rglob("*.npz"):
        file.write_bytes(b"PK\x03\x04 cut off")
    third = ColourEncoder()
    np.testing.assert_array_equal(
        word_embeddings(third, ["red", "blue"]), [[1, 0, 0], [0, 0, 1]]
    )
    assert third.asked == ["red", "blue"]


def test_nothing_is_unpickled_from_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path))
    store = encoders.Store("colours@1", "words")
    store.folder.mkdir(parents=True)

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was run",))

    np.savez(
        store.folder / "trap.npz",
        keys=np.array([Trap()], dtype=object),
        rows=np.zeros((1, 3)),
    )
    assert store.read({"x"}) == {}


def test_an_interrupted_encoding_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path))
    encoder, samples = ColourEncoder(), colour_images(10)
    encode = encoder.images

    def fails_late(images):
        if len(encoder.asked) >= 8:
            raise KeyboardInterrupt
        return encode(images)

    encoder.images = fails_late
    with pytest.raises(KeyboardInterrupt):
        image_embeddings(encoder, samples, batch=4)
    encoder.images = encode
    encoder.asked.clear()
    image_embeddings(encoder, samples, batch=4)
    assert len(encoder.asked) == 2


def test_an_encoder_without_an_id_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path))
    known = ColourEncoder()
    pair = load_encoder((known.images, known.words))
    assert isinstance(pair, EncoderPair)
    word_embeddings(pair, ["red", "blue"])
    word_embeddings(pair, ["red", "blue"])
    assert known.asked == ["red", "blue"] * 2
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize(
    "answer",
    [
        torch.zeros(2, 3),
        torch.ones(3, 3),
        torch.ones(2),
        torch.full((2, 3), float("nan")),
    ],
    ids=str,
)
def test_what_is_no_embedding_is_refused(answer):
    with pytest.raises(ConsilienceError, match="embedding"):
        word_embeddings(EncoderPair(lambda _: answer, lambda _: answer), ["a", "b"])


def test_two_spaces_are_no_common_space(units):
    with pytest.raises(ConsilienceError, match="no common space"):
        Space(np.ones((2, 3), np.float32), np.ones((2, 4), np.float32))


# ---- encoders by name


def test_an_encoder_by_factory(tmp_path, monkeypatch):
    (tmp_path / "my_encoders.py").write_text(
        "import torch\ndef pair():\n    return (lambda p: torch.ones(len(p), 2), lambda w: "
        "torch.ones(len(w), 2))\n"
        "def nothing():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_encoders", None)
    assert load_encoder("my_encoders:pair").words(["a"]).shape == (1, 2)
    for wrong, said in (
        ("my_encoders:nothing", "gives int"),
        ("my_encoders:none", "no function"),
        ("no_such:pair", "no encoder"),
        ("clip", "is not an encoder"),
    ):
        with pytest.raises(ConsilienceError, match=said):
            load_encoder(wrong)


TINY = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 16,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


@pytest.fixture
def tiny_clip(tmp_path, monkeypatch):
    """A small architecture of open_clip, and a file of its weights."""
    import json

    import open_clip

    (tmp_path / "tiny-test.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    torch.manual_seed(3)
    module = open_clip.create_model("tiny-test", pretrained=None).eval()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    yield module, tmp_path / "weights.pt"
    open_clip.factory._MODEL_CONFIG_PATHS.remove(tmp_path / "tiny-test.json")
    open_clip.factory._rescan_model_configs()


def test_open_clip_loads_a_file_and_says_what_the_module_says(tiny_clip):
    import open_clip

    module, file = tiny_clip
    encoder = load_encoder(f'open_clip:tiny-test,pretrained="{file}"')
    pixels = np.random.default_rng(0).integers(0, 255, (40, 32, 3), dtype=np.uint8)
    mean, std = (
        torch.tensor(open_clip.OPENAI_DATASET_MEAN),
        torch.tensor(open_clip.OPENAI_DATASET_STD),
    )
    from PIL import Image

    squashed = np.array(
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
    )
    with torch.no_grad():
        shown = ((torch.from_numpy(squashed) / 255 - mean) / std).permute(2, 0, 1)[
            None
        ]
        expected = module.encode_image(shown)
        said = module.encode_text(open_clip.tokenize(["a dog"]))
    torch.testing.assert_close(
        encoder.images([pixels]), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(encoder.words(["a dog"]), said)
    assert encoder.id.startswith("tiny-test@")


def test_the_encoders_id_follows_weights_and_view(tiny_clip):
    _, file = tiny_clip
    one = load_encoder(f'open_clip:tiny-test,pretrained="{file}"').id
    assert load_encoder(f'open_clip:tiny-test,pretrained="{file}"').id == one
    assert (
        load_encoder(f'open_clip:tiny-test,pretrained="{file}",view=crop').id != one
    )
    state = torch.load(file, weights_only=True)
    state["positional_embedding"] += 1
    torch.save(state, file)
    assert load_encoder(f'open_clip:tiny-test,pretrained="{file}"').id != one


def test_open_clip_says_what_is_missing(tiny_clip, tmp_path, monkeypatch):
    _, file = tiny_clip
    with pytest.raises(
        ConsilienceError,
        match="no CLIP in open_clip 'ViT-B-61'; did you mean 'ViT-B-16'",
    ):
        OpenClip("ViT-B-61").load()
    with pytest.raises(
        ConsilienceError, match=r"no weights of ViT-B-16 'open'.*openai"
    ):
        OpenClip("ViT-B-16", "open").load()
    with pytest.raises(
        ConsilienceError,
        match=r"no network, and not on this machine yet: .*ViT-B-16 \(openai\)",
    ):
        OpenClip().load()
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(ConsilienceError, match="does not load as tiny-test"):
        OpenClip("tiny-test", str(tmp_path / "broken.pt")).load()
    with pytest.raises(ConsilienceError, match="does not load as RN50"):
        OpenClip("RN50", str(file)).load()
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConsilienceError, match=r"pip install 'consilience\[clip\]'"):
        OpenClip("tiny-test", str(file)).load()


def test_weights_of_clip_are_not_unpickled(tmp_path, tiny_clip):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was run",))

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ConsilienceError, match="does not load"):
        OpenClip("tiny-test", str(tmp_path / "trap.pt")).load()


# ---- names


@pytest.mark.parametrize(
    ("a", "b", "alike"),
    [
        ("car", "sports car", True),
        ("car", "car wheel", False),
        ("dogs", "Eskimo dog, husky", True),
        ("black-c", "black", True),
        ("street_sign", "Street Sign", True),
        ("bus", "school bus", True),
        ("grass", "gras", False),
        ("cat", "polecat", False),
    ],
)
def test_names_are_compared_by_whole_words(a, b, alike):
    assert class_groups.same_name(a, b) is alike
    assert class_groups.same_name(b, a) is alike


def test_imagenet_runs_are_what_they_say():
    from consilience.models.load import imagenet_names

    classes = imagenet_names()
    sizes = {
        "dog": 118,
        "bird": 59,
        "snake": 17,
        "fish": 16,
        "spider": 6,
        "insect": 27,
        "turtle": 5,
    }  # counted by hand
    assert {
        name: len(class_groups.match(name, classes).classes) for name in sizes
    } == sizes
    dogs = class_groups.match("dogs", classes)
    assert dogs.how == "run"
    assert {classes[index] for index in dogs.classes} >= {
        "beagle",
        "golden retriever",
        "toy poodle",
        "Siberian husky",
    }
    assert not {"timber wolf", "hyena", "tabby", "hot dog"} & {
        classes[index] for index in dogs.classes
    }
    assert all(
        class_groups.match(name, classes).how == "run" for name in class_groups.RUNS
    )
    assert "118" not in dogs.said(classes, 2)
    assert "and 116 more" in dogs.said(classes, 2)


def test_a_run_needs_imagenets_classes():
    assert class_groups.match(
        "dog", ("Eskimo dog, husky", "hot dog", "dogsled", "cat")
    ).classes == (0, 1)
    assert class_groups.match("sports car", ("car", "sports car")).classes == (1,)
    assert (
        class_groups.match("wheel", ("cat",)).said(("cat",))
        == "no class goes with 'wheel' by name"
    )


def test_a_file_of_groups_overrules(tmp_path):
    file = tmp_path / "groups.csv"
    file.write_text("concept,class\nvehicle,0\nvehicle,bus\ndog,hot dog\n")
    groups = class_groups.read_groups(file, ("car", "bus", "Eskimo dog", "hot dog"))
    assert groups == {"vehicle": (0, 1), "dog": (3,)}
    assert (
        class_groups.match(
            "dogs", ("car", "bus", "Eskimo dog", "hot dog"), groups
        ).how
        == "file"
    )
    file.write_text("concept,class\nvehicle,9\n")
    with pytest.raises(ConsilienceError, match="line 2: classes are 0 to 1"):
        class_groups.read_groups(file, ("car", "bus"))
