"""When YOLACT's training leaves the batch norms of its backbone alone."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import nn

from instseg_ext.config import check_choice

__all__ = ["batch_norms", "keep_batch_norms"]

logger = logging.getLogger(__name__)

# The authors keep the batch norms below this many images per process.
_FEWEST_FOR_BN = 6


def batch_norms(backbone: nn.Module) -> list[nn.Module]:
    """Return the batch norms that training would change."""
    return [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def keep_batch_norms(cfg: CfgNode, backbone: nn.Module) -> bool:
    """Tell whether training leaves statistics, scale and shift of the batch norms as loaded.

    ``MODEL.YOLACT.FREEZE_BN`` says so; ``auto`` does when too few images share their statistics.

    Raises:
        ValueError: if the key has another value.
    """
    choice = check_choice(
        "MODEL.YOLACT.FREEZE_BN", cfg.MODEL.YOLACT.FREEZE_BN, ("auto", "always", "never")
    )
    norms = batch_norms(backbone)
    if choice != "auto" or not norms:
        return choice == "always"
    images = cfg.SOLVER.IMS_PER_BATCH // cfg.INSTSEG.ACCUMULATE
    if not isinstance(norms[0], nn.SyncBatchNorm | NaiveSyncBatchNorm):
        images //= comm.get_world_size()
    if images < _FEWEST_FOR_BN:
        logger.info(
            "Batch norms of the backbone stay as loaded: %d images share their statistics and "
            "MODEL.YOLACT.FREEZE_BN auto wants at least %d.",
            images,
            _FEWEST_FOR_BN,
        )
    return images < _FEWEST_FOR_BN
