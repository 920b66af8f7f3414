"""Config keys of PANet."""

from __future__ import annotations

from detectron2.config import CfgNode as CN  # noqa: N817

__all__ = ["FUSIONS", "add_panet_config"]

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
