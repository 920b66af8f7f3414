"""Small MNC models and inputs for the tests."""

import torch
from contract.cases import blobs
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

import instseg_ext

OBJECTS = ([(8, 8, 40, 40), (50, 10, 80, 50)], [(20, 5, 60, 45)])
NARROW = [
    "MODEL.DEVICE", "cpu",
    "MODEL.RESNETS.DEPTH", 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 8,
    "MODEL.RESNETS.NORM", "FrozenBN",
    # fresh frozen norms do nothing: every block doubles the features
    "MODEL.PIXEL_STD", [1500.0, 1500.0, 1500.0],
    "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.FPN.NORM", "",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 30,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 12,
    "MODEL.ROI_HEADS.NUM_CLASSES", 3,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 24,
    "MODEL.MNC.MASK_FC_DIM", 24,
    "MODEL.MNC.MASK_CONV_DIM", 0,
]  # fmt: skip
# res4 alone, and the last stage of the ResNet as towers
C4 = [
    "MODEL.BACKBONE.NAME", "build_instseg_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES", ["res4"],
    "MODEL.RPN.IN_FEATURES", ["res4"],
    "MODEL.ROI_HEADS.IN_FEATURES", ["res4"],
    "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32, 64]],
    "MODEL.MNC.TOWER", "res5",
]  # fmt: skip


def config(opts=()):
    return instseg_ext.get_config("MNC/nuclei_mnc_R_18_FPN", [*NARROW, *opts])


def model_of(opts=(), seed=0):
    torch.manual_seed(seed)
    return build_model(config(opts))


def batch(*objects, size=(64, 96)):
    """Images with the given boxes, one list of boxes per image."""
    return [blobs(*size, boxes) for boxes in objects]


def proposals_of(boxes, size=(64, 96), boxes_require_grad=False):
    """Proposals of one image at these boxes."""
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    found = Instances(size)
    found.proposal_boxes = Boxes(tensor.requires_grad_(boxes_require_grad))
    found.objectness_logits = torch.zeros(len(tensor))
    return found


def randomise(model, seed=1):
    """Give the last layers weights that matter: classes differ, boxes move, masks are not flat."""
    torch.manual_seed(seed)
    heads = model.roi_heads
    for layer, std in (
        (heads.cls_score, 0.5),
        (heads.seg_cls_score, 0.5),
        (heads.bbox_pred, 0.3),
        (heads.mask_head.fc1, 0.1),
        (heads.mask_head.predictor, 1.0),
    ):
        torch.nn.init.normal_(layer.weight, std=std)
    return model
