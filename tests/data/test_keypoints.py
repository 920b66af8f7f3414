"""Keypoints from the annotation file to the training sample."""

import copy
import logging

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_FLIP_MAP,
    COCO_PERSON_KEYPOINT_NAMES,
)
from detectron2.data.detection_utils import (
    create_keypoint_hflip_indices,
    transform_keypoint_annotations,
)
from detectron2.structures import Keypoints

import instseg_ext
from instseg_ext.data import build_mapper, build_train_loader, register
from instseg_ext.data.augmentation import Rotate90Transform, StretchTransform
from instseg_ext.data.keypoints import declared_keypoints, mirror_pairs, transform_keypoints
from instseg_ext.data.registration import load_keypoint_metadata

NAMES = ["nose", "left_ear", "right_ear"]


@pytest.fixture
def people(good_coco):
    """Dogs of category 7 have keypoints, cats have none; one cat and one dog without any mark."""
    good_coco["categories"][0]["keypoints"] = NAMES
    first = good_coco["annotations"][0]
    first["keypoints"], first["num_keypoints"] = [3, 4, 2, 2, 6, 1, 0, 0, 0], 2
    unmarked = {**copy.deepcopy(first), "id": 4, "keypoints": [0] * 9, "num_keypoints": 0}
    good_coco["annotations"].append(unmarked)
    return good_coco


@pytest.fixture
def cfg(registry, write_coco, people):
    register("keypoint_test", *write_coco(people))
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("keypoint_test",), ()
    cfg.MODEL.DEVICE, cfg.MODEL.KEYPOINT_ON, cfg.INPUT.RANDOM_FLIP = "cpu", True, "none"
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = (20,), 0, 1
    return cfg


def mapped(cfg, **changes):
    sample = next(d for d in DatasetCatalog.get("keypoint_test") if d["image_id"] == 20)
    return build_mapper(cfg, True)({**sample, **changes})["instances"]


def test_pairs_follow_from_the_names():
    assert mirror_pairs(COCO_PERSON_KEYPOINT_NAMES) == list(COCO_PERSON_KEYPOINT_FLIP_MAP)
    names = ["Right Hip", "tail", "left hip", "L-eye", "r-eye", "upright", "left_only", "rl", "lr"]
    assert mirror_pairs(names) == [("Right Hip", "left hip"), ("L-eye", "r-eye")]


def test_reader_agrees_with_detectron2(write_coco, people, registry):
    json_file, images = write_coco(people)
    register("keypoint_test", json_file, images)
    ours = DatasetCatalog.get("keypoint_test")
    metadata = MetadataCatalog.get("keypoint_test")
    assert metadata.keypoint_names == NAMES
    assert metadata.keypoint_flip_map == [("left_ear", "right_ear")]
    assert create_keypoint_hflip_indices("keypoint_test") == [0, 2, 1]
    theirs = load_coco_json(str(json_file), str(images))
    found = [a["keypoints"] for d in ours for a in d["annotations"] if "keypoints" in a]
    expected = [a["keypoints"] for d in theirs for a in d["annotations"] if "keypoints" in a]
    assert found == [k for k in expected if any(k[2::3])]
    assert len(found) == 1


def test_keypoints_that_nobody_declared_are_left_out_and_counted(
    write_coco, people, caplog, registry
):
    people["annotations"][0]["keypoints"].append(1)
    register("keypoint_test", *write_coco(people))
    with caplog.at_level(logging.WARNING):
        dicts = DatasetCatalog.get("keypoint_test")
    assert not any("keypoints" in a for d in dicts for a in d["annotations"])
    assert sum(len(d["annotations"]) for d in dicts) == 4
    assert "keypoints that its category does not declare (mask kept)" in caplog.text


def test_categories_must_agree(write_coco, people, caplog, registry):
    cats = people["categories"]
    assert declared_keypoints(cats) == NAMES
    assert declared_keypoints([{"id": 1, "name": "x"}]) == []
    cats[1]["keypoints"] = ["tail"]
    with pytest.raises(ValueError, match="'dog' and 'cat' have different keypoints"):
        declared_keypoints(cats)
    register("keypoint_test", *write_coco(people))
    assert len(DatasetCatalog.get("keypoint_test")) == 2  # masks can be trained
    assert "different keypoints" in caplog.text


def test_pairs_set_by_the_user_stay(cfg):
    MetadataCatalog.get("keypoint_test").keypoint_flip_map = []
    load_keypoint_metadata("keypoint_test")
    DatasetCatalog.get("keypoint_test")
    assert MetadataCatalog.get("keypoint_test").keypoint_flip_map == []
    with pytest.raises(KeyError, match="no_such_set"):
        load_keypoint_metadata("no_such_set")


TRANSFORMS = {
    "none": [],
    "flip": [T.HFlipTransform(12)],
    "twice": [T.HFlipTransform(12), T.ResizeTransform(10, 12, 20, 20), T.HFlipTransform(20)],
    "crop": [T.CropTransform(3, 4, 5, 5)],
    "crop of a flip": [T.HFlipTransform(12), T.CropTransform(6, 4, 6, 6)],
    "turn": [Rotate90Transform(1, 10, 12)],
    "stretch": [StretchTransform(10, 12, 24, 13)],
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transform_equals_detectron2(kind):
    transforms = T.TransformList(TRANSFORMS[kind])
    size_hw = transforms.apply_image(np.zeros((10, 12, 3), np.uint8)).shape[:2]
    rng = np.random.default_rng(0)
    points = np.concatenate(
        [rng.uniform(0, (12, 10), (20, 3, 2)), rng.integers(0, 3, (20, 3, 1))], axis=2
    )
    before = points.copy()
    result = transform_keypoints(points, transforms, size_hw, [0, 2, 1])
    assert (points == before).all()
    assert result.dtype == torch.float32
    for row, flat in zip(result, points.reshape(20, 9), strict=True):
        expected = transform_keypoint_annotations(flat.copy(), transforms, size_hw, [0, 2, 1])
        np.testing.assert_allclose(row, expected, rtol=1e-6)
    assert transform_keypoints(points[:0], transforms, size_hw, [0, 2, 1]).shape == (0, 3, 3)


def test_upside_down_is_a_mirror_too():
    """Flipped both ways, an image is turned by half: left stays left."""
    points = np.array([[[3.0, 4.0, 2.0], [2.0, 6.0, 2.0], [5.0, 7.0, 1.0]]])
    down, across = T.VFlipTransform(10), T.HFlipTransform(12)
    once = transform_keypoints(points, T.TransformList([down]), (10, 12), [0, 2, 1])
    assert once[0].tolist() == [[3, 6, 2], [5, 3, 1], [2, 4, 2]]
    both = transform_keypoints(points, T.TransformList([down, across]), (10, 12), [0, 2, 1])
    assert both[0].tolist() == [[9, 6, 2], [10, 4, 2], [7, 3, 1]]


def test_training_sample(cfg):
    instances = mapped(cfg)
    assert isinstance(instances.gt_keypoints, Keypoints)
    assert instances.gt_keypoints.tensor.tolist() == [
        [[7, 9, 2], [5, 13, 1], [0, 0, 0]],
        [[0, 0, 0]] * 3,
    ]
    assert len(instances) == len(instances.gt_masks) == 2
    assert mapped(cfg, annotations=[]).gt_keypoints.tensor.shape == (0, 3, 3)
    cfg.MODEL.KEYPOINT_ON = False
    assert not mapped(cfg).has("gt_keypoints")


def test_keypoints_go_with_their_instances(cfg):
    """A crop that loses one object loses its keypoints, not those of the next."""
    mapper = build_mapper(cfg, True)
    mapper.augmentations = T.AugmentationList([T.CropTransform(6, 0, 6, 10)])
    sample = next(d for d in DatasetCatalog.get("keypoint_test") if d["image_id"] == 20)
    other = copy.deepcopy(sample["annotations"][0])
    other["segmentation"] = [[8, 1, 11, 1, 11, 4, 8, 4]]
    other["keypoints"] = [9, 2, 2, 5.5, 3, 2, 10, 3, 2]
    sample = {**sample, "annotations": [*sample["annotations"], other]}
    instances = mapper(sample)["instances"]
    assert instances.gt_keypoints.tensor.tolist() == [[[3, 2, 2], [0, 0, 0], [4, 3, 2]]]


def test_another_number_of_keypoints_is_refused(cfg):
    mapper = build_mapper(cfg, True)
    sample = next(d for d in DatasetCatalog.get("keypoint_test") if d["image_id"] == 20)
    dog = next(a for a in sample["annotations"] if "keypoints" in a)
    for numbers in ([], None):
        instances = mapper({**sample, "annotations": [{**dog, "keypoints": numbers}]})["instances"]
        assert instances.gt_keypoints.tensor.tolist() == [[[0, 0, 0]] * 3]
    for numbers in ([3, 4, 2], [3, 4, 2] * 5, [3, 4]):
        message = rf"\(image id 20\): an object has {len(numbers)} numbers .* not 9 .* of 3\);"
        with pytest.raises(ValueError, match=message):
            mapper({**sample, "annotations": [{**dog, "keypoints": numbers}]})


def test_images_without_keypoints_do_not_train(cfg):
    loader = iter(build_train_loader(cfg, build_mapper(cfg, True), seed=0))
    assert {sample["image_id"] for _ in range(6) for sample in next(loader)} == {20}
    cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = 3
    with pytest.raises(ValueError, match="none of 2 images"):
        build_train_loader(cfg, build_mapper(cfg, True), seed=0)
    cfg.MODEL.KEYPOINT_ON = False
    loader = iter(build_train_loader(cfg, build_mapper(cfg, True), seed=0))
    assert {sample["image_id"] for _ in range(6) for sample in next(loader)} == {10, 20}


def test_what_is_missing_is_said(cfg, write_coco, good_coco):
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 17
    with pytest.raises(ValueError, match=r"NUM_KEYPOINTS is 17, .* declares 3 keypoints; set"):
        build_mapper(cfg, True)
    build_mapper(cfg, False)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
    build_mapper(cfg, True)
    cfg.DATASETS.TEST = ("keypoint_test",)
    for sigmas in ([], [0.1, 0.1]):
        cfg.TEST.KEYPOINT_OKS_SIGMAS = sigmas
        with pytest.raises(ValueError, match=r"OKS_SIGMAS needs a number for each of 3 keypoints"):
            build_mapper(cfg, True)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1, 0.1]
    build_mapper(cfg, True)
    good_coco["categories"][0].pop("keypoints")
    register("keypoint_free", *write_coco(good_coco, name="bare.json"))
    cfg.DATASETS.TRAIN = ("keypoint_test", "keypoint_free")
    with pytest.raises(ValueError, match=r"KEYPOINT_ON is True, but data set 'keypoint_free'"):
        build_mapper(cfg, True)
