"""Reductions over the processes of a distributed run."""

import torch
import torch.distributed as dist

__all__ = ["mean_over_processes"]


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Average a tensor over all processes; the identity in a run of one.

    Every process must call it the same number of times. A sum of loss terms divided by the averaged
    count gives, after DistributedDataParallel has averaged the gradients, what one process would
    have computed from the whole batch.

    Args:
        value: any numeric tensor; not modified.

    Returns:
        Detached tensor of the same shape; float32 when it was an integer.
    """
    value = value.detach().float() if not value.is_floating_point() else value.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
