"""Names that 0.1 had are still taken."""

import numpy as np

from consilience.cli import build_parser
from consilience.dissection.concepts import load_concepts
from consilience.dissection.measure import _options
from consilience.dissection.sets.coco import Coco
from consilience.images import Placement


def test_concept_sets_by_their_older_option():
    older, newer = (
        load_concepts(f"drawn:{name}=3,seed=1") for name in ("pictures", "images")
    )
    assert older.id == newer.id
    assert len(older) == 3
    np.testing.assert_array_equal(older.source.picture(1), newer.source.image(1))
    assert Coco("a.json", pictures="folder") == Coco("a.json", images="folder")


def test_options_of_a_dissection():
    assert _options({"min_pictures": 7, "null_pictures": 9}) == _options(
        {"min_images": 7, "null_images": 9}
    )


def test_flags():
    parse = build_parser().parse_args
    older = parse(["dissect", "X", "--min-pictures", "7", "--knockout-pictures", "9"])
    newer = parse(["dissect", "X", "--min-images", "7", "--knockout-images", "9"])
    assert vars(older) == vars(newer)
    assert parse(["dissect", "X"]).min_images is None


def test_maps_move_onto_the_image():
    place = Placement.squash((4, 6), (2, 3))
    values = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(place.to_picture(values), place.to_image(values))
