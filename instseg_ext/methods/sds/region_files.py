"""The region proposals of a data set: a folder with one file for each image.

Made by this package's segmentation, or of what others propose: MCG's candidates, the masks or boxes
of a proposal file, a COCO result file. Made in several processes, and made on where it was broken
off.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from instseg_ext.checkpoint.atomic import atomic_write, remove_leftovers
from instseg_ext.data.segmentation import as_rle, clean_segmentation
from instseg_ext.structures.region_proposals import RegionProposals

__all__ = ["RECALL_AT", "read_regions", "region_file", "write_regions"]

# Numbers of regions, from the first, whose recall is counted.
RECALL_AT = (100, 300, 1000, 2000)
_IOUS = (0.5, 0.7)

_SUMMARY = "regions.json"

Maker = Callable[[Mapping[str, Any]], RegionProposals]

# In a process of the pool, what it does with an image.
_here: dict[str, Callable[[dict], Any]] = {}


class _ImageResult(NamedTuple):
    """What is counted of an image: its regions, and for each of (G,) objects the best IoUs."""

    regions: int
    best: Tensor  # (len(RECALL_AT), G) float32


def region_file(folder: str | os.PathLike[str], image_id: int | str) -> Path:
    """Return the file that holds the regions of an image."""
    return Path(folder) / f"{quote(str(image_id), safe='')}.npz"


def read_regions(
    folder: str | os.PathLike[str], image_id: int | str, size_hw: tuple[int, int] | None = None
) -> RegionProposals:
    """Read the regions of an image.

    Args:
        folder: written by ``write_regions``.
        image_id: of the data set's dictionary.
        size_hw: (H, W) of the image file, if it is known.

    Raises:
        FileNotFoundError: if the folder has no regions of this image.
        ValueError: if the file is damaged, or its regions are of an image of another size.
    """
    path = region_file(folder, image_id)
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no regions of image {image_id}: {path} is missing. Make them with "
            "`instseg propose-regions`."
        )
    regions = RegionProposals.load(path)
    if size_hw is not None:
        _check_size(regions, image_id, size_hw)
    return regions


def write_regions(
    dicts: Sequence[dict],
    folder: str | os.PathLike[str],
    make: Maker,
    settings: Mapping[str, Any],
    *,
    workers: int = 1,
    force: bool = False,
) -> dict[str, Any]:
    """Make the regions of all images that have none yet, and count how many objects they find.

    Args:
        dicts: detectron2 dictionaries of the images, with ``height`` and ``width``.
        folder: made if it does not exist.
        make: gives the regions of one image; it can be pickled if there are several processes.
        settings: what the regions depend on, plain values. A folder takes regions of one kind.
        workers: processes. More than one are started anew, as a data loader's.
        force: throw away what is in the folder, of whatever kind.

    Returns:
        ``settings``; ``images``; ``regions_per_image``; ``objects``; and ``recall``: for the first
        100, 300, ... regions of an image the share of the objects that one of them covers with an
        IoU of at least 0.5 and 0.7, and the mean of the best IoUs. Crowds do not count. It is also
        in the folder, in ``regions.json``.

    Raises:
        FileExistsError: if the folder holds regions of another kind, or other files.
        FileNotFoundError, ValueError: naming an image that cannot be read; or if there is none.
    """
    if not dicts:
        raise ValueError("There is no image to make regions of.")
    folder = Path(folder)
    _claim(folder, settings, force)
    process = partial(_process, folder=str(folder), make=make)
    with closing(_mapped(process, dicts, workers)) as stream:
        results = list(tqdm(stream, total=len(dicts), desc="regions", disable=None))
    summary = {**_claimed(settings), **_counted(results)}
    _write_json(folder / _SUMMARY, summary)
    return summary


def _claim(folder: Path, settings: Mapping[str, Any], force: bool) -> None:
    """Note the settings in a folder, or raise if it is not for them."""
    summary = folder / _SUMMARY
    if summary.is_file():
        try:
            before = json.loads(summary.read_text(encoding="utf-8")).get("settings")
        except (ValueError, AttributeError):
            before = None
        if before != dict(settings) and not force:
            raise FileExistsError(
                f"{folder} holds regions that were made with {before}, not with {dict(settings)}; "
                "choose another folder, or replace them with --force."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files; choose an empty or a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    for path in folder.glob("*.npz") if force else ():
        path.unlink()
    _write_json(summary, _claimed(settings))


def _claimed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"settings": dict(settings)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _mapped(
    process: Callable[[dict], _ImageResult], dicts: Sequence[dict], workers: int
) -> Iterator[_ImageResult]:
    """Yield the results of all images in order."""
    if min(workers, len(dicts)) <= 1:
        yield from map(process, dicts)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(dicts)), multiprocessing.get_context("spawn"), _start, (process,)
    )
    try:
        yield from pool.map(_process_here, dicts)
    finally:
        # After an error nobody wants the images that wait.
        pool.shutdown(cancel_futures=True)


def _start(process: Callable[[dict], _ImageResult]) -> None:
    """Prepare a process of the pool; it keeps to one thread, there are as many as cores."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    # Sent once, not with every image: a source may hold a file of results.
    _here["process"] = process


def _process_here(record: dict) -> _ImageResult:
    """Make the regions of an image in a process of the pool."""
    return _here["process"](record)


def _process(record: dict, *, folder: str, make: Maker) -> _ImageResult:
    """Make the regions of an image unless they are there, and compare them with its objects."""
    path = region_file(folder, record["image_id"])
    size_hw = (record["height"], record["width"])
    if path.is_file():
        regions = read_regions(folder, record["image_id"], size_hw)
    else:
        regions = make(record)
        _check_size(regions, record["image_id"], size_hw)
        with atomic_write(path) as file:
            regions.save(file)
    objects = [
        clean_segmentation(annotation.get("segmentation"), size_hw)[0]
        for annotation in record.get("annotations", ())
        if not annotation.get("iscrowd", 0)
    ]
    iou = regions.iou([as_rle(clean, size_hw) for clean in objects if clean is not None])
    nothing = iou.new_zeros((1, iou.shape[1]))
    best = [torch.cat([nothing, iou[:limit]]).amax(dim=0) for limit in RECALL_AT]
    return _ImageResult(len(regions), torch.stack(best))


def _check_size(regions: RegionProposals, image_id: int | str, size_hw: tuple[int, int]) -> None:
    if regions.image_size != tuple(size_hw):
        raise ValueError(
            f"The regions of image {image_id} are of an image of size {regions.image_size}, but "
            f"the image has {tuple(size_hw)} (height, width): they were made for other data."
        )


def _counted(results: Sequence[_ImageResult]) -> dict[str, Any]:
    """Summarise the images."""
    best = torch.cat([result.best for result in results], dim=1).numpy()
    summary: dict[str, Any] = {
        "images": len(results),
        "regions_per_image": float(np.mean([result.regions for result in results])),
        "objects": best.shape[1],
    }
    if best.shape[1]:
        summary["recall"] = {
            str(limit): {
                **{str(iou): float((row >= iou).mean()) for iou in _IOUS},
                "mean_best_iou": float(row.mean()),
            }
            for limit, row in zip(RECALL_AT, best, strict=True)
        }
    return summary
