"""Small FCIS models, maps and regions for the tests."""

import torch
from contract.cases import blobs
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import BitMasks, Boxes, Instances

import instseg_ext
from instseg_ext.methods.fcis.roi_heads import FCISROIHeads, ScoreMaps
from instseg_ext.methods.fcis.sampling import SamplingOptions

TRANSFORM = Box2BoxTransform((5.0, 5.0, 2.0, 2.0))
TINY = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.RESNETS.DEPTH", 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RPN.CONV_DIMS", [16],
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 40,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 40,
    "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]],
    "MODEL.ROI_HEADS.NUM_CLASSES", 3,
    "MODEL.FCIS.HEAD_DIM", 16,
    "MODEL.FCIS.OHEM_ROIS", 16,
    "MODEL.FCIS.NUM_ROIS", 16,
]  # fmt: skip


def config(*opts, name="fcis_R_101_ohem_coco"):
    return instseg_ext.get_config(f"FCIS/{name}", [*TINY, *opts])


def model_of(*opts, name="fcis_R_101_ohem_coco"):
    torch.manual_seed(0)
    return build_model(config(*opts, name=name))


def batch(*objects, size=(64, 96)):
    return [blobs(*size, boxes) for boxes in objects]


def heads_of(num_classes=2, channels=4, *, options=None, **changes):
    """Heads at stride 16."""
    torch.manual_seed(0)
    return FCISROIHeads(
        in_feature="res5",
        in_channels=channels,
        stride=16,
        num_classes=num_classes,
        box2box_transform=TRANSFORM,
        sampling=options or SamplingOptions(),
        head_dim=8,
        **changes,
    )


def maps_of(num_classes=2, cells=(8, 8), images=1, groups=7):
    """Random score maps."""
    torch.manual_seed(1)
    channels = groups**2
    return ScoreMaps(
        torch.randn(images, (num_classes + 1) * 2 * channels, *cells),
        torch.randn(images, 4 * channels, *cells) * 0.1,
    )


def proposals_of(boxes, size=(128, 128)):
    return Instances(size, proposal_boxes=Boxes(torch.tensor(boxes).float().reshape(-1, 4)))


def objects_of(boxes, classes, size=(128, 128)):
    """Rectangles whose masks fill their boxes."""
    boxes = torch.tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return Instances(
        size,
        gt_boxes=Boxes(boxes.float()),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
        gt_masks=BitMasks(masks),
    )
