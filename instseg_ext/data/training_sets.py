"""The images that a training uses: sets joined, and left out what has nothing to learn from."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import filter_images_with_few_keypoints

from instseg_ext.data.foreign import require_packages
from instseg_ext.data.registration import is_semantic

__all__ = ["load_training_dicts", "training_dicts"]

logger = logging.getLogger(__name__)


def training_dicts(
    cfg: CfgNode, names: Sequence[str], limit: int | None = None, *, may_be_empty: bool = False
) -> list[dict]:
    """Load training sets as the training of a config uses them, without proposals.

    Args:
        cfg: reads what says which images are left out.
        names: of ``DATASETS.TRAIN``, or some of them.
        limit: return only the first images; None = all.
        may_be_empty: see ``load_training_dicts``.

    Returns:
        detectron2 dictionaries.

    Raises:
        ValueError: see ``load_training_dicts``.
    """
    return load_training_dicts(
        list(names),
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=(
            cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        ),
        may_be_empty=may_be_empty,
    )[:limit]


def load_training_dicts(
    names: list[str],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    *,
    may_be_empty: bool = False,
) -> list[dict]:
    """Load and join training sets.

    Args:
        names: registered data sets with the same classes, all of them with instances or all of them
            with label maps; of the latter no image is left out.
        filter_empty: leave out images that have nothing but crowds.
        min_keypoints: leave out images with fewer labelled keypoints than this.
        may_be_empty: return an empty list if no image remains: the sets are some of several.

    Returns:
        detectron2 dictionaries.

    Raises:
        ValueError: if no data set is named, their classes differ, or no image remains.
    """
    if not names:
        raise ValueError(
            "DATASETS.TRAIN is empty; name a data set or give --train-json and --train-images."
        )
    dicts, classes = [], None
    for name in names:
        require_packages(name)
        dicts += DatasetCatalog.get(name)
        metadata = MetadataCatalog.get(name)
        these = list(metadata.stuff_classes if is_semantic(name) else metadata.thing_classes)
        if classes is not None and these != classes:
            raise ValueError(
                f"DATASETS.TRAIN: {name} has classes {these[:5]}, {names[0]} has {classes[:5]}; "
                "data sets that are trained together need the same classes in the same order."
            )
        classes = these
    if dicts and is_semantic(names[0]):
        logger.info("Training on %d images with label maps of %d classes", len(dicts), len(classes))
        return dicts
    total = len(dicts)
    if filter_empty:
        dicts = [d for d in dicts if any(not a.get("iscrowd", 0) for a in d["annotations"])]
    if min_keypoints > 0:
        dicts = filter_images_with_few_keypoints(dicts, min_keypoints)
    if not dicts and not may_be_empty:
        raise ValueError(
            f"DATASETS.TRAIN {names}: none of {total} images has an object to train on."
        )
    objects = Counter(
        a["category_id"] for d in dicts for a in d["annotations"] if not a.get("iscrowd", 0)
    )
    logger.info(
        "Training on %d of %d images with %d objects of %d of %d classes",
        len(dicts), total, sum(objects.values()), len(objects), len(classes or []),
    )  # fmt: skip
    return dicts
