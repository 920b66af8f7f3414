import pickle

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from instseg_ext.config import add_shared_config
from instseg_ext.data import InstSegDatasetMapper, add_data_config, build_mapper
from instseg_ext.data.augmentation import (
    InstanceInput,
    Stretch,
    augmentation_kwargs,
    build_augmentations,
)
from instseg_ext.data.mapper import annotation_boxes
from instseg_ext.data.ssd_augmentation import (
    ExpandAndCrop,
    PhotometricDistortion,
    WindowTransform,
    distort_colours,
    draw_crop,
    draw_expansion,
)
from instseg_ext.data.stream import seeded
from instseg_ext.layers.stretch import stretch

OFF = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
FILL = (10.5, 20.5, 30.5)


@pytest.fixture(autouse=True)
def random_state():
    with seeded(0, 0):
        yield


def distort(pixel, image_format="RGB", **changes):
    """Distort a pixel as part of an image wide enough for vector instructions."""
    image = np.full((3, 37, 3), pixel, np.uint8)
    result = distort_colours(image, image_format=image_format, **{**OFF, **changes})
    assert result.dtype == np.float32
    assert (result == result[0, 0]).all()
    return result[0, 0].tolist()


@pytest.mark.parametrize(
    ("pixel", "changes", "expected"),
    [
        ([200, 100, 50], {}, [200, 100, 50]),
        ([200, 100, 50], {"brightness": 10.0, "contrast": 1.5}, [315, 165, 90]),  # (x + 10) * 1.5
        ([9, 9, 9], {"brightness": -32.0}, [-23, -23, -23]),
        # Saturation 1/2 becomes 3/4 or 1/4; the largest channel stays.
        ([200, 100, 100], {"saturation": 1.5}, [200, 50, 50]),
        ([200, 100, 100], {"saturation": 0.5}, [200, 150, 150]),
        # Red is at 0 degrees, yellow at 60, magenta at 300: past the end in both directions.
        ([200, 0, 0], {"hue": 18.0}, [200, 60, 0]),
        ([200, 0, 0], {"hue": -18.0}, [200, 0, 60]),
        ([200, 0, 20], {"hue": 18.0}, [200, 40, 0]),  # 354 + 18 = 12
        ([200, 20, 0], {"hue": -18.0}, [200, 0, 40]),  # 6 - 18 = -12
        ([80, 80, 80], {"hue": 18.0, "saturation": 1.5}, [80, 80, 80]),
    ],
)
def test_colours_by_hand(pixel, changes, expected):
    assert distort(pixel, **changes) == pytest.approx(expected, abs=1e-3)
    assert distort(pixel[::-1], "BGR", **changes) == pytest.approx(expected[::-1], abs=1e-3)


@pytest.mark.parametrize("contrast_first", [True, False])
def test_contrast_may_come_first_or_last(contrast_first):
    """Oracle: the published order of steps, with negative values among the input's."""
    image = np.random.default_rng(0).integers(0, 256, (20, 41, 3)).astype(np.uint8)
    step = image.astype(np.float32) - 30
    if contrast_first:
        step *= 0.6
    hsv = cv2.cvtColor(step, cv2.COLOR_BGR2HSV)
    hsv[..., 1] *= 1.4
    hsv[..., 0] = (hsv[..., 0] - 17) % 360
    expected = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if not contrast_first:
        expected *= 0.6
    changes = {"brightness": -30.0, "contrast": 0.6, "saturation": 1.4, "hue": -17.0}
    before = image.copy()
    result = distort_colours(image, image_format="BGR", **changes)
    np.testing.assert_allclose(result, expected, atol=1e-3)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(
        distort_colours(image.astype(np.float64), image_format="BGR", **changes), result
    )


def test_colour_changes_are_drawn_one_by_one_within_their_limits():
    augmentation = PhotometricDistortion("RGB")
    image = np.zeros((2, 2, 3), np.uint8)
    drawn = [augmentation.get_transform(image).op.keywords for _ in range(2000)]
    limits = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5)}
    active = []
    for key, (low, high) in {**limits, "hue": (-18, 18)}.items():
        values = np.array([d[key] for d in drawn])
        active.append(values != OFF[key])
        values = values[active[-1]]
        assert low <= values.min() < 0.98 * low + 0.02 * high
        assert 0.02 * low + 0.98 * high < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))
        assert active[-1].mean() == pytest.approx(0.5, abs=0.05)
    # Independent of each other: all 16 combinations, each with probability 1/16.
    counts = np.bincount(np.array(active).T @ [1, 2, 4, 8], minlength=16)
    assert counts.min() > 80
    assert counts.max() < 170


def test_only_colour_images_have_a_hue():
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT RGB or BGR, not 'L'"):
        PhotometricDistortion("L")


def test_canvas_by_hand(monkeypatch):
    numbers = iter([2.55, np.array([12.9, 7.2])])
    monkeypatch.setattr(np.random, "uniform", lambda *_: next(numbers))
    # 20 rows, 30 columns; 30 * 2.55 = 76.5 columns, 51 rows.
    assert draw_expansion((20, 30), 4.0) == (12, 7, 51, 76)


def test_canvas_limits():
    drawn = np.array([draw_expansion((20, 30), 4.0) for _ in range(2000)])
    left, top, height, width = drawn.T
    assert (left.min(), top.min(), height.min(), width.min()) == (0, 0, 20, 30)
    assert height.max() in (78, 79)
    assert width.max() in (118, 119)
    np.testing.assert_allclose(width / height, 1.5, atol=0.08)
    assert (left + 30 <= width).all()
    assert (top + 20 <= height).all()
    assert np.mean(left[width > 60] / (width - 30)[width > 60]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("x0", "y0", "width", "height"),
    [(0, 0, 9, 7), (2, 1, 4, 5), (-3, -2, 20, 14), (-3, 2, 7, 3), (4, -2, 12, 6), (30, -20, 6, 4)],
)
@pytest.mark.parametrize("channels", [(), (3,)])
def test_window_moves_pixels_labels_and_points_alike(x0, y0, width, height, channels):
    """Oracle: pixel (row, column) of the window is (row + y0, column + x0) of the image."""
    image = np.random.default_rng(0).integers(1, 256, (7, 9, 3)).astype(np.uint8)
    labels = np.random.default_rng(0).integers(1, 99, (7, 9, *channels)).astype(np.int16)
    window = WindowTransform(x0, y0, width, height, FILL)
    moved, moved_labels = window.apply_image(image), window.apply_segmentation(labels)
    assert moved.dtype == np.float32
    assert moved_labels.dtype == np.int16
    assert moved.shape == (height, width, 3)
    assert moved_labels.shape == (height, width, *channels)
    for row in range(height):
        for column in range(width):
            y, x = row + y0, column + x0
            inside = 0 <= y < 7 and 0 <= x < 9
            assert moved[row, column].tolist() == (image[y, x].tolist() if inside else list(FILL))
            assert (moved_labels[row, column] == (labels[y, x] if inside else 0)).all()
    points = np.array([[2.5, 3.5], [-1.0, 8.0]])
    np.testing.assert_array_equal(window.apply_coords(points), points - (x0, y0))
    np.testing.assert_array_equal(points, [[2.5, 3.5], [-1.0, 8.0]])


def test_crop_limits():
    centre = np.array([[63.0, 41.0]])
    drawn = [draw_crop((100, 140), centre) for _ in range(3000)]
    crops = np.array([c for c in drawn if c is not None])
    assert 1 - len(crops) / len(drawn) == pytest.approx(1 / 6, abs=0.02)
    x0, y0, x1, y1 = crops.T
    assert crops.min() >= 0
    assert x1.max() <= 140
    assert y1.max() <= 100
    # Sides are 0.3 to 1 of the image's, cut to whole pixels: up to one pixel more or less.
    assert 41 <= (x1 - x0).min() < 47
    assert 29 <= (y1 - y0).min() < 35
    assert (x1 - x0).max() > 130
    assert (y1 - y0).max() > 95
    assert ((y1 - y0 + 1) / (x1 - x0 - 1) > 0.5).all()
    assert ((y1 - y0 - 1) / (x1 - x0 + 1) < 2).all()
    assert ((x0 < 63) & (x1 > 63) & (y0 < 41) & (y1 > 41)).all()


def test_crop_holds_some_centre_strictly():
    centres = np.array([[4.0, 5.0], [36.0, 30.0], [200.0, 5.0]])
    drawn = [draw_crop((32, 40), centres) for _ in range(500)]
    crops = np.array([c for c in drawn if c is not None])
    low, high = crops[:, None, :2], crops[:, None, 2:]
    held = ((low < centres) & (centres < high)).all(axis=2)
    assert held.any(axis=1).all()
    assert held[:, 0].any()
    assert held[:, 1].any()
    assert not held.all(axis=1).any()
    # On a border of every possible window, or in no window at all.
    assert draw_crop((32, 40), np.array([[0.0, 10.0], [40.0, 10.0], [9.0, -1.0]])) is None


def test_crop_gives_up_when_no_window_fits():
    # Widths of at least 60 with heights of at most 20 are too flat.
    assert draw_crop((20, 200), np.array([[100.0, 10.0]])) is None
    assert draw_crop((20, 20), np.zeros((0, 2))) is None


def window_of(boxes, crowd, *, size_hw=(40, 50), expand_ratio=1.0, crop=True):
    """Run the augmentation on a black image; gives the input and the transform."""
    given = InstanceInput(
        np.zeros((*size_hw, 3), np.uint8), np.array(boxes, float).reshape(-1, 4), np.array(crowd)
    )
    augmentation = ExpandAndCrop(expand_ratio=expand_ratio, fill=FILL, crop=crop)
    return given, augmentation(given)


def test_crowds_do_not_hold_a_crop():
    for _ in range(30):
        given, _ = window_of([[5, 5, 9, 9]], [True])
        assert given.image.shape == (40, 50, 3)
        given, _ = window_of([], np.zeros(0, bool))
        assert given.image.shape == (40, 50, 3)


def test_objects_centred_outside_the_crop_are_dropped():
    boxes = np.array([[2, 2, 12, 10], [30, 20, 48, 38], [0, 0, 50, 40], [38, 2, 46, 10]], float)
    crowd = np.array([False, False, True, True])
    seen = set()
    for _ in range(200):
        given, window = window_of(boxes, crowd)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - (window.x0, window.y0)
        inside = ((centres > 0) & (centres < (window.width, window.height))).all(axis=1)
        assert given.index.tolist() == np.flatnonzero(inside).tolist()
        assert inside[:2].any()
        np.testing.assert_array_equal(given.boxes, window.apply_box(boxes[inside]))
        np.testing.assert_array_equal(given.crowd, crowd[inside])
        seen.add(tuple(given.index.tolist()))
    assert {(0, 1, 2, 3), (0,), (1,), (0, 2), (0, 2, 3)} <= seen  # crowds go and stay


def test_canvas_and_crop_are_one_window():
    """Half the images get a canvas; the crop is drawn on it and painted in one go."""
    boxes, crowd = [[10, 10, 30, 30]], [False]
    sizes = [window_of(boxes, crowd, expand_ratio=4.0, crop=False)[1] for _ in range(400)]
    larger = [w for w in sizes if (w.width, w.height) != (50, 40)]
    assert len(larger) / len(sizes) == pytest.approx(0.5, abs=0.08)
    assert max(w.width for w in larger) > 180
    assert all(w.x0 <= 0 and w.x0 + w.width >= 50 for w in larger)
    crops = [window_of(boxes, crowd, expand_ratio=4.0) for _ in range(400)]
    assert all(len(given.boxes) == 1 for given, _ in crops)
    partly = [w for _, w in crops if w.x0 < 0 < w.x0 + w.width < 50]
    assert partly
    image = np.full((40, 50, 3), 200, np.uint8)
    for window in partly[:5]:
        painted = window.apply_image(image)
        inside = window.apply_segmentation(np.ones((40, 50), bool))
        assert (painted[inside] == 200).all()
        assert (painted[~inside] == FILL).all()


@pytest.mark.parametrize("pieces", ["photometric", "window", "all"])
def test_image_box_and_mask_stay_together(pieces):
    """A bright rectangle with its box and mask; the surroundings stay dark."""
    photometric = PhotometricDistortion("RGB")
    window = ExpandAndCrop(expand_ratio=4.0, fill=(0, 0, 0), crop=True)
    lists = {
        "photometric": [photometric],
        "window": [window],
        "all": [photometric, window, T.RandomFlip(), Stretch((96, 64))],
    }
    augmentations = T.AugmentationList(lists[pieces])
    box = np.array([[20.0, 12.0, 52.0, 28.0]])
    image = np.zeros((48, 64, 3), np.uint8)
    image[12:28, 20:52] = (250, 230, 220)
    mask = image[..., 0] > 0
    for _ in range(60):
        given = InstanceInput(image, box, np.array([False]))
        transforms = augmentations(given)
        bright = given.image.max(axis=2) > 80
        moved = transforms.apply_segmentation(mask)
        height, width = bright.shape
        assert moved.shape == bright.shape
        x0, y0, x1, y1 = given.boxes[0].clip(0, [width, height, width, height])
        np.testing.assert_array_equal(given.boxes, transforms.apply_box(box))
        if pieces != "all":  # without a resize all edges lie between pixels
            np.testing.assert_array_equal(moved, bright)
        rows, columns = np.nonzero(bright)
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose([x0, y0, x1, y1], edges, atol=0 if pieces != "all" else 2)
        rows, columns = np.nonzero(moved)
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose([x0, y0, x1, y1], edges, atol=0 if pieces != "all" else 1)


@pytest.mark.parametrize("size_hw", [(48, 64), (213, 160), (300, 411)])
def test_stretch_equals_opencv(size_hw):
    image = np.random.default_rng(0).uniform(-40, 300, (*size_hw, 3)).astype(np.float32)
    expected = cv2.resize(image, (111, 110), interpolation=cv2.INTER_LINEAR)
    given = T.AugInput(image)
    Stretch((110, 111))(given)
    np.testing.assert_allclose(given.image, expected, atol=0.05)
    of_the_model = stretch(torch.from_numpy(image.transpose(2, 0, 1).copy()), (110, 111))
    np.testing.assert_array_equal(of_the_model.numpy().transpose(1, 2, 0), given.image)


def make_cfg(**changes):
    cfg = get_cfg()
    add_shared_config(cfg)
    add_data_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (0,), 0
    cfg.INSTSEG.STRETCH = [32, 32]
    cfg.INSTSEG.AUGMENTATIONS.SSD.ENABLED = True
    for key, value in changes.items():
        cfg.merge_from_list([f"INSTSEG.AUGMENTATIONS.SSD.{key}", value])
    return cfg


def kinds(cfg, is_train=True):
    return [type(a).__name__ for a in build_augmentations(**augmentation_kwargs(cfg, is_train))]


def test_config_gives_the_published_order():
    assert kinds(make_cfg()) == ["PhotometricDistortion", "ExpandAndCrop", "RandomFlip", "Stretch"]
    assert kinds(make_cfg(ENABLED=False)) == ["RandomFlip", "Stretch"]
    assert kinds(make_cfg(), is_train=False) == []
    without = make_cfg(PHOTOMETRIC=False, EXPAND_RATIO=1.0, CROP=False)
    assert kinds(without) == ["RandomFlip", "Stretch"]
    for one in (make_cfg(EXPAND_RATIO=1.0), make_cfg(CROP=False)):
        assert "ExpandAndCrop" in kinds(one)
    cfg = make_cfg()
    cfg.INSTSEG.AUGMENTATIONS.CONTRAST = [0.9, 1.1]
    cfg.INPUT.CROP.ENABLED = True
    assert kinds(cfg)[:4] == [
        "RandomContrast",
        "PhotometricDistortion",
        "ExpandAndCrop",
        "RandomCrop",
    ]


def test_canvas_has_the_models_mean():
    cfg = make_cfg()
    window = augmentation_kwargs(cfg, True)["ssd"][1]
    assert window.fill == tuple(cfg.MODEL.PIXEL_MEAN)
    cfg = make_cfg(EXPAND_FILL=[1.0, 2.0, 3.0])
    assert augmentation_kwargs(cfg, True)["ssd"][1].fill == (1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"EXPAND_RATIO": 0.5}, r"SSD\.EXPAND_RATIO is 1\.0 \(off\) or more, not 0\.5"),
        ({"EXPAND_FILL": [1.0]}, r"SSD\.EXPAND_FILL is \[\] or has a value for each of the 3"),
    ],
)
def test_bad_values_name_their_key(changes, message):
    with pytest.raises(ValueError, match=message):
        build_mapper(make_cfg(**changes), True)


def test_boxes_of_annotations():
    mask = np.zeros((20, 30), np.uint8, order="F")
    mask[4:9, 6:16] = 1
    counts = np.diff(np.flatnonzero(np.diff(np.r_[2, mask.T.reshape(-1), 2])))
    rle = {"size": [20, 30], "counts": counts.tolist()}
    parts = [[2.5, 4, 8, 4, 8, 10], [2, 14, 8, 14, 8, 18.5]]
    box = [1.0, 2.0, 7.5, 8.0]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "segmentation": parts},
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "segmentation": rle},
        {"bbox": box, "segmentation": parts},
        {"segmentation": rle},
    ]
    assert annotation_boxes(annotations).tolist() == [
        [1, 2, 8.5, 10],
        [1, 2, 7.5, 8],
        [2, 4, 8, 18.5],
        [6, 4, 16, 9],
    ]
    assert annotation_boxes([]).shape == (0, 4)


class Recorder(T.Augmentation):
    """Note what an augmentation can ask for."""

    def get_transform(self, image, boxes, crowd):
        self.seen = (image.shape, boxes.tolist(), crowd.tolist())
        return T.NoOpTransform()


def test_shared_mapper_shows_objects_and_leaves_dropped_ones_out(tmp_path):
    Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(tmp_path / "a.png")
    squares = [[4, 4, 20, 20], [30, 4, 56, 36], [0, 30, 60, 40]]
    annotations = [
        {
            "category_id": i,
            "iscrowd": int(i == 2),
            "bbox": [float(v) for v in square],
            "bbox_mode": BoxMode.XYXY_ABS,
            "segmentation": [[float(square[k]) for k in (0, 1, 2, 1, 2, 3, 0, 3)]],
        }
        for i, square in enumerate(squares)
    ]
    sample = {"file_name": str(tmp_path / "a.png"), "annotations": annotations}
    recorder = Recorder()

    class RightPart(ExpandAndCrop):
        """The square at the left loses its centre but not all its pixels."""

        def get_transform(self, image, boxes, crowd):
            return WindowTransform(15, 0, 45, 40, self.fill)

    part = RightPart(expand_ratio=1.0, fill=FILL, crop=True)
    for keep_crowd, shown, left in ((False, [0, 1], [1]), (True, [0, 1, 2], [1, 2])):
        mapper = InstSegDatasetMapper(
            is_train=True,
            augmentations=[recorder, part],
            image_format="RGB",
            keep_crowd=keep_crowd,
        )
        instances = mapper(sample)["instances"]
        assert recorder.seen == ((40, 60, 3), [squares[i] for i in shown], [i == 2 for i in shown])
        assert instances.gt_classes.tolist() == left
        assert instances.gt_boxes.tensor[0].tolist() == [15, 4, 41, 36]
    assert mapper({**sample, "annotations": []})["instances"].gt_masks.tensor.shape == (0, 40, 45)
    assert recorder.seen[1:] == ([], [])


def test_mapper_of_a_config_is_reproducible_and_can_be_sent_to_a_process(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)).save(
        tmp_path / "a.png"
    )
    corners = [[10.0, 8.0, 40.0, 8.0, 40.0, 30.0, 10.0, 30.0]]
    sample = {
        "file_name": str(tmp_path / "a.png"),
        "annotations": [{"category_id": 0, "segmentation": corners}],
    }
    cfg = make_cfg()
    mappers = [build_mapper(cfg, True), pickle.loads(pickle.dumps(build_mapper(cfg, True)))]
    images = []
    for position in (3, 3, 4):
        for mapper in mappers:
            with seeded(1, position):
                images.append(mapper(sample)["image"])
    assert images[0].dtype == torch.float32
    assert images[0].shape == (3, 32, 32)
    assert all(torch.equal(images[0], other) for other in images[:4])
    assert not torch.equal(images[0], images[4])
