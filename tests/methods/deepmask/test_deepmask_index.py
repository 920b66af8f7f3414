"""Where patches are cut. Numbers in docstrings: acceptance checks of DeepMask."""

from collections import Counter

import numpy as np
import pytest

from instseg_ext.methods.deepmask.index import PatchIndex, zoom_steps
from instseg_ext.methods.deepmask.legacy import LegacyWindowSampler
from instseg_ext.methods.deepmask.sampling import NEGATIVE_ZOOMS, Geometry, WindowSampler

GEOMETRY = Geometry(
    patch=192,
    window=160,
    canonical=92,
    gt_size=112,
    shift=16.0,
    scale=0.25,
    neg_shift=32.0,
    neg_octaves=1.0,
)


def thing(x, y, width, height, category=0, **changes):
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {
        "bbox": [x, y, width, height],
        "bbox_mode": 1,
        "category_id": category,
        "iscrowd": 0,
        "area": width * height,
        "segmentation": [corners],
    } | changes


def picture(*annotations, height=480, width=640):
    return {"file_name": "x", "height": height, "width": width, "annotations": list(annotations)}


def index_of(dicts, **limits):
    return PatchIndex(dicts, canonical=92, **({"min_area": 100, "min_side": 5} | limits))


def sampler_of(dicts, kind=WindowSampler, **limits):
    return kind(index_of(dicts, **limits), GEOMETRY)


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_usable_objects_are_large_enough_and_no_crowds():
    index = index_of(
        [
            picture(),
            picture(
                thing(0, 0, 10, 10),
                thing(0, 0, 10, 10, area=99.9),
                thing(0, 0, 4.9, 30),
                thing(0, 0, 30, 4.9),
                thing(0, 0, 5, 20),
                thing(0, 0, 50, 50, iscrowd=1),
                thing(0, 0, 50, 50, segmentation=[]),
            ),
            picture(thing(3, 4, 20, 30)),
        ]
    )
    assert index.num_images == 3
    assert index.images.tolist() == [1] * 7 + [2]
    assert index.usable.tolist() == [True, False, False, False, True, False, False, True]
    assert index.crowd.tolist() == [False] * 5 + [True] + [False] * 2
    np.testing.assert_allclose(index.boxes[-1], [3, 4, 23, 34])


def test_an_area_that_is_not_annotated_is_counted():
    small, large = thing(0, 0, 9, 9), thing(0, 0, 12, 12)
    mask = np.zeros((480, 640), dtype=bool)
    mask[:12, :8] = True
    drawn = thing(0, 0, 12, 8, segmentation=mask)
    for annotation in (small, large, drawn):
        del annotation["area"]
    assert index_of([picture(small, large, drawn)]).usable.tolist() == [False, True, False]


def test_sets_without_annotations_have_an_index():
    index = index_of([picture(), {"file_name": "x", "height": 4, "width": 5}])
    assert (index.num_images, len(index.boxes), len(index.octaves)) == (2, 0, 0)
    assert index.sizes_hw.tolist() == [[480, 640], [4, 5]]


def test_images_of_unknown_size_are_named():
    with pytest.raises(ValueError, match=r"how large image lost\.png is"):
        index_of([picture(), {"file_name": "lost.png", "width": 4}])


@pytest.mark.parametrize(("longest", "zoom"), [(92, 0.25), (93, 0.0), (184, -0.75)])
def test_zoom_of_sizes(longest, zoom):
    """Check 9: the first step at which an object is larger than canonical."""
    index = index_of([picture(thing(0, 0, 20, longest), thing(0, 0, longest, 20))])
    assert zoom_steps(index.octaves, 0.25).tolist() == [zoom, zoom]


def test_apparent_sizes_lie_within_one_step_above_canonical(generator):
    """Check 9, and the authors' search through all steps."""
    longest = np.concatenate([generator.uniform(2, 2000, 500), 92 * 2.0 ** np.arange(-3, 4)])
    zooms = zoom_steps(np.log2(92 / longest), 0.25)
    apparent = longest * 2.0**zooms
    assert (apparent > 92).all()
    assert (apparent <= 92 * 2**0.25 + 1e-9).all()
    for size, zoom in zip(longest, zooms, strict=True):
        step = next(
            s for s in range(-32, 33) if 92 * 2 ** ((s - 1) / 4) < size <= 92 * 2 ** ((s + 1) / 4)
        )
        assert zoom == -step / 4
    np.testing.assert_array_equal(zoom_steps(np.array([0.3, -1.1]), 0), [0.3, -1.1])


def test_categories_are_drawn_evenly_then_their_objects(generator):
    """Section 3.1: a rare category is drawn as often as a frequent one."""
    many = [picture(*(thing(9 * k, 0, 20, 20, category=3) for k in range(30)))]
    few = [picture(thing(0, 0, 20, 20, category=7), thing(50, 0, 20, 20, category=7))]
    tiny = [picture(thing(0, 0, 2, 2, category=5))]
    index = index_of(many + few + tiny)
    drawn = Counter(index.draw_by_category(generator) for _ in range(4000))
    assert sum(drawn[k] for k in range(30)) == pytest.approx(2000, abs=150)
    assert drawn[30] == pytest.approx(1000, abs=120)
    assert drawn[32] == 0
    assert set(drawn) == set(range(32))


def test_mask_windows_follow_their_formulas(generator):
    """Section 3.1: size within a quarter octave, centre within 16 px of the patch."""
    sampler = sampler_of([picture(thing(100, 200, 46, 30)), picture(thing(10, 20, 368, 80))])
    sides = {}
    for _ in range(1000):
        patch = sampler.mask_patch(generator)
        unit = patch.window.side / 192
        x, y, side = patch.window
        centre = np.array([x, y]) + side / 2
        offset = (centre - sampler.centre(patch.annotation)) / unit
        longest = [46, 368][patch.image] / unit
        sides.setdefault(patch.image, []).append((longest, *offset))
        assert patch.target.side == pytest.approx(160 * unit)
        np.testing.assert_allclose(np.array(patch.target[:2]) + patch.target.side / 2, centre)
    for rows in sides.values():
        longest, *offsets = np.array(rows).T
        octaves = np.log2(longest / 92)
        assert np.abs(octaves).max() <= 0.25
        assert np.abs(octaves).max() > 0.24
        assert np.abs(offsets).max() <= 16
        assert np.abs(offsets).max() > 15.5
        assert np.abs(np.mean(offsets, axis=1)).max() < 1.5


def test_canonical_windows_are_centred(generator):
    sampler = sampler_of([picture(thing(100, 200, 46, 30))])
    patch = sampler.canonical_patch(0)
    assert patch.window == (123 - 48, 215 - 48, 96)
    assert patch.target == (123 - 40, 215 - 40, 80)


def test_positives_are_centred_and_never_below_canonical(generator):
    """Section 3.2: zooms are drawn evenly, then the boxes that need them."""
    things = [thing(10, 10, 92, 40), thing(300, 30, 368, 80), thing(40, 300, 300, 9)]
    crowd = thing(0, 0, 200, 200, iscrowd=1)
    tiny = thing(3, 3, 4, 4)
    dicts = [picture(*things, thing(200, 200, 320, 100), crowd, tiny), picture(crowd, tiny)]
    sampler = sampler_of(dicts)
    drawn = Counter()
    for _ in range(2000):
        patch = sampler.score_patch(generator)
        if patch.label < 0:
            continue
        assert (patch.image, patch.target, patch.annotation) == (0, None, -1)
        centre = np.array(patch.window[:2]) + patch.window.side / 2
        (found,) = (k for k in range(4) if np.allclose(centre, sampler.centre(k)))
        longest = (sampler.index.boxes[found][2:] - sampler.index.boxes[found][:2]).max()
        assert 92 < longest * 192 / patch.window.side <= 92 * 2**0.25 + 1e-6
        drawn[found] += 1
    assert sum(drawn.values()) == pytest.approx(1000, abs=100)
    assert sampler.zooms[:4].tolist() == [0.25, -1.75, -1.5, -1.75]
    assert drawn[0] == pytest.approx(333, abs=70)
    assert drawn[1] + drawn[3] == pytest.approx(333, abs=70)


def test_negatives_keep_away_from_all_objects(generator):
    """Check 11: none within 32 px and one octave of an object, in 10000 draws."""
    objects = [
        thing(100, 100, 92, 60), thing(300, 250, 40, 46), thing(420, 50, 200, 184),
        thing(50, 400, 12, 12), thing(20, 20, 3, 3), thing(0, 0, 640, 480),
    ]  # fmt: skip
    crowd = thing(500, 300, 140, 180, iscrowd=1)
    sampler = sampler_of([picture(*objects, crowd)])
    patches = [sampler.negative(0, generator) for _ in range(10000)]
    assert {patch.label for patch in patches} == {-1.0}
    left, top, side = np.array([patch.window for patch in patches]).T
    x, y, zoom = left + side / 2, top + side / 2, np.log2(192 / side)
    assert set((zoom * 4).round() / 4) == set(NEGATIVE_ZOOMS)
    assert min(x.min(), y.min()) >= 0
    assert (x.max(), y.max()) <= (640, 480)
    assert not ((x >= 500) & (y >= 300) & (y < 480)).any()
    for box in (thing["bbox"] for thing in objects):
        distance = np.hypot(x - box[0] - box[2] / 2, y - box[1] - box[3] / 2) * 192 / side
        octaves = np.abs(zoom + np.log2(max(box[2:]) / 92))
        assert ((distance >= 32) | (octaves >= 1 - 1e-9)).all()


def test_negatives_of_a_full_image_terminate(generator):
    """Check 11: one object covers everything; what is left are other sizes and places."""
    sampler = sampler_of([picture(thing(0, 0, 92, 92), height=92, width=92)])
    for _ in range(200):
        patch = sampler.score_patch(generator)
        assert patch is not None
    crowded = sampler_of([picture(thing(0, 0, 640, 480, iscrowd=1), thing(9, 9, 50, 50))])
    assert crowded.negative(0, generator) is None


def test_images_without_objects_are_negative(generator):
    """Section 3.3: legitimate negatives; positives come from elsewhere."""
    sampler = sampler_of([picture(), picture(thing(100, 100, 50, 50))])
    drawn = Counter(
        (p.image, p.label) for p in (sampler.score_patch(generator) for _ in range(400))
    )
    assert set(drawn) == {(0, -1.0), (1, -1.0), (1, 1.0)}
    assert drawn[1, 1.0] == pytest.approx(200, abs=50)


def test_patches_have_a_least_side(generator):
    """Section 3.2: at least 10 px of the image file."""
    sampler = sampler_of([picture(thing(100, 100, 3, 3))], min_area=0, min_side=0)
    assert sampler.positive(0, generator).window.side == 10


# --- the authors' sampler -------------------------------------------------------------------------


def test_legacy_windows_lie_on_whole_pixels(generator):
    """Section 3.3: the mask is one pixel of the image file off."""
    sampler = sampler_of([picture(thing(100.3, 200.8, 46, 30))], LegacyWindowSampler)
    for _ in range(200):
        patch = sampler.mask_patch(generator)
        assert all(value == int(value) for value in patch.window)
        exact = patch.window.inner(patch.window.side * 160 / 192)
        pixel = patch.target.side / 112
        np.testing.assert_allclose(patch.target.side, exact.side)
        for got, expected in zip(patch.target[:2], exact[:2], strict=True):
            assert abs(got - (expected + 1)) <= pixel / 2 + 1e-9


def test_legacy_positives_are_anything_annotated(generator):
    crowd, tiny = thing(0, 0, 200, 200, iscrowd=1), thing(3, 3, 4, 4)
    dicts = [picture(), picture(crowd), picture(tiny)]
    sampler = sampler_of(dicts, LegacyWindowSampler)
    drawn = Counter(
        (p.image, p.label) for p in (sampler.score_patch(generator) for _ in range(400))
    )
    assert set(drawn) == {(1, -1.0), (1, 1.0), (2, -1.0), (2, 1.0)}


def test_legacy_negatives_are_compared_at_different_magnifications(generator):
    """Section 3.3: a window on top of an object passes where the zooms differ; ours not."""
    dicts = [picture(thing(300, 200, 92, 92))]
    legacy, sampler = sampler_of(dicts, LegacyWindowSampler), sampler_of(dicts)
    wrong = 0
    for _ in range(1500):
        x, y, side = legacy.negative(0, generator).window
        centre, zoom = np.array([[x + side / 2, y + side / 2]]), np.log2([192 / side])
        wrong += not sampler.is_negative(0, centre, zoom)[0]
    assert 0 < wrong < 150


def test_legacy_negatives_give_up(generator):
    """Section 3.2: the last of a hundred tries is taken whatever it shows."""
    things = [thing(x, y, 8, 8) for x in range(0, 64, 4) for y in range(0, 48, 4)]
    things += [
        thing(x, y, size, size)
        for size in (16, 30, 60)
        for x in range(0, 40, 4)
        for y in range(0, 40, 4)
    ]
    sampler = sampler_of([picture(*things, height=48, width=64)], LegacyWindowSampler)
    assert all(sampler.negative(0, generator).label == -1.0 for _ in range(20))
