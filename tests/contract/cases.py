"""The models on which the contract suite runs: a new method adds one line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.structures import BitMasks, Instances

import instseg_ext

TINY_RESNET = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    # Of 50 layers, because detectron2 fixes the widths of the shallow ones.
    "MODEL.RESNETS.DEPTH", 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
    "MODEL.FPN.OUT_CHANNELS", 32,
    "INPUT.MIN_SIZE_TRAIN", (64,),
    "INPUT.MIN_SIZE_TEST", 64,
]  # fmt: skip

TINY_SOLO = ("MODEL.SOLO.CONV_DIM", 32, "MODEL.SOLO.NUM_CONVS", 1)
# Fresh scores are near 1 / (K + 1) = 1 / 2.
TINY_YOLACT = (
    "MODEL.YOLACT.WIDTH", 32,
    "MODEL.YOLACT.NUM_PROTOS", 8,
    "INSTSEG.STRETCH", [64, 64],
    "INPUT.MIN_SIZE_TRAIN", (0,),
    "INPUT.MIN_SIZE_TEST", 0,
)  # fmt: skip
TINY_POLARMASK = ("MODEL.POLARMASK.WIDTH", 32, "MODEL.POLARMASK.NUM_CONVS", 1)
TINY_RCNN = (
    "MODEL.FPN.NORM", "",
    "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 16,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 40,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 40,
)  # fmt: skip
TINY_DEEPMASK = (
    "MODEL.DEEPMASK.INPUT_SIZE", 32,
    "MODEL.DEEPMASK.OUT_SIZE", 12,
    "MODEL.DEEPMASK.GT_SIZE", 32,
    "MODEL.DEEPMASK.REDUCE_DIM", 8,
    "MODEL.DEEPMASK.CODE_DIM", 16,
    "MODEL.DEEPMASK.SCORE_DIM", 16,
    "MODEL.DEEPMASK.TEST_SCALES", [0.5, 1.0],
)  # fmt: skip
# Fresh masks of the first SOLO are at the prior everywhere: put them above the mask threshold, also
# as a product of two, and the scores below theirs.
FULL_MASKS = (*TINY_SOLO, "MODEL.SOLO.PRIOR_PROB", 0.8, "MODEL.SOLO.SCORE_THRESH", 0.99)


@dataclass(frozen=True)
class Case:
    """One method's smallest honest model.

    Attributes:
        name: test id.
        config: a config of ``projects``.
        opts: overrides that make it small.
        sees_padding: padding changes the result. Coordinate channels and group normalisation see it
            everywhere; plain convolutions do within their receptive field, since a bias or a
            normalisation makes padded pixels non-zero.
        patches: side of the image and of the mask of a training sample, where these are patches
            around one object.
        classes: its results have classes; without them they are judged as proposals.
    """

    name: str
    config: str
    opts: tuple
    sees_padding: bool = False
    patches: tuple[int, int] | None = None
    classes: bool = True

    def cfg(self, *opts):
        return instseg_ext.get_config(self.config, [*TINY_RESNET, *self.opts, *opts])

    def samples(self, scene):
        """Return the training samples of a scene."""
        return [patch_of(image, *self.patches) for image in scene] if self.patches else scene


CASES = [
    Case(
        "SOLOv2",
        "SOLO/nuclei_solov2_R_18_FPN",
        (*TINY_SOLO, "MODEL.SOLO.KERNEL_DIM", 32, "MODEL.SOLO.MASK_FEATURES.CONV_DIM", 32),
        sees_padding=True,
    ),
    Case("SOLO", "SOLO/nuclei_solo_R_18_FPN", FULL_MASKS, sees_padding=True),
    Case("Decoupled", "SOLO/nuclei_decoupled_solo_R_18_FPN", FULL_MASKS, sees_padding=True),
    Case(
        "DecoupledLight", "SOLO/nuclei_decoupled_solo_light_R_18_FPN", FULL_MASKS, sees_padding=True
    ),
    Case("YOLACT", "YOLACT/nuclei_yolact_R_18", TINY_YOLACT),
    Case(
        "YOLACT++",
        "YOLACT/nuclei_yolact_R_18",
        (*TINY_YOLACT, "MODEL.YOLACT.MASK_IOU.ENABLED", True),
    ),
    Case("PolarMask", "PolarMask/nuclei_polarmask_R_18_FPN", TINY_POLARMASK, sees_padding=True),
    # What PolarMask++ changes: no box branch, suppression on the polygons, soft centerness.
    Case(
        "PolarMask++",
        "PolarMask/nuclei_polarmask_R_18_FPN",
        (
            *TINY_POLARMASK,
            "MODEL.POLARMASK.WITH_BOX", False,
            "MODEL.POLARMASK.NMS_ON", "mask",
            "MODEL.POLARMASK.CENTERNESS", "soft",
        ),
        sees_padding=True,
    ),
    Case(
        "MaskRCNN",
        "MaskRCNN/nuclei_mask_rcnn_R_18_FPN",
        (*TINY_RCNN, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
        sees_padding=True,
    ),
    Case(
        "PointRend",
        "PointRend/nuclei_pointrend_R_18_FPN",
        (
            *TINY_RCNN,
            "MODEL.ROI_MASK_HEAD.FC_DIM", 32,
            "MODEL.POINT_HEAD.FC_DIM", 16,
        ),
        sees_padding=True,
    ),
    Case(
        "PANet",
        "PANet/nuclei_panet_R_18_FPN",
        (
            *TINY_RCNN,
            # The fully connected branch has half the channels, in groups of 32.
            "MODEL.ROI_MASK_HEAD.CONV_DIM", 64,
            "MODEL.ROI_BOX_HEAD.CONV_DIM", 32,
        ),
        sees_padding=True,
    ),
    Case(
        "MNC",
        "MNC/nuclei_mnc_R_18_FPN",
        (
            *TINY_RCNN,
            "MODEL.MNC.MASK_CONV_DIM", 8,
            "MODEL.MNC.MASK_FC_DIM", 32,
        ),
        sees_padding=True,
    ),
    Case(
        "FCIS",
        "FCIS/nuclei_fcis_R_18",
        (
            "MODEL.RPN.CONV_DIMS", [32],
            "MODEL.RPN.POST_NMS_TOPK_TRAIN", 40,
            "MODEL.RPN.POST_NMS_TOPK_TEST", 40,
            "MODEL.FCIS.HEAD_DIM", 32,
        ),
        sees_padding=True,
    ),
    *(
        Case(name, f"DeepMask/nuclei_{config}_R_18", TINY_DEEPMASK, patches=(64, 32), classes=False)
        for name, config in (("DeepMask", "deepmask"), ("SharpMask", "sharpmask"))
    ),
    Case(
        "MultiPathNet",
        "MultiPathNet/nuclei_multipathnet_R_18_FPN",
        (*TINY_RCNN, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.MULTIPATH.MIX_DIM", 8),
        sees_padding=True,
    ),
    Case(
        "SDS",
        "SDS/nuclei_sds_R_18",
        (
            "MODEL.SDS.WINDOW", 32,
            "MODEL.SDS.CONTEXT", 4,
            "MODEL.SDS.MAX_REGIONS", 60,
            "MODEL.SDS.FOREGROUND", 4,
            "MODEL.SDS.BACKGROUND", 4,
        ),
    ),
    Case(
        "DeepMetric",
        "MetricLearning/nuclei_metric_R_18",
        (
            "MODEL.DEEP_METRIC.HEAD_DIM", 32,
            "MODEL.DEEP_METRIC.EMBED_DIM", 4,
            # Fresh masks are small and equal.
            "MODEL.DEEP_METRIC.MIN_CELLS", 1,
            "MODEL.DEEP_METRIC.MASK_NMS", 1.0,
        ),
        sees_padding=True,
    ),
]  # fmt: skip


def first_of_each_method() -> list[Case]:
    """Return the first case of every project, for what does not depend on the variant."""
    return list({case.config.partition("/")[0]: case for case in reversed(CASES)}.values())[::-1]


def blobs(height: int, width: int, boxes: list[tuple[int, int, int, int]]) -> dict:
    """Return a training sample: a noisy image with a bright rectangle per (x0, y0, x1, y1)."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    image = torch.randint(0, 60, (3, height, width), dtype=torch.uint8, generator=generator)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
        image[:, y0:y1, x0:x1] += 150
    instances = Instances((height, width))
    instances.gt_masks = BitMasks(masks)
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    return {
        "image": image,
        "instances": instances,
        "height": height,
        "width": width,
        "file_name": "blobs",
    }


def patch_of(image: dict, side: int, mask_side: int) -> dict:
    """Return a patch for the mask of an image's first object, or, without objects, for its score.

    Args:
        image: a training sample of ``blobs``.
        side: of the patch.
        mask_side: of the mask.
    """

    def resized(values: torch.Tensor, size: int) -> torch.Tensor:
        return torch.nn.functional.interpolate(values[None].float(), size=(size, size))[0]

    patch = {"image": resized(image["image"], side), "file_name": image["file_name"]}
    masks = image["instances"].gt_masks.tensor[:1]
    if len(masks):
        return {**patch, "is_mask": True, "target": resized(masks, mask_side)[0] > 0}
    return {**patch, "is_mask": False, "label": -1.0}
