import itertools

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from instseg_ext.config import add_shared_config
from instseg_ext.data import TrainLoader, add_data_config, make_shapes
from instseg_ext.data.augmentation import Stretch
from instseg_ext.data.coco import load_coco
from instseg_ext.data.ssd_augmentation import ExpandAndCrop, WindowTransform
from instseg_ext.data.stream import seeded
from instseg_ext.methods.yolact.config import add_yolact_config
from instseg_ext.methods.yolact.mapper import YOLACTMapper, build_yolact_mapper

SIZE = 100  # of the network input


def square(x0, y0, x1, y1, *, category=0, box=None, crowd=False):
    """Annotate a rectangle of a 50 x 80 image; crowds as RLE, as COCO has them."""
    segmentation = [[float(v) for v in (x0, y0, x1, y0, x1, y1, x0, y1)]]
    if crowd:
        pixels = np.zeros((50, 80), np.uint8, order="F")
        pixels[y0:y1, x0:x1] = 1
        segmentation = mask_util.encode(pixels)
    x0, y0, x1, y1 = box or (x0, y0, x1, y1)
    return {
        "category_id": category,
        "iscrowd": int(crowd),
        "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
        "bbox_mode": BoxMode.XYWH_ABS,
        "segmentation": segmentation,
    }


@pytest.fixture
def sample(tmp_path):
    """Make a data set dictionary of given annotations."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    def make(*annotations):
        return {"file_name": str(tmp_path / "a.png"), "annotations": list(annotations)}

    return make


def make_mapper(*augmentations, min_box_size=4 / 550):
    return YOLACTMapper(
        is_train=True,
        augmentations=[*augmentations, Stretch((SIZE, SIZE))],
        image_format="RGB",
        min_box_size=min_box_size,
    )


def make_cfg(**changes):
    cfg = get_cfg()
    add_shared_config(cfg)
    add_data_config(cfg)
    add_yolact_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (0,), 0
    cfg.INSTSEG.STRETCH = [SIZE, SIZE]
    cfg.INSTSEG.AUGMENTATIONS.SSD.ENABLED = True
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def test_crowds_are_kept_last_and_marked(sample):
    mapped = make_mapper()(
        sample(
            square(0, 0, 40, 10, category=5, crowd=True),
            square(8, 10, 24, 30, category=3),
            square(40, 10, 60, 40, category=1),
            square(60, 0, 80, 10, category=2, crowd=True),
            square(30, 0, 50, 40, category=4),
        )
    )
    instances = mapped["instances"]
    assert instances.gt_classes.tolist() == [3, 1, 4, 5, 2]
    assert instances.gt_is_crowd.tolist() == [False, False, False, True, True]
    assert instances.gt_is_crowd.dtype == torch.bool
    assert instances.image_size == (SIZE, SIZE)
    assert instances.gt_masks.tensor.shape == (5, SIZE, SIZE)
    assert instances.gt_boxes.tensor.dtype == torch.float32
    # 80 columns and 50 rows become 100: times 1.25 and 2.
    assert instances.gt_boxes.tensor[0].tolist() == [10, 20, 30, 60]
    rows, columns = np.nonzero(instances.gt_masks.tensor[0].numpy())
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (20, 60, 10, 30)
    # Nearest pixel of a mask of 40 columns and 10 rows.
    assert instances.gt_masks.tensor[3].sum() == 50 * 20


def test_boxes_are_those_of_the_file_cut_at_the_border(sample):
    """They differ from the masks' boxes; nothing is recomputed."""
    window = WindowTransform(20, 10, 40, 25, (0.0, 0.0, 0.0))
    mapped = make_mapper(window)(
        sample(
            square(24, 12, 30, 20, box=(22.4, 11, 33, 21.5)),
            square(30, 12, 70, 20, box=(29, 5, 72, 25)),
        )
    )
    torch.testing.assert_close(
        mapped["instances"].gt_boxes.tensor,
        torch.tensor([[6.0, 4.0, 32.5, 46.0], [22.5, 0.0, 100.0, 60.0]]),
    )


def test_flipped_boxes_and_annotations_without_box(sample):
    bare = square(10, 10, 20, 40, category=1)
    del bare["bbox"]
    mapped = make_mapper(T.HFlipTransform(80))(sample(square(0, 0, 8, 5, box=(0, 0, 9, 5)), bare))
    torch.testing.assert_close(
        mapped["instances"].gt_boxes.tensor,
        torch.tensor([[88.75, 0.0, 100.0, 10.0], [75.0, 20.0, 87.5, 80.0]]),
    )


@pytest.mark.parametrize(
    ("min_box_size", "left"), [(4 / 550, [0, 1, 2]), (0.0, [0, 1, 2, 3]), (4.0, [0, 1])]
)
def test_boxes_that_are_too_small_go(sample, min_box_size, left):
    annotations = [
        square(10, 10, 40, 40, category=0),
        square(10, 10, 14, 40, category=1),  # 5 pixels wide in the network input
        square(10, 10, 40, 12, category=2),  # 4 pixels high: not above 4
        square(10, 10, 40, 30, category=3, box=(10, 10, 10.005, 30)),  # 0.00625 pixels
        square(10, 10, 40, 30, category=4, box=(10, 10, 10, 30)),
        square(10, 10, 40, 30, category=5, box=(81, 10, 90, 30)),  # outside
    ]
    instances = make_mapper(min_box_size=min_box_size)(sample(*annotations))["instances"]
    assert instances.gt_classes.tolist() == left
    crowded = [{**a, "iscrowd": 1} for a in annotations[1:]]
    instances = make_mapper(min_box_size=min_box_size)(sample(annotations[0], *crowded))[
        "instances"
    ]
    assert instances.gt_classes.tolist() == left


def test_the_box_alone_decides(sample):
    """An object stays although the window holds none of its pixels."""
    window = WindowTransform(0, 0, 40, 50, (0.0, 0.0, 0.0))
    mapped = make_mapper(window)(sample(square(50, 10, 60, 20, box=(10, 10, 60, 20))))
    assert mapped["instances"].gt_boxes.tensor.tolist() == [[25, 20, 100, 40]]
    assert not mapped["instances"].gt_masks.tensor.any()


def test_an_image_that_loses_its_objects_is_rejected(sample):
    mapper = make_mapper(WindowTransform(0, 0, 40, 50, (0.0, 0.0, 0.0)))
    lost, crowd = square(50, 10, 60, 20), square(5, 5, 30, 30, crowd=True)
    assert mapper(sample(lost)) is None
    assert mapper(sample(lost, crowd)) is None
    assert mapper(sample(lost, square(5, 5, 30, 30))) is not None


def test_an_image_without_objects_passes(sample):
    crowd = square(5, 5, 30, 30, category=2, crowd=True)
    for mapper in (make_mapper(), build_yolact_mapper(make_cfg(), True)):
        instances = mapper(sample())["instances"]
        assert len(instances) == 0
        assert instances.gt_masks.tensor.shape == (0, SIZE, SIZE)
        assert instances.gt_boxes.tensor.shape == (0, 4)
        assert instances.gt_classes.dtype == torch.int64
        assert instances.gt_is_crowd.dtype == torch.bool
        no_shape = {"category_id": 1, "iscrowd": 0, "segmentation": []}
        assert len(mapper(sample(no_shape))["instances"]) == 0
    for position in range(20):
        with seeded(0, position):
            instances = build_yolact_mapper(make_cfg(), True)(sample(crowd))["instances"]
        assert instances.gt_is_crowd.tolist() == [True]


def test_testing_leaves_the_image_to_the_model(sample):
    mapped = build_yolact_mapper(make_cfg(), False)(sample(square(5, 5, 30, 30)))
    assert "instances" not in mapped
    assert mapped["image"].dtype == torch.uint8
    assert mapped["image"].shape == (3, 50, 80)
    without = sample()
    del without["annotations"]
    assert "instances" not in build_yolact_mapper(make_cfg(), True)(without)


def test_config(sample):
    mapper = build_yolact_mapper(make_cfg(MODEL__YOLACT__MIN_BOX_SIZE=60.0), True)
    assert mapper.keep_crowd
    assert [type(a).__name__ for a in mapper.augmentations.augs] == [
        "PhotometricDistortion",
        "ExpandAndCrop",
        "RandomFlip",
        "Stretch",
    ]
    mapper.augmentations = T.AugmentationList(mapper.augmentations.augs[-1:])
    assert mapper(sample(square(0, 0, 47, 50))) is None
    assert mapper(sample(square(0, 0, 49, 50))) is not None
    with pytest.raises(ValueError, match=r"MODEL\.YOLACT\.MIN_BOX_SIZE is 0\.0 or more, not -1"):
        build_yolact_mapper(make_cfg(MODEL__YOLACT__MIN_BOX_SIZE=-1.0), True)


def test_every_sample_has_an_object_centred_in_it(sample):
    """The whole recipe: what stays is what the crop holds, and masks fill their boxes."""
    mapper = build_yolact_mapper(make_cfg(), True)
    squares = [square(4, 4, 30, 22), square(40, 20, 76, 46, category=1)]
    given = sample(*squares, square(50, 2, 78, 14, category=2, crowd=True))
    classes = []
    for position in range(60):
        with seeded(5, position):
            mapped = mapper(given)
        instances = mapped["instances"]
        assert mapped["image"].shape == (3, SIZE, SIZE)
        assert not instances.gt_is_crowd[0]
        classes.append(tuple(instances.gt_classes.tolist()))
        boxes, masks = instances.gt_boxes.tensor, instances.gt_masks.tensor
        assert boxes.min() >= 0
        assert boxes.max() <= SIZE
        for (x0, y0, x1, y1), mask in zip(boxes.tolist(), masks.numpy(), strict=True):
            rows, columns = np.nonzero(mask)
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose([x0, y0, x1, y1], tight, atol=1.01)
    assert {(0,), (1,), (0, 1, 2), (1, 2)} <= set(classes)


def fingerprint(mapped):
    instances = mapped["instances"]
    return (
        mapped["file_name"],
        mapped["image"].numpy().tobytes(),
        instances.gt_masks.tensor.numpy().tobytes(),
        instances.gt_boxes.tensor.numpy().tobytes(),
        instances.gt_classes.tolist(),
        instances.gt_is_crowd.tolist(),
    )


def test_samples_depend_on_the_seed_not_on_the_workers(tmp_path):
    dicts, _ = load_coco(*make_shapes(tmp_path, num_images=6, size=48, seed=3))[:2]
    mapper = build_yolact_mapper(make_cfg(INSTSEG__STRETCH=[40, 40]), True)

    def take(seed, num_workers=0):
        loader = TrainLoader(dicts, mapper, batch_size=4, seed=seed, num_workers=num_workers)
        return [[fingerprint(s) for s in batch] for batch in itertools.islice(iter(loader), 3)]

    first = take(7)
    assert take(7) == first
    assert take(7, num_workers=2) == first
    assert take(8) != first


def test_rejected_images_are_replaced(sample):
    """The loader draws another image, which is how an empty sample never trains."""
    lost, kept = sample(square(50, 10, 60, 20)), sample(square(5, 5, 30, 30, category=1))
    mapper = make_mapper(WindowTransform(0, 0, 40, 50, (0.0, 0.0, 0.0)))
    loader = TrainLoader([lost, kept], mapper, batch_size=4, seed=0)
    batch = next(iter(loader))
    assert [s["instances"].gt_classes.tolist() for s in batch] == [[1]] * 4


def test_crop_of_an_image_with_objects_and_crowds_holds_an_object(sample):
    mapper = make_mapper(ExpandAndCrop(expand_ratio=1.0, fill=(0, 0, 0), crop=True))
    given = sample(square(2, 2, 20, 20), square(50, 30, 80, 50, crowd=True))
    left = []
    for position in range(40):
        with seeded(2, position):
            left.append(mapper(given)["instances"].gt_is_crowd.tolist())
    assert {(False,), (False, True)} == {tuple(flags) for flags in left}
