"""The MNC authors' file, written from the layers of their networks and not from our key map."""

from __future__ import annotations

VGG = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
# The layers of the second pass that have parameters; the dump of a net lists them without any.
SECOND_PASS = (
    "fc6_maskest_ext", "mask_pred_ext", "fc6_ext", "fc7_ext", "fc6_mask_ext", "fc7_mask_ext",
    "cls_score_ext", "seg_cls_score_ext", "bbox_pred_ext",
)  # fmt: skip
# Some of those that have none.
WITHOUT = ("data", "relu1_1", "rpn_cls_prob", "proposal", "mask_resize", "seg_cls_prob_ext")
# Overrides of the published config that fit `small`.
SMALL_OPTS = [
    "MODEL.DEVICE", "cpu", "MODEL.VGG.WIDTH", 2, "MODEL.RPN.CONV_DIMS", [4],
    "MODEL.MNC.MASK_FC_DIM", 6, "MODEL.MNC.MASK_SIZE", 5, "MODEL.MNC.POOL_SIZE", 4,
    "MODEL.MNC.WARP_SIZE", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8,
]  # fmt: skip


def layers(*, width=64, rpn=512, mask_dim=256, mask=21, pool=14, dim=4096, classes=21):
    """Return {layer: (shape of the weights, ...)} in the order of the training network."""
    found, channels = {}, 3
    for stage, (convs, out) in enumerate(VGG, start=1):
        out = out * width // 64
        for number in range(1, convs + 1):
            found[f"conv{stage}_{number}"] = (out, channels, 3, 3)
            channels = out
    half = channels * (pool // 2) ** 2
    return found | {
        "rpn_conv_3x3": (rpn, channels, 3, 3),
        "rpn_cls_score": (18, rpn, 1, 1),
        "rpn_bbox_pred": (36, rpn, 1, 1),
        "fc6_maskest": (mask_dim, channels * pool**2),
        "mask_pred": (mask**2, mask_dim),
        "fc6": (dim, half),
        "fc7": (dim, dim),
        "fc6_mask": (dim, half),
        "fc7_mask": (dim, dim),
        "cls_score": (classes, 2 * dim),
        "seg_cls_score": (classes, 2 * dim),
        "bbox_pred": (4 * classes, 2 * dim),
    }


def named(found):
    """Return shapes by the names under which the reader gives the arrays of these layers."""
    shapes = {}
    for name, shape in found.items():
        shapes |= {f"{name}/0": shape, f"{name}/1": shape[:1]}
    return shapes


FULL = named(layers())


def small():
    """The same with 3 classes and few channels."""
    return named(layers(width=2, rpn=4, mask_dim=6, mask=5, pool=4, dim=8, classes=4))
