"""Training samples of deep metric learning: crowds stay, as cells that do not count."""

from __future__ import annotations

from detectron2.config import CfgNode

from instseg_ext.data import InstSegDatasetMapper

__all__ = ["build_metric_mapper"]


def build_metric_mapper(cfg: CfgNode, is_train: bool) -> InstSegDatasetMapper:
    """Build the mapper that the method's record names: the shared one, with crowds."""
    return InstSegDatasetMapper(cfg, is_train, keep_crowd=is_train)
