"""Drawing: where colour goes, that nothing else changes, labels, forms of masks."""

import itertools
import time

import numpy as np
import pytest

from instseg_ext.structures.rle import encode_masks, rle_boxes
from instseg_ext.visualization.contact_sheet import contact_sheet, side_by_side, write_image
from instseg_ext.visualization.draw import DrawStyle, class_label, draw_instances, instance_colour
from instseg_ext.visualization.tracks import ColourTracks, box_iou

BARE = DrawStyle(labels="none")


@pytest.fixture
def scene():
    masks = np.zeros((3, 80, 100), dtype=bool)
    masks[0, 10:40, 10:50] = True
    masks[1, 50:70, 60:90] = True
    masks[1, 55:60, 65:70] = False
    return np.full((80, 100, 3), 90, dtype=np.uint8), masks  # the third mask is empty


def test_colour_stays_inside_the_masks(scene):
    image, masks = scene
    before = image.copy()
    drawn = draw_instances(image, masks, style=BARE)
    assert np.array_equal(image, before)
    changed = (drawn != image).any(axis=2)
    union = masks.any(axis=0)
    assert changed[union].all()
    grown = np.zeros_like(union)
    for dy in (-2, -1, 0, 1, 2):
        for dx in (-2, -1, 0, 1, 2):
            grown |= np.roll(union, (dy, dx), axis=(0, 1))
    assert not changed[~grown].any()  # outlines are antialiased
    expected = 90 * (1 - BARE.opacity) + np.array(instance_colour(0)) * BARE.opacity
    assert np.abs(drawn[25, 30].astype(float) - expected).max() <= 1


def test_run_lengths_draw_the_same(scene):
    image, masks = scene
    style = DrawStyle(boxes=True, min_side=200)
    common = {"classes": [0, 1, 5], "scores": [0.9, 0.8, 0.7], "names": ["cell", "rod"]}
    first = draw_instances(image, masks, **common, style=style)
    second = draw_instances(image, encode_masks(masks), **common, style=style)
    assert np.array_equal(first, second)
    assert first.shape == (240, 300, 3)
    assert rle_boxes(encode_masks(masks)).tolist() == [[10, 10, 50, 40], [60, 50, 90, 70], [0] * 4]


def test_enlarged_masks_keep_their_place(scene):
    image, masks = scene
    drawn = draw_instances(image, masks, style=DrawStyle(labels="none", min_side=320))
    changed = (drawn != 90).any(axis=2)
    union = masks.any(axis=0).repeat(4, axis=0).repeat(4, axis=1)
    assert (changed & union).sum() / (changed | union).sum() > 0.93


def test_boxes_without_masks_and_nothing_at_all(scene):
    image, _ = scene
    boxes = np.array([[10.0, 10.0, 50.0, 40.0]])
    drawn = draw_instances(image, boxes=boxes, style=BARE)
    assert tuple(drawn[10, 30]) == instance_colour(0)
    assert (drawn[12:38, 12:48] == 90).all()
    for masks in ([], np.zeros((0, 80, 100), dtype=bool)):
        assert np.array_equal(draw_instances(image, masks, classes=[], scores=[]), image)


def test_labels_do_not_cover_each_other(scene):
    image = np.full((300, 400, 3), 90, dtype=np.uint8)
    masks = np.zeros((30, 300, 400), dtype=bool)
    masks[:, 140:160, 190:210] = True
    scores = np.linspace(0.9, 0.1, 30)
    bare = draw_instances(image, masks, style=BARE)
    auto = draw_instances(image, masks, scores=scores)
    everything = draw_instances(image, masks, scores=scores, style=DrawStyle(labels="all"))
    assert 0 < (auto != bare).any(axis=2).sum() < 300 * 400 / 10
    assert not np.array_equal(auto, everything)
    assert class_label(1, 0.456, ["a", "b"]) == "b 0.46"
    assert class_label(7, None, ["a", "b"]) == "class 7"


def test_label_stands_at_the_largest_part():
    image = np.full((300, 300, 3), 90, dtype=np.uint8)
    masks = np.zeros((1, 300, 300), dtype=bool)
    masks[0, 200:260, 200:260] = masks[0, 20:24, 20:24] = True
    bare = draw_instances(image, masks, style=BARE)
    label = (draw_instances(image, masks, scores=[0.5]) != bare).any(axis=2)
    y, x = np.nonzero(label)
    assert (y.min(), x.min()) > (180, 180)


def test_colours_follow_the_ids(scene):
    image, masks = scene
    first = draw_instances(image, masks[:2], ids=[4, 9], style=BARE)
    second = draw_instances(image, masks[1::-1], ids=[9, 4], style=BARE)
    assert np.array_equal(first[25, 30], second[25, 30])
    colours = [instance_colour(i) for i in range(24)]
    distance = [np.abs(np.subtract(a, b)).sum() for a, b in itertools.pairwise(colours)]
    assert min(distance) > 120
    assert len(set(colours)) == 24


def test_disagreeing_inputs_are_named(scene):
    image, masks = scene
    with pytest.raises(ValueError, match="masks or boxes"):
        draw_instances(image)
    with pytest.raises(ValueError, match="3 masks but 1 boxes"):
        draw_instances(image, masks, np.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"\(80, 100\) do not fit an image of size \(40, 100\)"):
        draw_instances(image[:40], masks)


def test_a_hundred_masks_are_quick():
    rng = np.random.default_rng(0)
    masks = np.zeros((100, 480, 640), dtype=bool)
    for mask in masks:
        y, x = rng.integers(0, 400), rng.integers(0, 540)
        mask[y : y + 80, x : x + 100] = True
    image = rng.integers(0, 256, (480, 640, 3)).astype(np.uint8)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        draw_instances(image, masks, classes=[0] * 100, scores=[0.5] * 100, names=["thing"])
        times.append(time.perf_counter() - began)
    assert min(times) < 0.5  # about 0.03 s on an idle core


def test_contact_sheet_holds_every_picture(tmp_path):
    cells = [(np.full((50, 80, 3), 10 * i, dtype=np.uint8), f"picture {i}") for i in range(1, 6)]
    sheet = contact_sheet(cells, columns=2, cell_width=160, title="five")
    assert sheet.shape[1] == 2 * 160 + 3 * 6
    for i in range(1, 6):
        assert (sheet == 10 * i).all(axis=2).sum() >= 160 * 100
    tall = contact_sheet([(np.zeros((1000, 10, 3), dtype=np.uint8), "x" * 500)], cell_width=120)
    assert tall.shape[0] < 250
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
    assert side_by_side(sheet, sheet, gap=4).shape[1] == 2 * sheet.shape[1] + 4
    for path in (tmp_path / "no" / "folder.png", tmp_path / "strange.suffix"):
        with pytest.raises(ValueError, match="cannot be written"):
            write_image(str(path), sheet)


def test_tracks_keep_numbers_through_motion_swap_and_gaps():
    tracks = ColourTracks(memory=2)
    here = np.array([[0, 0, 10, 10], [50, 0, 60, 10]], dtype=float)
    assert tracks.update(here, np.array([0, 0])).tolist() == [0, 1]
    assert tracks.update(here[::-1] + 2, np.array([0, 0])).tolist() == [1, 0]
    assert tracks.update(here + 2, np.array([0, 1])).tolist() == [0, 2]  # another class is new
    assert tracks.update(np.zeros((0, 4)), np.zeros(0, dtype=int)).tolist() == []
    assert tracks.update(here[:1] + 3, np.array([0])).tolist() == [0]
    for _ in range(4):
        tracks.update(np.zeros((0, 4)), np.zeros(0, dtype=int))
    assert tracks.update(here[:1] + 3, np.array([0])).tolist() == [3]
    assert box_iou(here, here).tolist() == [[1, 0], [0, 1]]
