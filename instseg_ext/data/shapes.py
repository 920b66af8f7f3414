"""A generated data set of circles, squares and triangles, for tests and quick trials.

It holds what real files hold and simple fixtures lack: occlusion, objects in several parts, crowds,
images without objects, polygons beside compressed and uncompressed RLE, category ids with gaps.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from instseg_ext.data.cache import cache_folder
from instseg_ext.data.segmentation import rasterise_polygons

__all__ = ["SHAPE_CATEGORIES", "SHAPE_SPLITS", "cached_shapes", "make_shapes"]

SHAPE_CATEGORIES = (
    {"id": 2, "name": "circle", "supercategory": "shape"},
    {"id": 5, "name": "square", "supercategory": "shape"},
    {"id": 9, "name": "triangle", "supercategory": "shape"},
)
# name -> number of images, side in pixels, seed
SHAPE_SPLITS = {"shapes_train": (192, 96, 1), "shapes_val": (32, 96, 2)}
_VERSION = 2  # part of the cache folder's name: raise it when the generator changes

_EMPTY_EVERY = 12  # one image in so many has no object
_CROWD_EVERY = 6  # one image in so many has a crowd
_MIN_VISIBLE = 80  # pixels; an object hidden beyond this is not annotated
_MAX_HIDDEN = 0.3  # share of an earlier object that a later one may hide


def make_shapes(
    out_dir: str | os.PathLike, num_images: int, size: int, seed: int
) -> tuple[Path, Path]:
    """Write a shapes data set.

    Args:
        out_dir: folder for ``annotations.json`` and ``images/``; made if missing.
        num_images: number of images; every twelfth is empty, every sixth has a crowd.
        size: side of the square images in pixels, at least 48.
        seed: the same seed gives the same files.

    Returns:
        the annotation file and the image folder.

    Raises:
        ValueError: if ``size`` is below 48 or ``num_images`` below 1.
    """
    if size < 48 or num_images < 1:
        raise ValueError(
            f"make_shapes needs num_images >= 1 and size >= 48, not {num_images} and {size}"
        )
    out = Path(out_dir)
    (out / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(num_images):
        rng = np.random.default_rng([seed, index])
        pixels, objects = _draw_image(
            rng,
            size,
            empty=index % _EMPTY_EVERY == _EMPTY_EVERY - 1,
            crowd=index % _CROWD_EVERY == 2,
        )
        name = f"{index:05d}.png"
        Image.fromarray(pixels).save(out / "images" / name)
        images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **entry})
    content = {
        "info": {"description": f"generated shapes, seed {seed}", "version": str(_VERSION)},
        "licenses": [],
        "categories": [dict(c) for c in SHAPE_CATEGORIES],
        "images": images,
        "annotations": annotations,
    }
    json_file = out / "annotations.json"
    json_file.write_text(json.dumps(content), encoding="utf-8")
    return json_file, out / "images"


def cached_shapes(name: str) -> tuple[Path, Path]:
    """Return where the split ``name`` lies in the cache, without touching the disk."""
    num_images, size, seed = SHAPE_SPLITS[name]
    folder = cache_folder() / f"{name}_v{_VERSION}_{num_images}x{size}_{seed}"
    return folder / "annotations.json", folder / "images"


def generate_cached(name: str, json_file: Path) -> None:
    """Write a split into its cache folder unless it is there.

    Written beside it and moved in one step, so that several processes may ask at the same time.
    """
    if json_file.is_file():
        return
    num_images, size, seed = SHAPE_SPLITS[name]
    folder = json_file.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make_shapes(scratch, num_images, size, seed)
        scratch.chmod(0o755)
        scratch.replace(folder)
    except OSError:
        # Another process was faster: its folder is the same.
        if not json_file.is_file():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _draw_image(
    rng: np.random.Generator, size: int, *, empty: bool, crowd: bool
) -> tuple[np.ndarray, list[dict]]:
    """Paint one image and describe its objects."""
    base = rng.uniform(40, 110, 3)
    canvas = np.broadcast_to(base, (size, size, 3)).copy()
    owner = np.zeros((size, size), dtype=np.int32)  # which object is visible, 0 = none
    objects: list[tuple[int, list[float], np.ndarray]] = []
    if not empty:
        for _ in range(int(rng.integers(1, 5))):
            _paint_object(rng, size, canvas, owner, objects, base)
    entries = [
        _entry(owner == i, *o)
        for i, o in enumerate(objects, 1)
        if (owner == i).sum() >= _MIN_VISIBLE
    ]
    if crowd and not empty:
        entries.append(_paint_crowd(rng, size, canvas, owner))
    canvas += rng.normal(0, 6, canvas.shape)
    return np.clip(canvas, 0, 255).astype(np.uint8), [e for e in entries if e is not None]


def _paint_object(
    rng: np.random.Generator,
    size: int,
    canvas: np.ndarray,
    owner: np.ndarray,
    objects: list[tuple[int, list[float], np.ndarray]],
    base: np.ndarray,
) -> None:
    """Paint one shape over what is there; sometimes a bar of background cuts it in two parts."""
    kind = int(rng.integers(3))
    radius = rng.uniform(0.14, 0.22) * size
    for _ in range(10):
        centre = rng.uniform(0.8 * radius, size - 0.8 * radius, 2)
        polygon = _outline(kind, centre, radius, rng.uniform(-0.35, 0.35))
        mask = rasterise_polygons([polygon], size, size).astype(bool)
        before, after = (
            np.bincount(owner.flat),
            np.bincount(owner[~mask], minlength=owner.max() + 1),
        )
        if (after[1:] >= (1 - _MAX_HIDDEN) * before[1:]).all():
            break
    else:
        return
    if rng.random() < 0.15:
        row = int(np.clip(centre[1], 2, size - 3))
        bar = np.zeros_like(mask)
        bar[row - 1 : row + 2] = True
        canvas[mask & bar] = base
        owner[mask & bar] = 0
        mask &= ~bar
        # What the painter hid below the bar stays hidden: a bar is drawn in background colour.
    colour = rng.uniform(140, 255, 3)
    colour[rng.integers(3)] = rng.uniform(0, 120)
    canvas[mask] = colour
    objects.append((kind, polygon, mask))
    owner[mask] = len(objects)


def _outline(kind: int, centre: np.ndarray, radius: float, angle: float) -> list[float]:
    """Return the flat polygon of a circle (0), square (1) or triangle (2)."""
    corners = (24, 4, 3)[kind]
    start = (0.0, np.pi / 4, -np.pi / 2)[kind] + angle
    theta = start + 2 * np.pi * np.arange(corners) / corners
    scale = (1.0, 1.15, 1.3)[kind] * radius  # about equal areas
    points = centre + scale * np.stack([np.cos(theta), np.sin(theta)], axis=1)
    return [round(float(v), 2) for v in points.reshape(-1)]


def _entry(visible: np.ndarray, kind: int, polygon: list[float], full: np.ndarray) -> dict:
    """Describe one object: its polygon where nothing hides or cuts it, else the visible RLE."""
    rle = mask_util.encode(np.asfortranarray(visible, dtype=np.uint8))
    whole = rasterise_polygons([polygon], *visible.shape).astype(bool)
    segmentation: list | dict = {
        "size": list(visible.shape),
        "counts": rle["counts"].decode("ascii"),
    }
    if np.array_equal(visible, full) and np.array_equal(full, whole):
        segmentation = [polygon]
    return {
        "category_id": SHAPE_CATEGORIES[kind]["id"],
        "iscrowd": 0,
        "area": int(visible.sum()),
        "bbox": [float(v) for v in mask_util.toBbox(rle)],
        "segmentation": segmentation,
    }


def _paint_crowd(
    rng: np.random.Generator, size: int, canvas: np.ndarray, owner: np.ndarray
) -> dict | None:
    """Paint a cluster of small shapes of one class into free space, as one crowd annotation."""
    kind = int(rng.integers(3))
    corner = rng.uniform(0, size - 28, 2)
    region = np.zeros((size, size), dtype=bool)
    for _ in range(6):
        polygon = _outline(kind, corner + rng.uniform(4, 24, 2), 4.0, rng.uniform(-0.35, 0.35))
        mask = rasterise_polygons([polygon], size, size).astype(bool) & (owner == 0)
        canvas[mask] = rng.uniform(120, 255, 3)
        region |= mask
    if not region.any():
        return None
    flat = region.reshape(-1, order="F")
    change = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(np.int8))).tolist()
    counts = np.diff([0, *change, flat.size]).tolist()  # starts with background, as COCO wants it
    rle = mask_util.encode(np.asfortranarray(region, dtype=np.uint8))
    return {
        "category_id": SHAPE_CATEGORIES[kind]["id"],
        "iscrowd": 1,
        "area": int(region.sum()),
        "bbox": [float(v) for v in mask_util.toBbox(rle)],
        "segmentation": {"size": [size, size], "counts": counts},
    }
