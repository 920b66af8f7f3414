"""Config keys of PANet."""

from __future__ import annotations

from detectron2.config import CfgNode as CN  # noqa: N817
from detectron2.modeling import ROI_HEADS_REGISTRY

__all__ = ["FUSIONS", "add_panet_config", "check_region_heads"]

FUSIONS = ("max", "sum")


def add_panet_config(cfg: CN) -> None:
    """Add ``MODEL.PANET`` with the settings of the published models.

    Sizes and norms are detectron2's keys: ``MODEL.FPN.NORM`` holds for the pyramid and the
    bottom-up path, ``NUM_CONV``, ``NUM_FC``, ``NORM`` and the others of ``MODEL.ROI_BOX_HEAD`` and
    ``MODEL.ROI_MASK_HEAD`` for the heads. ``POOLER_SAMPLING_RATIO`` must be set there, to 2 as
    published: detectron2's default 0 takes more samples the larger a box is on a level, and here
    every box is on the finest one.

    Args:
        cfg: changed in place.
    """
    _C = cfg
    _C.MODEL.PANET = CN()
    # How adaptive feature pooling joins a region's levels after the first layer of a head: max, as
    # published, or sum.
    _C.MODEL.PANET.FUSION = "max"
    # True: the mask head has the fully connected branch, whose map is added to every class's.
    _C.MODEL.PANET.FC_FUSION = True
    # True, as published: a ReLU follows the fully connected layer, so that the branch can only
    # raise mask logits. False: plain addition, as the paper has it.
    _C.MODEL.PANET.FC_FUSION_RELU = True
    # True: anchors, boxes, pooling and pasting of masks as in the authors' code, for inference with
    # their weights. Not for training.
    _C.MODEL.PANET.LEGACY_D1 = False


def check_region_heads(cfg: CN, head: str) -> None:
    """Make sure that a head will get its regions from all levels.

    Args:
        cfg: the config.
        head: name of the head, for the message.

    Raises:
        ValueError: if ``MODEL.ROI_HEADS.NAME`` has regions of one level each.
    """
    name = cfg.MODEL.ROI_HEADS.NAME
    if not getattr(ROI_HEADS_REGISTRY.get(name), "pools_all_levels", False):
        raise ValueError(
            f"{head} needs every region from every level: set MODEL.ROI_HEADS.NAME to "
            f"PANetROIHeads, not {name}."
        )
