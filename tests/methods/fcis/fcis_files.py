"""The FCIS authors' MXNet files, written from the layers of their networks, not from our map."""

from __future__ import annotations

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
# Overrides of the published configs that fit `small`.
SMALL_OPTS = [
    "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 4,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 2, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8,
    "MODEL.RPN.CONV_DIMS", [6], "MODEL.FCIS.HEAD_DIM", 10,
]  # fmt: skip


def norm(name, channels):
    return {
        f"arg:{name}_gamma": (channels,),
        f"arg:{name}_beta": (channels,),
        f"aux:{name}_moving_mean": (channels,),
        f"aux:{name}_moving_var": (channels,),
    }


def block_names(blocks):
    """Letters, but for long stages of the deep networks a, b1, b2, ..."""
    if blocks in (3, 4, 6):
        return "abcdef"[:blocks]
    return ["a", *(f"b{number}" for number in range(1, blocks))]


def resnet(depth=101, stem=64, width=64, out=256):
    """Shapes of a ResNet of bottlenecks."""
    shapes = {"arg:conv1_weight": (stem, 3, 7, 7)} | norm("bn_conv1", stem)
    channels = stem
    for stage, blocks in enumerate(BLOCKS[depth], start=2):
        # In ResNet-101 the stage of four blocks counts, too.
        names = ["a", "b1", "b2", "b3"] if (depth, stage) == (101, 3) else block_names(blocks)
        for name in names:
            convs = {
                "2a": (width, channels, 1, 1),
                "2b": (width, width, 3, 3),
                "2c": (out, width, 1, 1),
            }
            if name == "a":
                convs["1"] = (out, channels, 1, 1)
            for branch, shape in convs.items():
                shapes[f"arg:res{stage}{name}_branch{branch}_weight"] = shape
                shapes |= norm(f"bn{stage}{name}_branch{branch}", shape[0])
            channels = out
        width, out = 2 * width, 2 * out
    return shapes


def layer(name, out, channels, kernel=1):
    return {
        f"arg:{name}_weight": (out, channels, kernel, kernel),
        f"arg:{name}_bias": (out,),
    }


def heads(classes, anchors, *, res4=1024, res5=2048, rpn=512, dim=1024):
    """Shapes of all other layers; ``classes`` counts the background."""
    boxes = layer("fcis_bbox", 7 * 7 * 4 * 2, dim)
    return {
        **layer("rpn_conv_3x3", rpn, res4, 3),
        **layer("rpn_cls_score", 2 * anchors, rpn),
        **layer("rpn_bbox_pred", 4 * anchors, rpn),
        **layer("conv_new_1", dim, res5),
        **layer("fcis_cls_seg", 7 * 7 * 2 * classes, dim),
        **boxes,
        # What the authors add when they save: the box layer multiplied by its standard deviations.
        **{f"{name}_test": shape for name, shape in boxes.items()},
    }


CLASSIFIER = {"arg:fc1000_weight": (1000, 2048), "arg:fc1000_bias": (1000,)}
IMAGENET = resnet() | CLASSIFIER
SBD = resnet() | heads(21, 9)
COCO = resnet() | heads(81, 12)


def small():
    """A model of 3 classes with few channels, on ResNet-50."""
    return resnet(50, 4, 2, 8) | heads(4, 9, res4=32, res5=64, rpn=6, dim=10)
