"""Config keys of SDS."""

from __future__ import annotations

from detectron2.config import CfgNode as CN  # noqa: N817

from instseg_ext.config import check_choice, check_range

__all__ = ["add_sds_config", "check_settings"]


def add_sds_config(cfg: CN) -> None:
    """Add ``MODEL.SDS`` with the paper's settings.

    Args:
        cfg: changed in place.
    """
    _C = cfg
    _C.MODEL.SDS = CN()
    # Foreground classes, without background.
    _C.MODEL.SDS.NUM_CLASSES = 20

    # ---- regions ----
    # Folder that `instseg propose-regions` wrote for the training images; "" = segment each image
    # when it is needed, or with `instseg train-sds` once, into OUTPUT_DIR/regions.
    _C.MODEL.SDS.REGIONS_TRAIN = ""
    # The same for the test images; "" = segment each image when it is needed.
    _C.MODEL.SDS.REGIONS_TEST = ""
    # Most regions of an image that are classified, from the first.
    _C.MODEL.SDS.MAX_REGIONS = 2000
    # Most regions of a training image, beside its objects, whose features are kept for the linear
    # models; each takes two bytes a feature on the disk.
    _C.MODEL.SDS.MAX_REGIONS_TRAIN = 500

    # ---- networks ----
    # caffenet: CaffeNet, as in the paper. backbone: MODEL.BACKBONE, its last map averaged.
    _C.MODEL.SDS.TOWER = "caffenet"
    # Side of the windows in pixels.
    _C.MODEL.SDS.WINDOW = 227
    # Pixels of a window on each side that show what is around the region's box.
    _C.MODEL.SDS.CONTEXT = 16
    # Windows that go through the networks together at inference.
    _C.MODEL.SDS.CHUNK = 128

    # ---- fine-tuning ----
    # Windows with an object that are drawn from each image.
    _C.MODEL.SDS.FOREGROUND = 8
    # Windows without.
    _C.MODEL.SDS.BACKGROUND = 24
    # Lowest IoU with an object of the regions of the former.
    _C.MODEL.SDS.FG_IOU = 0.5
    # True: windows are mirrored at random.
    _C.MODEL.SDS.MIRROR = True
    # Learning rate of the layer that is trained anew, in units of the others'.
    _C.MODEL.SDS.CLASSIFIER_LR_MULT = 10.0

    # ---- support vector machines ----
    _C.MODEL.SDS.SVM = CN()
    # Weight of the loss of a negative (C).
    _C.MODEL.SDS.SVM.C = 0.001
    # Weight of the loss of a positive, in units of C.
    _C.MODEL.SDS.SVM.POSITIVE_WEIGHT = 2.0
    # Constant feature whose weight, times this, is the bias.
    _C.MODEL.SDS.SVM.BIAS_VALUE = 10.0
    # Features are scaled so that their mean norm is this.
    _C.MODEL.SDS.SVM.NORM = 20.0
    # Regions are negatives below this IoU with every object of the class.
    _C.MODEL.SDS.SVM.NEGATIVE_IOU = 0.2
    # True: in a second round the best region of each object takes its place as positive.
    _C.MODEL.SDS.SVM.LATENT = True
    # A region takes the place of an object above this IoU.
    _C.MODEL.SDS.SVM.LATENT_IOU = 0.5
    # Images, drawn at random, whose negatives the first of two rounds sees.
    _C.MODEL.SDS.SVM.FIRST_IMAGES = 1000

    # ---- refinement ----
    _C.MODEL.SDS.REFINE = CN()
    # False: results are the regions as proposed.
    _C.MODEL.SDS.REFINE.ENABLED = True
    # Cells of the coarse mask on each side.
    _C.MODEL.SDS.REFINE.SIZE = 10
    # The regression of a cell learns from regions with this IoU with an object of the class.
    _C.MODEL.SDS.REFINE.MIN_IOU = 0.7
    # Most such regions of a class; of more, some are drawn at random.
    _C.MODEL.SDS.REFINE.MAX_SAMPLES = 5000
    # Weight of its losses (C).
    _C.MODEL.SDS.REFINE.C = 0.01
    # Weight of the losses of the regression of superpixels.
    _C.MODEL.SDS.REFINE.SUPERPIXEL_C = 1.0
    # The regression of superpixels learns from those of more pixels than this.
    _C.MODEL.SDS.REFINE.MIN_PIXELS = 100
    # It learns from those that are in the region or whose mean coarse value is above this.
    _C.MODEL.SDS.REFINE.MIN_COARSE = 0.2
    # True: a pixel belongs to the cell of its right and lower edge, as in the authors' code,
    # instead of that of its centre.
    _C.MODEL.SDS.REFINE.LEGACY_CELLS = False

    # ---- inference ----
    # Lowest score. Scores are the logistic function of the classifiers' margins, which keeps their
    # order; 0.25 is a margin of -1.1.
    _C.MODEL.SDS.SCORE_THRESH = 0.25


def check_settings(node: CN) -> None:
    """Refuse settings of ``MODEL.SDS`` that no model can have.

    Raises:
        ValueError: naming the key.
    """
    prefix = "MODEL.SDS."
    check_choice(prefix + "TOWER", node.TOWER, ("caffenet", "backbone"))
    ranges = {
        "NUM_CLASSES": "[1, inf)",
        "MAX_REGIONS": "[1, inf)",
        "MAX_REGIONS_TRAIN": "[1, inf)",
        "WINDOW": "[1, inf)",
        "CONTEXT": "[0, inf)",
        "CHUNK": "[1, inf)",
        "FOREGROUND": "[1, inf)",
        "BACKGROUND": "[0, inf)",
        "FG_IOU": "(0, 1]",
        "CLASSIFIER_LR_MULT": "[0, inf)",
        "SCORE_THRESH": "[0, 1]",
    }
    for key, allowed in ranges.items():
        check_range(prefix + key, node[key], allowed)
    svm = {
        "C": "(0, inf)",
        "POSITIVE_WEIGHT": "(0, inf)",
        "BIAS_VALUE": "[0, inf)",
        "NORM": "(0, inf)",
        "NEGATIVE_IOU": "[0, 1]",
        "LATENT_IOU": "[0, 1]",
        "FIRST_IMAGES": "[1, inf)",
    }
    for key, allowed in svm.items():
        check_range(f"{prefix}SVM.{key}", node.SVM[key], allowed)
    refine = {
        "SIZE": "[1, inf)",
        "MIN_IOU": "(0, 1]",
        "MAX_SAMPLES": "[1, inf)",
        "C": "(0, inf)",
        "SUPERPIXEL_C": "(0, inf)",
        "MIN_PIXELS": "[0, inf)",
        "MIN_COARSE": "[0, 1]",
    }
    for key, allowed in refine.items():
        check_range(f"{prefix}REFINE.{key}", node.REFINE[key], allowed)
    if 2 * node.CONTEXT >= node.WINDOW:
        raise ValueError(
            f"{prefix}CONTEXT {node.CONTEXT} on each side leaves no room in a window of "
            f"{prefix}WINDOW {node.WINDOW} pixels."
        )
