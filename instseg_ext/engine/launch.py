"""Start the processes of a job: torchrun, detectron2's launcher, or just this process."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch as d2_launch
from detectron2.utils import comm

from instseg_ext import compat

__all__ = ["launch"]

logger = logging.getLogger(__name__)

_TIMEOUT = timedelta(minutes=30)


def launch(
    main: Callable[..., Any],
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = "auto",
    args: Sequence[Any] = (),
    device: str = "auto",
) -> Any:
    """Run ``main(*args)`` in every process of the job.

    Under torchrun (one or several machines) this process is one of them, whose number torchrun
    has set. Otherwise ``num_gpus`` processes are started on this machine; where there is no CUDA
    device, or ``device`` is ``cpu``, they are CPU processes that talk over gloo. Data sets must be
    registered by ``main``, because started processes share nothing with this one.

    Args:
        main: a module-level function.
        num_gpus: processes per machine.
        num_machines: machines of the job, each of which must call this.
        machine_rank: this machine's number.
        dist_url: where the processes meet; "auto" or None picks a free port, on one machine.
        args: arguments of ``main``; they must be picklable.
        device: ``cpu`` keeps a machine's GPUs out of it; ``auto`` or ``cuda`` uses them.

    Returns:
        What ``main`` returned, if it ran in this process; else None.

    Raises:
        ValueError: if the numbers contradict each other or the machine.
    """
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if compat.under_torchrun():
        return _run_under_torchrun(main, num_gpus, num_machines, args, on_cuda)
    if num_gpus < 1 or not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--num-gpus {num_gpus} must be at least 1 and --machine-rank {machine_rank} below "
            f"--num-machines {num_machines}."
        )
    if num_gpus * num_machines == 1:
        return main(*args)
    if on_cuda and num_gpus > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus {num_gpus}, but this machine has {torch.cuda.device_count()} CUDA "
            "device(s): lower it, or set MODEL.DEVICE cpu."
        )
    if not on_cuda:
        logger.info("No CUDA device in use: %d CPU processes over gloo.", num_gpus)
    if num_machines > 1 and dist_url in (None, "auto"):
        raise ValueError("--num-machines above 1 needs --dist-url tcp://HOST:PORT of machine 0.")
    with _hidden_gpus(hide=not on_cuda):
        d2_launch(
            _worker,
            num_gpus,
            num_machines=num_machines,
            machine_rank=machine_rank,
            dist_url=dist_url or "auto",
            args=(main, tuple(args), num_gpus),
        )
    return None


def _worker(main: Callable[..., Any], args: tuple, processes: int) -> None:
    """Run in a started process, whose group detectron2's launcher has formed."""
    _share_cores(processes)
    try:
        main(*args)
    finally:
        dist.destroy_process_group()


def _run_under_torchrun(
    main: Callable[..., Any],
    num_gpus: int,
    num_machines: int,
    args: Sequence[Any],
    on_cuda: bool,
) -> Any:
    if num_gpus > 1 or num_machines > 1:
        raise ValueError(
            f"torchrun has already started the processes: leave out --num-gpus {num_gpus} and "
            f"--num-machines {num_machines}, and give torchrun --nproc_per_node and --nnodes."
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if on_cuda:
        if local_size > torch.cuda.device_count():
            raise ValueError(
                f"torchrun started {local_size} processes, but this machine has "
                f"{torch.cuda.device_count()} CUDA device(s): lower --nproc_per_node, or set "
                "MODEL.DEVICE cpu."
            )
        torch.cuda.set_device(local_rank)
    else:
        _share_cores(local_size)
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=_TIMEOUT)
    try:
        comm.create_local_process_group(local_size)
        comm.synchronize()
        return main(*args)
    finally:
        dist.destroy_process_group()


def _share_cores(processes: int) -> None:
    """Split the cores among CPU processes, unless the user has decided."""
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


@contextlib.contextmanager
def _hidden_gpus(hide: bool) -> Iterator[None]:
    """Hide the machine's GPUs from processes started inside the block."""
    key = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(key)
    if hide:
        os.environ[key] = ""
    try:
        yield
    finally:
        if hide:
            os.environ.pop(key)
            if before is not None:
                os.environ[key] = before
