"""State dicts with the names of other code bases, written from their naming and not from our map.

Everything is a shape by name until `tensors` fills it, so that full-size models cost nothing.
"""

from __future__ import annotations

from methods import foreign
from methods.foreign import SMALL, block, conv

GRIDS = (40, 36, 24, 16, 12)


def resnet(depth, *, fpn=256, **options):
    """The backbone of OpenMMLab with its FPN, which reads all four stages."""
    shapes, channels = foreign.resnet(depth, **options)
    return shapes | foreign.fpn(channels, fpn)


def tower(name, convs, width, channels, deform=()):
    """``deform``: offsets per convolution, none where it is shorter."""
    shapes = {}
    for q in range(convs):
        offsets = deform[q] if q < len(deform) else 0
        shapes |= block(f"{name}.{q}", width, channels if q == 0 else width, offsets=offsets)
    return shapes


NAMES = {
    "solo-authors": {
        "category": "bbox_head.cate_convs",
        "kernel": "bbox_head.kernel_convs",
        "mask": "bbox_head.ins_convs",
        "mask_x": "bbox_head.ins_convs_x",
        "mask_y": "bbox_head.ins_convs_y",
        "category_pred": "bbox_head.solo_cate",
        "decoupled_category_pred": "bbox_head.dsolo_cate",
        "kernel_pred": "bbox_head.solo_kernel",
        "mask_pred": "bbox_head.solo_ins_list",
        "mask_pred_x": "bbox_head.dsolo_ins_list_x",
        "mask_pred_y": "bbox_head.dsolo_ins_list_y",
        "levels": "mask_feat_head.convs_all_levels",
        "fused": "mask_feat_head.conv_pred.0",
    },
    "solo-mmdet": {
        "category": "mask_head.cls_convs",
        "kernel": "mask_head.kernel_convs",
        "mask": "mask_head.mask_convs",
        "mask_x": "mask_head.mask_convs_x",
        "mask_y": "mask_head.mask_convs_y",
        "category_pred": "mask_head.conv_cls",
        "decoupled_category_pred": "mask_head.conv_cls",
        "kernel_pred": "mask_head.conv_kernel",
        "mask_pred": "mask_head.conv_mask_list",
        "mask_pred_x": "mask_head.conv_mask_list_x",
        "mask_pred_y": "mask_head.conv_mask_list_y",
        "levels": "mask_head.mask_feature_head.convs_all_levels",
        "fused": "mask_head.mask_feature_head.conv_pred",
    },
}


def vanilla_head(family, *, convs=7, width=256, fpn=256, classes=80):
    n = NAMES[family]
    shapes = tower(n["mask"], convs, width, fpn + 2) | tower(n["category"], convs, width, fpn)
    for level, side in enumerate(GRIDS):
        shapes |= conv(f"{n['mask_pred']}.{level}", side**2, width, kernel=1)
    return shapes | conv(n["category_pred"], classes, width)


def decoupled_head(family, *, light=False, convs=7, width=256, fpn=256, classes=80, deform=()):
    n = NAMES[family]
    shapes = tower(n["category"], convs, width, fpn, deform)
    if light:
        shapes |= tower(n["mask"], convs, width, fpn + 2, deform)
    else:
        shapes |= tower(n["mask_x"], convs, width, fpn + 1)
        shapes |= tower(n["mask_y"], convs, width, fpn + 1)
    for level, side in enumerate(GRIDS):
        shapes |= conv(f"{n['mask_pred_x']}.{level}", side, width)
        shapes |= conv(f"{n['mask_pred_y']}.{level}", side, width)
    return shapes | conv(n["decoupled_category_pred"], classes, width)


def solov2_head(family, *, convs=4, width=512, kernels=256, fpn=256, classes=80, deform=()):
    n = NAMES[family]
    shapes = tower(n["kernel"], convs, width, fpn + 2, deform)
    shapes |= tower(n["category"], convs, width, fpn, deform)
    return (
        shapes | conv(n["category_pred"], classes, width) | conv(n["kernel_pred"], kernels, width)
    )


def mask_features(family, *, kernels=256, fpn=256, width=128, offsets=0):
    n = NAMES[family]
    shapes = {}
    for level in range(4):
        for q in range(max(level, 1)):
            channels = width if q else fpn + (2 if level == 3 else 0)
            shapes |= block(f"{n['levels']}.{level}.conv{q}", width, channels, offsets=offsets)
    return shapes | block(n["fused"], kernels, width, kernel=1, offsets=offsets)


def adelaidet(depth, *, classes=80):
    """SOLOv2 of AdelaiDet: detectron2's backbone, lists of convolution, norm, ReLU in the head."""
    stages = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}
    shapes = {}
    for name, shape in resnet(depth).items():
        parts = name.removeprefix("backbone.").split(".")
        if parts[-1] == "num_batches_tracked":
            continue
        if parts[0] == "neck":
            kind = "lateral" if parts[1] == "lateral_convs" else "output"
            shapes[f"backbone.fpn_{kind}{int(parts[2]) + 2}.{parts[4]}"] = shape
        elif parts[0] in stages:
            shapes[f"backbone.bottom_up.{stages[parts[0]]}.{parts[1]}"] = shape
        else:
            stage, number, layer, *rest = parts
            where = f"backbone.bottom_up.res{int(stage[5:]) + 1}.{number}"
            if layer == "downsample":
                layer, rest = (
                    ("shortcut", rest[1:]) if rest[0] == "0" else ("shortcut.norm", rest[1:])
                )
            else:
                layer = layer.replace("bn", "conv") + (".norm" if layer.startswith("bn") else "")
            shapes[f"{where}.{layer}.{rest[-1]}"] = shape
    for kind, channels in (("cate", 256), ("kernel", 258)):
        for q in range(4):
            name = f"ins_head.{kind}_tower"
            shapes[f"{name}.{3 * q}.weight"] = (512, 512 if q else channels, 3, 3)
            shapes |= {f"{name}.{3 * q + 1}.{p}": (512,) for p in ("weight", "bias")}
    shapes |= conv("ins_head.cate_pred", classes, 512) | conv("ins_head.kernel_pred", 256, 512)
    for level in range(4):
        for q in range(max(level, 1)):
            channels = 128 if q else 256 + (2 if level == 3 else 0)
            name = f"mask_head.convs_all_levels.{level}.conv{q}"
            shapes[f"{name}.0.weight"] = (128, channels, 3, 3)
            shapes |= {f"{name}.1.{p}": (128,) for p in ("weight", "bias")}
    shapes["mask_head.conv_pred.0.weight"] = (256, 128, 1, 1)
    return shapes | {f"mask_head.conv_pred.1.{p}": (256,) for p in ("weight", "bias")}


def small_solov2(family="solo-authors", classes=80):
    """Shapes of a SOLOv2 of 0.3 million parameters; see SMALL_OPTS for its config."""
    return (
        resnet(50, sizes=SMALL, fpn=32)
        | solov2_head(family, convs=1, width=32, kernels=32, fpn=32, classes=classes)
        | mask_features(family, kernels=32, fpn=32, width=32)
    )


SMALL_CONFIG = "SOLO/solov2_R_50_FPN_1x"
SMALL_OPTS = (
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.SOLO.NUM_CONVS", 1, "MODEL.SOLO.CONV_DIM", 32, "MODEL.SOLO.KERNEL_DIM", 32),
    *("MODEL.SOLO.MASK_FEATURES.CONV_DIM", 32, "MODEL.WEIGHTS", ""),
)
