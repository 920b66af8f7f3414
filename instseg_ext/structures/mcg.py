"""Region candidates that MCG's MATLAB code (arXiv:1503.00848) saved, one file an image."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from instseg_ext.structures.superpixels import require_scipy

__all__ = ["read_mcg"]


def read_mcg(
    path: str | os.PathLike[str],
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray | None]:
    """Read a file of candidates, which holds them by themselves or in a structure ``candidates``.

    Returns:
        (H, W) int64 superpixels, numbered from 1; for each of R candidates, best first, int64
        numbers of its superpixels; and (R,) float64 scores, if the file has any.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
        ImportError: without scipy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of MCG candidates {path}.")
    loadmat = require_scipy("scipy.io").loadmat
    try:
        content = loadmat(path, squeeze_me=True, struct_as_record=False)
    except Exception as error:  # a broken file makes scipy raise nearly anything
        raise ValueError(f"{path} is no MATLAB file that scipy reads: {error}") from error
    holder = content.get("candidates")
    fields = content if holder is None else vars(holder)
    if not {"superpixels", "labels"} <= set(fields):
        raise ValueError(f"{path} has no MCG candidates: superpixels and labels are missing.")
    superpixels = np.atleast_2d(fields["superpixels"]).astype(np.int64)
    cells = fields["labels"]
    cells = cells if isinstance(cells, np.ndarray) and cells.dtype == object else [cells]
    labels = [np.atleast_1d(ids).astype(np.int64) for ids in cells]
    highest = int(superpixels.max(initial=0))
    if superpixels.min(initial=1) < 1 or any(
        len(ids) and not 1 <= ids.min() <= ids.max() <= highest for ids in labels
    ):
        raise ValueError(f"{path}: regions name superpixels that are not in 1..{highest}.")
    scores = fields.get("scores")
    return superpixels, labels, None if scores is None else np.atleast_1d(scores).astype(float)
