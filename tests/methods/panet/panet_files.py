"""State dicts with the names of the PANet authors, written from their modules and not from our map.

Shapes by name; `methods.foreign.tensors` fills them.
"""

from methods.foreign import BLOCKS, conv

LEVELS = range(4)


def norm(name, channels):
    """An affine layer or a group norm."""
    return {f"{name}.{p}": (channels,) for p in ("weight", "bias")}


def linear(name, out, channels):
    return {f"{name}.weight": (out, channels), f"{name}.bias": (out,)}


def block(name, out, channels, kernel=3, *, bias=False):
    """A sequence of convolution and group norm."""
    shapes = conv(f"{name}.0", out, channels, kernel) | norm(f"{name}.1", out)
    return shapes if bias else {n: s for n, s in shapes.items() if n != f"{name}.0.bias"}


def resnet(depth=50, stem=64, first=256):
    """The trunk, bottlenecks with affine layers instead of norms."""
    body = "Conv_Body.conv_body"
    shapes = {f"{body}.res1.conv1.weight": (stem, 3, 7, 7)} | norm(f"{body}.res1.bn1", stem)
    channels = stem
    for stage, blocks in enumerate(BLOCKS[depth], start=2):
        out = first * 2 ** (stage - 2)
        inner = out // 4
        for number in range(blocks):
            name = f"{body}.res{stage}.{number}"
            layers = [(inner, channels, 1), (inner, inner, 3), (out, inner, 1)]
            for k, (width, depth_in, kernel) in enumerate(layers, start=1):
                shapes[f"{name}.conv{k}.weight"] = (width, depth_in, kernel, kernel)
                shapes |= norm(f"{name}.bn{k}", width)
            if number == 0:
                shapes[f"{name}.downsample.0.weight"] = (out, channels, 1, 1)
                shapes |= norm(f"{name}.downsample.1", out)
            channels = out
    return shapes


def body(depth=50, *, stem=64, first=256, width=256):
    """The trunk, both paths and the RPN."""
    top = first * 8
    shapes = resnet(depth, stem, first) | block("Conv_Body.conv_top", width, top, 1)
    for n in range(3):
        lateral = f"Conv_Body.topdown_lateral_modules.{n}.conv_lateral"
        shapes |= block(lateral, width, top // 2 ** (n + 1), 1)
        for kind in (1, 2):
            name = f"Conv_Body.panet_buttomup_conv{kind}_modules.{n}"
            shapes |= block(name, width, width, bias=True)
    for n in LEVELS:
        shapes |= block(f"Conv_Body.posthoc_modules.{n}", width, width)
    return (
        shapes
        | conv("RPN.FPN_RPN_conv", width, width)
        | conv("RPN.FPN_RPN_cls_score", 3, width, 1)
        | conv("RPN.FPN_RPN_bbox_pred", 12, width, 1)
    )


def box_outs(classes, channels):
    return linear("Box_Outs.cls_score", classes + 1, channels) | linear(
        "Box_Outs.bbox_pred", 4 * (classes + 1), channels
    )


def sequence(name, count, width):
    """Convolution, group norm and ReLU, ``count`` times in one list."""
    shapes = {}
    for q in range(count):
        shapes[f"{name}.{3 * q}.weight"] = (width, width, 3, 3)
        shapes |= norm(f"{name}.{3 * q + 1}", width)
    return shapes


def box_head(classes=80, *, width=256, fc=1024):
    """Four convolutions and a layer."""
    shapes = sequence("Box_Head.convs", 3, width) | linear("Box_Head.fc", fc, width * 49)
    for n in LEVELS:
        shapes |= block(f"Box_Head.conv1_head.{n}", width, width)
    return shapes | box_outs(classes, fc)


def box_head_2fc(classes=80, *, width=256, fc=1024):
    """Two layers."""
    shapes = linear("Box_Head.fc2.0", fc, fc) | norm("Box_Head.fc2.1", fc)
    for n in LEVELS:
        shapes |= linear(f"Box_Head.fc1.{n}.0", fc, width * 49) | norm(f"Box_Head.fc1.{n}.1", fc)
    return shapes | box_outs(classes, fc)


def mask_head(classes=80, *, width=256, cells=14, fusion=True):
    """With the fully connected branch, or with one convolution more in the list instead."""
    shapes = sequence("Mask_Head.conv_fcn", 2 if fusion else 3, width)
    for n in LEVELS:
        shapes |= block(f"Mask_Head.mask_conv1.{n}", width, width)
    shapes |= {"Mask_Head.upconv.weight": (width, width, 2, 2), "Mask_Head.upconv.bias": (width,)}
    shapes |= conv("Mask_Outs.classify", classes + 1, width, 1)
    if fusion:
        half = width // 2
        shapes |= block("Mask_Head.mask_conv4", width, width)
        shapes |= block("Mask_Head.mask_conv4_fc", width, width)
        shapes |= block("Mask_Head.mask_conv5_fc", half, width)
        shapes |= linear("Mask_Head.mask_fc.0", 4 * cells**2, half * cells**2)
    return shapes


def small(classes=3):
    """A model of 3 million parameters; see SMALL_OPTS."""
    head = {"width": 32, "fc": 64}
    return (
        body(stem=8, first=16, width=32)
        | box_head(classes, **head)
        | {
            name: (shape if "mask_conv1" not in name or len(shape) != 4 else (64, 32, 3, 3))
            for name, shape in mask_head(classes, width=64, cells=6).items()
        }
    )


SMALL_OPTS = (
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 64),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 64, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 6),
    *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"),
)
