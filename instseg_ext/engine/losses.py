"""Bookkeeping of a step's loss terms with one device synchronisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor

__all__ = ["StepLosses"]


class StepLosses:
    """Collects the loss terms of an iteration's micro-batches and stops on a non-finite one.

    Terms stay on the device until ``means`` reads all of them at once: one synchronisation per
    iteration, whatever the number of terms. With several processes the terms are averaged over
    them in the same step, so that each process sees a NaN or infinity of any other.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._terms: list[Tensor] = []
        self._files: list[list[str]] = []

    def add(self, losses: Mapping[str, Tensor], batch: Sequence[Mapping[str, Any]]) -> Tensor:
        """Take in one micro-batch.

        Args:
            losses: scalars with gradient, the same names in every call.
            batch: the loader dicts, for the file names.

        Returns:
            The sum of the terms, scalar, with gradient.

        Raises:
            ValueError: if there are no terms, or other ones than before.
        """
        names = sorted(losses)
        if not names:
            raise ValueError("the model returned no loss in training mode.")
        if self._names and names != self._names:
            raise ValueError(
                f"the model returned the losses {', '.join(names)} after {', '.join(self._names)} "
                "for another part of the same batch; they must be the same."
            )
        self._names = names
        self._terms.append(torch.stack([losses[name].detach().float() for name in names]))
        self._files.append([_file_name(item) for item in batch])
        return torch.stack([losses[name].float() for name in names]).sum()

    def means(self, iteration: int) -> dict[str, float]:
        """Return each term's mean over micro-batches and processes.

        Args:
            iteration: counted from 0, for the message.

        Raises:
            FloatingPointError: in every process, if a term is not finite in any of them; names
                iteration, process, term and image files.
        """
        terms = torch.stack(self._terms)
        averaged = terms.mean(dim=0)
        processes = comm.get_world_size()
        if processes > 1:
            dist.all_reduce(averaged)
            averaged /= processes
        values = averaged.tolist()
        if not torch.isfinite(torch.tensor(values)).all():
            self._stop(terms, iteration)
        return dict(zip(self._names, values, strict=True))

    def _stop(self, terms: Tensor, iteration: int) -> None:
        mine = []
        for row, files in zip(terms.tolist(), self._files, strict=True):
            for name, value in zip(self._names, row, strict=True):
                if not torch.isfinite(torch.tensor(value)):
                    mine.append(f"{name} is {value} for {', '.join(files)}")
        everywhere = comm.all_gather(mine)
        several = len(everywhere) > 1
        found = [
            f"{text} (process {rank})" if several else text
            for rank, texts in enumerate(everywhere)
            for text in texts
        ]
        raise FloatingPointError(
            f"training stopped at iteration {iteration}: {'; '.join(found)}. The weights were not "
            "updated by it. Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, set "
            "INSTSEG.CLIP_GRAD_NORM, or look at these images with `instseg visualize data`."
        )


def _file_name(item: Mapping[str, Any]) -> str:
    return str(item.get("file_name", item.get("image_id", "an unnamed image")))
