"""Data-parallel wrapping that works on CPU and CUDA."""

from __future__ import annotations

import logging

import torch
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["create_ddp_model", "plain_batch_norms", "unwrap"]

logger = logging.getLogger(__name__)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def plain_batch_norms(model: nn.Module) -> list[str]:
    """Return the names of layers that normalise with the statistics of one process's batch.

    Frozen layers (detectron2's ``FrozenBatchNorm2d`` is no ``BatchNorm``), layers that the model
    keeps in eval mode while it trains, and layers that synchronise do not count.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BATCH_NORMS)
        and module.track_running_stats
        and (module.training or not model.training)
        and not _synchronises(module)
    ]


def _synchronises(module: nn.Module) -> bool:
    # detectron2's NaiveSyncBatchNorm derives from BatchNorm2d and is told by its name only.
    return isinstance(module, nn.SyncBatchNorm) or type(module).__name__ == "NaiveSyncBatchNorm"


def create_ddp_model(model: nn.Module) -> nn.Module:
    """Wrap ``model`` for data-parallel training if there is more than one process.

    ``device_ids`` are given for CUDA only (DDP refuses them on a CPU). Buffers are broadcast only
    when plain batch normalisation would let the processes' running statistics drift apart.
    """
    if comm.get_world_size() == 1:
        return model
    on_cuda = next(model.parameters()).device.type == "cuda"
    return DistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if on_cuda else None,
        broadcast_buffers=bool(plain_batch_norms(model)),
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside a DDP wrapper, or ``model`` itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model
