import copy
import itertools

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.structures import BoxMode, Instances
from fvcore.transforms.transform import Transform
from PIL import Image
from pycocotools import mask as mask_util

from instseg_ext.config import add_shared_config
from instseg_ext.data import TrainLoader, add_data_config, make_shapes
from instseg_ext.data.augmentation import Rotate90Transform, StretchTransform
from instseg_ext.data.coco import load_coco
from instseg_ext.data.mapper import transform_masks
from instseg_ext.methods.polarmask.config import add_polarmask_config
from instseg_ext.methods.polarmask.mapper import (
    PolarMaskMapper,
    build_polarmask_mapper,
    inclusive_boxes,
)
from instseg_ext.structures.contours import trace_contours
from instseg_ext.visualization.data import draw_sample, sample_masks

HEIGHT, WIDTH = 50, 80  # of the image file


def rectangle(x0, y0, x1, y1, *, category=0, rle=False, **extra):
    """Annotate the pixels x0 to x1 - 1 and y0 to y1 - 1; fields in ``extra`` are added."""
    segmentation = [[float(v) for v in (x0, y0, x1, y0, x1, y1, x0, y1)]]
    if rle:
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        pixels[y0:y1, x0:x1] = 1
        segmentation = mask_util.encode(pixels)
    return {
        "category_id": category,
        "iscrowd": 0,
        "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
        "bbox_mode": BoxMode.XYWH_ABS,
        "segmentation": segmentation,
        **extra,
    }


@pytest.fixture
def sample(tmp_path):
    """Make a data set dictionary of given annotations."""
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    def make(*annotations):
        return {"file_name": str(tmp_path / "a.png"), "annotations": list(annotations)}

    return make


def make_mapper(*augmentations, **options):
    options = {"min_area": 15, "min_size": 10, **options}
    return PolarMaskMapper(
        is_train=True, augmentations=augmentations, image_format="BGR", **options
    )


def make_cfg(**changes):
    cfg = get_cfg()
    add_shared_config(cfg)
    add_data_config(cfg)
    add_polarmask_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (0,), 0
    cfg.INSTSEG.STRETCH = [48, 64]
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


# --- what a sample holds ------------------------------------------------------------------------


def test_sample(sample):
    given = sample(rectangle(20, 10, 50, 30, category=3), rectangle(0, 0, 80, 50, category=1))
    before = copy.deepcopy(given)
    mapped = make_mapper()(given)
    assert given == before
    assert mapped["boxes_inclusive"] is True
    instances = mapped["instances"]
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes", "gt_contours", "gt_centers"}
    assert instances.gt_boxes.tensor.tolist() == [[20, 10, 49, 29], [0, 0, 79, 49]]
    assert instances.gt_classes.tolist() == [3, 1]
    assert instances.gt_centers.tolist() == [[34, 19], [39, 24]]
    assert instances.gt_contours.lengths.tolist() == [2 * (29 + 19), 2 * (79 + 49)]
    first = instances.gt_contours[0].points
    assert (first.dtype, first.min(0).values.tolist()) == (torch.int16, [20, 10])
    assert first.max(0).values.tolist() == [49, 29]


def test_contours_are_those_of_the_whole_masks():
    """Oracle: full-image masks through trace_contours; polygons and run lengths, cut and holey."""
    rng = np.random.default_rng(4)
    segmentations = []
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radii = rng.uniform(2, 30, 9)
        centre = rng.uniform(-5, (WIDTH + 5, HEIGHT + 5))
        points = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        segmentations.append([points.reshape(-1).tolist(), [3.0, 3.0, 9.0, 3.0, 3.0, 9.0]])
        blob = np.kron(rng.random((5, 8)) < 0.4, np.ones((10, 10), np.uint8))
        segmentations.append(mask_util.encode(np.asfortranarray(blob.astype(np.uint8))))
    annotations = [
        rectangle(0, 0, 80, 50, segmentation=s, category=i) for i, s in enumerate(segmentations)
    ]
    transforms = T.TransformList(
        [T.HFlipTransform(WIDTH), T.CropTransform(10, 5, 60, 40), StretchTransform(40, 60, 96, 70)]
    )
    masks = transform_masks(segmentations, transforms, (HEIGHT, WIDTH), (96, 70))
    contours, centers, found = trace_contours(masks)
    mapper = make_mapper(min_area=0, min_size=0)
    instances = mapper.make_instances(annotations, transforms, (HEIGHT, WIDTH), (96, 70))
    assert instances.gt_classes.tolist() == found.nonzero().flatten().tolist()
    assert torch.equal(instances.gt_centers, centers[found])
    assert torch.equal(instances.gt_contours.lengths, contours.lengths[found])
    assert torch.equal(instances.gt_contours.points, contours.points)


# --- boxes --------------------------------------------------------------------------------------

TRANSFORMS = {
    "none": T.NoOpTransform(),
    "flip": T.HFlipTransform(WIDTH),
    "upside down": T.VFlipTransform(HEIGHT),
    "crop": T.CropTransform(7, 5, 60, 40),
    "pad": T.PadTransform(2, 3, 4, 5),
    **{f"turn {k}": Rotate90Transform(k, HEIGHT, WIDTH) for k in range(4)},
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_boxes_follow_their_pixels(name):
    """Oracle: the first and last row and column of a drawn box, moved with the image."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[12:31, 20:46] = 1
    transforms = T.TransformList([TRANSFORMS[name]])
    rows, columns = np.nonzero(transforms.apply_image(pixels[..., None])[..., 0])
    boxes = inclusive_boxes(np.array([[20.0, 12.0, 46.0, 31.0]]), transforms, (HEIGHT, WIDTH))
    assert boxes.dtype == np.float32
    assert boxes.tolist() == [[columns.min(), rows.min(), columns.max(), rows.max()]]


@pytest.mark.parametrize("flip_first", [True, False])
def test_boxes_have_the_bits_of_the_authors_code(flip_first):
    """Index * scale, flipped W - 1 - index * scale, all in float32."""
    rng = np.random.default_rng(0)
    height, width, new_height, new_width = 427, 640, 768, 1280
    corner, size = rng.uniform(0, 400, (200, 2)).round(2), rng.uniform(0.3, 200, (200, 2)).round(2)
    scale = np.array([new_width / width, new_height / height] * 2, dtype=np.float32)
    expected = np.concatenate([corner, corner + size - 1], axis=1).astype(np.float32) * scale
    given = np.concatenate([corner, corner + size], axis=1)
    resize = StretchTransform(height, width, new_height, new_width)
    source_hw = (height, width)
    np.testing.assert_array_equal(
        inclusive_boxes(given, T.TransformList([resize]), source_hw), expected
    )
    expected[:, [2, 0]] = new_width - expected[:, [0, 2]] - 1
    steps = [T.HFlipTransform(width), resize] if flip_first else [resize, T.HFlipTransform(1280)]
    np.testing.assert_array_equal(
        inclusive_boxes(given, T.TransformList(steps), source_hw), expected
    )


@pytest.mark.parametrize("scale", [0.5, 3])
def test_boxes_of_areas_cover_the_resized_object(sample, scale):
    """Pixels 10 to 19 at three times the size are pixels 30 to 59; an index 19 becomes 57."""
    resize = StretchTransform(HEIGHT, WIDTH, int(HEIGHT * scale), int(WIDTH * scale))
    boxes = {}
    for kind in ("areas", "indices"):
        mapper = make_mapper(resize, coordinates=kind)
        instances = mapper(sample(rectangle(10, 20, 20, 40)))["instances"]
        boxes[kind] = instances.gt_boxes.tensor[0]
    expected = torch.tensor([10.0, 20, 20, 40]) * scale - torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(boxes["areas"], expected)
    torch.testing.assert_close(boxes["indices"], torch.tensor([10.0, 20, 19, 39]) * scale)


def test_boxes_are_cut_at_the_border(sample):
    wide = rectangle(20, 10, 50, 30, bbox=[-3.0, -2.0, 100.0, 60.0])
    assert make_mapper()(sample(wide))["instances"].gt_boxes.tensor.tolist() == [[0, 0, 79, 49]]
    stretched = make_mapper(T.HFlipTransform(WIDTH), StretchTransform(HEIGHT, WIDTH, 100, 40))
    boxes = stretched(sample(wide, rectangle(20, 10, 50, 30)))["instances"].gt_boxes.tensor
    assert boxes.tolist() == [[0, 0, 39, 99], [39 - 24.5, 20, 39 - 10, 58]]


def test_turned_boxes_are_refused():
    class Turn(Transform):
        def apply_image(self, img):
            return img

        def apply_coords(self, coords):
            return coords @ np.array([[0.8, -0.6], [0.6, 0.8]])

    with pytest.raises(ValueError, match="turned by right angles"):
        inclusive_boxes(np.zeros((1, 4)), T.TransformList([Turn()]), (HEIGHT, WIDTH))


# --- which objects stay ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "stays"),
    [
        (rectangle(10, 10, 20, 13), True),  # 10 x 3 pixels
        (rectangle(10, 10, 20, 13, area=15.0), False),
        (rectangle(10, 10, 20, 13, area=15.1), True),
        (rectangle(10, 10, 19, 19), False),  # 9 x 9
        (rectangle(10, 10, 19, 19, bbox=[10.0, 10.0, 9.0, 10.0]), True),
        (rectangle(10, 10, 19, 19, bbox=[80.0, 10.0, 10.0, 9.0]), False),  # outside
        (rectangle(10, 10, 19, 19, bbox=[6.01, 10.0, 10.0, 9.0]), True),  # 16.01 - 6.01 < 10
        (rectangle(10, 10, 25, 11), False),  # 15 pixels, which is also the area
        (rectangle(10, 10, 25, 11, area=16.0), True),
        (rectangle(10, 10, 24, 11, area=99.0), False),  # 14 pixels
        (rectangle(10, 10, 25, 11, area=16.0, rle=True), True),
        (rectangle(10, 10, 24, 11, area=16.0, rle=True), False),
        (rectangle(10, 10, 40, 40, ignore=1), False),
        (rectangle(10, 10, 40, 40, ignore=0), True),
        (rectangle(10, 10, 40, 40, rle=True, iscrowd=1), False),
    ],
)
def test_objects_left_out(sample, annotation, stays):
    instances = make_mapper()(sample(annotation, rectangle(0, 0, 30, 30, category=1)))["instances"]
    assert instances.gt_classes.tolist() == ([0, 1] if stays else [1])


def test_uncompressed_run_lengths_are_counted(sample):
    counts = {"size": [HEIGHT, WIDTH], "counts": [10 * HEIGHT, 20 * HEIGHT, 50 * HEIGHT]}
    given = sample(rectangle(10, 0, 30, 50, segmentation=counts))
    assert make_mapper()(given)["instances"].gt_centers.tolist() == [[19, 24]]


def test_limits_come_from_the_config(sample):
    given = sample(rectangle(0, 0, 30, 30), rectangle(10, 10, 13, 13))
    assert len(build_polarmask_mapper(make_cfg(), True)(given)["instances"]) == 1
    for key, kept in (("MIN_AREA", 2), ("MIN_SIZE", 2)):
        cfg = make_cfg(MODEL__POLARMASK__MIN_AREA=0, MODEL__POLARMASK__MIN_SIZE=1)
        assert len(build_polarmask_mapper(cfg, True)(given)["instances"]) == kept
        with pytest.raises(ValueError, match=rf"MODEL\.POLARMASK\.{key} is 0 or more, not -1"):
            build_polarmask_mapper(make_cfg(**{f"MODEL__POLARMASK__{key}": -1}), True)


def test_a_vanished_mask_takes_its_object_along(sample):
    """The mask is outside the crop although its box is not; boxes alone keep the object."""
    given = sample(
        rectangle(60, 10, 80, 30, bbox=[5.0, 10.0, 75.0, 20.0]), rectangle(5, 5, 25, 25, category=1)
    )
    crop = T.CropTransform(0, 0, 40, HEIGHT)
    assert make_mapper(crop)(given)["instances"].gt_classes.tolist() == [1]
    instances = make_mapper(crop, with_contours=False)(given)["instances"]
    assert instances.gt_classes.tolist() == [0, 1]
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes"}
    assert instances.gt_boxes.tensor.tolist() == [[5, 10, 39, 29], [5, 5, 24, 24]]


@pytest.mark.parametrize("with_contours", [True, False])
def test_an_image_that_loses_its_objects_is_rejected(sample, with_contours):
    mapper = make_mapper(T.CropTransform(0, 0, 40, HEIGHT), with_contours=with_contours)
    lost, small = rectangle(40, 10, 60, 40), rectangle(5, 5, 9, 9)
    assert mapper(sample(lost)) is None
    assert mapper(sample(small)) is None
    assert mapper(sample(lost, small, rectangle(39, 10, 60, 40))) is not None


@pytest.mark.parametrize("with_contours", [True, False])
def test_an_image_without_objects_passes(sample, with_contours):
    crowd = rectangle(5, 5, 30, 30, rle=True, iscrowd=1)
    for annotations in ([], [crowd]):
        instances = make_mapper(with_contours=with_contours)(sample(*annotations))["instances"]
        assert len(instances) == 0
        assert instances.gt_boxes.tensor.shape == (0, 4)
        assert instances.gt_boxes.tensor.dtype == torch.float32
        assert instances.gt_classes.dtype == torch.int64
        if with_contours:
            assert len(instances.gt_contours) == 0
            assert instances.gt_contours.points.shape == (0, 2)
            assert instances.gt_centers.shape == (0, 2)
            assert instances.gt_centers.dtype == torch.int64


def test_testing_leaves_the_image_to_the_model(sample):
    mapped = build_polarmask_mapper(make_cfg(), False)(sample(rectangle(5, 5, 30, 30)))
    assert set(mapped) == {"file_name", "height", "width", "image"}
    assert mapped["image"].dtype == torch.uint8
    without = sample()
    del without["annotations"]
    assert "instances" not in build_polarmask_mapper(make_cfg(), True)(without)


@pytest.mark.parametrize(
    ("with_mask", "center", "traced"),
    [(True, "none", True), (False, "mass", True), (False, "none", False), (False, "box", False)],
)
def test_contours_are_traced_where_they_are_needed(sample, with_mask, center, traced):
    cfg = make_cfg(MODEL__POLARMASK__WITH_MASK=with_mask, MODEL__POLARMASK__CENTER=center)
    instances = build_polarmask_mapper(cfg, True)(sample(rectangle(5, 5, 30, 30)))["instances"]
    assert instances.has("gt_contours") == traced


# --- through the loader ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return load_coco(*make_shapes(tmp_path_factory.mktemp("shapes"), num_images=6, size=64, seed=3))


def fingerprint(mapped):
    fields = mapped["instances"].get_fields()
    arrays = [mapped["image"], fields["gt_boxes"].tensor, fields["gt_classes"]]
    arrays += [fields["gt_centers"], fields["gt_contours"].points, fields["gt_contours"].lengths]
    return mapped["file_name"], *(array.numpy().tobytes() for array in arrays)


def test_batches_depend_on_the_seed_not_on_the_workers(shapes):
    dicts = shapes[0]
    mapper = build_polarmask_mapper(make_cfg(INSTSEG__STRETCH_HEIGHTS=[40, 56]), True)

    def take(seed, num_workers=0):
        loader = TrainLoader(
            dicts, mapper, batch_size=4, seed=seed, accumulate=2, num_workers=num_workers,
            group_by_aspect=True,
        )  # fmt: skip
        return list(itertools.islice(iter(loader), 4))

    batches = take(7)
    assert [len(batch) for batch in batches] == [2, 2, 2, 2]
    prints = [[fingerprint(s) for s in batch] for batch in batches]
    assert [[fingerprint(s) for s in batch] for batch in take(7, num_workers=2)] == prints
    assert [[fingerprint(s) for s in batch] for batch in take(8)] != prints

    samples = list(itertools.chain.from_iterable(batches))
    assert len({s["image"].shape for s in samples}) > 1
    for mapped in samples:
        instances = mapped["instances"].to(torch.device("cpu"))
        assert instances.image_size == mapped["image"].shape[1:]
        assert len(instances.gt_contours) == len(instances.gt_centers) == len(instances) > 0
        size = torch.tensor(instances.image_size).flip(0)
        assert (instances.gt_contours.points >= 0).all()
        assert (instances.gt_contours.points < size).all()
        assert (instances.gt_centers < size).all()
        assert (instances.gt_boxes.tensor[:, 2:] <= size - 1).all()
    same_size = [s["instances"] for s in samples if s["image"].shape == samples[0]["image"].shape]
    joined = Instances.cat(same_size)
    assert len(joined.gt_contours) == sum(len(instances) for instances in same_size)


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_of_samples(sample):
    given = sample(rectangle(10, 10, 40, 30), rectangle(50, 5, 60, 45, category=1))
    mapped = make_mapper()(given)
    masks = sample_masks(mapped["instances"])
    expected = np.zeros((2, HEIGHT, WIDTH), dtype=bool)
    expected[0, 10:30, 10:40] = True
    expected[1, 5:45, 50:60] = True
    np.testing.assert_array_equal(masks, expected)
    picture = draw_sample(mapped, "BGR", ["a", "b"])
    factor = picture.shape[0] // HEIGHT
    assert picture.shape == (HEIGHT * factor, WIDTH * factor, 3)

    boxes_only = make_mapper(with_contours=False)(given)
    assert sample_masks(boxes_only["instances"]) is None
    exclusive = copy.deepcopy({**boxes_only, "boxes_inclusive": False})
    exclusive["instances"].gt_boxes.tensor[:, 2:] += 1
    np.testing.assert_array_equal(
        draw_sample(boxes_only, "BGR", ["a", "b"]), draw_sample(exclusive, "BGR", ["a", "b"])
    )
