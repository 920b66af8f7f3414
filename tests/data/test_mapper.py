import copy
import pickle

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.structures import polygons_to_bitmask
from PIL import Image
from pycocotools import mask as mask_util

from instseg_ext.config import add_shared_config
from instseg_ext.data import InstSegDatasetMapper, add_data_config, build_mapper
from instseg_ext.data.augmentation import (
    Rotate90Transform,
    StretchTransform,
    augmentation_kwargs,
    build_augmentations,
)
from instseg_ext.data.mapper import mask_boxes, transform_masks
from instseg_ext.data.stream import seeded
from instseg_ext.layers.stretch import stretch


def rle_of(mask):
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


@pytest.fixture
def sample(tmp_path):
    """One 20 x 30 image with a two-part polygon, an RLE and a crowd."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    disc = np.hypot(*np.ogrid[-7:13, -20:10]) < 5
    crowd = np.zeros((20, 30), bool)
    crowd[0:3] = True
    two_parts = [[2, 4, 8, 4, 8, 10, 2, 10], [2, 14, 8, 14, 8, 18]]
    return {
        "file_name": str(tmp_path / "a.png"),
        "height": 20,
        "width": 30,
        "image_id": 5,
        "annotations": [
            {"category_id": 1, "iscrowd": 0, "segmentation": two_parts},
            {"category_id": 0, "iscrowd": 0, "segmentation": rle_of(disc)},
            {"category_id": 2, "iscrowd": 1, "segmentation": rle_of(crowd)},
        ],
    }


def make_cfg(**changes):
    cfg = get_cfg()
    add_shared_config(cfg)
    add_data_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (40,), 40
    cfg.INPUT.RANDOM_FLIP = "none"
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def test_training_dict(sample):
    before = copy.deepcopy(sample)
    out = build_mapper(make_cfg(), True)(sample)
    assert sample == before
    assert set(out) == {"file_name", "height", "width", "image_id", "image", "instances"}
    assert (out["height"], out["width"], out["image_id"]) == (20, 30, 5)
    assert out["image"].shape == (3, 40, 60)
    assert out["image"].dtype == torch.uint8
    instances = out["instances"]
    assert instances.image_size == (40, 60)
    assert instances.gt_classes.tolist() == [1, 0]
    masks = instances.gt_masks.tensor
    assert masks.dtype == torch.bool
    for box, mask in zip(instances.gt_boxes.tensor.tolist(), masks.numpy(), strict=True):
        rows, columns = np.nonzero(mask)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert not instances.has("gt_is_crowd")


def test_channel_order(sample):
    rgb = read_image(sample["file_name"], "RGB")
    for order, expected in (("RGB", rgb), ("BGR", rgb[..., ::-1])):
        out = build_mapper(make_cfg(INPUT__MIN_SIZE_TRAIN=(0,), INPUT__FORMAT=order), True)(sample)
        np.testing.assert_array_equal(out["image"].permute(1, 2, 0), expected)


def test_test_dict_has_no_annotations(sample):
    out = build_mapper(make_cfg(), False)(sample)
    assert set(out) == {"file_name", "height", "width", "image_id", "image"}
    assert out["image"].shape == (3, 40, 60)


def test_crowds_on_request(sample):
    mapper = InstSegDatasetMapper(
        is_train=True, augmentations=[], image_format="BGR", keep_crowd=True
    )
    instances = mapper(sample)["instances"]
    assert instances.gt_classes.tolist() == [1, 0, 2]
    assert instances.gt_is_crowd.tolist() == [False, False, True]
    assert instances.gt_masks.tensor[2].sum() == 3 * 30


def test_nothing_left_has_all_fields(sample):
    crop = T.CropTransform(0, 0, 1, 1)
    mapper = InstSegDatasetMapper(is_train=True, augmentations=[crop], image_format="BGR")
    for annotations in (sample["annotations"], []):
        instances = mapper({**sample, "annotations": annotations})["instances"]
        assert len(instances) == 0
        assert instances.gt_masks.tensor.shape == (0, 1, 1)
        assert instances.gt_boxes.tensor.shape == (0, 4)
        assert instances.gt_classes.dtype == torch.int64


def test_what_is_wrong_with_an_image_is_said(sample, tmp_path):
    mapper = build_mapper(make_cfg(), True)
    with pytest.raises(ValueError, match=r"a\.png \(image id 5\) is 30 x 20 pixels.*31 x 20"):
        mapper({**sample, "width": 31})
    with pytest.raises(FileNotFoundError, match=r"gone\.png \(image id 5\) is missing"):
        mapper({**sample, "file_name": str(tmp_path / "gone.png")})
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png \(image id 5\) cannot be read"):
        mapper({**sample, "file_name": str(tmp_path / "bad.png")})


TRANSFORMS = {
    "none": lambda h, w: T.NoOpTransform(),
    "flip": lambda h, w: T.HFlipTransform(w),
    "upside down": lambda h, w: T.VFlipTransform(h),
    "larger": lambda h, w: T.ResizeTransform(h, w, 33, 47),
    "smaller": lambda h, w: T.ResizeTransform(h, w, 9, 14),
    "crop": lambda h, w: T.CropTransform(3, 2, 15, 11),
    "pad": lambda h, w: T.PadTransform(2, 3, 4, 5),
    "stretch": lambda h, w: StretchTransform(h, w, 24, 13),
    **{f"rotate {k}": lambda h, w, k=k: Rotate90Transform(k, h, w) for k in range(4)},
}


def chain(names, height, width):
    """Build a transform list and give the size it leads to."""
    transforms = []
    for name in names:
        transforms.append(TRANSFORMS[name](height, width))
        height, width = transforms[-1].apply_image(np.zeros((height, width, 3), np.uint8)).shape[:2]
    return T.TransformList(transforms), (height, width)


CHAINS = [
    *([name] for name in TRANSFORMS),
    ["larger", "flip", "rotate 1", "crop"],
    ["rotate 3", "smaller", "upside down", "stretch"],
]


@pytest.mark.parametrize("names", CHAINS)
def test_masks_go_where_the_image_goes(names):
    """Oracle: each mask alone through apply_segmentation, each point alone through apply_coords."""
    height, width = 20, 30
    rng = np.random.default_rng(3)
    masks = [np.kron(rng.random((5, 6)) < 0.4, np.ones((4, 5), bool)) for _ in range(3)]
    square = [20.0, 1.0, 29.0, 1.0, 29.0, 9.0, 20.0, 9.0]
    corner = [3.0, 3.0, 9.0, 3.0, 3.0, 9.0]
    polygons = [[[2.0, 4.0, 18.0, 4.5, 15.0, 17.0]], [square, corner]]
    transforms, size_hw = chain(names, height, width)
    mixed = [
        rle_of(masks[0]),
        polygons[0],
        masks[1].astype(np.uint8),
        polygons[1],
        rle_of(masks[2]),
    ]
    result = transform_masks(mixed, transforms, (height, width), size_hw).numpy()
    for row, mask in zip((0, 2, 4), masks, strict=True):
        np.testing.assert_array_equal(
            result[row], transforms.apply_segmentation(mask.astype(np.uint8)).astype(bool)
        )
    for row, parts in zip((1, 3), polygons, strict=True):
        moved = []
        for part in parts:
            points = np.array(part).reshape(-1, 2)
            moved.append(np.concatenate([transforms.apply_coords(p[None])[0] for p in points]))
        np.testing.assert_array_equal(result[row], polygons_to_bitmask(moved, *size_hw))


@pytest.mark.parametrize("turns", range(4))
def test_rotation_moves_points_with_pixels(turns):
    image = np.zeros((5, 7), np.uint8)
    image[1, 4] = 1
    transform = Rotate90Transform(turns, 5, 7)
    row, column = np.argwhere(transform.apply_image(image))[0]
    np.testing.assert_allclose(
        transform.apply_coords(np.array([[4.5, 1.5]])), [[column + 0.5, row + 0.5]]
    )
    back = transform.inverse()
    np.testing.assert_array_equal(back.apply_image(transform.apply_image(image)), image)
    np.testing.assert_allclose(
        back.apply_coords(transform.apply_coords(np.array([[4.5, 1.5]]))), [[4.5, 1.5]]
    )


def test_stretch_of_training_is_that_of_the_model(sample):
    cfg = make_cfg(INPUT__MIN_SIZE_TRAIN=(0,), INPUT__MIN_SIZE_TEST=0, INSTSEG__STRETCH=[24, 40])
    out = build_mapper(cfg, True)(sample)
    raw = build_mapper(cfg, False)(sample)["image"]
    assert raw.dtype == torch.uint8
    assert raw.shape == (3, 20, 30)
    assert out["image"].dtype == torch.float32
    assert torch.equal(out["image"], stretch(raw, (24, 40)))
    assert torch.equal(stretch(out["image"], (24, 40)), out["image"])
    assert out["instances"].image_size == (24, 40)
    assert out["instances"].gt_masks.tensor.shape[1:] == (24, 40)


def test_random_heights_of_the_stretch(sample):
    cfg = make_cfg(
        INPUT__MIN_SIZE_TRAIN=(0,),
        INPUT__MIN_SIZE_TEST=0,
        INSTSEG__STRETCH=[24, 40],
        INSTSEG__STRETCH_HEIGHTS=[30, 33],
    )
    mapper = build_mapper(cfg, True)

    def sizes(seed):
        mapped = []
        for position in range(40):
            with seeded(seed, position):
                mapped.append(mapper(sample))
        assert {out["image"].shape[2] for out in mapped} == {40}
        assert all(out["instances"].image_size == out["image"].shape[1:] for out in mapped)
        return [out["image"].shape[1] for out in mapped]

    heights = sizes(0)
    assert set(heights) == {30, 31, 32, 33}
    assert sizes(0) == heights
    assert sizes(1) != heights
    assert build_mapper(cfg, False)(sample)["image"].shape == (3, 20, 30)


def test_stretch_equals_interpolation_by_hand():
    image = torch.tensor([[[0.0, 10.0], [20.0, 30.0]]])
    # Half-pixel centres: output pixel i samples input coordinate (i + 0.5) / 2 - 0.5.
    row = [0.0, 2.5, 7.5, 10.0]
    expected = [[v + s for v in row] for s in (0.0, 5.0, 15.0, 20.0)]
    torch.testing.assert_close(stretch(image, (4, 4)), torch.tensor([expected]))
    assert stretch(image.byte(), (2, 2)).dtype == torch.float32
    for bad in ((0, 4), (4, -1)):
        with pytest.raises(ValueError, match="positive"):
            stretch(image, bad)
    with pytest.raises(ValueError, match="one image"):
        stretch(image[None], (4, 4))


def test_augmentations_of_a_config(sample):
    extra = "INSTSEG__AUGMENTATIONS__"
    cfg = make_cfg(
        INPUT__RANDOM_FLIP="horizontal",
        INPUT__CROP__ENABLED=True,
        **{
            extra + "BRIGHTNESS": [0.5, 0.6],
            extra + "CONTRAST": [0.9, 1.1],
            extra + "SATURATION": [0.9, 1.1],
            extra + "ROTATE90": True,
            extra + "VERTICAL_FLIP": True,
        },
    )
    kinds = [type(a).__name__ for a in build_augmentations(**augmentation_kwargs(cfg, True))]
    assert kinds == [
        "RandomBrightness",
        "RandomContrast",
        "RandomSaturation",
        "RandomCrop",
        "RandomFlip",
        "RandomFlip",
        "RandomRotate90",
        "ResizeShortestEdge",
    ]
    tests = build_augmentations(**augmentation_kwargs(cfg, False))
    assert [type(a).__name__ for a in tests] == ["ResizeShortestEdge"]
    mapper = pickle.loads(pickle.dumps(build_mapper(cfg, True)))
    assert mapper(sample)["image"].float().mean() < 90  # darkened from about 127


def test_quarter_turns_all_happen():
    mapper = InstSegDatasetMapper(
        is_train=True,
        augmentations=build_augmentations(
            min_size=(0,), max_size=0, rotate90=True, vertical_flip=True
        ),
        image_format="RGB",
    )
    np.random.seed(0)  # noqa: NPY002
    image = np.arange(6, dtype=np.uint8).reshape(2, 3)[..., None].repeat(3, 2)
    seen = set()
    for _ in range(60):
        aug_input = T.AugInput(image)
        mapper.augmentations(aug_input)
        seen.add(tuple(aug_input.image[..., 0].reshape(-1).tolist()))
    assert len(seen) == 8  # the symmetries of a rectangle's pixels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"INSTSEG__STRETCH": [64, 64]}, r"INPUT\.MIN_SIZE_TRAIN must be 0"),
        ({"INSTSEG__STRETCH": [64, 0], "INPUT__MIN_SIZE_TRAIN": (0,)}, "both positive"),
        ({"INSTSEG__STRETCH_HEIGHTS": [40, 48]}, r"STRETCH_HEIGHTS is \[40, 48\].*needs INSTSEG"),
        *(
            (
                {"INPUT__MIN_SIZE_TRAIN": (0,), "INSTSEG__STRETCH": [64, 64]}
                | {"INSTSEG__STRETCH_HEIGHTS": heights},
                r"INSTSEG\.STRETCH_HEIGHTS is \[\] or \[low, high\]",
            )
            for heights in ([48], [48, 40], [0, 40], [40.5, 48])
        ),
        ({"INPUT__RANDOM_FLIP": "diagonal"}, r"INPUT\.RANDOM_FLIP"),
        ({"INSTSEG__AUGMENTATIONS__CONTRAST": [1.1]}, r"INSTSEG\.AUGMENTATIONS\.CONTRAST"),
        ({"INSTSEG__AUGMENTATIONS__BRIGHTNESS": [1.1, 0.9]}, r"INSTSEG\.AUGMENTATIONS\.BRIGHTNESS"),
    ],
)
def test_bad_values_name_their_key(changes, message):
    with pytest.raises(ValueError, match=message):
        build_mapper(make_cfg(**changes), True)


def test_boxes_of_masks():
    masks = torch.zeros(3, 5, 6, dtype=torch.bool)
    masks[0, 1, 2] = True
    masks[2] = True
    boxes, keep = mask_boxes(masks)
    assert boxes.tolist() == [[2, 1, 3, 2], [0, 0, 0, 0], [0, 0, 6, 5]]
    assert keep.tolist() == [True, False, True]
    boxes, keep = mask_boxes(masks[:0])
    assert boxes.shape == (0, 4)
    assert keep.shape == (0,)
