"""Config keys of PolarMask."""

from __future__ import annotations

from detectron2.config import CfgNode as CN  # noqa: N817

from instseg_ext.config import check_choice

__all__ = ["add_polarmask_config", "check_settings"]


def add_polarmask_config(cfg: CN) -> None:
    """Add ``MODEL.POLARMASK`` with the settings of the published R-50 model.

    The size of the network input is ``INSTSEG.STRETCH``, the number of detections
    ``TEST.DETECTIONS_PER_IMAGE``.

    Args:
        cfg: changed in place.
    """
    _C = cfg
    _C.MODEL.POLARMASK = CN()
    # Foreground classes, without background.
    _C.MODEL.POLARMASK.NUM_CLASSES = 80

    # ---- backbone (build_polarmask_resnet_fpn_backbone) ----
    # Batches are padded to a multiple of this. The published models see padding to 128.
    _C.MODEL.POLARMASK.SIZE_DIVISIBILITY = 128

    # ---- head ----
    # Pyramid levels, finest first.
    _C.MODEL.POLARMASK.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions of each tower.
    _C.MODEL.POLARMASK.NUM_CONVS = 4
    # Channels of the towers.
    _C.MODEL.POLARMASK.WIDTH = 256
    # Normalisation of the towers: GN, BN, FrozenBN, SyncBN, or "" for none.
    _C.MODEL.POLARMASK.NORM = "GN"
    # True: all convolutions of the towers are deformable (v2), as in the published DCN models.
    _C.MODEL.POLARMASK.DEFORM = False
    # Probability of every class at the start of training.
    _C.MODEL.POLARMASK.PRIOR_PROB = 0.01
    # Lengths of sides and rays at the start of training, in pixels of the network input. The
    # authors start at 1; a short training gains from a start nearer to the size of its objects.
    _C.MODEL.POLARMASK.INIT_LENGTH = 1.0
    # False: no box branch. NMS then needs NMS_ON "mask".
    _C.MODEL.POLARMASK.WITH_BOX = True
    # False: no rays, which leaves a box detector (FCOS).
    _C.MODEL.POLARMASK.WITH_MASK = True

    # ---- rays ----
    # Rays at equal angles; divides 360. Published: 36.
    _C.MODEL.POLARMASK.NUM_RAYS = 36
    # Direction of ray 0. down: (0, 1), then towards (1, 0), the authors' code since 2019-11-12.
    # left: (-1, 0), then towards (0, 1), their code before; needs NUM_RAYS divisible by 4.
    # `instseg convert` brings old files into the order "down".
    _C.MODEL.POLARMASK.RAY_ORIGIN = "down"
    # Target length of a ray. bins: the farthest contour pixel in the nearest non-empty bin of one
    # degree, at most 3 degrees away, as the authors have it; 1e-6 where there is none, which is
    # common for small objects. exact: where the ray meets the contour last.
    _C.MODEL.POLARMASK.RAY_TARGET = "bins"

    # ---- assignment ----
    # A location belongs to a level when its largest distance to a side of the box lies between two
    # of these bounds, in pixels of the network input; both ends belong.
    _C.MODEL.POLARMASK.SIZE_RANGES = [64.0, 128.0, 256.0, 512.0]
    # Positive locations lie around the mass centre (mass) or the centre of the box (box), or
    # anywhere in the box (none, as FCOS).
    _C.MODEL.POLARMASK.CENTER = "mass"
    # Half the side of the square around that centre, in strides.
    _C.MODEL.POLARMASK.CENTER_RADIUS = 1.5

    # ---- training data ----
    # Objects whose annotated area is not above this, or with fewer pixels, are left out of training
    # (pixels of the image file).
    _C.MODEL.POLARMASK.MIN_AREA = 15
    # Objects whose width and height are both below this are left out of training (pixels of the
    # image file).
    _C.MODEL.POLARMASK.MIN_SIZE = 10

    # ---- losses ----
    # What the quality branch learns, which weights box and mask loss, too. polar: square root of
    # shortest / longest ray. soft: of the ratios of opposite quarters' mean rays (PolarMask++).
    # fcos: from the box. none: no such branch.
    _C.MODEL.POLARMASK.CENTERNESS = "polar"
    # polar_iou, or smooth_l1 on the lengths in pixels (LOSS_WEIGHT_MASK 0.3 in the paper).
    _C.MODEL.POLARMASK.MASK_LOSS = "polar_iou"
    # Weight of the class loss.
    _C.MODEL.POLARMASK.LOSS_WEIGHT_CLS = 1.0
    # Weight of the box loss.
    _C.MODEL.POLARMASK.LOSS_WEIGHT_BOX = 1.0
    # Weight of the mask loss.
    _C.MODEL.POLARMASK.LOSS_WEIGHT_MASK = 1.0
    # Weight of the centerness loss.
    _C.MODEL.POLARMASK.LOSS_WEIGHT_CENTERNESS = 1.0

    # ---- inference ----
    # A class of a location is a candidate when its probability is strictly higher.
    _C.MODEL.POLARMASK.SCORE_THRESH = 0.05
    # The score is the probability times (centerness + this), so it may exceed 1. Polar centerness
    # is small: without the constant it would suppress too much.
    _C.MODEL.POLARMASK.CENTERNESS_BIAS = 0.5
    # Best locations of each level, by probability times centerness, that enter NMS.
    _C.MODEL.POLARMASK.NMS_PRE = 1000
    # A box is suppressed when its overlap with a better one of its class is higher.
    _C.MODEL.POLARMASK.NMS_THRESH = 0.5
    # Boxes that overlap: box (of the box branch) or mask (around the polygon).
    _C.MODEL.POLARMASK.NMS_ON = "box"
    # How boxes get the size of the network input in training, and results the size of the image.
    # indices: pixel indices are multiplied and divided by the factors of the resize, and vertices
    # cut to integers, as the authors do: masks lie on average half a pixel of the network input too
    # far to the left and up. areas: a pixel covers an area, and vertices go to the nearest pixel.
    # Masks of disks then overlap better (IoU 0.98 for 0.94) unless the image is much smaller than
    # the network input, where both are equal.
    _C.MODEL.POLARMASK.COORDINATES = "indices"


def check_settings(node: CN) -> None:
    """Refuse settings of ``MODEL.POLARMASK`` that contradict each other.

    Raises:
        ValueError: naming the keys.
    """
    prefix = "MODEL.POLARMASK."
    check_choice(prefix + "RAY_TARGET", node.RAY_TARGET, ("bins", "exact"))
    if list(node.SIZE_RANGES) != sorted(node.SIZE_RANGES):
        raise ValueError(f"{prefix}SIZE_RANGES must rise, not be {list(node.SIZE_RANGES)}.")
    if node.NMS_ON == "box" and not node.WITH_BOX:
        raise ValueError(f"{prefix}WITH_BOX False needs {prefix}NMS_ON mask.")
    if node.WITH_MASK:
        rays = node.NUM_RAYS
        if rays < 3 or 360 % rays:
            raise ValueError(f"{prefix}NUM_RAYS must divide 360 and be at least 3, not {rays}.")
        quarters = [
            f"{prefix}{key} {value}"
            for key, value in (("RAY_ORIGIN", node.RAY_ORIGIN), ("CENTERNESS", node.CENTERNESS))
            if value in ("left", "soft")
        ]
        if quarters and rays % 4:
            raise ValueError(
                f"{' and '.join(quarters)} need {prefix}NUM_RAYS divisible by 4, not {rays}."
            )
        return
    if node.CENTERNESS in ("polar", "soft"):
        raise ValueError(
            f"{prefix}WITH_MASK False leaves no rays for CENTERNESS {node.CENTERNESS}: use fcos or "
            "none."
        )
    if node.NMS_ON == "mask":
        raise ValueError(f"{prefix}WITH_MASK False needs {prefix}NMS_ON box.")
