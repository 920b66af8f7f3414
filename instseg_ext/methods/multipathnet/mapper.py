"""The shared mapper; in training it leaves crowds in, whose neighbourhood is not trained on."""

from __future__ import annotations

from detectron2.config import CfgNode

from instseg_ext.data import InstSegDatasetMapper

__all__ = ["build_mapper"]


def build_mapper(cfg: CfgNode, is_train: bool) -> InstSegDatasetMapper:
    """Build the mapper."""
    keep_crowd = is_train and cfg.MODEL.MULTIPATH.CROWD_OVERLAP < 1
    return InstSegDatasetMapper(cfg, is_train, keep_crowd=keep_crowd)
